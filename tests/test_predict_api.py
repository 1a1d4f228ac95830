"""Prediction from Python: ``nnunetv2_mstkd.Predictor``."""

from __future__ import annotations

import doctest
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from predict_inputs import (
    PRESENT,
    SHAPE,
    SPACING,
    files,
    noise,
    predict,
    read,
    segmentations,
    trainer_class,
    write,
    write_case,
    write_model,
)

import nnunetv2_mstkd
from nnunetv2_mstkd import Predictor, cli
from nnunetv2_mstkd.images.writing import write_given
from nnunetv2_mstkd.inference import predictor as module


def images_of(folders: Path, name: str) -> dict[str, Path]:
    return {f"T{channel}": folders / "in" / f"{name}_{channel:04d}.nii.gz" for channel in PRESENT[name]}


# ---- importing -----------------------------------------------------------------------------------------------------


def test_import_is_cheap():
    command = [sys.executable, "-X", "importtime", "-c", "import nnunetv2_mstkd"]
    root = Path(nnunetv2_mstkd.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "nnunetv2_mstkd" in imported
    assert not {"torch", "numpy", "pandas", "SimpleITK", "nnunetv2"} & imported


def test_names_of_the_api():
    assert {"Predictor", "Prediction", "evaluate", "compare", "__version__"} <= set(nnunetv2_mstkd.__all__)
    assert set(nnunetv2_mstkd.__all__) <= set(dir(nnunetv2_mstkd))
    assert nnunetv2_mstkd.Predictor is module.Predictor and nnunetv2_mstkd.Prediction is module.Prediction
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        nnunetv2_mstkd.Predicter  # noqa: B018


def test_examples(trained, tmp_path, monkeypatch):
    """Those of the docstrings, on a trained model, without nnU-Net's environment variables."""
    for name in ("raw", "preprocessed", "results", "extTrainer"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    (tmp_path / "in").mkdir()
    source = sorted((trained.raw / trained.dataset / "imagesTs").glob("*_0000.nii.gz"))[0]
    for case, channels in {"a": [0], "b": [0, 3]}.items():
        for channel in channels:
            image = source.with_name(source.name.replace("_0000", f"_{channel:04d}"))
            shutil.copy(image, tmp_path / "in" / f"{case}_{channel:04d}.nii.gz")
    names = {
        "model_folder": trained.fold("MSTKDTrainer").parent,
        "images": tmp_path / "in",
        "t1_file": tmp_path / "in" / "b_0000.nii.gz",
        "flair_file": tmp_path / "in" / "b_0003.nii.gz",
        "output": tmp_path,
    }
    names["predictor"] = Predictor(names["model_folder"], folds=[0], device="cpu")
    tests = [test for test in doctest.DocTestFinder().find(module, extraglobs=names) if test.examples]
    assert len(tests) == 4
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.failures == 0
    assert (tmp_path / "segmentation.nii.gz").is_file()


# ---- one case ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("MSTKDTrainer", {}),
        ("nnUNetTrainer", {"labels": tiny.REGIONS, "mirroring": (0, 2)}),
        ("AdaMMTrainer", {"block": {"adamm": {"gate": 0.5}}}),
        ("MSTKDTrainer", {"reader": "NibabelIO"}),
        ("MSTKDTrainer", {"reader": "SimpleITKIOWithReorient"}),
        ("MSTKDTrainer", {"reader": "NibabelIOWithReorient"}),
    ],
    ids=["student", "regions", "gate", "nibabel", "reorient", "nibabel, reorient"],
)
def test_same_labels_as_the_command(folders, trainer, options):
    model = write_model(trainer_class(trainer), **options)
    assert predict(folders, model, "--save_probabilities") == 0
    predictor = Predictor(model, [0], device="cpu")
    for name in PRESENT:
        result = predictor.predict(images_of(folders, name))
        expected = folders / "out" / f"{name}.nii.gz"
        np.testing.assert_array_equal(result.segmentation, read(expected))
        probabilities = np.load(folders / "out" / f"{name}.npz")["probabilities"]
        np.testing.assert_array_equal(result.probabilities, probabilities)
        result.save(folders / "one.nii.gz")
        assert (folders / "one.nii.gz").read_bytes() == expected.read_bytes()
        assert result.available == tuple(f"T{channel}" for channel in PRESENT[name])


def test_images_in_memory(folders, model):
    predictor = Predictor(model, device="cpu")
    files_of = images_of(folders, "two")
    expected = predictor.predict(files_of)
    images = {name: sitk.ReadImage(str(path)) for name, path in files_of.items()}
    found = predictor.predict(images)
    np.testing.assert_array_equal(found.segmentation, expected.segmentation)
    mixed = predictor.predict({"t3 ": str(files_of["T3"]), "T1": images["T1"]})
    np.testing.assert_array_equal(mixed.segmentation, expected.segmentation)
    assert mixed.subset == "T1+T3"
    found.save(folders / "found.mha")
    assert sitk.ReadImage(str(folders / "found.mha")).GetOrigin() == pytest.approx(images["T1"].GetOrigin())


def test_arrays(folders, model):
    predictor = Predictor(model, device="cpu")
    write(folders / "a.nii.gz", noise(1), origin=(0.0, 0.0, 0.0), direction=np.eye(3).ravel().tolist())
    expected = predictor.predict({"T1": folders / "a.nii.gz"})
    for array in (noise(1), noise(1).astype(np.float64)):
        found = predictor.predict({"T1": (array, SPACING[::-1])})
        np.testing.assert_array_equal(found.segmentation, expected.segmentation)
    flat = write_model(trainer_class("ModalityDropoutTrainer"), dimensions=2)
    result = Predictor(flat, device="cpu").predict({"T1": (noise(1, (20, 18)), (1, 1))})
    assert result.segmentation.shape == (20, 18)


def test_zero_images_are_absent(folders, model):
    predictor = Predictor(model, device="cpu")
    images = images_of(folders, "one")
    expected = predictor.predict(images)
    result = predictor.predict({**images, "T0": (np.zeros(SHAPE), (1, 1, 1))})
    assert result.available == expected.available == ("T2",)
    np.testing.assert_array_equal(result.segmentation, expected.segmentation)


def test_expected_dice(folders, model):
    (model / "subsets").mkdir()
    subsets = {"T3+T1": {"WT": {"dice": 0.8}}}
    (model / "subsets" / "summary.json").write_text(json.dumps({"subsets": subsets}))
    predictor = Predictor(model, device="cpu")
    assert predictor.predict(images_of(folders, "two")).expected_dice == {"WT": 0.8}
    assert predictor.predict(images_of(folders, "one")).expected_dice is None


def test_an_evaluation_that_cannot_be_read_does_not_stop_prediction(folders, model, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "summary.json")

    monkeypatch.setattr("nnunetv2_mstkd.inference.predictor.read_expected_dice", refuse)
    assert Predictor(model, [0], device="cpu").expected_dice == {}
    assert "warning: [Errno 13] Permission denied" in capsys.readouterr().err


def nan_image() -> np.ndarray:
    array = noise(1)
    array[5, 5, 5] = np.nan
    return array


GOOD = (noise(2), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "no image is given; name at least one of T0, T1, T2, T3"),
        ({"PD": GOOD}, "unknown modality 'PD'; known are T0, T1, T2, T3"),
        ({1: GOOD}, r"unknown modality '1' \(did you mean 'T1'\?\); known are T0, T1, T2, T3"),
        ({"all": GOOD}, "unknown modality 'all'"),
        ({"T0": GOOD, "t0": GOOD}, "T0 is given twice"),
        ({"T0": GOOD, "T1": (noise(1), (1, 1, 2))}, "T1 has spacing .* as in T0"),
        ({"T0": GOOD, "T1": (noise(1, (14, 20, 17)), (1, 1, 1))}, "T1 has size"),
        ({"T0": (nan_image(), (1, 1, 1))}, "T0 .* voxels that are NaN"),
        ({"T0": (np.zeros(SHAPE), (1, 1, 1))}, "only all-zero images"),
        ({"T0": (np.full(SHAPE, 7), (1, 1, 1))}, "is constant, 7"),
        ({"T0": noise(1)}, "the image of T0 is a ndarray, expected"),
        ({"T0": 5}, "the image of T0 is a int, expected"),
        (["t0.nii.gz"], "images is a list, expected a dict"),
        ({"T0": (noise(1), (1, 1))}, "expected 2 or 3 axes and a positive spacing"),
        ({"T0": (noise(1), (1, 1, -1))}, "expected 2 or 3 axes and a positive spacing"),
        ({"T0": (noise(1) > 0, (1, 1, 1))}, "of type bool, expected real numbers"),
        ({"T0": "nowhere.nii.gz"}, "no file nowhere.nii.gz .modality T0"),
    ],
)
def test_bad_images(model, images, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Predictor(model, device="cpu").predict(images)
    assert "\n" not in str(caught.value)


def test_a_type_that_the_format_lacks_is_no_full_disk(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written as \.gipl: .*LONG"):
        write_given((np.zeros(SHAPE, np.int64), (1, 1, 1)), tmp_path / "a.gipl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 3}, "fold_3/checkpoint_final.pth not found"),
        ({"folds": ["one"]}, "expected fold numbers"),
        ({"device": "gpu"}, "the device is 'gpu', expected 'cuda'"),
        ({"step_size": 0}, "step size is 0"),
        ({"student": 1}, "has one network and no students"),
        ({"checkpoint": "checkpoint_best.pth"}, "no fold of .* is finished"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Predictor(model, **{"device": "cpu", **options})


def test_all_finished_folds_are_the_default(folders):
    model = write_model(trainer_class("MSTKDTrainer"), folds=(0, 2))
    shutil.copytree(model / "fold_0", model / "fold_all")
    predictor = Predictor(model, device="cpu")
    assert predictor.folds == (0, 2)
    found = predictor.predict(images_of(folders, "one")).segmentation
    assert predict(folders, model, "-f", "0", "2") == 0
    np.testing.assert_array_equal(found, read(folders / "out" / "one.nii.gz"))
    assert Predictor(model, "all", device="cpu").folds == ("all",)


def test_one_student_alone(folders):
    model = write_model(trainer_class("SMMLTrainer"))
    images = images_of(folders, "two")
    found = [Predictor(model, device="cpu", student=student).predict(images).probabilities for student in (None, 1, 2)]
    assert not np.array_equal(found[1], found[2]) and not np.array_equal(found[0], found[1])
    with pytest.raises(ValueError, match="has students 1 to 2"):
        Predictor(model, device="cpu", student=3)


def test_a_format_that_cannot_be_written(folders, model):
    result = Predictor(model, device="cpu").predict(images_of(folders, "one"))
    with pytest.raises(ValueError, match=r"out\.png has no ending that SimpleITKIO can write, which are \.nii\.gz"):
        result.save(folders / "out.png")
    result.save(folders / "new" / "out.nii")
    np.testing.assert_array_equal(read(folders / "new" / "out.nii"), result.segmentation)
    assert list(files(folders / "new")) == ["out.nii"]


@pytest.mark.parametrize("labels", [None, tiny.REGIONS], ids=["labels", "regions"])
def test_uncertainty_is_that_of_the_command(folders, labels):
    model = write_model(trainer_class("MSTKDTrainer"), labels=labels)
    assert predict(folders, model, "--save-uncertainty") == 0
    predictor = Predictor(model, [0], device="cpu")
    predictor.predict(images_of(folders, "two")).save_uncertainty(folders / "map.nii.gz")
    expected = read(folders / "out" / "uncertainty" / "two.nii.gz")
    assert expected.any()
    np.testing.assert_array_equal(read(folders / "map.nii.gz"), expected)
    assert all(0 not in values for values in predictor.labels.values())
    assert set(predictor.labels) == set(labels or predictor.labels) - {"background"}


def test_every_pass_of_the_network_is_reported(folders):
    model = write_model(trainer_class("MSTKDTrainer"), folds=(0, 1), mirroring=(0, 2))
    predictor = Predictor(model, [0, 1], device="cpu")
    calls = []
    watched = predictor.predict(images_of(folders, "two"), on_pass=lambda *call: calls.append(call))
    total = calls[0][1]
    assert calls == [(done, total) for done in range(total)]
    assert total % (2 * 4) == 0  # folds, mirrored copies
    np.testing.assert_array_equal(watched.segmentation, predictor.predict(images_of(folders, "two")).segmentation)
    assert calls[-1] == (total - 1, total) and len(calls) == total


def test_a_prediction_can_be_cancelled(folders, model):
    predictor = Predictor(model, [0], device="cpu")
    images = {"T1": (noise(1, (40, 40, 40)), (1.0, 1.0, 1.25))}  # more patches than nnU-Net cuts in advance
    before = predictor.predict(images).segmentation
    threads = threading.active_count()

    def stop(done: int, total: int) -> None:
        assert done <= 1 < total - 4
        if done == 1:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        predictor.predict(images, on_pass=stop)
    assert threading.active_count() == threads  # nnU-Net's thread that cuts patches has ended
    np.testing.assert_array_equal(predictor.predict(images).segmentation, before)


# ---- a folder ------------------------------------------------------------------------------------------------------


def test_predict_folder(folders, model):
    assert predict(folders, model) == 0
    predictor = Predictor(model, device="cpu")
    options = {"preprocessing_processes": 0, "export_processes": 0, "progress": False}
    (folders / "in" / "one_0000.nii.gz").write_bytes(b"no image")
    result = predictor.predict_folder(folders / "in", folders / "api", skip_bad=True, **options)
    assert (result.predicted, result.kept) == (["complete", "two"], 0)
    assert [problem.case for problem in result.problems] == ["one"]
    assert result.record == folders / "api" / "predictions.json"
    (folders / "in" / "one_0000.nii.gz").unlink()
    result = predictor.predict_folder(folders / "in", folders / "api", continue_prediction=True, **options)
    assert (result.predicted, result.kept, result.problems) == (["one"], 2, [])
    assert result.subsets == ["T0+T1+T2+T3: 1", "T1+T3: 1", "T2: 1"]
    assert files(folders / "api") == files(folders / "out")


# ---- mstkd predict --image -----------------------------------------------------------------------------------------


def command(model: Path, output: Path, *arguments: str) -> int:
    options = ["-m", str(model), "-f", "0", "-device", "cpu"]
    return cli.main(["predict", *arguments, "-o", str(output), *options])


def test_one_patient(folders, model, capsys):
    assert predict(folders, model) == 0
    (model / "subsets").mkdir()
    subsets = {"T1+T3": {"WT": {"dice": 0.8}}}
    (model / "subsets" / "summary.json").write_text(json.dumps({"subsets": subsets}))
    for name, path in images_of(folders, "two").items():
        shutil.copy(path, folders / f"{name}=any name.nii.gz")
    capsys.readouterr()
    images = [f"--image=t{channel}={folders}/T{channel}=any name.nii.gz" for channel in (3, 1)]
    assert command(model, folders / "patient.nii.gz", *images) == 0
    assert "predicted from T1+T3:" in (out := capsys.readouterr().out) and "expected Dice: WT 0.800" in out
    assert (folders / "patient.nii.gz").read_bytes() == segmentations(folders / "out")["two.nii.gz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "T1"], "--image T1: expected MODALITY=FILE"),
        (["--image", "T1=a.nii.gz", "--image", "T1=b.nii.gz"], "--image names T1 twice"),
        (["--image", "T1=a.nii.gz", "--drop", "T2"], "--drop is for a folder of cases"),
        (["--image", "T1=a.nii.gz", "-num_parts", "2"], "-num_parts is for a folder of cases"),
        (["--image", "PD=nowhere.nii.gz"], "unknown modality 'PD'"),
    ],
)
def test_bad_arguments_for_one_patient(folders, model, capsys, arguments, message):
    assert command(model, folders / "patient.nii.gz", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (folders / "patient.nii.gz").exists()


def test_one_patient_is_written_to_a_file(folders, model, capsys):
    write_case(folders / "in", "x", [1])
    assert command(model, folders / "in", "--image", f"T1={folders / 'in' / 'x_0001.nii.gz'}") == 2
    assert "is a folder" in capsys.readouterr().err
    image = folders / "in" / "x_0001.nii.gz"
    before = image.read_bytes()
    assert command(model, folders / "in" / ".." / "in" / image.name, "--image", f"T1={image}") == 2
    assert "is one of the images; name another file to write" in capsys.readouterr().err
    assert image.read_bytes() == before


def test_an_output_that_cannot_be_written_is_refused_before_the_prediction(folders, model, capsys, monkeypatch):
    monkeypatch.setattr(module.Predictor, "predict", lambda *_: pytest.fail("the network ran"))
    assert command(model, folders / "patient.foo", "--image", "T1=a.nii.gz") == 2
    assert "patient.foo has no ending that SimpleITKIO can write" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["-i", "in", "--image", "T1=a.nii.gz"]], ids=["neither", "both"])
def test_either_a_folder_or_images(folders, model, arguments):
    with pytest.raises(SystemExit):
        command(model, folders / "patient.nii.gz", *arguments)
