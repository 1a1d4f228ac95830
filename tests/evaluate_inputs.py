"""A data set of noise with labels, preprocessed by nnU-Net, beside a model of random weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from conftest import empty_folders
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from predict_inputs import CHANNELS, SHAPE, trainer_class, write, write_case, write_model

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.evaluation.results import read_results

CASES = ("BraTS-GLI-00001-100", "BraTS-GLI-00001-101", "BraTS-GLI-00002-100", "d")
SPLITS = [{"train": [CASES[2], CASES[3]], "val": [CASES[0], CASES[1]]}, {"train": [CASES[0]], "val": [CASES[2]]}]


def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures empty: drawing takes longer than all else in a small evaluation."""
    from nnunetv2_mstkd.reporting import figures

    for name in ("missing_bars", "heat_map", "curve_by_count", "shapley_bars"):
        monkeypatch.setattr(figures, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: Path(path).touch())


def model_with_regions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of one fold in nnU-Net's empty folders, and its data set; figures stay empty."""
    empty_folders(folder, monkeypatch)
    without_drawing(monkeypatch)
    model = write_model(trainer_class("MSTKDTrainer"), labels=tiny.REGIONS)
    write_dataset(model)
    return model


def naive_dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two masks; 1 if both are empty."""
    return 2 * (one & other).sum() / (one.sum() + other.sum()) if one.any() or other.any() else 1.0


def evaluate(model: Path, *options: str) -> int:
    """Run ``mstkd evaluate`` in this process."""
    arguments = ["-m", str(model), "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar", *options]
    return cli.main(["evaluate", *arguments])


def refused(capsys: pytest.CaptureFixture, model: Path, *options: str) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert evaluate(model, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mstkd evaluate: ")
    return error


def results(folder: Path) -> pd.DataFrame:
    return read_results(folder / "results.csv")


def label_image(seed: int, shape: Sequence[int] = SHAPE, ignore: int | None = None) -> np.ndarray:
    """A block of 2 around a block of 1, somewhere."""
    label = np.zeros(shape, np.uint8)
    corner = np.random.default_rng(seed).integers(3, 6, len(shape))
    label[tuple(slice(start, start + 8) for start in corner)] = 2
    label[tuple(slice(start + 2, start + 5) for start in corner)] = 1
    if ignore is not None:
        label[..., :5] = ignore
    return label


def write_dataset(model: Path, *, channels: int = CHANNELS, ignore: int | None = None, cases=CASES, **geometry) -> Path:
    """Raw and preprocessed data of ``CASES`` for a model from ``write_model``; returns the raw folder."""
    raw = Path(os.environ["nnUNet_raw"], tiny.DATASET)
    preprocessed = Path(os.environ["nnUNet_preprocessed"], tiny.DATASET)
    data, labels = preprocessed / "tiny_data", preprocessed / "gt_segmentations"
    for folder in (raw / "labelsTr", data, labels):
        folder.mkdir(parents=True, exist_ok=True)
    (data / "nothing.b2nd").unlink(missing_ok=True)  # of the factory that made the model
    for number, name in enumerate(cases):
        write_case(raw / "imagesTr", name, range(channels), **geometry)
        for folder in (raw / "labelsTr", labels):
            write(folder / f"{name}.nii.gz", label_image(number, ignore=ignore), **geometry)
    plans_manager = PlansManager(json.loads((model / "plans.json").read_text()))
    dataset_json = json.loads((model / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**dataset_json, "numTraining": len(cases)}))
    (preprocessed / "splits_final.json").write_text(json.dumps(SPLITS))
    preprocess(raw, data, plans_manager, dataset_json, channels, cases)
    return raw


def preprocess(raw: Path, data: Path, plans_manager, dataset_json: dict, channels: int, cases=CASES) -> None:
    """As ``nnUNetv2_preprocess`` does, in this process."""
    configuration = plans_manager.get_configuration("tiny")
    for name in cases:
        DefaultPreprocessor(verbose=False).run_case_save(
            str(data / name),
            [str(raw / "imagesTr" / f"{name}_{c:04d}.nii.gz") for c in range(channels)],
            str(raw / "labelsTr" / f"{name}.nii.gz"),
            plans_manager,
            configuration,
            dataset_json,
        )
