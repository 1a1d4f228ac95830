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
import torch
from predict_inputs import files, predict, segmentations, set_up, write_case, write_model
from tiny import batch, give_teacher, wake

import nnunetv2_mstkd
from nnunetv2_mstkd import methods, testing
from nnunetv2_mstkd.training.distillation import DistillationTrainer

EVERY = [getattr(methods, name) for name in methods.__all__]


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_property(cls, check, tmp_path):
    check(cls, tmp_path)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_mixed_precision_keeps_losses_and_direction(make_trainer, monkeypatch, cls, dtype):
    """Networks in half precision, terms in float32: what CUDA's autocast does, as far as a CPU can show it."""
    losses, gradients = [], []
    for lowered in (False, True):
        trainer = make_trainer(cls, block={"schedule": {"seed": 0}})
        if issubclass(cls, DistillationTrainer):
            give_teacher(trainer)
        wake(trainer.network)
        trainer.on_train_epoch_start()
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


def test_export_import_and_stock_prediction(tmp_path, monkeypatch):
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
