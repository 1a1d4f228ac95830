"""The pure parts of benchmarks/few_labels.py: who is labelled. Nothing is trained."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from statistics import fmean

import pytest
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import few_labels

PARTS = ("test", "val", "labelled", "unlabelled")


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Twelve patients of two channels, of whom two lack the second."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", "")
    source = tmp_path / "source"
    (source / "imagesTr").mkdir(parents=True)
    (source / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "FLAIR"}}))
    for number in range(12):
        for channel in range(2):
            image = sitk.Image(2, 2, 2, sitk.sitkUInt8) + (0 if channel and number < 2 else 1)
            sitk.WriteImage(image, str(source / "imagesTr" / f"case_{number:02d}_{channel:04d}.nii.gz"))
    options = dict.fromkeys(("seconds", "teacher_epochs", "iterations", "batch_size", "features", "spacing"), 1)
    return few_labels.Benchmark(source, tmp_path / "out", test=3, validation=1, bfloat16=False, **options)


@pytest.mark.parametrize("labelled", ["2", "4", "every", "complete"])
def test_parts_share_no_patient_and_hold_all(benchmark, labelled):
    parts = benchmark.divide(labelled, 0)
    cases = [case for part in PARTS for case in parts[part]]
    assert len(cases) == len(set(cases)) == (10 if labelled == "complete" else 12)
    incomplete = {"case_00", "case_01"}
    assert not incomplete & {*parts["test"], *parts["val"]}
    assert (incomplete <= set(parts["labelled"])) == (labelled == "every")


def test_fewer_labelled_patients_are_among_the_more(benchmark):
    few, many = benchmark.divide("2", 0), benchmark.divide("4", 0)
    assert set(few["labelled"]) < set(many["labelled"])
    assert few["test"] == many["test"] == benchmark.divide("2", 1)["test"]
    assert few["labelled"] != benchmark.divide("2", 1)["labelled"]


def test_every_size_and_seed_has_its_own_data_set(benchmark):
    names = [benchmark.dataset(size, seed) for size in ("3", "8", "16", "every", "complete") for seed in range(10)]
    assert len(set(names)) == len(names)


def test_rows_of_one_teacher_start_alike():
    for name, row in few_labels.ROWS.items():
        assert row.trainer in few_labels.TEACHERS
        warm = row.trainer == "ModalityDropoutTrainer" and not row.alone
        assert ("schedule.init_from" in row.settings) == warm, name


PUBLISHED = sorted((Path(few_labels.__file__).parent / "results").glob("few_labels_*.json"))


@pytest.mark.parametrize("file", PUBLISHED, ids=[file.stem for file in PUBLISHED])
def test_published_numbers_follow_from_the_values_by_case(file):
    for rows in json.loads(file.read_text())["rows"].values():
        again = copy.deepcopy(rows)
        few_labels.add_differences(again)
        assert again == rows
        for row in rows.values():
            by_seed = {seed: fmean(map(fmean, subsets.values())) for seed, subsets in row["cases"].items()}
            assert row["seeds"] == pytest.approx(by_seed, abs=0.01)
            assert row["mean"] == pytest.approx(fmean(by_seed.values()), abs=0.01)
            of_subset = {
                subset: fmean(fmean(row["cases"][seed][subset]) for seed in by_seed) for subset in row["subsets"]
            }
            assert row["subsets"] == pytest.approx(of_subset, abs=0.01)


def test_differences_from_the_control_are_over_common_seeds():
    def row(*seeds: float) -> dict:
        return {"cases": {str(n): {"A": [value, value + 2], "A+B": [value, value]} for n, value in enumerate(seeds)}}

    rows = {"dropout": row(50.0, 51.0, 52.0), "mstkd": row(50.0, 50.0), "once": row(53.0), "none": {"cases": {"7": {}}}}
    few_labels.add_differences(rows)
    found = rows["mstkd"]["minus_control"]
    assert (found["difference"], found["by_seed"]) == (-0.5, {"0": 0.0, "1": -1.0})
    # cases do not differ: t with one degree of freedom times 0.707 / sqrt 2
    assert found["interval"] == pytest.approx([-0.5 - 12.706 / 2, -0.5 + 12.706 / 2], abs=0.01)
    assert rows["once"]["minus_control"] == {"difference": 3.0, "by_seed": {"0": 3.0}, "over_cases": [3.0, 3.0]}
    assert "minus_control" not in rows["none"] and "minus_control" not in rows["dropout"]
