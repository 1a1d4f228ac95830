from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import release_trees
import SimpleITK as sitk
from conftest import Folders, empty_folders, plan_and_preprocess
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.dataset_conversion.splits import (
    cross_validation,
    draw_test_cases,
    hold_out,
    read_lists,
    refuse_unknown_cases,
    without,
    write_splits,
)
from nnunetv2_mstkd.errors import InputError


def patient_of(case: str) -> str:
    return case.split("-")[0]


@given(number=st.integers(2, 30), data=st.data())
def test_each_case_validates_once(number, data):
    cases = [f"case{index:02d}" for index in range(number)]
    folds = data.draw(st.integers(2, number))
    splits = cross_validation(cases, folds, seed=data.draw(st.integers(0, 2**32 - 1)))
    assert len(splits) == folds
    assert sorted(case for fold in splits for case in fold["val"]) == cases
    for fold in splits:
        assert sorted(fold["train"] + fold["val"]) == cases
        assert len(fold["val"]) in (number // folds, number // folds + 1)


@pytest.mark.parametrize(("number", "folds"), [(2, 2), (3, 3), (5, 5), (12, 5)])
def test_default_number_of_folds(number, folds):
    assert len(cross_validation([f"case{index}" for index in range(number)])) == folds


def test_default_folds_equal_nnunets():
    cases = [f"case{index:02d}" for index in range(11)]
    assert cross_validation(cases[::-1]) == generate_crossval_split(cases)


def test_folds_depend_on_the_seed():
    cases = [f"case{index:02d}" for index in range(20)]
    assert cross_validation(cases, 5, seed=1) == cross_validation(cases, 5, seed=1)
    assert cross_validation(cases, 5, seed=1) != cross_validation(cases, 5, seed=2)


@given(points=st.lists(st.integers(1, 4), min_size=2, max_size=12), data=st.data())
def test_patients_are_never_on_both_sides(points, data):
    cases = [f"p{patient}-{point}" for patient, number in enumerate(points) for point in range(number)]
    folds = data.draw(st.integers(2, len(points)))
    splits = cross_validation(cases, folds, patient_of=patient_of)
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(cases)
    for fold in splits:
        assert {patient_of(case) for case in fold["train"]}.isdisjoint({patient_of(case) for case in fold["val"]})
        assert sorted(fold["train"] + fold["val"]) == sorted(cases)
    fraction = data.draw(st.floats(0.05, 0.5))
    test = draw_test_cases(cases, fraction, patient_of=patient_of)
    assert {patient_of(case) for case in test}.isdisjoint({patient_of(case) for case in set(cases) - set(test)})
    assert 1 <= len({patient_of(case) for case in test}) < len(points)


def test_drawn_test_cases_depend_on_the_seed_alone():
    cases = [f"case{index:02d}" for index in range(20)]
    assert draw_test_cases(cases, 0.2, seed=3) == draw_test_cases(cases[::-1], 0.2, seed=3)
    assert draw_test_cases(cases, 0.2, seed=3) != draw_test_cases(cases, 0.2, seed=4)
    assert len(draw_test_cases(cases, 0.2)) == 4


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 0.99])
def test_impossible_test_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match="--test-fraction"):
        draw_test_cases(["a", "b", "c"], fraction)


def test_hold_out_refuses_a_patient_on_both_sides():
    with pytest.raises(ValueError, match="fold 0 trains and validates on 1 patients, such as p1"):
        hold_out(["p1-1", "p1-2", "p2-1"], ["p1-2"], patient_of=patient_of)


def write_lists(folder, **lists):
    for name, cases in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(cases) + "\n")
    return sorted(folder.glob("*.txt"))


def test_published_lists_of_three_parts(tmp_path):
    files = write_lists(tmp_path, train=["HGG/b", "HGG/a"], val=["c"], test=["LGG/d"])
    assert read_lists(files) == ([{"train": ["a", "b"], "val": ["c"]}], ["d"])


def test_test_lists_validate_without_validation_lists(tmp_path):
    files = write_lists(tmp_path, train1=["a"], test1=["b"], train2=["b"], test2=["a"])
    assert read_lists(files) == ([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}], [])


def test_split_table(tmp_path):
    (tmp_path / "split.csv").write_text("Subject_ID,Split\na,train\nb,Training\nc,validation\nd,test\n")
    assert read_lists([tmp_path / "split.csv"]) == ([{"train": ["a", "b"], "val": ["c"]}], ["d"])


def test_tables_of_one_part_and_names_that_hold_a_number(tmp_path):
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "val15splits.csv").write_text('case,mask\nc,"[False, False, True, False]"\n\n')
    (tmp_path / "Brats18_test15splits.csv").write_text('case,mask\r\nHGG/d,"[True, True, True, True]"\r\n')
    assert read_lists(sorted(tmp_path.iterdir())) == ([{"train": ["a", "b"], "val": ["c"]}], ["d"])


def test_grade_before_the_case_is_removed_where_a_case_follows(tmp_path):
    files = write_lists(tmp_path, train=["HG_case_1", "case_2"], val=["LG_case_3", "HG_other"])
    assert read_lists(files, r"case_\d") == ([{"train": ["case_1", "case_2"], "val": ["HG_other", "case_3"]}], [])
    assert read_lists(files) == ([{"train": ["HG_case_1", "case_2"], "val": ["HG_other", "LG_case_3"]}], [])


def test_comments_in_lists_are_skipped(tmp_path):
    (tmp_path / "split.csv").write_text("# from somewhere\ncase,part\na,train\nb,val\n")
    assert read_lists([tmp_path / "split.csv"]) == ([{"train": ["a"], "val": ["b"]}], [])


@pytest.mark.parametrize(
    ("name", "fold"),
    [("val", 0), ("val2", 2), ("validation_2", 2), ("val2_cases", 2), ("val15splits", 0), ("BraTS23_val", 0)],
)
def test_fold_in_the_name_of_a_list(tmp_path, name, fold):
    files = write_lists(tmp_path, **{name: ["b"], f"train{fold or ''}": ["a"]})
    assert read_lists(files) == ([{"train": ["a"], "val": ["b"]}], [])


def test_splits_final_as_a_list(tmp_path):
    splits = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    assert read_lists([tmp_path / "splits_final.json"]) == (splits, [])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": ["a", "b"], "val": ["b"]}, "b in more than one part"),
        ({"train": ["a", "b"], "val": ["c"], "test": ["a"]}, "a in more than one part"),
        ({"train": ["a"]}, "no train or no val cases"),
        ({"cases": ["a"]}, "cases.txt is not a list of cases"),
        ({"constrain": ["a"]}, "constrain.txt is not a list of cases"),
        ({"train": ["a"], "val": ["b"], "val15splits": ["c"]}, "a second list of val cases"),
        ({"train": ["a"], "training": ["b"], "val": ["c"]}, "a second list of train cases"),
        (
            {"train1": ["a"], "val1": ["b"], "test1": ["c"], "train2": ["a"], "val2": ["c"], "test2": ["b"]},
            "the 2 splits have different test cases",
        ),
    ],
)
def test_contradicting_lists_are_refused(tmp_path, lists, message):
    with pytest.raises(ValueError, match=message):
        read_lists(write_lists(tmp_path, **lists))


def test_unreadable_lists_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_lists([tmp_path / "train.txt"])
    (tmp_path / "split.csv").write_text("case,part\na,first\n")
    with pytest.raises(ValueError, match="puts a into 'first', expected train, val or test"):
        read_lists([tmp_path / "split.csv"])
    (tmp_path / "split.csv").write_text("case;part\na;train\n")
    with pytest.raises(ValueError, match=r"split\.csv is separated by semicolons"):
        read_lists([tmp_path / "split.csv"])
    (tmp_path / "splits.json").write_text('{"train": 1}')
    with pytest.raises(ValueError, match="is not a list of splits"):
        read_lists([tmp_path / "splits.json"])
    (tmp_path / "train.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"train\.txt is not UTF-8 text"):
        read_lists([tmp_path / "train.txt"])


def test_short_rows_and_byte_order_marks_of_lists(tmp_path):
    (tmp_path / "split.csv").write_text("part,case\ntrain,a\nval,b\ntrain\n")
    assert read_lists([tmp_path / "split.csv"]) == ([{"train": ["", "a"], "val": ["b"]}], [])
    files = write_lists(tmp_path, train=["a"], val=["b"])
    files[0].write_text("a\n", encoding="utf-8-sig")
    assert read_lists(files) == ([{"train": ["a"], "val": ["b"]}], [])


def test_lists_of_unknown_cases_are_refused():
    with pytest.raises(ValueError, match="the lists name 2 of 3 cases that do not exist: b, c"):
        refuse_unknown_cases([{"train": ["a"], "val": ["b"]}], ["c"], ["a"])


def test_folds_keep_cases_in_both_parts():
    splits = [{"train": ["a", "b"], "val": ["c"]}]
    assert without(splits, ["a"]) == [{"train": ["b"], "val": ["c"]}]
    with pytest.raises(InputError, match="all val cases of fold 0 have problems: c"):
        without(splits, ["c"])


def test_one_case_cannot_be_split():
    with pytest.raises(ValueError, match="1 folds of 1 training cases"):
        cross_validation(["a"])


def test_hold_out_trains_on_all_other_cases():
    assert hold_out(["a", "b", "c"], ["b"]) == [{"train": ["a", "c"], "val": ["b"]}]


def test_write_splits_creates_the_folder(tmp_path):
    splits = [{"train": ["a"], "val": ["b"]}]
    write_splits(splits, tmp_path / "Dataset007_Toy" / "splits_final.json")
    assert json.loads((tmp_path / "Dataset007_Toy" / "splits_final.json").read_text()) == splits
    assert [path.name for path in (tmp_path / "Dataset007_Toy").iterdir()] == ["splits_final.json"]


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Convert four cases of BraTS 2024 GLI, two of one patient, with these options; return code and splits file."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    release_trees.use_small_grids(monkeypatch)
    release_trees.make_release(tmp_path / "source", "brats2024_gli")

    def convert(*options):
        arguments = ["brats2024_gli", str(tmp_path / "source"), "-d", "7", "--name", "Toy", "--workers", "1"]
        code = cli.main(["convert", *arguments, *map(str, options)])
        return code, tmp_path / "preprocessed" / "Dataset007_Toy" / "splits_final.json"

    return convert


A, B, C, D = release_trees.case_names("brats2024_gli")


def test_published_lists_make_the_fold_and_the_test_cases(release, tmp_path):
    files = write_lists(tmp_path, train=[A, B], val=[C], test=[D])
    code, file = release("--splits", *files)
    assert code == 0
    assert json.loads(file.read_text()) == [{"train": [A, B], "val": [C]}]
    assert len(list((tmp_path / "raw" / "Dataset007_Toy" / "imagesTs").iterdir())) == 4


def test_published_lists_that_share_a_patient_are_refused(release, tmp_path, capsys):
    files = write_lists(tmp_path, train=[A, C], val=[B, D])
    assert release("--splits", *files)[0] == 2
    assert "fold 0 trains and validates on 1 patients, such as BraTS-GLI-00005" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["--test-cases", "--splits", "--no-splits"])
def test_a_patient_in_training_and_test_is_refused(release, tmp_path, capsys, way):
    files = write_lists(tmp_path, train=[A, C], val=[D], test=[B])
    options = {"--splits": ["--splits", *files], "--no-splits": ["--no-splits", "--test-cases", B]}
    assert release(*options.get(way, ["--test-cases", B]))[0] == 2
    error = capsys.readouterr().err
    assert f"patient BraTS-GLI-00005 is in training and test: {A} trains or validates, {B} tests" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "raw").iterdir())


def test_skipped_cases_are_removed_from_lists(release, tmp_path):
    (tmp_path / "source" / B / f"{B}-seg.nii.gz").unlink()
    files = write_lists(tmp_path, train=[A, B], val=[C])
    code, file = release("--splits", *files)
    assert code == 1
    assert json.loads(file.read_text()) == [{"train": [A], "val": [C]}]


def test_foreign_folds_are_kept(release, capsys):
    _, file = release()
    file.write_text("[]")
    assert release()[0] == 2
    assert "splits_final.json already exists with other folds; --overwrite replaces it" in capsys.readouterr().err
    assert file.read_text() == "[]"
    assert release("--overwrite", "--folds", "2")[0] == 0
    assert len(json.loads(file.read_text())) == 2


def test_missing_folds_are_noted(release, tmp_path, capsys):
    for case in (B, C, D):
        shutil.rmtree(tmp_path / "source" / case)
    code, file = release()
    assert code == 0
    assert not file.exists()
    assert "note: no folds were written, because a single patient cannot be split" in capsys.readouterr().out


def test_folds_without_a_data_set_are_kept(release, tmp_path, capsys):
    release()
    shutil.rmtree(tmp_path / "raw" / "Dataset007_Toy")
    assert release()[0] == 2
    assert "--overwrite replaces it, --no-splits leaves the folds to nnU-Net" in capsys.readouterr().err
    assert release("--no-splits")[0] == 0


def test_stale_folds_are_reported(release, tmp_path, capsys):
    release()
    shutil.rmtree(tmp_path / "source" / D)
    assert release("--overwrite", "--no-splits")[0] == 2
    assert f"names 1 case that it does not have, such as {D}; remove the file" in capsys.readouterr().err
    assert release("--overwrite")[0] == 0


def test_nnunet_accepts_the_data_set_and_keeps_the_split(tmp_path, monkeypatch):
    empty_folders(tmp_path, monkeypatch)
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

    folders = Folders(*(tmp_path / name for name in ("raw", "preprocessed", "results")))
    plan_and_preprocess(folders, 7, "3d_fullres")
    assert len(list((split.parent / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == 3
    assert split.read_bytes() == written
    raw = tmp_path / "raw" / "Dataset007_Toy"
    for case in "abc":
        images = [str(raw / "imagesTr" / f"{case}_000{channel}.nii.gz") for channel in (0, 1)]
        assert check_cases(images, str(raw / "labelsTr" / f"{case}.nii.gz"), 2, SimpleITKIO)
