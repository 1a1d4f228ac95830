"""Cases that lack modalities in `mstkd evaluate` and `mstkd compare`: each counts with the subsets that it has."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from conftest import empty_folders
from evaluate_inputs import (
    CASES,
    evaluate,
    label_image,
    preprocess,
    refused,
    results,
    without_drawing,
    write_dataset,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from predict_inputs import CHANNELS, SHAPE, trainer_class, write, write_case, write_model

from nnunetv2_mstkd.evaluation.results import COLUMNS, check_results, modality_order, write_results
from nnunetv2_mstkd.evaluation.stacking import SubsetPredictor
from nnunetv2_mstkd.reporting.compare import compare
from nnunetv2_mstkd.reporting.tables import subset_table
from nnunetv2_mstkd.statistics.bootstrap import Bootstrap, cube
from nnunetv2_mstkd.statistics.findings import Findings, gap_to_full, mean_by_count, summary
from nnunetv2_mstkd.statistics.plausibility import plausibility_warnings
from nnunetv2_mstkd.statistics.shapley import shapley

NAMES = ("T0", "T1", "T2", "T3")
COMPLETE, INCOMPLETE = CASES[0], CASES[1]
VALIDATION = CASES[:3]
DICE = ("--metrics", "dice")


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        without_drawing(monkeypatch)


@pytest.fixture
def drawn():
    """Asks for real figures."""


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture
def model(nnunet_folders) -> Path:
    """Of nnU-Net's own trainer, with three validation cases of two patients."""
    return with_data()


def with_data(**options) -> Path:
    folder = write_model(trainer_class("nnUNetTrainer"), **options)
    write_dataset(folder, ignore=3 if "labels" in options else None)
    split = [{"train": [CASES[3]], "val": list(VALIDATION)}]
    (preprocessed() / "splits_final.json").write_text(json.dumps(split))
    return folder


def preprocessed() -> Path:
    return Path(os.environ["nnUNet_preprocessed"], tiny.DATASET)


def raw() -> Path:
    return Path(os.environ["nnUNet_raw"], tiny.DATASET)


def take_away(model: Path, channels: Sequence[int], case: str = INCOMPLETE) -> None:
    """Make images of a case zero, as the converter writes absent ones, and preprocess it again."""
    for channel in channels:
        write(raw() / "imagesTr" / f"{case}_{channel:04d}.nii.gz", np.zeros(SHAPE, np.float32))
    for file in (preprocessed() / "tiny_data").glob(f"{case}*.b2nd"):
        file.unlink()  # blosc2 does not overwrite
    plans = PlansManager(json.loads((model / "plans.json").read_text()))
    dataset_json = json.loads((model / "dataset.json").read_text())
    preprocess(raw(), preprocessed() / "tiny_data", plans, dataset_json, CHANNELS, [case])


@pytest.fixture
def folder(model, nnunet_folders) -> tuple[str, ...]:
    """Options for a folder of two cases: "less" has no file of T2."""
    (nnunet_folders / "labels").mkdir()
    for number, (name, channels) in enumerate({"full": range(CHANNELS), "less": [0, 1, 3]}.items()):
        write_case(nnunet_folders / "in", name, channels)
        write(nnunet_folders / "labels" / f"{name}.nii.gz", label_image(number))
    names = {"-i": "in", "-l": "labels", "-o": "out"}
    return tuple(text for option, name in names.items() for text in (option, str(nnunet_folders / name)))


def values(table: pd.DataFrame, case: str) -> dict[tuple[str, str, str], float]:
    of_case = table[table["case"] == case]
    keys = zip(of_case["subset"], of_case["region"], of_case["metric"], strict=True)
    return dict(zip(keys, of_case["value"], strict=True))


def subsets_of(table: pd.DataFrame, case: str) -> set[str]:
    return {subset for subset, _, _ in values(table, case)}


def within(names: Sequence[str]) -> set[str]:
    """All subsets of these modalities."""
    sizes = range(1, len(names) + 1)
    return {"+".join(part) for size in sizes for part in itertools.combinations(names, size)}


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# ---- validation cases ----------------------------------------------------------------------------------------------


def test_a_validation_case_counts_with_the_subsets_that_it_has(model, nnunet_folders, capsys):
    assert evaluate(model, *DICE, "-o", str(nnunet_folders / "before")) == 0
    before = results(nnunet_folders / "before")
    assert "| n " not in capsys.readouterr().out
    take_away(model, [2])
    assert evaluate(model, *DICE) == 0
    table, printed = results(model / "subsets"), capsys.readouterr().out
    assert subsets_of(table, COMPLETE) == within(NAMES) and subsets_of(table, INCOMPLETE) == within(("T0", "T1", "T3"))
    for case in VALIDATION:
        old, new = values(before, case), values(table, case)
        assert new == {key: old[key] for key in new}
    assert "1 of 3 cases lack modalities" in printed
    numbers = [line.strip("| ").split("|")[1:] for line in printed.splitlines() if line.startswith("| n ")]
    counts = [3 if "T2" not in subset else 2 for subset in dict.fromkeys(before["subset"])]
    assert [[int(number) for number in line] for line in numbers] == [counts]
    assert printed.count("from 2 of 3 cases, which have all modalities (95 % interval over 2 patients)") == 2
    content = summary_of(model / "subsets")
    assert content["cases_by_subset"] == dict(zip(dict.fromkeys(before["subset"]), counts, strict=True))
    assert content["cases_with_full_input"] == 2 and "of different patients" in content["notes"][0]
    for text in ((model / "subsets" / name).read_text() for name in ("tables.md", "tables.tex")):
        assert "n of 3 cases" in text and " 3 " in text


def test_a_subset_that_no_case_has_is_left_out(model, capsys):
    for case in VALIDATION:
        take_away(model, [1], case)
    take_away(model, [3])
    assert evaluate(model, *DICE, "--subsets", "T0", "T1+T2", "T3", "all") == 0
    printed = capsys.readouterr().out
    assert "no case has all their modalities: T1+T2, T0+T1+T2+T3\n" in printed
    assert summary_of(model / "subsets")["cases_by_subset"] == {"T0": 3, "T3": 2}
    assert "no Shapley values" in printed and summary_of(model / "subsets")["shapley"] is None


def test_nothing_left_is_an_error(model, capsys):
    for case in VALIDATION:
        take_away(model, [1], case)
    assert "none of the 3 cases can be evaluated" in refused(capsys, model, "--subsets", "T0+T1", "all")
    assert not (model / "subsets").exists()


def test_cases_without_any_requested_subset_are_named(model, capsys):
    take_away(model, [1])
    assert evaluate(model, *DICE, "--subsets", "T1", "T1+T2") == 0
    assert f"no subset within their modalities: {INCOMPLETE}\n" in capsys.readouterr().out
    assert set(results(model / "subsets")["case"]) == {COMPLETE, VALIDATION[2]}


@pytest.mark.parametrize("source", ["preprocessed", "images"])
def test_unlabelled_cases_are_left_out(nnunet_folders, capsys, source):
    model = with_data(labels=tiny.LABELS_WITH_IGNORE)
    for file in (preprocessed() / "gt_segmentations", raw() / "labelsTr"):
        write(file / f"{INCOMPLETE}.nii.gz", np.full(SHAPE, 3, np.uint8))
    take_away(model, [])
    options = [] if source == "preprocessed" else ["--mask-first"]
    assert evaluate(model, *DICE, "--subsets", "T0", *options) == 0
    assert "nothing but ignore: 1 cases" in capsys.readouterr().out
    assert set(results(model / "subsets")["case"]) == {COMPLETE, VALIDATION[2]}


def test_a_case_without_any_modality_is_an_error(model, nnunet_folders, folder, capsys):
    take_away(model, range(CHANNELS))
    assert f"case {INCOMPLETE} has no modality" in refused(capsys, model)
    assert f"case {INCOMPLETE} has no modality" in refused(capsys, model, "--mask-first")
    for channel in (0, 1, 3):
        write(nnunet_folders / "in" / f"less_{channel:04d}.nii.gz", np.zeros(SHAPE, np.float32))
    assert "case less has no modality" in refused(capsys, model, *folder)
    assert evaluate(model, *folder, *DICE, "--available", "T0,T1") == 0
    assert "no subset within their modalities: less\n" in capsys.readouterr().out


def test_images_that_are_zero_are_absent_from_mask_first_too(model, nnunet_folders):
    few = (*DICE, "--subsets", "T0", "T0+T2", "T1+T3")
    take_away(model, [2])
    assert evaluate(model, *few) == 0
    assert evaluate(model, *few, "--mask-first", "-o", str(nnunet_folders / "first")) == 0
    tables = [results(model / "subsets"), results(nnunet_folders / "first")]
    assert all(subsets_of(table, INCOMPLETE) == {"T0", "T1+T3"} for table in tables)
    # all images of a case are zero in the same voxels, so both ways are the same
    assert values(tables[0], INCOMPLETE) == values(tables[1], INCOMPLETE)


# ---- folders -------------------------------------------------------------------------------------------------------


def test_a_file_that_is_zero_counts_as_absent(model, folder, nnunet_folders):
    assert evaluate(model, *folder, *DICE) == 0
    absent = results(nnunet_folders / "out")
    assert subsets_of(absent, "full") == within(NAMES) and subsets_of(absent, "less") == within(("T0", "T1", "T3"))
    write(nnunet_folders / "in" / "less_0002.nii.gz", np.zeros(SHAPE, np.float32))
    assert evaluate(model, *folder, *DICE, "--restart") == 0
    pd.testing.assert_frame_equal(results(nnunet_folders / "out"), absent)


def test_available_restricts_what_a_case_has(model, folder, nnunet_folders):
    assert evaluate(model, *folder, *DICE, "--available", "T1,T2") == 0
    table = results(nnunet_folders / "out")
    assert subsets_of(table, "full") == within(("T1", "T2")) and subsets_of(table, "less") == {"T1"}


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.fixture
def predicted(monkeypatch) -> list[int]:
    """The number of subsets of each call of the network's predictor."""
    calls, real = [], SubsetPredictor.predict

    def predict(self, data, subsets):
        calls.append(len(subsets))
        return real(self, data, subsets)

    monkeypatch.setattr(SubsetPredictor, "predict", predict)
    return calls


def test_a_resumed_run_predicts_only_what_cases_lack(model, predicted, capsys):
    take_away(model, [2])
    assert evaluate(model, *DICE, "--subsets", "T0", "T2", "T0+T1") == 0
    assert predicted == [3, 2, 3]
    assert evaluate(model, *DICE) == 0
    assert predicted == [3, 2, 3, 12, 5, 12]
    first = results(model / "subsets")
    assert evaluate(model, *DICE) == 0 and len(predicted) == 6
    assert "already evaluated: 3" in capsys.readouterr().out
    assert evaluate(model, *DICE, "--restart") == 0 and predicted[6:] == [15, 7, 15]
    pd.testing.assert_frame_equal(results(model / "subsets"), first)


def test_a_case_that_gets_or_loses_a_modality_is_evaluated_again(model, folder, nnunet_folders, predicted):
    assert evaluate(model, *folder, *DICE) == 0 and predicted == [15, 7]
    write(nnunet_folders / "in" / "less_0002.nii.gz", np.zeros(SHAPE, np.float32))
    assert evaluate(model, *folder, *DICE) == 0 and predicted == [15, 7, 7]  # who knows what preprocessing makes of it
    assert evaluate(model, *folder, *DICE) == 0 and len(predicted) == 3
    write_case(nnunet_folders / "in", "less", range(CHANNELS))
    (nnunet_folders / "in" / "full_0000.nii.gz").unlink()
    assert evaluate(model, *folder, *DICE) == 0
    table = results(nnunet_folders / "out")
    assert subsets_of(table, "less") == within(NAMES) and subsets_of(table, "full") == within(("T1", "T2", "T3"))
    page = (nnunet_folders / "out" / "report.html").read_text()  # pictures of more subsets are on disk
    assert "less" in page


# ---- numbers -------------------------------------------------------------------------------------------------------


def table(cases: Mapping[str, Mapping[str, float]], model: str = "m") -> pd.DataFrame:
    """Dice of one region by case and subset."""
    rows = [
        (model, "MSTKDTrainer", "0", case, subset, subset.count("+") + 1, "WT", "dice", value)
        for case, of_case in cases.items()
        for subset, value in of_case.items()
    ]
    return check_results(pd.DataFrame(rows, columns=list(COLUMNS)))


UNEVEN = {"a": {"A": 0.2, "B": 0.4, "A+B": 0.6}, "b": {"A": 0.6, "B": 0.6, "A+B": 0.8}, "c": {"A": 0.7}}


def test_means_are_over_the_cases_that_have_a_subset():
    frame, bootstrap = table(UNEVEN), Bootstrap(samples=200)
    data = cube(frame, "dice")
    assert data.counts.tolist() == [3, 2, 2] and not data.complete
    assert data.complete_cases().cases == ("a", "b")
    (overall,) = summary(frame, bootstrap=bootstrap).to_dict("records")
    # A 0.5, B 0.5, A+B 0.7
    assert overall["value"] == pytest.approx(1.7 / 3) and overall["worst"] == pytest.approx(0.5)
    assert 0.2 <= overall["low"] < overall["value"] < overall["high"] <= 0.8
    assert mean_by_count(frame, bootstrap=bootstrap)["value"].tolist() == pytest.approx([0.5, 0.7])
    # 0.4 and 0.2, 0.2 and 0.2: case c has no full input to lose against
    assert gap_to_full(frame, bootstrap=bootstrap)["value"].tolist() == pytest.approx([0.3, 0.2])


def test_shapley_values_are_from_complete_cases():
    frame, bootstrap = table(UNEVEN), Bootstrap(samples=200)
    whole = frame[frame["case"] != "c"]
    pd.testing.assert_frame_equal(shapley(frame, bootstrap=bootstrap), shapley(whole, bootstrap=bootstrap))
    # v(A) = 0.4, v(B) = 0.5, v(A+B) = 0.7
    assert shapley(frame, bootstrap=bootstrap)["value"].tolist() == pytest.approx([0.3, 0.4])
    found = Findings(frame)
    assert found.counts == {"A": 3, "B": 2, "A+B": 2} and found.full_cases == ["a", "b"] and found.full_patients == 2


def test_without_a_complete_case_there_are_no_shapley_values_and_no_losses():
    found = Findings(table({"a": {"A": 0.5, "B": 0.5, "A+B": 0.5}, "b": {"B": 0.5, "C": 0.5, "B+C": 0.5}}))
    assert found.shapley is None and found.gap is None and len(found.notes) == 4
    assert "no Shapley values" in found.notes[2] and found.warnings == []
    assert found.notes[3] == "intervals over 2 patients are too narrow to rely on"


def test_a_subset_of_one_patient_has_no_interval():
    frame = table({**UNEVEN, "d": {"B": 0.9, "C": 0.3, "B+C": 0.5}})
    found = mean_by_count(frame, bootstrap=Bootstrap(samples=200))
    assert found["value"].notna().all() and found["low"].isna().all()  # C and B+C are known of d alone
    alone = gap_to_full(table({"a": {"A": 0.2, "A+B": 0.6, "B": 0.3}, "b": {"A": 0.5}}), bootstrap=Bootstrap(samples=9))
    assert alone["value"].tolist() == pytest.approx([0.4, 0.3]) and alone["low"].isna().all()


def test_each_resample_has_all_subsets():
    """Else an interval would mix means of different subsets, and be wide where nothing varies."""
    rows = {f"c{number}": {"A": 0.9} for number in range(17)}
    rows |= {f"d{number}": {"A": 0.9, "B": 0.3, "A+B": 0.3} for number in range(3)}
    (overall,) = summary(table(rows)).to_dict("records")
    assert (overall["value"], overall["low"], overall["high"]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_headline_says_how_many_cases_it_is_from():
    rows = {f"c{number}": {"A": 0.9} for number in range(8)}
    rows |= {f"d{number}": {"A": 0.9, "B": 0.3, "A+B": 0.95} for number in range(2)}
    found = Findings(table(rows))
    assert found.headline.endswith(", from the 2 of 10 cases that have all modalities")
    assert found.notes[-1] == "intervals over 2 patients are too narrow to rely on"


def test_a_subset_that_a_case_could_have_is_missed():
    frame = table(UNEVEN)
    with pytest.raises(ValueError, match="no dice of model m, case b, subset B, region WT"):
        cube(frame[~((frame["case"] == "b") & (frame["subset"] == "B"))], "dice")


def test_plausibility_compares_the_same_patients():
    good = {"T1": 0.7, "T1ce": 0.8, "T1+T1ce": 0.8}
    cases = {f"full{number}": good for number in range(8)} | {f"only{number}": {"T1": 0.95} for number in range(24)}
    frame = table(cases).assign(region="ET")
    # of all cases T1 alone is better than the full input, of those that have both it is not
    assert Findings(frame).by_subset["value"].tolist() == pytest.approx([0.8875, 0.8, 0.8])
    assert not any(
        "than the full input" in text for text in plausibility_warnings(frame, bootstrap=Bootstrap(samples=200))
    )


def test_the_table_has_a_row_of_numbers_only_where_they_differ():
    for fmt in ("text", "markdown", "latex"):
        uneven = [
            line for line in subset_table(table(UNEVEN), fmt=fmt).splitlines() if line.lstrip("| ").startswith("n ")
        ]
        assert len(uneven) == 1 and [word for word in uneven[0].split() if word.isdigit()] == ["3", "2", "2"]
    whole = table({case: UNEVEN[case] for case in "ab"})
    assert "| n " not in subset_table(whole) and "mean of 2 cases; average over 3 subsets\n" in subset_table(whole)


def test_modalities_keep_their_order_without_a_full_subset():
    assert modality_order(["A+C+D", "B", "A+B", "B+C"]) == ("A", "B", "C", "D")
    assert modality_order(["A+B", "B+C", "C+A"]) == ("A", "B", "C")  # no order fits


# ---- comparing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path, drawn):
    """Of case c the new model has one subset more, and of case d only the old one has a value."""
    old = {**UNEVEN, "d": {"A": 0.1}}
    gains = {"a": 0.1, "b": 0.2, "c": 0.3}
    new = {case: {subset: value + gains[case] for subset, value in UNEVEN[case].items()} for case in "abc"}
    new["c"] |= {"B": 0.9, "A+B": 0.9}
    for name, cases in {"old": old, "new": new}.items():
        write_results(table(cases, name), tmp_path / f"{name}.csv")
    return compare([f"new={tmp_path / 'new.csv'}", f"old={tmp_path / 'old.csv'}"], output=tmp_path / "out")


def test_models_are_compared_on_the_subsets_of_a_case_that_both_have(compared, tmp_path):
    (overall,) = compared.overall.to_dict("records")
    # each patient counts with its mean difference: 0.1, 0.2 and 0.3, the last from one subset
    assert overall["difference"] == pytest.approx(0.2) and (overall["cases"], overall["patients"]) == (3, 3)
    assert compared.by_count["difference"].tolist() == pytest.approx([0.2, 0.15])
    assert compared.by_subset["difference"].tolist() == pytest.approx([0.2, 0.15, 0.15])
    assert compared.per_case["difference"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert compared.counts == {"A": 3, "B": 2, "A+B": 2} and compared.not_compared == {"new": [], "old": ["d"]}
    assert compared.ranks["model"].tolist() == ["new", "old"] and compared.ranks["mean_rank"].tolist() == [1.0, 2.0]
    assert any("2 subsets, each of one case" in note for note in compared.notes)
    assert "2 to 3 of 3 cases" in compared.text
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["cases_by_subset"] == compared.counts
    page = (tmp_path / "out" / "comparison.md").read_text().partition("By subset")[2]
    assert [line.split()[1:4] for line in page.splitlines() if line.startswith("| B ")] == [["B", "|", "2"]]


def test_a_case_without_a_common_subset_is_not_compared(tmp_path):
    one = {"a": {"A": 0.2, "B": 0.4, "A+B": 0.6}, "b": {"A": 0.6}}
    other = {"a": {"A": 0.2, "B": 0.4, "A+B": 0.6}, "b": {"B": 0.6}}
    for name, cases in {"one": one, "other": other}.items():
        write_results(table(cases, name), tmp_path / f"{name}.csv")
    found = compare([tmp_path / "one.csv", tmp_path / "other.csv"])
    assert found.cases == ["a"] and found.not_compared == {"one": ["b"], "other": ["b"]}


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_report_shows_what_cases_lack(model, drawn):
    take_away(model, [1, 2])
    assert evaluate(model, *DICE) == 0
    page = (model / "subsets" / "report.html").read_text()
    assert '<th scope="row">n</th>' in page and '<th scope="col">lacks</th>' in page
    assert "<td>T1, T2</td>" in page and "of different patients" in page
    take_away(model, [0], COMPLETE)
    take_away(model, [3], VALIDATION[2])
    assert evaluate(model, *DICE) == 0
    page = (model / "subsets" / "report.html").read_text()
    assert "no Shapley values" in page and "shapley" not in {path.stem for path in (model / "subsets").glob("*.png")}
