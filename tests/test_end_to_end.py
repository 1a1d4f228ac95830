"""The path of a user through nnU-Net's own commands: teacher, student, prediction with absent modalities."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import (
    CONFIGURATION,
    PHANTOM,
    TINY,
    Folders,
    add_configuration,
    command,
    configure,
    in_this_process,
    plan_and_preprocess,
    train,
)

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.nnunet import checkpoints

COMMANDS = Path(sys.executable).parent
ABSENT = {"phantom_test_000": (1, 3), "phantom_test_001": (0, 1, 2)}


def run(name: str, *arguments: object, **variables: str) -> str:
    """Run one of nnU-Net's commands in a process of its own and return what it printed."""
    done = subprocess.run(
        [COMMANDS / name, *map(str, arguments), "-device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **variables},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_here(name: str, *arguments: object, **variables: str) -> str:
    """:func:`run` in this process."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        for variable, value in variables.items():
            patch.setenv(variable, value)
        command(name, *arguments, "-device", "cpu")
    return printed.getvalue()


def write_with_absent_channels(source: Path, target: Path, absent: tuple[int, ...]) -> None:
    """Copy the channels of a case; absent ones become zero images with the header of the file."""
    for file in sorted(source.parent.glob(f"{source.name}_*.nii.gz")):
        channel = int(file.name.split("_")[-1].split(".")[0])
        image = sitk.ReadImage(str(file))
        sitk.WriteImage(image * 0 if channel in absent else image, str(target / file.name))


def assert_geometry(prediction: Path, image: Path) -> np.ndarray:
    """The prediction lies on the image's grid; returns its labels."""
    one, other = sitk.ReadImage(str(prediction)), sitk.ReadImage(str(image))
    assert one.GetSize() == other.GetSize()
    assert one.GetSpacing() == pytest.approx(other.GetSpacing())
    assert one.GetOrigin() == pytest.approx(other.GetOrigin())
    assert one.GetDirection() == pytest.approx(other.GetDirection())
    return np.unique(sitk.GetArrayFromImage(one))


@pytest.mark.parametrize(("method", "run", "workers"), [("MSTKD", run, 1), ("AdaMM", run_here, 0)])
def test_nnunet_commands_end_to_end(phantom, tmp_path, method, run, workers):
    configure(phantom, schedule__epochs=1, schedule__save_every=None)
    run_here("nnUNetv2_train", PHANTOM, CONFIGURATION, 0, "-tr", f"{method}TeacherTrainer")
    printed = run("nnUNetv2_train", PHANTOM, CONFIGURATION, 0, "-tr", f"{method}Trainer")
    assert "Mean Validation Dice" in printed
    student = phantom.fold(f"{method}Trainer")
    produced = {path.name for path in student.iterdir()}
    assert produced >= {
        "checkpoint_final.pth",
        "checkpoint_best.pth",
        "progress.png",
        "progress_terms.png",
        "validation",
    }
    assert (student / "validation" / "summary.json").is_file()

    # another machine: the student's model folder and nothing else
    elsewhere = tmp_path / "elsewhere"
    model = elsewhere / student.parent.relative_to(phantom.results)
    shutil.copytree(student.parent, model)
    images = tmp_path / "images"
    images.mkdir()
    for case, absent in ABSENT.items():
        write_with_absent_channels(phantom.raw / phantom.dataset / "imagesTs" / case, images, absent)
    output = tmp_path / "output"
    run(
        "nnUNetv2_predict",
        *("-i", images, "-o", output, "-d", phantom.dataset, "-c", CONFIGURATION, "-f", 0, "-tr", f"{method}Trainer"),
        *("-npp", workers, "-nps", workers, "--disable_tta"),
        nnUNet_results=str(elsewhere),
        nnUNet_preprocessed=str(elsewhere / "none"),
        nnUNet_raw=str(elsewhere / "none"),
    )
    for case in ABSENT:
        labels = assert_geometry(output / f"{case}.nii.gz", images / f"{case}_0000.nii.gz")
        assert set(labels) <= {0, 1, 2, 3}

    # the same with the files away, and the network told which
    partly = tmp_path / "partly"
    partly.mkdir()
    for case, absent in ABSENT.items():
        for channel in set(range(4)) - set(absent):
            shutil.copy(images / f"{case}_{channel:04d}.nii.gz", partly)
    arguments = ["-i", str(partly), "-o", str(tmp_path / "told"), "-m", str(model), "-f", "0", "--disable_tta"]
    assert cli.main(["predict", *arguments, "-device", "cpu", "-npp", "0", "-nps", "0"]) == 0
    for case in ABSENT:
        assert (tmp_path / "told" / f"{case}.nii.gz").read_bytes() == (output / f"{case}.nii.gz").read_bytes()


# ---- real data -----------------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("MSTKD_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data" / "open_ms")
OPEN_MS = 903


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}; MSTKD_REAL_DATA names another folder")
def test_real_patients_end_to_end(tmp_path, monkeypatch):
    folders = Folders(*(tmp_path / name for name in ("raw", "preprocessed", "results")), dataset="Dataset903_OpenMS")
    for folder in (folders.raw, folders.preprocessed, folders.results):
        folder.mkdir()
    folders.use(monkeypatch)
    channels = ("T1", "T1POST", "T2", "FLAIR")
    modalities = [part for name in channels for part in ("--modality", f"{name}={name}.nii.gz")]
    label = ["--label", "GOLD_STANDARD.nii.gz", "--class", "lesion=1"]
    options = ["-d", str(OPEN_MS), "--name", "OpenMS", "--cases", "patient*", "--val-cases", "patient26"]
    status = cli.main(["convert", "generic", str(REAL), *options, *modalities, *label, "--workers", "1"])
    assert status == 0

    # real headers and small lesions, but not their full size
    plan_and_preprocess(folders, OPEN_MS, "3d_fullres", spacing=(4.0, 4.0, 4.0))
    add_configuration(
        folders.plans_file,
        CONFIGURATION,
        features=[8, 16, 24],
        patch_size=[24, 24, 24],
        batch_size=2,
        settings={**TINY, "schedule.epochs": 1, "schedule.validation_iterations": 1},
    )
    for fold in (0, "all"):
        for trainer in ("MSTKDTeacherTrainer", "MSTKDTrainer"):
            train(trainer, fold=fold, dataset=OPEN_MS)
            content = checkpoints.read(folders.fold(trainer, fold=fold) / "checkpoint_final.pth")
            assert all(torch.isfinite(value).all() for value in content["network_weights"].values())
            patients = 2 if fold == 0 else 3
            assert len(content["mstkd"]["split"]["train"]) == patients
    assert content["mstkd"]["teacher"]["path"].endswith("fold_all/checkpoint_final.pth")

    images, output = tmp_path / "images", tmp_path / "output"
    for folder in (images, output):
        folder.mkdir()
    absent = (channels.index("T1POST"), channels.index("FLAIR"))
    write_with_absent_channels(folders.raw / folders.dataset / "imagesTr" / "patient26", images, absent)
    predict(folders, images, output)
    labels = assert_geometry(output / "patient26.nii.gz", REAL / "patient26" / "T1.nii.gz")
    assert set(labels) <= {0, 1}


def predict(folders: Folders, images: Path, output: Path) -> None:
    """nnU-Net's prediction in this process."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folders.fold("MSTKDTrainer").parent), use_folds=(0,))
    with pytest.MonkeyPatch.context() as patch, in_this_process(patch):
        predictor.predict_from_files_sequential(str(images), str(output), save_probabilities=False)
