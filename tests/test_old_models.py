"""Models of version 0.1 predict what they predicted then, and their trainings continue.

``fixtures/models_0_1.tar.xz`` holds, per trainer, the checkpoint of a training on the shared phantom that was stopped
after the first of two epochs, its logits of one image with two subsets, and what its second epoch logged.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHANTOM, read_plans, train

from nnunetv2_mstkd.inference.conditioning import conditioned
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet.model import load_predictor

ARCHIVE = Path(__file__).with_name("fixtures") / "models_0_1.tar.xz"
CONFIGURATION = "old"
TRAINERS = (
    "AdaMMTeacherTrainer", "AdaMMTrainer", "FullModalityTrainer", "MSTKDTeacherTrainer", "MSTKDTrainer",
    "MedMAPMSTKDTrainer", "MedMAPTrainer", "ModalityDropoutTrainer", "SMMLTrainer",
)  # fmt: skip
TEACHERS = {"MSTKDTrainer": "MSTKD", "MedMAPMSTKDTrainer": "MSTKD", "AdaMMTrainer": "AdaMM"}
SUBSETS = {"all": (True, True, True, True), "two": (False, True, False, True)}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # older than Python 3.11.4
        archive.extractall(folder)
    return folder


def put(folders, checkpoint: Path, name: str) -> Path:
    """A model folder as version 0.1 left it, with the checkpoint under this file name."""
    content = checkpoints.read(checkpoint)
    arguments = content["init_args"]
    fold = folders.fold(content["trainer_name"], configuration=CONFIGURATION)
    fold.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(checkpoint, fold / name)
    for file, key in (("plans.json", "plans"), ("dataset.json", "dataset_json")):
        (fold.parent / file).write_text(json.dumps(arguments[key]))
    plans = read_plans(folders)
    plans["configurations"][CONFIGURATION] = arguments["plans"]["configurations"][CONFIGURATION]
    folders.plans_file.write_text(json.dumps(plans))
    return fold


@pytest.mark.parametrize("trainer", TRAINERS)
def test_predicts_as_before(phantom_at_6_mm, old, trainer):
    fold = put(phantom_at_6_mm, old / f"{trainer}.pth", "checkpoint_final.pth")
    predictor = load_predictor(
        fold.parent, (0,), device=torch.device("cpu"),
        use_mirroring=False, perform_everything_on_device=False, allow_tqdm=False,
    )  # fmt: skip
    expected = np.load(old / "logits.npz")
    for name, subset in SUBSETS.items():
        image = torch.from_numpy(expected["image"]) * torch.tensor(subset)[:, None, None, None]
        with conditioned(predictor.network, torch.tensor([subset]), predictor.label_manager):
            found = predictor.predict_logits_from_preprocessed_data(image).float().numpy()
        np.testing.assert_allclose(found, expected[f"{trainer}_{name}"], atol=1e-5)
        assert np.array_equal(found > 0, expected[f"{trainer}_{name}"] > 0)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_continues(phantom_at_6_mm, old, trainer):
    if trainer in TEACHERS:
        put(phantom_at_6_mm, old / f"{TEACHERS[trainer]}TeacherTrainer.pth", "checkpoint_final.pth")
    fold = put(phantom_at_6_mm, old / f"{trainer}.pth", "checkpoint_latest.pth")
    train(trainer, dataset=PHANTOM, configuration=CONFIGURATION, continue_training=True)
    content = checkpoints.read(fold / "checkpoint_final.pth")
    expected = json.loads((old / "expected.json").read_text())[trainer]
    assert content["current_epoch"] == 2
    for name, values in expected["log"].items():
        np.testing.assert_allclose(content["logging"][name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    total = sum(float(tensor.double().abs().sum()) for tensor in content["network_weights"].values())
    assert total == pytest.approx(expected["sum"], rel=1e-5)
