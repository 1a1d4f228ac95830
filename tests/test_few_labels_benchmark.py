"""The pure parts of benchmarks/few_labels.py: who is labelled. Nothing is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
        assert ("schedule.init_from" in row.settings) == (row.trainer == "ModalityDropoutTrainer"), name
