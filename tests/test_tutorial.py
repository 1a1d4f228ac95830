"""The notebook documentation/tutorial.ipynb runs from data to report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "documentation" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_tutorial_runs(tmp_path):
    code = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    short, replaced = re.subn(r"^EPOCHS = \d+", "EPOCHS = 1", code, flags=re.MULTILINE)
    assert replaced == 1
    variables = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", short], cwd=tmp_path, env=variables, capture_output=True, text=True)
    log = tmp_path / "tutorial" / "log.txt"
    assert done.returncode == 0, done.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    models = list((tmp_path / "tutorial" / "nnUNet_results" / "Dataset902_Tutorial").iterdir())
    assert len(models) == 2
    assert all((model / "subsets" / "report.html").is_file() for model in models)
    assert (tmp_path / "tutorial" / "phantom_test_000.nii.gz").is_file()
    assert (tmp_path / "tutorial" / "comparison" / "comparison.md").is_file()


def test_tutorial_was_executed_without_errors():
    outputs = [output for cell in CELLS for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    home = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/")
    assert not [output for output in outputs if home.search(json.dumps(output.get("text", output.get("data", ""))))]


def test_links_of_the_tutorial_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    assert [target for target in targets if not (NOTEBOOK.parent / target).exists()] == []
