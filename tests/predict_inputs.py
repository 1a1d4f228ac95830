"""Input folders with absent files, and trained models that never trained: random weights tell errors best."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
import torch

from nnunetv2_mstkd import cli

CHANNELS = 4
SHAPE = (14, 20, 18)
SPACING = (1.0, 1.0, 1.25)
ORIGIN = (-9.0, 4.0, 2.5)
TURNED = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def noise(seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """A head in air: noise with a border of zeros, which nnU-Net crops."""
    image = np.zeros(shape, np.float32)
    inner = tuple(slice(min(2, size // 4), None) for size in shape)
    image[inner] = np.random.default_rng(seed).normal(100, 20, image[inner].shape)
    return image


def write(path: Path, array: np.ndarray, *, spacing=SPACING, origin=ORIGIN, direction=TURNED) -> Path:
    image = sitk.GetImageFromArray(array)
    dimensions = array.ndim
    image.SetSpacing(spacing[:dimensions])
    image.SetOrigin(origin[:dimensions])
    if dimensions == 3:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return path


def write_case(folder: Path, name: str, channels: Sequence[int], *, ending: str = ".nii.gz", **geometry) -> list[Path]:
    """``NAME_000k`` for these channels; the same name and channel always give the same image."""
    folder.mkdir(exist_ok=True)
    seed = sum(map(ord, name)) * 10
    return [write(folder / f"{name}_{c:04d}{ending}", noise(seed + c), **geometry) for c in channels]


def write_model(
    trainer_class: type,
    *,
    folds: Sequence[int] = (0,),
    mirroring: tuple[int, ...] | None = None,
    file_ending: str = ".nii.gz",
    reader: str = "SimpleITKIO",
    schemes: Sequence[str] | None = None,
    **options,
) -> Path:
    """A model folder below nnUNet_results as training leaves it; each fold has other random weights."""
    make = tiny.make_trainer
    channels = options.setdefault("channels", CHANNELS)
    plans = tiny.plans(**{key: value for key, value in options.items() if key != "labels"})
    plans["image_reader_writer"] = reader
    statistics = {"mean": 100.0, "std": 20.0, "percentile_00_5": 40.0, "percentile_99_5": 160.0}
    plans["foreground_intensity_properties_per_channel"] = {str(c): statistics for c in range(channels)}
    if schemes is not None:
        plans["configurations"]["tiny"]["normalization_schemes"] = list(schemes)
    for fold in folds:
        trainer = make(trainer_class, plans, channels=channels, labels=options.get("labels"), fold=fold, seed=fold)
        torch.manual_seed(fold)
        tiny.wake(trainer.network)
        trainer.inference_allowed_mirroring_axes = mirroring
        trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    folder = Path(trainer.output_folder_base)
    dataset_json = {**trainer.dataset_json, "file_ending": file_ending}
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PRESENT = {"complete": [0, 1, 2, 3], "one": [2], "two": [1, 3]}
"""Cases and the channels that have a file; the first channel is absent in two of them."""


def set_up(top: Path, patch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's three folders, and an input folder ``in`` with the cases of PRESENT."""
    for name in ("raw", "preprocessed", "results"):
        (top / name).mkdir()
        patch.setenv(f"nnUNet_{name}", str(top / name))
    for name, channels in PRESENT.items():
        write_case(top / "in", name, channels)
    return top


def trainer_class(name: str) -> type:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunetv2_mstkd import methods as trainers

    return nnUNetTrainer if name == "nnUNetTrainer" else getattr(trainers, name)


def edit_checkpoint(model: Path, change: Callable[[dict], object]) -> None:
    """Change the content of the checkpoint of fold 0."""
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def predict(folders: Path, model: Path, *options: str, output: str = "out", source: str = "in") -> int:
    """Run ``mstkd predict`` in this process."""
    arguments = ["-i", str(folders / source), "-o", str(folders / output), "-m", str(model)]
    if "-f" not in options:
        arguments += ["-f", "0"]
    return cli.main(["predict", *arguments, "-device", "cpu", "-npp", "0", "-nps", "0", *options])


def segmentations(folder: Path, ending: str = ".nii.gz") -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name.endswith(ending)}


def record(folder: Path) -> dict:
    return json.loads((folder / "predictions.json").read_text())
