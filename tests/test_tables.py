from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from nnunetv2_mstkd.evaluation.results import COLUMNS
from nnunetv2_mstkd.reporting import figures, tables
from nnunetv2_mstkd.statistics.bootstrap import Bootstrap
from nnunetv2_mstkd.statistics.findings import Findings, gap_to_full, mean_by_count, missing_one
from nnunetv2_mstkd.statistics.shapley import shapley

SUBSETS = ("T1", "T1ce", "T1+T1ce")
QUICK = {"bootstrap": Bootstrap(samples=50)}


def table(values: dict[tuple[str, str], tuple[float, ...]], metric: str = "dice", cases: int = 1) -> pd.DataFrame:
    """Results from {(model, region): value of T1, T1ce and both}, the same for all cases."""
    rows = [
        (model, "MSTKDTrainer", 0, f"case{case}", subset, subset.count("+") + 1, region, metric, value)
        for (model, region), of_subset in values.items()
        for subset, value in zip(SUBSETS, of_subset, strict=True)
        for case in range(cases)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


ONE = {("M", "WT"): (0.5, 0.6, 0.7), ("M", "ET"): (0.25, 0.8, 0.9)}
TWO = {("old", "ET"): (0.5, 0.6, 0.7), ("new_1", "ET"): (0.45, 0.6, 0.9)}


def cells(line: str) -> list[str]:
    """The entries of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_markdown_table_of_one_model():
    found = tables.subset_table(table(ONE, cases=3)).splitlines()
    assert found[:5] == [
        "| T1   |  ●   |  ○   |  ●   | average |",
        "| ---- | :--: | :--: | :--: | :-----: |",
        "| T1ce |  ○   |  ●   |  ●   |         |",
        "| WT   | 50.0 | 60.0 | 70.0 |   60.0  |",
        "| ET   | 25.0 | 80.0 | 90.0 |   65.0  |",
    ]
    assert found[6] == "* Dice in %, mean of 3 cases; average over 3 subsets"
    assert found[7].startswith("* Rules for empty masks: brats (")
    assert found[8] == "* Dice: 1 if both masks are empty, 0 if one is"


def test_a_loss_has_a_minus_in_the_headline_and_in_the_table():
    found = Findings(table({("M", "ET"): (0.5, 0.9, 0.7)}, cases=6))
    assert found.headline.startswith("Without T1ce: ET -20.0 Dice points; without T1: ET +20.0")
    changes = next(each.table for each in tables.finding_tables(found) if each.title.startswith("Change of Dice"))
    assert changes.to_numpy().tolist() == [["T1", "-20.0 [-20.0, -20.0]"], ["T1ce", "+20.0 [+20.0, +20.0]"]]


def test_the_best_of_several_models_is_bold_and_equals_share():
    found = tables.subset_table(table(TWO)).splitlines()
    assert cells(found[3]) == ["ET", "old", "**50.0**", "**60.0**", "70.0", "60.0"]
    assert cells(found[4]) == ["ET", "new_1", "45.0", "**60.0**", "**90.0**", "**65.0**"]


def test_the_second_best_of_three_is_marked():
    values = TWO | {("third", "ET"): (0.4, 0.6, 0.8)}
    found = tables.subset_table(table(values)).splitlines()
    assert cells(found[3])[1:] == ["old", "**50.0**", "**60.0**", "70.0", "_60.0_"]
    assert cells(found[4])[1:] == ["new_1", "_45.0_", "**60.0**", "**90.0**", "**65.0**"]
    assert cells(found[5])[1:] == ["third", "40.0", "**60.0**", "_80.0_", "_60.0_"]
    assert "* bold: best; italics: second best" in found
    best = tables.subset_table(table(values | {("third", "ET"): (0.5, 0.6, 0.7)})).splitlines()
    # two are best in the first column, so the other one is the third
    assert [cells(line)[2] for line in best[3:6]] == ["**50.0**", "45.0", "**50.0**"]
    assert r"\underline{80.0}" in tables.subset_table(table(values), fmt="latex")


def test_tables_of_subsets_as_csv():
    values = TWO | {("old", "WT"): (math.nan,) * 3, ("new_1", "WT"): (0.1, 0.2, 0.6)}
    lines = tables.subset_csv({"dice": tables.subset_content(table(values))}).splitlines()
    assert lines[0] == "metric,region,model,T1,T1ce,T1+T1ce,average"
    assert lines[1:3] == ["dice,ET,old,50.0,60.0,70.0,60.0", "dice,ET,new_1,45.0,60.0,90.0,65.0"]
    assert lines[3:] == ["dice,WT,old,,,,", "dice,WT,new_1,10.0,20.0,60.0,30.0"]


def test_the_note_names_the_tolerance_of_the_surface_dice_alone():
    found = tables.subset_table(table(ONE, "nsd"), metric="nsd", tolerance=1.5)
    assert "NSD in % at a tolerance of 1.5 mm, mean of 1 case;" in found
    assert "tolerance" not in tables.subset_table(table(ONE), tolerance=1.5)
    assert "tolerance" not in tables.subset_table(table(ONE, "nsd"), metric="nsd")


def test_unknown_rules_for_empty_masks_are_not_named():
    assert "empty masks" not in tables.subset_table(table(ONE), convention=None)


def test_what_is_equal_as_printed_shares_and_zero_has_no_sign():
    values = {("a", "ET"): (-0.0001, 0.601, 0.7), ("b", "ET"): (0.0, 0.60101, 0.6)}
    found = tables.subset_table(table(values, "volume_error_ml"), metric="volume_error_ml").splitlines()
    assert cells(found[3])[2:4] == ["**0.00**", "**0.60**"]
    assert cells(found[4])[2:5] == ["**0.00**", "**0.60**", "**0.60**"]


def test_errors_that_cancel_are_not_the_best():
    frame = pd.concat(
        [
            table({("a", "ET"): (sign * 10,) * 3, ("b", "ET"): (1.0,) * 3}, "volume_error_ml").assign(case=case)
            for case, sign in (("c", 1), ("d", -1))
        ],
        ignore_index=True,
    )
    found = tables.subset_table(frame, metric="volume_error_ml")
    assert cells(found.splitlines()[3])[2:] == ["0.00"] * 4 and cells(found.splitlines()[4])[2:] == ["**1.00**"] * 4
    assert "with their signs; the best are those with the smallest mean size" in found


def test_lower_distances_are_bold_and_in_millimetres():
    found = tables.subset_table(
        table({key: tuple(10 * v for v in of) for key, of in TWO.items()}, "hd95"), metric="hd95"
    )
    assert cells(found.splitlines()[3]) == ["ET", "old", "5.00", "**6.00**", "**7.00**", "**6.00**"]
    assert cells(found.splitlines()[4]) == ["ET", "new_1", "**4.50**", "**6.00**", "9.00", "6.50"]
    assert "* HD95 in mm, mean of 1 case; average over 3 subsets" in found
    assert "* HD95: 0 if both masks are empty, the image diagonal if one is" in found


def test_a_latex_table_of_two_models_and_two_regions():
    values = TWO | {("old", "A&B_C"): (0.1, 0.2, 0.3), ("new_1", "A&B_C"): (0.1, 0.1, 0.1)}
    found = tables.subset_table(table(values), fmt="latex")
    assert found.splitlines()[:12] == [
        r"\begin{tabular}{llcccc}",
        r"\toprule",
        r"T1 &  & $\bullet$ & $\circ$ & $\bullet$ & Avg. \\",
        r"T1ce &  & $\circ$ & $\bullet$ & $\bullet$ &  \\",
        r"\midrule",
        r"ET & old & \textbf{50.0} & \textbf{60.0} & 70.0 & 60.0 \\",
        r" & new\_1 & 45.0 & \textbf{60.0} & \textbf{90.0} & \textbf{65.0} \\",
        r"\midrule",
        r"A\&B\_C & old & \textbf{10.0} & \textbf{20.0} & \textbf{30.0} & \textbf{20.0} \\",
        r" & new\_1 & \textbf{10.0} & 10.0 & 10.0 & 10.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert r"Dice in \%, mean of 1 case; average over 3 subsets.\\" in found
    assert found.endswith("Dice: 1 if both masks are empty, 0 if one is.")


def test_values_left_out_are_counted_and_shown_as_a_dash():
    found = tables.subset_table(table({("M", "ET"): (math.nan, 0.6, 0.7)}, cases=2), convention="nnunet")
    assert cells(found.splitlines()[3]) == ["ET", "-", "60.0", "70.0", "65.0"]
    assert "mean of 2 cases; 2 of 6 values left out; average over 3 subsets" in found
    assert "Dice: left out of the mean if both masks are empty, 0 if one is" in found


def test_plain_text_escapes_nothing():
    frame = table({("a__b", "_WT|"): (0.5, 0.6, 0.7), ("c", "_WT|"): (0.1, 0.1, 0.1)})
    text, markdown = (tables.subset_table(frame, fmt=fmt) for fmt in ("text", "markdown"))
    assert "| _WT| " in text and "| a__b " in text and "\\" not in text
    assert r"\_WT\|" in markdown
    assert tables.frame_table(frame[["model"]], fmt="text").splitlines()[2] == "| a__b  |"


def test_fifteen_subsets_have_fifteen_columns_of_dots():
    names = ("T1", "T1ce", "T2", "FLAIR")
    subsets = ["+".join(part) for size in range(1, 5) for part in itertools.combinations(names, size)]
    rows = [("M", "T", 0, "case", name, name.count("+") + 1, "WT", "dice", 0.5) for name in subsets]
    lines = tables.subset_table(pd.DataFrame(rows, columns=list(COLUMNS))).splitlines()
    head = [line for line in lines if "●" in line]
    assert [line.split()[1] for line in head] == list(names)
    assert all(line.count("●") == 8 and line.count("○") == 7 for line in head)


def test_unknown_conventions_are_refused():
    with pytest.raises(ValueError, match="unknown convention 'isles'"):
        tables.subset_table(table(ONE), convention="isles")
    with pytest.raises(ValueError, match="lesion_dice needs the name of its lesion-wise convention"):
        tables.subset_table(table(ONE, "lesion_dice"), metric="lesion_dice")


def test_any_table_can_be_printed():
    frame = pd.DataFrame({"model": ["a_b", "c|d"], "p": [0.0001, 0.25], "value": [math.nan, 1.0], "cases": [3, 4]})
    assert tables.frame_table(frame).splitlines() == [
        "| model |   p    | value | cases |",
        "| ----- | :----: | :---: | :---: |",
        "| a_b   | <0.001 |   -   |   3   |",
        "| c\\|d  | 0.250  | 1.000 |   4   |",
    ]
    latex = tables.frame_table(frame, fmt="latex", digits=2)
    assert r"a\_b & $<$0.01 & - & 3 \\" in latex and r"\begin{tabular}{lccc}" in latex


@pytest.mark.parametrize(
    ("text", "markdown", "latex"),
    [
        ("a_b", "a_b", r"a\_b"),
        ("_a_", r"\_a\_", r"\_a\_"),
        ("x*y|z", r"x\*y\|z", r"x*y\textbar{}z"),
        ("[a]<b>", r"[a]\<b>", r"{[}a]\textless{}b\textgreater{}"),  # OT1 fonts have other signs there
        ("a\nb & c", r"a b \& c", "a\nb \\& c"),
        ("50 %{}~^\\", "50 %{}~^\\\\", r"50 \%\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}"),
    ],
)
def test_text_without_a_meaning_to_the_format(text, markdown, latex):
    assert tables.escaped(text, "markdown") == markdown
    assert tables.escaped(text, "latex") == latex


# ---- figures -------------------------------------------------------------------------------------------------------


def texts_in(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def ends_of_bars(figure) -> list[list[float]]:
    """Lower and upper end of each error bar of the first panel."""
    return [segment[:, 1].tolist() for bars in figure.axes[0].collections for segment in bars.get_segments()]


def test_a_heat_map_shows_every_value_in_percent():
    figure = figures.heat_map(table(ONE | {("N", "WT"): (0, 0.1, 0.2), ("N", "ET"): (0, 0, 1)}))
    first, second, scale = figure.axes
    assert texts_in(first) == ["50.0", "25.0", "60.0", "80.0", "70.0", "90.0"]
    assert texts_in(second) == ["0.0", "0.0", "10.0", "0.0", "20.0", "100.0"]
    assert [label.get_text() for label in first.get_yticklabels()] == list(SUBSETS)
    assert (first.get_title(), second.get_title(), scale.get_ylabel()) == ("M", "N", "Dice (%)")


def test_heat_maps_share_a_scale_from_0_to_100():
    for values in (ONE, TWO):
        assert figures.heat_map(table(values)).axes[0].collections[0].get_clim() == (0, 100)


def test_regions_keep_their_colours():
    colors = {"WT": (1.0, 0.0, 0.0), "ET": (0.0, 0.0, 1.0)}
    missing = missing_one(gap_to_full(table(ONE), **QUICK), ("T1", "T1ce"))
    bars = [bar.get_facecolor()[:3] for bar in figures.missing_bars(missing, colors=colors).axes[0].patches]
    assert bars == [colors["WT"]] * 2 + [colors["ET"]] * 2
    panels = figures.shapley_bars(shapley(table(ONE), **QUICK), colors=colors).axes
    assert [axis.patches[0].get_facecolor()[:3] for axis in panels] == list(colors.values())
    curves = figures.curve_by_count(mean_by_count(table(ONE), **QUICK), colors=colors).axes
    assert [axis.lines[0].get_color() for axis in curves][:2] == list(colors.values())
    heights = [bar.get_height() for bar in figures.missing_bars(missing).axes[0].patches]
    assert heights == pytest.approx([20, 10, 65, 10])  # T1ce costs more


def test_a_curve_has_a_line_per_model_and_a_panel_per_region():
    counts = mean_by_count(table(TWO, cases=2), **QUICK)
    figure = figures.curve_by_count(counts)
    (axis,) = figure.axes
    assert [line.get_ydata().tolist() for line in axis.lines[::3]] == [
        pytest.approx([55, 70]),
        pytest.approx([52.5, 90]),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["old", "new_1"]
    counts = counts.assign(low=counts["value"] - 0.05, high=counts["value"] + 0.01)
    assert ends_of_bars(figures.curve_by_count(counts))[:2] == [pytest.approx([50, 56]), pytest.approx([65, 71])]
    assert len(figures.curve_by_count(mean_by_count(table(ONE, cases=2), **QUICK)).axes) == 3


def test_shapley_bars_have_the_height_of_the_values():
    values = shapley(table(ONE, cases=2), **QUICK)
    figure = figures.shapley_bars(values)
    heights = [bar.get_height() for axis in figure.axes for bar in axis.patches]
    assert heights == pytest.approx([30, 40, 17.5, 72.5])
    assert [axis.get_title() for axis in figure.axes] == ["WT", "ET"]
    values = values.assign(low=values["value"] - 0.05, high=values["value"] + 0.01)
    assert ends_of_bars(figures.shapley_bars(values))[:2] == [pytest.approx([25, 31]), pytest.approx([35, 41])]


def test_a_single_case_is_drawn_without_an_interval(tmp_path):
    for number, figure in enumerate(
        (
            figures.curve_by_count(mean_by_count(table(ONE), **QUICK)),
            figures.shapley_bars(shapley(table(ONE), **QUICK)),
        )
    ):
        figures.save_figure(figure, tmp_path / f"{number}.png", dpi=40)
        assert (tmp_path / f"{number}.png").stat().st_size > 0


def test_figures_are_saved_whole_in_the_format_of_their_name(tmp_path):
    figure = figures.heat_map(table(ONE))
    figures.save_figure(figure, tmp_path / "new" / "heat.png", dpi=40)
    figures.save_figure(figure, tmp_path / "new" / "heat.svg")
    assert (tmp_path / "new" / "heat.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "new" / "heat.svg").read_text()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["heat.png", "heat.svg"]
    with pytest.raises(ValueError, match=r"heat.doc ends in .doc; expected .png"):
        figures.save_figure(figure, tmp_path / "heat.doc")


def test_nothing_to_draw_is_refused():
    empty = mean_by_count(table(ONE), **QUICK)
    with pytest.raises(ValueError, match="no rows to draw"):
        figures.curve_by_count(empty[:0])
    with pytest.raises(ValueError, match="no rows to draw"):
        figures.shapley_bars(empty[:0])


def test_values_are_drawn_where_all_of_a_subset_are_missing():
    assert texts_in(figures.heat_map(table({("M", "ET"): (np.nan, 0.5, 0.6)})).axes[0]) == ["50.0", "60.0"]
