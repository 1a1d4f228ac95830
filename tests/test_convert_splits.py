from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.dataset_conversion.splits import cross_validation, hold_out, write_splits


@given(number=st.integers(2, 30), data=st.data())
def test_each_case_validates_once_and_trains_in_the_other_folds(number, data):
    cases = [f"case{index:02d}" for index in range(number)]
    folds = data.draw(st.integers(2, number))
    splits = cross_validation(cases, folds, seed=data.draw(st.integers(0, 2**32 - 1)))
    assert len(splits) == folds
    assert sorted(case for fold in splits for case in fold["val"]) == cases
    for fold in splits:
        assert sorted(fold["train"] + fold["val"]) == cases
        assert len(fold["val"]) in (number // folds, number // folds + 1)


@pytest.mark.parametrize(("number", "folds"), [(2, 2), (3, 3), (5, 5), (12, 5)])
def test_the_default_is_five_folds_or_one_per_case(number, folds):
    assert len(cross_validation([f"case{index}" for index in range(number)])) == folds


def test_five_default_folds_are_those_of_nnunet():
    cases = [f"case{index:02d}" for index in range(11)]
    assert cross_validation(cases[::-1]) == generate_crossval_split(cases)


def test_another_seed_deals_the_cases_out_differently():
    cases = [f"case{index:02d}" for index in range(20)]
    assert cross_validation(cases, 5, seed=1) == cross_validation(cases, 5, seed=1)
    assert cross_validation(cases, 5, seed=1) != cross_validation(cases, 5, seed=2)


def test_one_case_cannot_be_split():
    with pytest.raises(ValueError, match="1 folds of 1 training cases"):
        cross_validation(["a"])


def test_hold_out_trains_on_all_other_cases():
    assert hold_out(["a", "b", "c"], ["b"]) == [{"train": ["a", "c"], "val": ["b"]}]


def test_writing_makes_the_folder_and_leaves_no_other_file(tmp_path):
    splits = [{"train": ["a"], "val": ["b"]}]
    write_splits(splits, tmp_path / "Dataset007_Toy" / "splits_final.json")
    assert json.loads((tmp_path / "Dataset007_Toy" / "splits_final.json").read_text()) == splits
    assert [path.name for path in (tmp_path / "Dataset007_Toy").iterdir()] == ["splits_final.json"]


def test_nnunet_accepts_the_data_set_and_keeps_the_split(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    random = np.random.default_rng(0)
    for case in "abc":
        folder = tmp_path / "source" / case
        folder.mkdir(parents=True)
        label = np.zeros((16, 24, 24), np.uint8)
        label[6:10, 8:16, 8:16] = 1
        for file in ("t1.nii.gz", "t2.nii.gz"):
            image = random.normal(100, 10, label.shape) + 50 * label
            sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.float32)), str(folder / file))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "seg.nii.gz"))
    options = "-d 7 --name Toy --modality T1=t1.nii.gz --modality T2=t2.nii.gz --label seg.nii.gz --class lesion=1"
    assert cli.main(["convert", "generic", str(tmp_path / "source"), *options.split(), "--val-cases", "c"]) == 0
    split = tmp_path / "preprocessed" / "Dataset007_Toy" / "splits_final.json"
    written = split.read_bytes()

    extract_fingerprints([7], num_processes=1)
    plan_experiments([7])
    preprocess([7], configurations=("3d_fullres",), num_processes=(1,))
    assert len(list((split.parent / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == 3
    assert split.read_bytes() == written
    raw = tmp_path / "raw" / "Dataset007_Toy"
    for case in "abc":
        images = [str(raw / "imagesTr" / f"{case}_000{channel}.nii.gz") for channel in (0, 1)]
        assert check_cases(images, str(raw / "labelsTr" / f"{case}.nii.gz"), 2, SimpleITKIO)
