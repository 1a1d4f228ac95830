from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from predict_inputs import (
    PRESENT,
    noise,
    predict,
    read,
    record,
    segmentations,
    trainer_class,
    write,
    write_case,
    write_model,
)

from nnunetv2_mstkd import cli


def fill(folders: Path, model: Path, *options: str) -> Path:
    assert (
        cli.main(["fill-missing", "-i", str(folders / "in"), "-o", str(folders / "full"), "-m", str(model), *options])
        == 0
    )
    return folders / "full"


def stock(model: Path, source: Path, output: Path, *, folds: Sequence[int] = (0,), probabilities: bool = False) -> Path:
    """What ``nnUNetv2_predict`` calls with ``-npp 0 -nps 0``."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), tuple(folds))
    output.mkdir()
    predictor.predict_from_files_sequential(str(source), str(output), save_probabilities=probabilities)
    return output


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("MSTKDTrainer", {}),
        ("ModalityDropoutTrainer", {}),
        ("nnUNetTrainer", {}),
        ("MSTKDTrainer", {"labels": tiny.REGIONS}),
        ("MSTKDTrainer", {"mirroring": (0, 2)}),
        ("MSTKDTrainer", {"dimensions": 2}),
        ("FullModalityTrainer", {"residual": True}),
        ("AdaMMTrainer", {"mirroring": (0, 2)}),
        ("AdaMMTrainer", {"dimensions": 2, "labels": tiny.REGIONS}),
        ("AdaMMTrainer", {"residual": True, "block": {"adamm": {"subsets": ["T1+T3"]}}}),
    ],
    ids=[
        *("student", "dropout", "stock trainer", "regions", "mirroring", "2d", "residual"),
        *("adapters", "adapters, 2d, regions", "adapters, residual, listed subset"),
    ],
)
def test_segments_like_nnunet_on_zero_images(folders, trainer, options):
    model = write_model(trainer_class(trainer), **options)
    assert predict(folders, model) == 0
    expected = segmentations(stock(model, fill(folders, model), folders / "stock"))
    assert sorted(expected) == [f"{name}.nii.gz" for name in sorted(PRESENT)]
    assert segmentations(folders / "out") == expected
    assert all(len(np.unique(read(folders / "out" / name))) > 1 for name in expected)


def test_several_folds_are_averaged_like_in_nnunet(folders):
    model = write_model(trainer_class("MSTKDTrainer"), folds=(0, 1))
    assert predict(folders, model, "-f", "0", "1") == 0
    assert predict(folders, model, "-f", "1", output="single") == 0
    expected = segmentations(stock(model, fill(folders, model), folders / "stock", folds=(0, 1)))
    assert segmentations(folders / "out") == expected
    assert segmentations(folders / "single") != expected
    assert record(folders / "out")["folds"] == [0, 1]


def test_probabilities_are_those_of_nnunet(folders, model):
    assert predict(folders, model, "--save_probabilities") == 0
    expected = stock(model, fill(folders, model), folders / "stock", probabilities=True)
    for name in PRESENT:
        ours, theirs = (np.load(folder / f"{name}.npz")["probabilities"] for folder in (folders / "out", expected))
        np.testing.assert_array_equal(ours, theirs)
        assert (folders / "out" / f"{name}.pkl").is_file()


def test_axes_that_the_plans_swap_are_swapped_back(folders):
    model = write_model(trainer_class("MSTKDTrainer"))
    plans = json.loads((model / "plans.json").read_text())
    plans.update(transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0])
    (model / "plans.json").write_text(json.dumps(plans))
    assert predict(folders, model) == 0
    assert segmentations(folders / "out") == segmentations(stock(model, fill(folders, model), folders / "stock"))
    assert read(folders / "out" / "one.nii.gz").shape == noise(0).shape


@pytest.mark.parametrize(
    ("ending", "reader"),
    [
        (".mha", "SimpleITKIO"),
        (".nrrd", "SimpleITKIO"),
        (".gipl", "SimpleITKIO"),
        (".nii", "NibabelIO"),
        (".nii.gz", "SimpleITKIOWithReorient"),
        (".nii.gz", "NibabelIOWithReorient"),
    ],
)
def test_every_format_of_the_plans_reader_is_predicted(folders, ending, reader):
    model = write_model(trainer_class("MSTKDTrainer"), file_ending=ending, reader=reader)
    for path in (folders / "in").iterdir():
        path.unlink()
    for name, channels in PRESENT.items():
        write_case(folders / "in", name, channels, ending=ending)
    assert predict(folders, model) == 0
    expected = stock(model, fill(folders, model), folders / "stock")
    for name in PRESENT:
        np.testing.assert_array_equal(read(folders / "out" / f"{name}{ending}"), read(expected / f"{name}{ending}"))


def test_sheared_nifti_images_are_read_by_nibabel_alone(folders):
    import nibabel

    model = write_model(trainer_class("MSTKDTrainer"), reader="NibabelIO")
    affine = np.array([[1, 0.3, 0, 5], [0, 1, 0, -2], [0, 0, 1.25, 1], [0, 0, 0, 1.0]])
    for path in (folders / "in").iterdir():
        path.unlink()
    for channel in (1, 2):
        image = nibabel.Nifti1Image(noise(channel).transpose(), affine)
        nibabel.save(image, folders / "in" / f"case_{channel:04d}.nii.gz")
    assert predict(folders, model) == 0
    found = nibabel.load(folders / "out" / "case.nii.gz")
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    expected = nibabel.load(stock(model, fill(folders, model), folders / "stock") / "case.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))


@pytest.mark.parametrize(
    ("ending", "reader", "shape"), [(".png", "NaturalImage2DIO", (20, 18)), (".tif", "Tiff3DIO", None)]
)
def test_images_without_a_place_in_space_are_predicted(folders, ending, reader, shape):
    model = write_model(
        trainer_class("MSTKDTrainer"), file_ending=ending, reader=reader, dimensions=2 if ending == ".png" else 3
    )
    for path in (folders / "in").iterdir():
        path.unlink()
    for channel in (1, 2):
        image = noise(channel) if shape is None else noise(channel, shape)
        write(folders / "in" / f"case_{channel:04d}{ending}", image.astype(np.uint8))
    if ending == ".tif":
        (folders / "in" / "case.json").write_text('{"spacing": [1.25, 1, 1]}')
    assert predict(folders, model) == 0
    expected = stock(model, fill(folders, model), folders / "stock")
    assert (folders / "out" / f"case{ending}").read_bytes() == (expected / f"case{ending}").read_bytes()
    if ending == ".tif":
        assert json.loads((folders / "out" / "case.json").read_text()) == {"spacing": [1.25, 1, 1]}


def test_two_dimensional_images_are_predicted(folders):
    model = write_model(trainer_class("MSTKDTrainer"), dimensions=2)
    for path in (folders / "in").iterdir():
        path.unlink()
    write(folders / "in" / "flat_0002.nii.gz", noise(1, (20, 18)))
    assert predict(folders, model) == 0
    assert segmentations(folders / "out") == segmentations(stock(model, fill(folders, model), folders / "stock"))
    assert read(folders / "out" / "flat.nii.gz").shape == (20, 18)


def test_commands_in_processes_of_their_own_agree(folders, model):
    """nnUNetv2_predict and mstkd predict as they are called; the latter with background processes."""
    from nnunetv2_mstkd.nnunet.registration import TRAINER_PATH

    variables = {
        **os.environ,
        "nnUNet_extTrainer": TRAINER_PATH,
        "nnUNet_def_n_proc": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    which = ["-d", "901", "-c", "tiny", "-f", "0", "-tr", "MSTKDTrainer", "-device", "cpu"]
    full = fill(folders, model)
    theirs = ["-c", "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as run; run()"]
    ours = ["-m", "nnunetv2_mstkd.cli", "predict"]
    for code, options in (
        (theirs, ["-i", str(full), "-o", str(folders / "stock"), "-npp", "0", "-nps", "0"]),
        (ours, ["-i", str(folders / "in"), "-o", str(folders / "out"), "-npp", "1", "-nps", "1"]),
    ):
        done = subprocess.run([sys.executable, *code, *which, *options], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert segmentations(folders / "out") == segmentations(folders / "stock")
    assert len(segmentations(folders / "out")) == 3
    assert "two (T1+T3)" in done.stderr  # the bar
