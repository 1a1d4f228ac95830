"""`mstkd compare` on tables of results that are written by hand."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.montage import Montage, write_montage
from nnunetv2_mstkd.evaluation.results import COLUMNS, read_results, write_results
from nnunetv2_mstkd.reporting.compare import compare
from nnunetv2_mstkd.reporting.figures import heat_map, save_figure
from nnunetv2_mstkd.reporting.qualitative import qualitative_plot

CASES = tuple(f"BraTS-GLI-{number:05d}-100" for number in range(8))
NAMES = ("T1", "T2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths of a test are relative to an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(
    model: str,
    gain: float = 0.0,
    *,
    cases: Sequence[str] = CASES,
    modalities: Sequence[str] = NAMES,
    regions: Sequence[str] = ("WT", "ET"),
    metrics: Sequence[str] = ("dice",),
) -> pd.DataFrame:
    """Dice of 0.5 and a little more from case to case; the gain is for subsets of one modality."""
    subsets = ["+".join(part) for size in (1, 2) for part in itertools.combinations(modalities, size)]
    rows = [
        (model, "MSTKDTrainer", "0", case, subset, subset.count("+") + 1, region, metric, value)
        for number, case in enumerate(cases)
        for subset in subsets
        for region in regions
        for metric in metrics
        for value in [0.5 + 0.01 * number + gain * (number + 1) * ("+" not in subset)]
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def model(name: str, *arguments, settings: Mapping | None = None, **options) -> Path:
    """A model folder with an evaluation."""
    folder = Path(name)
    write_results(table(name, *arguments, **options), folder / "subsets" / "results.csv")
    if settings is not None:
        (folder / "subsets" / "summary.json").write_text(json.dumps(settings))
    return folder


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert cli.main(["compare", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("mstkd compare: ")
    assert not Path("comparison").exists()
    return error


def numbers(folder: str = "comparison") -> dict:
    return json.loads((Path(folder) / "comparison.json").read_text())


# ---- values --------------------------------------------------------------------------------------------------------


def test_two_models_are_compared_case_by_case(capsys):
    model("old")
    model("new", 0.01)
    assert cli.main(["compare", "new", "old"]) == 0
    found = numbers()
    assert found["cases"] == list(CASES) and found["patients"] == 8 and found["subsets"] == ["T1", "T2", "T1+T2"]
    dice = found["metrics"]["dice"]
    # gains 0.01 ... 0.08 in two of three subsets
    assert [row["region"] for row in dice["overall"]] == ["WT", "ET", "average"]
    for row in dice["overall"]:
        assert (row["model"], row["against"]) == ("new", "old")
        assert row["difference"] == pytest.approx(0.03) and 0 < row["low"] < 0.03 < row["high"]
        assert row["p"] == pytest.approx(2 / 2**8) and row["p_corrected"] == pytest.approx(6 / 2**8)
    counts = {(row["modalities"], row["region"]): row for row in dice["by_number_of_modalities"]}
    assert counts[1, "average"]["difference"] == pytest.approx(0.045) and counts[2, "average"]["difference"] == 0
    assert counts[1, "WT"]["p_corrected"] == pytest.approx(6 * 2 / 2**8) and counts[2, "WT"]["p_corrected"] == 1
    subsets = {(row["subset"], row["region"]): row["difference"] for row in dice["subsets"]}
    assert subsets == pytest.approx(
        {(s, r): 0.0 if "+" in s else 0.045 for s in found["subsets"] for r in ("WT", "ET")}
    )
    per_case = [row["difference"] for row in dice["per_case"] if row["region"] == "average"]
    assert per_case == pytest.approx([0.02 / 3 * (number + 1) for number in range(8)])
    assert [(row["model"], row["rank"], row["first"]) for row in found["ranks"]] == [("new", 1, 1.0), ("old", 2, 0.0)]

    printed = capsys.readouterr().out
    assert "Compared on 8 cases of 8 patients, 3 subsets of modalities." in printed
    assert "mean over all subsets and regions: new 56.5, old 53.5\nnew against old: +3.00 [" in printed
    assert "points; p (Holm) 0.023\n" in printed
    assert re.search(r"\| new +\| +old +\| +WT +\| +\+3.00 \[", printed) and "a positive one is a gain" in printed
    page = Path("comparison", "comparison.md").read_text()
    assert "### By subset" in page and "![Differences of Dice with intervals](comparison.png)" in page
    assert "nothing about clinical benefit" in page and "* new against old: +3.00 [" in page
    html = Path("comparison", "comparison.html").read_text()
    assert html.index("new against old: +3.00 [") < html.index("All models and subsets</h2>")
    # at most 6 tests together, and 8 patients: 6 / 128 at best
    assert "over all subsets: with" not in printed and "by number of modalities: with" not in printed
    assert "by subset: with" not in printed
    assert Path("comparison", "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_only_shared_cases_are_compared_and_the_others_are_named(capsys):
    model("old", cases=CASES[:5])
    model("new", 0.01, cases=CASES[1:])
    assert cli.main(["compare", "new", "old"]) == 0
    printed = capsys.readouterr().out
    assert "Compared on 4 cases of 4 patients" in printed
    assert f"{CASES[5]}, {CASES[6]}, {CASES[7]} of new" in printed and f"{CASES[0]} of old" in printed
    assert "over all subsets: with 4 patients and 3 tests no corrected p-value can fall below 0.38" in printed
    assert "by number of modalities: with 4 patients and 6 tests no corrected p-value can fall below 0.75" in printed
    found = numbers()
    assert found["cases"] == list(CASES[1:5])
    assert [each["not_compared"] for each in found["models"]] == [list(CASES[5:]), list(CASES[:1])]


def test_intervals_and_tests_count_patients_not_cases():
    cases = [f"BraTS-GLI-{number // 2:05d}-10{number % 2}" for number in range(12)]
    model("old", cases=cases)
    model("new", 0.01, cases=cases)
    assert cli.main(["compare", "new", "old"]) == 0
    found = numbers()
    assert (len(found["cases"]), found["patients"]) == (12, 6)
    assert found["metrics"]["dice"]["overall"][0]["p"] == pytest.approx(2 / 2**6)


def test_patients_may_be_told_by_a_column_of_one_model():
    model("old")
    file = model("new", 0.01) / "subsets" / "results.csv"
    table = pd.read_csv(file, dtype=str)
    table.assign(patient=table["case"].map(lambda case: CASES.index(case) // 2)).to_csv(file, index=False)
    assert cli.main(["compare", "new", "old"]) == 0
    assert numbers()["patients"] == len(CASES) / 2


def test_three_models_with_a_baseline_by_hd95(capsys):
    for name, gain in (("a", 0.0), ("b", 0.01), ("c", 0.02)):
        model(name, gain, metrics=("dice", "hd95"))
    assert cli.main(["compare", "a", "b", "c", "--baseline", "a", "--metrics", "hd95", "dice", "-o", "out"]) == 0
    found = numbers("out")
    assert list(found["metrics"]) == ["hd95", "dice"] and found["metrics"]["hd95"]["better"] == "lower"
    pairs = {(row["model"], row["against"]) for row in found["metrics"]["hd95"]["subsets"]}
    assert pairs == {("b", "a"), ("c", "a")}
    # Dice and HD95 say the opposite here
    assert [row["mean_rank"] for row in found["ranks"]] == [2.0, 2.0, 2.0]
    printed = capsys.readouterr().out
    assert "in mm; a negative one is a gain" in printed and "A first place says nothing" in printed
    assert cli.main(["compare", "a", "b", "c"]) == 0
    assert len(numbers()["metrics"]["dice"]["overall"]) == 3 * 3


def test_values_left_out_have_no_rank_and_no_number():
    frame = table("new", 0.01)
    frame.loc[frame["region"] == "ET", "value"] = np.nan
    write_results(frame, "new.csv")
    model("old")
    assert cli.main(["compare", "new.csv", "old"]) == 0
    found = numbers()
    assert found["ranks"] is None and any("no ranking" in note for note in found["notes"])
    enhancing = next(row for row in found["metrics"]["dice"]["overall"] if row["region"] == "ET")
    assert enhancing["difference"] is None and enhancing["p"] is None and enhancing["cases"] == 0


def test_values_that_one_model_leaves_out_are_noted(capsys):
    """As in nnU-Net's convention where one model finds a region that the reference lacks: 0 there, nan in the other."""
    for name, missing in (("false", 0.0), ("none", np.nan)):
        frame = table(name)
        frame.loc[(frame["region"] == "ET") & frame["case"].isin(CASES[:3]), "value"] = missing
        write_results(frame, f"{name}.csv")
    assert cli.main(["compare", "false.csv", "none.csv"]) == 0
    printed = capsys.readouterr().out
    assert "(mean of the patients' own differences)" in printed and "9 values are left out (nan) of some" in printed
    columns = next(line for line in printed.splitlines() if "region" in line and "difference" in line)
    assert "patients" in columns
    rows = {row["region"]: row["patients"] for row in numbers()["metrics"]["dice"]["overall"]}
    assert rows == {"WT": 8, "ET": 5, "average": 8}


def test_two_evaluations_name_the_same_patients(capsys):
    for name in ("a", "b"):
        table(name).assign(patient=name).to_csv(f"{name}.csv", index=False)
    assert "different patients for case" in refused(capsys, "a.csv", "b.csv")


def test_compare_returns_data_frames():
    for name, gain in (("a", 0.0), ("b", 0.01)):
        model(name, gain, metrics=("dice", "hd95"))
    found = compare({"one": "a", "two": Path("b")}, metrics=["dice", "hd95"], baseline="one")
    for table in (found.overall, found.by_count, found.by_subset, found.per_case):
        assert list(table.columns[:3]) == ["metric", "model", "against"]
        assert set(table["metric"]) == {"dice", "hd95"}
        assert (set(table["model"]), set(table["against"])) == ({"two"}, {"one"})
    assert found.ranks["model"].tolist() == ["one", "two"] and "Compared on 8 cases" in found.text
    assert "first place" not in found.text  # of two, it looks like certainty beside an uncertain difference
    assert not Path("comparison").exists()
    compare(["a", "b"], output="out")
    assert Path("out/comparison.md").exists()


def test_the_table_of_all_models_and_subsets(capsys):
    for name, gain in (("a", 0.0), ("b", 0.01), ("c", 0.02)):
        model(name, gain, settings={"convention": "nnunet"})
    assert cli.main(["compare", "a", "b", "c"]) == 0
    # single modalities: 0.535 + 4.5 times the gain; both: 0.535
    row = r"\| WT +\| c +\| +\*\*62.5\*\* \| +\*\*62.5\*\* \| +\*\*53.5\*\* \| +\*\*59.5\*\* \|"
    assert re.search(row, Path("comparison/tables.md").read_text())
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[0] == ["T1", "T2", "a", "b", "c"] and ["\u25cf", "\u25cb", "53.5", "58.0", "62.5"] in rows
    assert ["WT", "", "53.5", "56.5", "59.5"] in rows and max(map(len, printed.splitlines()[:12])) <= 100
    assert r"\underline{58.0}" in Path("comparison/tables.tex").read_text()
    assert "dice,ET,b,58.0,58.0,53.5,56.5" in Path("comparison/tables.csv").read_text().splitlines()
    page = Path("comparison/comparison.html").read_text()
    assert "<b>62.5</b>" in page and "<u>58.0</u>" in page and "Rules for empty masks: nnunet (" in page
    assert 'href="tables.csv"' in page and 'id="cost"' not in page and not Path("comparison/cost.png").exists()


def test_postprocessed_regions_are_in_the_table_but_not_tested():
    regions = ("WT", "ET", "ET (min 500)")
    for name, gain in (("old", 0.0), ("new", 0.01)):
        model(name, gain, regions=regions)
    found = compare(["new", "old"])
    assert "ET (min 500)" in found.text and set(found.overall["region"]) == {"WT", "ET", "average"}


def test_cost_is_that_of_the_evaluation_or_given(capsys):
    for name, gain, cost in (("old", 0.0, {"parameters": 3e6, "training_hours": 2.0}), ("new", 0.01, {})):
        model(name, gain, settings=cost)
    assert cli.main(["compare", "new", "old", "--hours", "new=3.5"]) == 0
    rows = numbers()["costs"]
    assert [(row["model"], row["parameters"], row["training_hours"]) for row in rows] == [
        ("new", None, 3.5),
        ("old", 3e6, 2.0),
    ]
    assert [row["value"] for row in rows] == pytest.approx([0.565, 0.535])  # 0.535, and 4.5 gains in 2 of 3 subsets
    printed = capsys.readouterr().out
    assert re.search(r"\| old +\| +53.5 +\| +3.00 +\| +2.00", printed)
    assert "longer training alone makes a model better; hours: new 3.5, old 2" in printed
    assert "longer training alone" in Path("comparison/comparison.html").read_text()
    assert Path("comparison/cost.png").read_bytes()[:4] == b"\x89PNG"
    assert 'id="cost"' in Path("comparison/comparison.html").read_text()
    for hours, what in (("x=1", "no such model"), ("new", "is not NAME=HOURS"), ("new=-1", "is not NAME=HOURS")):
        capsys.readouterr()
        assert cli.main(["compare", "new", "old", "--hours", hours, "-o", "other"]) == 2
        assert what in capsys.readouterr().err


def with_slices(name: str, index: int = 3, **options) -> Path:
    """An evaluation that has kept a slice of each case: a square of label 1 with one of label 2 in it."""
    folder = model(name, settings={"regions": {"WT": [1, 2], "ET": [2]}, "channels": list(NAMES)}, **options)
    reference = np.zeros((20, 16), np.uint8)
    reference[5:15, 4:12], reference[8:12, 6:10] = 1, 2
    found = dict.fromkeys(("T1", "T2", "T1+T2"), reference)
    images = np.full((2, 20, 16), 90, np.uint8)
    for case in CASES:
        file = folder / "subsets" / "cases" / "fold_0" / f"{case}.npz"
        write_montage(Montage(0, index, 9, images, reference, found), file)
    return folder


def drawn(comparison, *choice) -> list[list[str]]:
    """All texts of the figure by row: titles, boxes and labels of its panels."""
    figure = qualitative_plot(comparison, *choice)
    panels = [
        [axis.get_title(), *(text.get_text() for text in axis.texts), axis.get_ylabel(), axis.get_xlabel()]
        for axis in figure.axes
    ]
    columns = len(NAMES) + 1 + len(comparison.trainings)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    return [[" ".join(filter(None, panel)) for panel in row] for row in rows]


def test_pictures_of_all_models_with_boxes_for_absent_images():
    with_slices("old")
    with_slices("new", gain=0.01)
    comparison = compare(["new", "old"])
    rows = drawn(comparison)
    # the median case; T1 and T2 have equal values, so the first of them stands for one modality
    assert rows[0] == [f"T1 {CASES[3]}", "T2 missing", "reference", "new WT 57.0  ET 57.0", "old WT 53.0  ET 53.0"]
    assert rows[1] == [CASES[3], "", "", "WT 53.0  ET 53.0", "WT 53.0  ET 53.0"]
    chosen = drawn(comparison, [CASES[7], CASES[0]], ["T2", "all"])
    assert [row[0] for row in chosen] == [f"T1 missing {CASES[7]}", CASES[7], f"missing {CASES[0]}", CASES[0]]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--show-cases", "nobody"], "the case nobody is not compared"),
        (["--show-subsets", "T9"], "the subset T9 is not compared"),
        (["--show-subsets", "T1"], "have not kept the same slices"),
    ],
)
def test_pictures_that_are_not_there_are_refused(capsys, options, what):
    with_slices("old")
    with_slices("new", index=4)  # another slice
    assert what in refused(capsys, "new", "old", *options)


def test_pictures_are_left_out_where_none_were_kept():
    with_slices("old")
    model("new")
    compare(["new", "old"], output="out")
    assert not Path("out/qualitative.png").exists() and 'id="pictures"' not in Path("out/comparison.html").read_text()
    shutil.copytree("old/subsets/cases", "new/subsets/cases")
    compare(["new", "old"], output="out")
    assert Path("out/qualitative.png").exists() and 'id="pictures"' in Path("out/comparison.html").read_text()
    assert "(qualitative.png)" in Path("out/comparison.md").read_text()


@pytest.mark.parametrize(
    ("modalities", "first_cases"),
    [
        (("T1ce", "FLAIR"), None),  # as with --available T1ce,FLAIR
        (("T1", "T1ce", "T2", "FLAIR"), ("T2", "FLAIR")),  # no case tells the order of all channels
    ],
)
def test_each_image_has_the_name_of_its_channel(modalities, first_cases):
    channels = ["T1", "T1ce", "T2", "FLAIR"]
    images = np.stack([np.full((20, 16), 50 + 10 * number, np.uint8) for number in range(4)])
    reference = np.zeros((20, 16), np.uint8)
    reference[5:15, 4:12] = 1
    for name in ("old", "new"):
        folder = model(name, modalities=modalities, settings={"regions": {"WT": [1], "ET": [1]}, "channels": channels})
        frame = read_results(folder / "subsets" / "results.csv")
        if first_cases:  # the others have the other modalities
            early = frame["case"].isin(CASES[:3])
            of_first = frame["subset"].map(lambda subset: set(subset.split("+")) <= set(first_cases))
            of_others = frame["subset"].map(lambda subset: not set(subset.split("+")) & set(first_cases))
            frame = frame[(early & of_first) | (~early & of_others)]
            write_results(frame, folder / "subsets" / "results.csv")
        for case, subsets in frame.groupby("case")["subset"]:
            file = folder / "subsets" / "cases" / "fold_0" / f"{case}.npz"
            write_montage(Montage(0, 3, 9, images, reference, dict.fromkeys(subsets, reference)), file)
    comparison = compare(["new", "old"], output="out")
    assert Path("out/qualitative.png").exists()
    figure = qualitative_plot(comparison, [CASES[5]], ["T1+T1ce"] if first_cases else ["T1ce"])
    titles = [axis.get_title() for axis in figure.axes]
    names = [name for name in channels if name in modalities]
    assert titles == [*names, "reference", "new", "old"]
    present = ["T1", "T1ce"] if first_cases else ["T1ce"]
    for axis in figure.axes:
        shown = int(np.asarray(axis.images[0].get_array()).max())
        if axis.get_title() in present:
            assert shown == 50 + 10 * channels.index(axis.get_title())
        elif axis.get_title() in names:
            assert shown == 255  # an empty box
        else:
            assert shown in {50 + 10 * channels.index(name) for name in present}


def test_a_size_without_values_is_not_pictured():
    for name in ("old", "new"):
        folder = with_slices(name)
        frame = read_results(folder / "subsets" / "results.csv")
        frame.loc[frame["modalities"] == 1, "value"] = np.nan
        write_results(frame, folder / "subsets" / "results.csv")
    rows = drawn(compare(["new", "old"], output="out"))
    assert len(rows) == 1 and "missing" not in " ".join(rows[0])


def test_names_are_drawn_as_they_are(tmp_path):
    names = ("A$\\foo$", "<b>B & $x^2$</b>")
    for name, folder in zip(names, ("old", "new"), strict=True):
        frame = table(name, regions=("WT$_2$", "ET$^$"))
        frame["model"] = name
        with_slices(folder)
        write_results(frame, Path(folder) / "subsets" / "results.csv")
        settings = {"regions": {"WT$_2$": [1, 2], "ET$^$": [2]}, "channels": list(NAMES)}
        (Path(folder) / "subsets" / "summary.json").write_text(json.dumps(settings))
    comparison = compare(["old", "new"], output=tmp_path / "out")
    titles = [axis.get_title() for axis in qualitative_plot(comparison).axes]
    assert names[0] in titles and "<b>B & $x^2$</b>" in titles
    assert (tmp_path / "out" / "comparison.png").is_file() and (tmp_path / "out" / "qualitative.png").is_file()
    save_figure(heat_map(comparison.results), tmp_path / "map.png")
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "\\<b>B \\& $x^2$\\</b>" in page


def test_a_picture_without_values_is_an_earlier_one_and_no_value_is_a_line():
    for name in ("old", "new"):
        with_slices(name)
        file = Path(name, "subsets", "results.csv")
        table = pd.read_csv(file)
        table.loc[(table["case"] == CASES[3]) & (table["region"] == "ET"), "value"] = np.nan
        # a case without T1, of which an earlier evaluation has kept pictures with it
        table[(table["case"] != CASES[2]) | (table["subset"] == "T2")].to_csv(file, index=False)
    comparison = compare(["new", "old"])
    assert drawn(comparison, [CASES[3]], ["T1"])[0][-1].split("  ")[1] == "ET -"
    with pytest.raises(InputError, match="have not kept"):
        drawn(comparison, [CASES[2]], ["T1"])


def test_names_in_the_page_are_escaped():
    model("old")
    model("new", 0.01)
    compare({"<script>alert(1)</script>": "new", "b": "old"}, output="out")
    page = Path("out/comparison.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_names_are_printed_as_they_are(capsys):
    model("a__b_c")
    model("_new_", 0.01)
    assert cli.main(["compare", "a__b_c", "_new_"]) == 0
    printed = capsys.readouterr().out
    assert "a__b_c" in printed and "\\" not in printed
    assert r"\_new\_" in Path("comparison/comparison.md").read_text()


# ---- several training runs -------------------------------------------------------------------------------------------


def seeds(name: str, *gains: float) -> list[str]:
    """Arguments with an evaluation per training."""
    return [f"{name}={model(f'{name}{number}', gain)}" for number, gain in enumerate(gains)]


def test_trainings_of_one_name_are_paired_and_have_no_p_value(capsys):
    assert cli.main(["compare", *seeds("new", 0.02, 0.01, 0.04), *seeds("old", 0.01, 0.01, 0.01)]) == 0
    found = numbers()
    assert found["trainings"] == {"new": 3, "old": 3} and found["test"] is None
    assert [(each["model"], each["training"]) for each in found["models"]] == [
        (name, number) for name in ("new", "old") for number in (1, 2, 3)
    ]
    row = found["metrics"]["dice"]["overall"][-1]
    # a gain of g per case number is 3 g in the mean over 8 cases and 3 subsets
    assert row["by_training"] == pytest.approx([0.03, 0.0, 0.09]) and row["difference"] == pytest.approx(0.04)
    assert row["p"] is None and row["p_corrected"] is None and row["low"] < 0 < row["high"]
    assert {each["level"] for each in found["metrics"]["dice"]["subsets"]} == {0.95}
    assert found["ranks"][0]["model"] == "new"
    printed, page = capsys.readouterr().out, Path("comparison/comparison.md").read_text()
    for text in (printed, page):
        assert "+3.00, +0.00, +9.00" in text and "Holm" not in text and "variation between training runs" in text
    assert "# new against old" in page and "new (3)" in page


def test_trainings_of_unequal_number_are_not_paired(capsys):
    assert cli.main(["compare", *seeds("new", 0.02, 0.01, 0.04), *seeds("old", 0.01, 0.02)]) == 0
    found = numbers()
    row = found["metrics"]["dice"]["overall"][-1]
    assert "by_training" not in row and row["difference"] == pytest.approx(0.07 - 0.045) and row["low"] < 0
    assert found["ranks"] is None and "not paired" in capsys.readouterr().out


def test_trainings_in_python():
    for number in range(2):
        model(f"a{number}", 0.0)
        model(f"b{number}", 0.01 * (number + 1))
    found = compare({"a": ["a0", "a1"], "b": [Path("b0"), Path("b1")]}, baseline="a")
    assert found.overall["by_training"].iloc[-1] == pytest.approx([0.03, 0.06])


def test_several_trainings_and_one_are_refused(capsys):
    message = refused(capsys, *seeds("new", 0.02, 0.01), *seeds("old", 0.01))
    assert "(new 2, old 1)" in message and "one of each" in message
    assert "holds one model" in refused(capsys, *seeds("new", 0.02, 0.01))


def test_one_training_each_says_what_it_is_about(capsys):
    model("old")
    model("new", 0.01)
    assert cli.main(["compare", "new", "old"]) == 0
    assert sum("not for the methods" in note for note in numbers()["notes"]) == 1
    assert "not for the methods" in capsys.readouterr().out


# ---- which models --------------------------------------------------------------------------------------------------


def test_forms_of_a_path():
    model("old")
    model("new", 0.01)
    for first in ("new", "new/subsets", "new/subsets/results.csv"):
        assert cli.main(["compare", first, "old"]) == 0
        assert [each["model"] for each in numbers()["models"]] == ["new", "old"]


def test_names_can_be_given_and_a_path_may_contain_the_sign(capsys):
    model("runs=1/M")
    model("runs=2/M", 0.01)
    for name in ("1", "2"):
        write_results(table("M"), f"runs={name}/M/subsets/results.csv")
    message = refused(capsys, "runs=1/M", "runs=2/M")
    assert "both hold a model 'M'" in message and "mstkd compare A=" in message
    assert cli.main(["compare", "new one=runs=2/M", "runs=1/M"]) == 0
    assert [each["model"] for each in numbers()["models"]] == ["new one", "M"]


def test_an_empty_name_is_refused(capsys):
    model("old")
    assert "neither a path nor NAME=PATH" in refused(capsys, "=x", "old")


def test_one_file_may_hold_several_models(capsys):
    write_results(pd.concat([table("a"), table("b", 0.01)]), "both.csv")
    assert "leave out the name x=" in refused(capsys, "x=both.csv")
    assert cli.main(["compare", "both.csv"]) == 0
    assert [each["model"] for each in numbers()["models"]] == ["a", "b"]


# ---- what differs --------------------------------------------------------------------------------------------------

RULES = {"convention": "brats", "regions": {"WT": [1, 2], "ET": [2]}, "mirroring": True}


def test_other_circumstances_are_told(capsys):
    model("old", settings=RULES)
    model("new", settings={**RULES, "mirroring": False})
    assert cli.main(["compare", "new", "old"]) == 0
    out = capsys.readouterr().out
    assert "another mirroring: new False, old True" in out and "no summary.json" not in out
    Path("old/subsets/summary.json").unlink()
    assert cli.main(["compare", "new", "old"]) == 0
    assert "no summary.json beside the results of old" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"convention": "nnunet"}, "another convention for empty masks: brats and nnunet"),
        ({"regions": {"WT": [1, 2], "ET": [1]}}, "another labels in its regions"),
    ],
)
def test_other_rules_are_refused(capsys, other, message):
    model("old", settings=RULES)
    model("new", settings={**RULES, **other})
    assert message in refused(capsys, "old", "new")


@pytest.mark.parametrize("order", [("bare", "old", "new"), ("old", "bare", "new"), ("old", "new", "bare")])
def test_a_model_without_rules_hides_no_difference(capsys, order):
    model("bare")
    model("old", settings=RULES)
    model("new", settings={**RULES, "convention": "nnunet"})
    assert "another convention for empty masks: brats and nnunet" in refused(capsys, *order)
    model("new", settings={**RULES, "mirroring": False})
    assert cli.main(["compare", *order]) == 0
    assert capsys.readouterr().out.count("another mirroring: old True, new False") == 1


def test_the_order_of_cases_is_not_an_order_of_channels():
    """Cases with one modality each do not tell the order of the channels, so there is no other order either."""
    for name, cases in (("old", CASES), ("new", CASES[1:])):
        frame = table(name, modalities=("T2", "T1"))
        frame = frame[(frame["subset"] == "T1") | (frame["subset"].eq("T2") & frame["case"].ne(CASES[1]))]
        model(name)
        write_results(frame[frame["case"].isin(cases)], Path(name) / "subsets" / "results.csv")
    comparison = compare(["old", "new"])
    assert set(comparison.subsets) == {"T1", "T2"} and comparison.cases == list(CASES[1:])


def test_the_tolerance_of_the_surface_dice_is_told_and_has_to_agree(capsys, tmp_path):
    for name, tolerance in (("old", 1.5), ("new", 1.5), ("other", 2.0)):
        model(name, metrics=("dice", "nsd"), settings={**RULES, "tolerance": tolerance})
    assert cli.main(["compare", "old", "new", "--metrics", "nsd", "-o", str(tmp_path / "out")]) == 0
    assert "NSD in % at a tolerance of 1.5 mm" in (tmp_path / "out" / "comparison.md").read_text()
    assert "another tolerance" in refused(capsys, "old", "other", "--metrics", "nsd")


def test_rules_of_lesions_matter_only_where_lesions_are_compared(capsys):
    for name in ("brats2023_gli", "brats2024_gli"):
        model(name, metrics=("dice", "lesion_dice"), settings={**RULES, "lesion_convention": name})
    message = refused(capsys, "brats2023_gli", "brats2024_gli", "--metrics", "lesion_dice")
    assert "another lesion-wise convention" in message
    assert cli.main(["compare", "brats2023_gli", "brats2024_gli"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ["x", "y"]}, "no case was evaluated with all models: old has 8 (such as BraTS-GLI-00000-100), new"),
        ({"modalities": ("T2", "T1")}, "the same modalities in another order: T1, T2 and T2, T1"),
        ({"modalities": ("T1", "FLAIR")}, "other modalities: T1, T2 and T1, FLAIR"),
        ({"regions": ("WT",)}, "different regions (only old: ET)"),
    ],
)
def test_results_that_do_not_fit_are_refused(capsys, options, message):
    model("old")
    model("new", **options)
    assert message in refused(capsys, "old", "new")


def test_other_subsets_are_refused(capsys):
    model("old")
    frame = table("new")
    write_results(frame[frame["subset"] != "T1"], "new.csv")
    message = refused(capsys, "old", "new.csv")
    assert "different subsets (only old: T1)" in message and "--subsets" in message


def test_bad_input_is_one_line(capsys):
    model("old")
    model("new")
    assert "new and new/subsets are the same file" in refused(capsys, "new", "new/subsets")
    assert "holds one model, new; a comparison needs at least two" in refused(capsys, "new")
    assert "nowhere does not exist" in refused(capsys, "new", "nowhere")
    Path("empty").mkdir()
    assert "not a model folder and has no results.csv" in refused(capsys, "new", "empty")
    Path("empty/plans.json").write_text("{}")
    assert "evaluate it: mstkd evaluate -m empty" in refused(capsys, "new", "empty")
    assert "no values of hd95, it has dice; evaluate it with --metrics dice hd95" in refused(
        capsys, "new", "old", "--metrics", "hd95"
    )
    assert "unknown metric 'jaccard'" in refused(capsys, "new", "old", "--metrics", "jaccard")
    assert "no model x; they have new, old" in refused(capsys, "new", "old", "--baseline", "x")
    assert "is a file" in refused(capsys, "new", "old", "-o", "old/subsets/results.csv")
    Path("old/subsets/summary.json").write_text("{")
    assert "summary.json is not valid JSON" in refused(capsys, "new", "old")
    Path("old/subsets/summary.json").write_text("[]")
    assert "summary.json holds no table" in refused(capsys, "new", "old")


def test_rows_that_stand_twice_are_refused(capsys):
    model("old")
    frame = table("new")
    frame = pd.concat([frame, frame.iloc[[3]]])
    frame.to_csv("new.csv", index=False)
    assert f"new.csv: row {len(frame)} appears twice" in refused(capsys, "old", "new.csv")


def test_a_case_without_one_subset_is_refused(capsys):
    model("old")
    write_results(table("new")[1:], "new.csv")
    assert "no dice of model new, case BraTS-GLI-00000-100, subset T1, region WT" in refused(capsys, "old", "new.csv")
