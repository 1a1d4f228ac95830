"""The data of benchmarks/accuracy.py: who is labelled, noisy labels; numbers of earlier runs. Nothing is trained."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
import accuracy_data
from accuracy_data import Parts, check_nested, divide, make_data, write_raw
from accuracy_rows import PRESETS
from accuracy_verdict import difference
from label_noise import perturb

from nnunetv2_mstkd.evaluation.results import COLUMNS, TRAINING, subset_size

PRESET = dataclasses.replace(PRESETS["slices"], test_cases=3, validation_cases=1)
INCOMPLETE = {"case_00", "case_01"}


@pytest.fixture
def source(tmp_path):
    """Twelve patients of two channels, of whom two lack the second."""
    folder = tmp_path / "Dataset001_Twelve"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    content = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "tumor": 1}}
    (folder / "dataset.json").write_text(json.dumps(content))
    for number in range(12):
        label = sitk.Image(4, 4, 4, sitk.sitkUInt8) + 1
        sitk.WriteImage(label, str(folder / "labelsTr" / f"case_{number:02d}.nii.gz"))
        for channel in range(2):
            image = sitk.Image(4, 4, 4, sitk.sitkUInt8) + (0 if channel and number < 2 else 1)
            sitk.WriteImage(image, str(folder / "imagesTr" / f"case_{number:02d}_{channel:04d}.nii.gz"))
    return folder


@pytest.mark.parametrize(("labelled", "unlabelled"), [("2", 6), ("4", 4), ("all", 0), ("complete", 0)])
def test_parts_share_no_patient(source, labelled, unlabelled):
    parts = divide(source, PRESET, labelled)
    cases = [case for part in dataclasses.astuple(parts) for case in part]
    assert len(cases) == len(set(cases)) == (10 if labelled == "complete" else 12)
    assert not INCOMPLETE & {*parts.test, *parts.validation}
    assert (set(parts.labelled) >= INCOMPLETE) == (labelled == "all")
    assert len(parts.unlabelled) == unlabelled


def test_fewer_labelled_patients_are_among_the_more(source):
    few, many = divide(source, PRESET, "2"), divide(source, PRESET, "4")
    assert set(few.labelled) < set(many.labelled)
    assert (few.test, few.validation) == (many.test, many.validation)
    other = divide(source, dataclasses.replace(PRESET, data_seed=1), "2")
    assert other.labelled != few.labelled


@pytest.mark.parametrize("labelled", ["7", "-1", "some"])
def test_a_number_of_labels_that_cannot_be_is_refused(source, labelled):
    with pytest.raises(ValueError, match=f"--labelled {labelled}: expected a number up to 6, 'all' or 'complete'"):
        divide(source, PRESET, labelled)


def test_too_few_patients_are_refused(source):
    with pytest.raises(ValueError, match="none is left for the part 'labelled'"):
        divide(source, dataclasses.replace(PRESET, test_cases=9), "complete")
    with pytest.raises(ValueError, match="'test'"):
        Parts([], ["a"], ["b"], [])


def test_unlabelled_cases_hold_the_ignore_label_alone(source, tmp_path):
    parts, raw = divide(source, PRESET, "2"), tmp_path / "raw"
    write_raw(source, parts, raw)
    labels = {path.name[:7]: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in raw.glob("labels*/*")}
    assert {case for case, values in labels.items() if (values == 2).all()} == set(parts.unlabelled)
    assert {case for case, values in labels.items() if (values == 1).all()} == {*labels} - {*parts.unlabelled}
    content = json.loads((raw / "dataset.json").read_text())
    assert (content["labels"]["ignore"], content["numTraining"]) == (2, 9)
    assert len(list(raw.glob("imagesTs/*"))) == 6


# ---- noisy labels --------------------------------------------------------------------------------------------------


def ball(shape: int = 40, radii: tuple[int, ...] = (14, 8)) -> sitk.Image:
    """Nested balls, at 2 mm."""
    distance = np.linalg.norm(np.indices((shape,) * 3) - shape // 2, axis=0)
    values = sum((distance <= radius).astype(np.uint8) for radius in radii)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((2.0, 2.0, 2.0))
    image.SetOrigin((1.0, 2.0, 3.0))
    return image


def test_noise_moves_boundaries_by_about_its_standard_deviation():
    from scipy import ndimage

    exact = ball(radii=(14,))
    noisy = perturb(exact, 2.0, np.random.default_rng(0))
    assert (noisy.GetSpacing(), noisy.GetOrigin()) == (exact.GetSpacing(), exact.GetOrigin())
    inside, moved = (sitk.GetArrayFromImage(image) > 0 for image in (exact, noisy))
    boundary = moved ^ ndimage.binary_erosion(moved)
    outside = ndimage.distance_transform_edt(~inside, sampling=2.0) - ndimage.distance_transform_edt(
        inside, sampling=2.0
    )
    assert 1.0 < outside[boundary].std() < 3.0
    assert np.array_equal(sitk.GetArrayFromImage(perturb(exact, 0.0, np.random.default_rng(0))) > 0, inside)


def test_noise_spares_the_ignore_label_of_unlabelled_cases(source, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_data, "_plan", lambda preset: None)
    monkeypatch.setattr(accuracy_data, "write_splits", lambda splits, file: None)
    preset = dataclasses.replace(PRESET, label_noise=2.0)
    make_data(tmp_path, preset, source, "2")
    (raw,) = (tmp_path / "raw").iterdir()
    parts = divide(source, PRESET, "2")
    for case in parts.unlabelled:
        assert (sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / f"{case}.nii.gz"))) == 2).all()
    replaced = {file.name[:7] for file in (raw / "labelsTr").iterdir() if not file.is_symlink()}
    assert replaced == {*parts.labelled, *parts.unlabelled}


def test_a_quarter_of_the_innermost_parts_is_missed():
    random = np.random.default_rng(0)
    seen = [int(sitk.GetArrayFromImage(perturb(ball(16, (6, 3)), 0.5, random)).max()) for _ in range(400)]
    assert set(seen) == {1, 2}
    assert 0.18 < seen.count(1) / len(seen) < 0.32


def test_noise_is_for_nested_labels():
    check_nested({"background": 0, "tumor": 1})
    check_nested({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3], "ignore": 4})
    for labels in ({"background": 0, "a": 1, "b": 2}, {"background": 0, "whole": [1, 2, 3], "core": [1, 3]}):
        with pytest.raises(ValueError, match="--label-noise needs one label"):
            check_nested(labels)


# ---- hours ---------------------------------------------------------------------------------------------------------


def test_equal_hours_become_epochs_by_the_time_of_a_step():
    from accuracy_rows import chosen_rows

    preset = dataclasses.replace(PRESET, hours=1.0, first_epochs=10, iterations=50)
    (row,) = chosen_rows(["kd"])
    # before steps are timed: a training of full length, so that each of its phases can be timed
    assert row.epochs(preset) == preset.student_epochs
    known = dataclasses.replace(preset, step_seconds={"kd": 0.3, "KDTeacherTrainer": 0.2, "dropout": 0.2})
    assert row.epochs(known) == round((3600 - 10 * 50 * 0.2) / (50 * 0.3))
    (scratch,) = chosen_rows(["dropout"])
    assert scratch.epochs(known) == 3600 / (50 * 0.2)
    assert scratch.epochs(preset) == 10 + preset.student_epochs


def test_names_of_results_say_what_was_run(tmp_path):
    benchmark = accuracy.Benchmark(
        tmp_path, "slices", None, Path("Dataset500_LGG"), "16", {"hours": 0.25, "label_noise": 2.0}
    )
    assert benchmark.title == "slices_lgg_16_hours0.25_noise2"
    assert accuracy.Benchmark(tmp_path, "short").title == "short"


def test_a_folder_of_other_data_is_refused(tmp_path, source, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, "")
    accuracy.Benchmark(tmp_path / "out", "slices", data=source).enter()
    with pytest.raises(ValueError, match=r"labelled 'complete' \(now '16'\)"):
        accuracy.Benchmark(tmp_path / "out", "slices", data=source, labelled="16").enter()
    with pytest.raises(ValueError, match=r"hours None \(now 2.0\)"):
        accuracy.Benchmark(tmp_path / "out", "slices", data=source, changes={"hours": 2.0}).enter()
    with pytest.raises(ValueError, match=r"labelled 'complete' \(now None\)"):  # not as the phantom
        accuracy.Benchmark(tmp_path / "out", "slices").enter()


# ---- earlier runs --------------------------------------------------------------------------------------------------


FEW_LABELS = sorted((Path(accuracy.__file__).parent / "results").glob("few_labels_*.json"))


@pytest.mark.parametrize("file", FEW_LABELS, ids=[file.stem for file in FEW_LABELS])
def test_numbers_of_few_labels_follow_from_the_values_by_case(file):
    for rows in json.loads(file.read_text())["rows"].values():
        for name, row in rows.items():
            by_seed = {seed: fmean(map(fmean, subsets.values())) for seed, subsets in row["cases"].items()}
            assert row["seeds"] == pytest.approx(by_seed, abs=0.01)
            assert row["mean"] == pytest.approx(fmean(by_seed.values()), abs=0.01)
            of_subset = {
                subset: fmean(fmean(row["cases"][seed][subset]) for seed in by_seed) for subset in row["subsets"]
            }
            assert row["subsets"] == pytest.approx(of_subset, abs=0.01)
            assert row.get("minus_control") == (minus_control(rows, name) if name != "dropout" else None)


def minus_control(rows: dict, name: str) -> dict | None:
    """The difference of a row from ``dropout`` over their common seeds, as the file has it."""
    seeds = [seed for seed in rows[name]["cases"] if seed in rows.get("dropout", {"cases": {}})["cases"]]
    if not seeds:
        return None
    values = [
        (model, "any", "0", f"{case:03d}", subset, subset_size(subset), "average", "dice", value / 100, seed)
        for model in (name, "dropout")
        for seed in seeds
        for subset, of_subset in rows[model]["cases"][seed].items()
        for case, value in enumerate(of_subset)
    ]
    found = difference(pd.DataFrame(values, columns=[*COLUMNS, TRAINING]), name, "dropout")
    by_seed = dict(zip(seeds, found["by_seed"] or [found["difference"]], strict=True))
    return {
        "difference": round(found["difference"], 2),
        "by_seed": {seed: round(value, 2) for seed, value in by_seed.items()},
        "interval" if len(seeds) > 1 else "over_cases": [round(found[key], 2) for key in ("low", "high")],
    }
