"""What holds for every trainer of this package; that nothing of an absent modality leaks is in test_leak.py."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_leak
import torch
from predict_inputs import files, predict, segmentations, set_up, write_case, write_model
from tiny import batch, give_teacher, same, state, wake

import nnunetv2_mstkd
from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer

EVERY = [getattr(trainers, name) for name in trainers.__all__]
DROPPING = [cls for cls in EVERY if issubclass(cls, ModalityDropoutTrainer)]
DISTILLING = [cls for cls in EVERY if issubclass(cls, DistillationTrainer)]
LARGEST, SMALLEST = 65504.0, 6e-8
"""Of float16."""


def every(classes: list[type]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cls", classes, ids=lambda cls: cls.__name__)


def make(make_trainer, cls, **options):
    """A trainer with its default terms, beside a teacher if it has one."""
    trainer = make_trainer(cls, **options)
    if cls in DISTILLING:
        give_teacher(trainer)
    wake(trainer.network)
    trainer.on_train_epoch_start()
    return trainer


def complete(trainer, monkeypatch) -> None:
    """Let the trainer draw the full set for all samples, and for a second student too."""
    everything = torch.ones(2, trainer.num_input_channels, dtype=torch.bool)
    monkeypatch.setattr(trainer, "draw_availability", lambda size: everything[:size])
    if hasattr(trainer, "draw_partner"):
        monkeypatch.setattr(trainer, "draw_partner", lambda availability: availability)


def test_every_trainer_that_takes_modalities_away_is_tested_for_leaks():
    assert set(test_leak.STUDENTS) == set(DROPPING)
    assert {cls.__name__ for cls in EVERY} - {cls.__name__ for cls in DROPPING} == {
        "FullModalityTrainer",
        "MSTKDTeacherTrainer",
        "AdaMMTeacherTrainer",
    }


@every(EVERY)
def test_permuting_the_batch_permutes_the_output(make_trainer, cls):
    trainer = make(make_trainer, cls)
    trainer.set_deep_supervision_enabled(False)
    network = trainer.network.eval()
    subsets = modalities.all_subsets(4)[[0, 5, 10, 14]]
    data = modalities.mask_modalities(batch(trainer, batch_size=4)["data"], subsets)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        together, permuted = network(data), network(data[order])
    assert together.shape == (4, 3, 16, 16, 16)
    torch.testing.assert_close(permuted, together[order], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@every(DROPPING)
def test_the_full_subset_equals_no_masking(make_trainer, monkeypatch, cls):
    content, losses, weights = None, [], []
    for masks in (True, False):
        trainer = make(make_trainer, cls)
        content = content or batch(trainer)
        with monkeypatch.context() as patch:
            complete(trainer, patch)
            if not masks:
                patch.setattr(modalities, "mask_modalities", lambda data, availability: data)
            losses.append(trainer.train_step(content)["terms"])
        weights.append(state(trainer.network))
    assert losses[0] == losses[1]
    assert same(*weights)


@every(DISTILLING)
def test_the_teacher_is_the_same_after_training_steps(make_trainer, cls):
    trainer = make(make_trainer, cls)
    assert trainer.needs_teacher
    teacher, student = state(trainer.teacher), state(trainer.network)
    for seed in range(2):
        trainer.train_step(batch(trainer, seed=seed))
    assert same(teacher, state(trainer.teacher)) and not same(student, state(trainer.network))
    assert not trainer.teacher.training
    assert not any(name.startswith("teacher") for name in trainer.plain_network.state_dict())


@every(EVERY)
@pytest.mark.parametrize(
    "scale", [LARGEST, SMALLEST, 0.0], ids=["as large as float16 goes", "as small", "nothing but zeros"]
)
def test_losses_are_finite_at_the_ends_of_float16(make_trainer, cls, scale):
    trainer = make(make_trainer, cls)
    content = batch(trainer)
    content["data"] = content["data"].sign() * scale
    result = trainer.train_step(content)  # stops by itself at a term that is not finite
    assert np.isfinite(result["loss"]) and np.isfinite(list(result["terms"].values())).all()
    assert all(torch.isfinite(value).all() for value in trainer.network.state_dict().values())


@every(EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_mixed_precision_changes_neither_losses_nor_the_direction_of_the_step(make_trainer, monkeypatch, cls, dtype):
    """Networks in half precision, terms in float32: what CUDA's autocast does, as far as a CPU can show it."""
    losses, gradients = [], []
    for lowered in (False, True):
        trainer = make(make_trainer, cls, block={"schedule": {"seed": 0}})
        trainer.on_epoch_start()
        if lowered:
            monkeypatch.setattr(trainer, "_autocast", lambda: torch.autocast("cpu", dtype=dtype))
        result = trainer.train_step(batch(trainer))
        losses.append(np.array(list(result["terms"].values())))
        gradients.append(
            torch.cat([each.grad.flatten() for each in trainer.network.parameters() if each.grad is not None])
        )
    assert not np.array_equal(losses[0], losses[1])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02, atol=1e-3)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@every(EVERY)
def test_a_seed_makes_steps_repeat_bit_for_bit(make_trainer, cls):
    results = []
    for seed in (5, 5, 6):
        trainer = make(make_trainer, cls, block={"schedule": {"seed": seed}})
        trainer.on_epoch_start()
        content = [batch(trainer, seed=number) for number in range(2)]
        losses = [float(trainer.train_step(each)["loss"]) for each in content]
        results.append([losses, state(trainer.network)])
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


INSTALL_AND_PREDICT = """
import sys
import torch
from pathlib import Path
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

if __name__ == "__main__":
    torch.set_num_threads(1)
    archives, images, output = map(Path, sys.argv[1:])
    for archive in sorted(archives.glob("*.zip")):
        install_model_from_zip_file(str(archive))
        where = ["-i", images, "-o", output / archive.stem, "-d", "901", "-c", "tiny", "-f", "0", "-tr", archive.stem]
        options = ["-npp", "0", "-nps", "0", "--disable_tta", "--disable_progress_bar", "-device", "cpu"]
        sys.argv = ["nnUNetv2_predict", *map(str, where), *options]
        predict_entry_point()
    assert not [name for name in sys.modules if name.startswith("nnunetv2_mstkd.commands")]
"""


def test_every_model_is_exported_imported_and_predicted_by_nnunet_in_another_process(tmp_path, monkeypatch):
    """nnU-Net's archive, installation and ``nnUNetv2_predict``, where there is a results folder and nothing else."""
    from nnunetv2.model_sharing.model_export import export_pretrained_model

    folders = set_up(tmp_path, monkeypatch)
    for path in (folders / "in").iterdir():
        path.unlink()
    images = write_case(folders / "in", "complete", range(4))
    archives, other, stock = folders / "archives", folders / "other", folders / "stock"
    for folder in (archives, other, stock):
        folder.mkdir()
    ours = {}
    for cls in EVERY:
        with contextlib.redirect_stdout(io.StringIO()):
            model = write_model(cls)
            for name in ("fold_0/progress.png", "fold_0/validation/summary.json", "dataset_fingerprint.json"):
                (model / name).parent.mkdir(exist_ok=True)
                (model / name).write_text("{}")
            export_pretrained_model(901, str(archives / f"{cls.__name__}.zip"), ("tiny",), cls.__name__, folds=(0,))
            assert predict(folders, model, "--disable_tta", output=cls.__name__) == 0
        ours[cls.__name__] = segmentations(folders / cls.__name__)["complete.nii.gz"]
    variables = {**os.environ, "nnUNet_results": str(other)}
    for name in ("raw", "preprocessed"):
        variables[f"nnUNet_{name}"] = str(folders / "none")
    variables["nnUNet_extTrainer"] = str(Path(nnunetv2_mstkd.__file__).parent / "nnunet" / "_trainer_path")
    script = folders / "install_and_predict.py"
    script.write_text(INSTALL_AND_PREDICT)
    command = [sys.executable, script, archives, images[0].parent, stock]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, segmentation in ours.items():
        assert files(stock / name)["complete.nii.gz"] == segmentation, name
    assert len(set(ours.values())) > 3  # some trainers share a network, and random weights here
