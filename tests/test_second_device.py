"""Nothing mixes tensors of a GPU and of the CPU: trainers, prediction and evaluation on an emulated second device."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import configure, train
from evaluate_inputs import without_drawing, write_dataset
from predict_inputs import write_case, write_model
from second_device import CPU, DEVICE, DeviceTensor, second_device
from tiny import LABELS_WITH_IGNORE, REGIONS, REGIONS_WITH_IGNORE, batch, give_teacher, wake

from nnunetv2_mstkd import methods
from nnunetv2_mstkd.inference.predictor import Predictor
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts
from nnunetv2_mstkd.reporting.evaluate import evaluate
from nnunetv2_mstkd.training.distillation import DistillationTrainer

EVERY = [getattr(methods, name) for name in methods.__all__]

# of a device called "meta" torch believes that its parameters hold nothing
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")


# ---- the device itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(here > 0, there, 0.0),
        lambda there, here: there.numpy(),
        lambda there, here: np.asarray(there),
        lambda there, here: torch.rand(3, device=there.device, generator=torch.Generator()),
        lambda there, here: torch.nn.Conv1d(2, 2, 1)(there),
    ],
    ids=["sum", "concatenation", "condition", "numpy", "asarray", "generator", "layer"],
)
def test_what_fails_on_cuda_fails(fault):
    with second_device():
        here = torch.ones(2, 3)
        there = here.to(DEVICE)
        with pytest.raises((RuntimeError, TypeError)):
            fault(there, here)


def test_what_works_on_cuda_works():
    with second_device():
        here = torch.arange(6.0).reshape(2, 3)
        there = here.to(DEVICE)
        made = torch.zeros(2, 3, device=DEVICE) + torch.tensor([1, 2, 3], device=DEVICE) * torch.tensor(2)
        for value in (there, made, there[torch.tensor([True, False])], here.to(there), torch.randn_like(there)):
            assert isinstance(value, DeviceTensor) and value.device == DEVICE
        assert torch.equal(there.cpu(), here) and not isinstance(there.cpu(), DeviceTensor)
        assert float(there.sum()) == 15 and there.tolist() == here.tolist()
        here.copy_(there * 2)
        assert here[1, 2] == 10


# ---- steps of training and of validation ---------------------------------------------------------------------------


def _steps(make_trainer, cls, device=DEVICE, *, lacking=False, unlabelled=False, **options):
    """Losses of a training step on a device, and that of validation after it."""
    with second_device():
        trainer = make_trainer(cls, device=device, **options)
        if isinstance(trainer, DistillationTrainer) and not trainer.teacher_learns:
            give_teacher(trainer).teacher.to(trainer.device)
        wake(trainer.network)
        if lacking:
            present = (True, *[False] * (trainer.num_input_channels - 1))
            trainer.case_facts = {"case_0": CaseFacts(present, True), "case_1": CaseFacts((True,) * len(present), True)}
        if unlabelled:
            trainer.unlabelled_batches = iter([{"data": batch(trainer, seed=1)["data"]}])
        trainer.on_train_epoch_start()
        training = trainer.train_step(batch(trainer))
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            validation = trainer.validation_step(batch(trainer))
        kinds = {type(parameter.data) for parameter in trainer.network.parameters()}
    assert kinds == {DeviceTensor if device == DEVICE else torch.Tensor}
    losses = {**training["terms"], "validation": validation["loss"]}
    assert np.isfinite(list(losses.values())).all()
    return {name: float(value) for name, value in losses.items()}


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_steps(make_trainer, cls):
    _steps(make_trainer, cls)


def test_losses_are_those_of_the_cpu(make_trainer):
    expected, found = (
        _steps(make_trainer, methods.MSTKDTrainer, device, block={"schedule": {"seed": 0}}) for device in (CPU, DEVICE)
    )
    assert found == pytest.approx(expected, rel=1e-4)  # a few functions of torch round otherwise there


@pytest.mark.parametrize(
    "cls", [methods.KDTrainer, methods.SelfDistillationTrainer, methods.MSTKDTrainer], ids=lambda cls: cls.__name__
)
def test_steps_with_unlabelled_studies(make_trainer, cls):
    _steps(make_trainer, cls, unlabelled=True)


@pytest.mark.parametrize("labels", [LABELS_WITH_IGNORE, REGIONS_WITH_IGNORE], ids=["labels", "regions"])
@pytest.mark.parametrize(
    "cls", [methods.MSTKDTrainer, methods.AdaMMTrainer, methods.SMMLTrainer, methods.MedMAPKDTrainer],
    ids=lambda cls: cls.__name__,
)  # fmt: skip
def test_steps_with_an_ignore_label_and_incomplete_cases(make_trainer, cls, labels):
    _steps(make_trainer, cls, labels=labels, lacking=True, dimensions=2)


@pytest.mark.parametrize(
    ("cls", "block"),
    [
        (methods.MSTKDTrainer, {"mstkd": {"recipe": "paper"}}),
        (methods.MSTKDTrainer, {"teacher": {"joint": True}}),
        (methods.MSTKDTrainer, {"network": {"placement": "main"}, "mstkd": {"regions": "separate"}}),
        (methods.SelfDistillationTrainer, {"self_distillation": {"decay": 0.9}}),
        (methods.ModalityDropoutTrainer, {"sampler": {"per_batch": True}, "schedule": {"optimizer": "adamw"}}),
        (methods.MedMAPTrainer, {"medmap": {"anchor": "star"}}),
        (methods.SMMLTrainer, {"smml": {"sequential": True}}),
        (methods.SMMLTrainer, {"smml": {"prior": "self"}}),
    ],
    ids=["paper", "joint", "main path", "moving average", "per batch", "star", "sequential", "prior"],
)
def test_steps_with_other_settings(make_trainer, cls, block):
    _steps(make_trainer, cls, block=block)


# ---- whole trainings, prediction -----------------------------------------------------------------------------------


def test_a_student_is_trained_and_validated(models):
    """A teacher is loaded, patches grow, checkpoints are written and continued, nnU-Net's own validation predicts."""
    configure(models, name="growing", schedule__epochs=2, schedule__patch_phases=2, teacher__configuration="tiny")
    found = []
    for device in (CPU, DEVICE):
        with second_device():
            train("MSTKDTrainer", configuration="growing", device=device, validate=True)
        fold = models.fold("MSTKDTrainer", configuration="growing")
        summary = (fold / "validation" / "summary.json").read_text()
        found.append((checkpoints.read(fold / "checkpoint_final.pth")["network_weights"], summary))
        fold.rename(fold.with_name(device.type))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("cls", [methods.MSTKDTrainer, methods.SMMLTrainer], ids=lambda cls: cls.__name__)
def test_prediction(folders, cls):
    model = write_model(cls, mirroring=(0, 1))
    paths = dict(zip(("T0", "T2"), write_case(folders / "two", "case", (0, 2)), strict=True))
    found = []
    for device in (CPU, DEVICE):
        with second_device():
            predictor = Predictor(model, device=device)
            found.append(predictor.predict(paths))
    assert np.array_equal(found[0].segmentation, found[1].segmentation)


@pytest.mark.parametrize(
    "cls", [methods.AdaMMTrainer, methods.ModalityConditionedTrainer], ids=lambda cls: cls.__name__
)
def test_evaluation(folders, monkeypatch, cls):
    """Subsets are stacked in one forward pass and scored in the CPU's memory."""
    without_drawing(monkeypatch)
    model = write_model(cls, labels=REGIONS)
    write_dataset(model)
    options = {"folds": [0], "preprocessing_processes": 0, "scoring_processes": 0}
    options |= {"subsets": ["T0", "T1+T3"], "metrics": ["dice"], "pictures": 0}
    found = []
    for device in (CPU, DEVICE):
        with second_device():
            found.append(evaluate(model, device=device, output=folders / device.type, **options))
    pd.testing.assert_frame_equal(found[0].results, found[1].results)
