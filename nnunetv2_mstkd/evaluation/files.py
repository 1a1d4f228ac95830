"""Names of what an evaluation leaves behind; light, so that the command line can show them."""

FOLDER = "subsets"
"""In the model folder."""

RESULTS = "results.csv"
SUMMARY = "summary.json"
TABLES = {"markdown": "tables.md", "latex": "tables.tex"}
REPORT = "report.html"
FIGURES = ("heat_map.png", "curve.png", "shapley.png")
