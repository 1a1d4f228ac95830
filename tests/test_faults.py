"""Full disks, signals and NaN: what is finished stays, nothing is half written, a second call does the rest."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_inputs import CASES, evaluate, without_drawing, write_dataset
from predict_inputs import files, predict, read, record, segmentations, write, write_model
from tiny import NO_TERMS, batch, memory, same, state

from nnunetv2_mstkd import cli, errors
from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd.dataset_conversion import conversion
from nnunetv2_mstkd.errors import UnsupportedError, UserError
from nnunetv2_mstkd.evaluation import run as run_module
from nnunetv2_mstkd.images.atomic import complete_image
from nnunetv2_mstkd.inference import prediction
from nnunetv2_mstkd.nnunet import checkpoints, preprocessing
from nnunetv2_mstkd.training import base, step
from nnunetv2_mstkd.training.step import MAX_SKIPPED_STEPS

FULL = [trainers.FullModalityTrainer, trainers.MSTKDTeacherTrainer, trainers.AdaMMTeacherTrainer]


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process grows beyond ``room`` bytes: writing fails as it does where a disk is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)  # a truncated .pyc would break every later import of the module
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def error_of(capsys: pytest.CaptureFixture) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


# ---- full disks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 700, 5000, 60_000])
def test_a_checkpoint_that_has_no_room_leaves_the_old_one(tmp_path, room):
    file = tmp_path / "checkpoint_latest.pth"
    checkpoints.write({"network_weights": {"a": torch.zeros(3)}}, file)
    before = file.read_bytes()
    with full_disk(room), pytest.raises(UserError, match=r"could not be written \(.*File too large\); what was there"):
        checkpoints.write({"network_weights": {"a": torch.randn(30_000)}}, file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_itk_says_nothing_of_a_full_disk_and_we_do(tmp_path):
    noise = np.random.default_rng(0).integers(0, 99, (30, 30, 30)).astype(np.uint8)
    with full_disk(5000):
        write(tmp_path / "a.nii.gz", noise)  # no exception
    assert (tmp_path / "a.nii.gz").stat().st_size == 5000
    with pytest.raises(OSError, match=r"a\.nii\.gz could not be written completely .*; is the disk full"):  # noqa: SIM117
        with complete_image(tmp_path / "a.nii.gz"):
            pass


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".nii", ".nii.gz"])
def test_a_full_disk_is_one_line_in_every_format(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 99, (30, 30, 30)).astype(np.uint8)
    file = tmp_path / f"a{ending}"
    with pytest.raises(OSError) as stop, full_disk(5000), complete_image(file):
        write(file, noise)
    assert re.fullmatch(
        rf"{re.escape(str(file))} could not be written completely \(.+\); is the disk full\?", str(stop.value)
    )


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("a defect")])
def test_other_errors_while_an_image_is_written_are_no_full_disk(tmp_path, error):
    with pytest.raises(type(error), match=str(error)), complete_image(tmp_path / "a.mha"):
        raise error


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_a_prediction_that_has_no_room_is_not_a_finished_case(folders, capsys, monkeypatch, ending):
    model = write_model(trainers.ModalityDropoutTrainer, file_ending=ending)
    for path in list((folders / "in").iterdir()):
        write(path.with_name(path.name.replace(".nii.gz", ending)), read(path))
        if ending != ".nii.gz":
            path.unlink()
    real = preprocessing.export_prediction_from_logits

    def export(*arguments):
        with full_disk(60):
            real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "export_prediction_from_logits", export)
        assert predict(folders, model, "--disable_progress_bar") == 2
    assert "could not be written completely" in error_of(capsys)
    assert record(folders / "out")["cases"] == {}
    assert not [name for name in files(folders / "out") if name.endswith(ending)]
    assert predict(folders, model, "--continue_prediction") == 0
    assert len([name for name in files(folders / "out") if name.endswith(ending)]) == 3


def test_unwritable_folder_ends_evaluation_early(folders, capsys, monkeypatch):
    model = write_model(trainers.ModalityDropoutTrainer)
    write_dataset(model)
    (folders / "file").touch()
    monkeypatch.setattr(run_module.SubsetPredictor, "predict", lambda *_: pytest.fail("the network ran"))
    assert evaluate(model, "-f", "0", "--subsets", "T0", "-o", str(folders / "file" / "out")) == 2
    assert "Not a directory" in error_of(capsys)


def test_an_evaluation_without_room_keeps_the_finished_cases(folders, capsys, monkeypatch):
    model = write_model(trainers.ModalityDropoutTrainer)
    write_dataset(model)
    without_drawing(monkeypatch)
    options = ["-f", "0", "--subsets", "T0", "--metrics", "dice"]
    real, saved = run_module.CaseRecords.save, []

    def save(self, fold, case, *more):
        with full_disk(10) if saved else contextlib.nullcontext():
            real(self, fold, case, *more)
        saved.append(case)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.CaseRecords, "save", save)
        assert evaluate(model, *options) == 2
    assert "File too large" in error_of(capsys)
    assert sorted(path.name for path in (model / "subsets" / "cases" / "fold_0").iterdir()) == [
        f"{saved[0]}.json",
        f"{saved[0]}.npz",
    ]
    assert evaluate(model, *options) == 0
    assert "already evaluated: 1" in capsys.readouterr().out


def make_source(folders: Path) -> list[str]:
    for number in range(3):
        folder = folders / "source" / f"case_{number}"
        folder.mkdir(parents=True)
        values = np.random.default_rng(number).integers(1, 99, (9, 9, 9)).astype(np.uint8)
        write(folder / "t1.mha", values)  # has to be written anew
        label = np.zeros_like(values)
        label[2:5, 2:5, 2:5] = 1
        write(folder / "seg.nii.gz", label)
    description = {"modalities": {"T1": "t1.mha"}, "label": "seg.nii.gz", "labels": {"background": 0, "core": 1}}
    (folders / "description.json").write_text(json.dumps(description))
    where = [str(folders / "source"), "--description", str(folders / "description.json")]
    return ["convert", "generic", *where, "-d", "7", "--name", "Toy", "--workers", "1", "--no-splits"]


def test_a_conversion_without_room_is_no_data_set(folders, capsys):
    command = make_source(folders)
    with full_disk(250):
        assert cli.main(command) == 2
    error = error_of(capsys)
    assert "could not be written completely" in error or "File too large" in error
    assert not list((folders / "raw").glob("Dataset*"))
    assert cli.main(command) == 0
    assert len(list((folders / "raw" / "Dataset007_Toy" / "imagesTr").iterdir())) == 3


# ---- SIGTERM -------------------------------------------------------------------------------------------------------


def terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_prediction_resumes_after_sigterm(folders, capsys, monkeypatch):
    model = write_model(trainers.ModalityDropoutTrainer)
    real, exported = preprocessing.export_prediction_from_logits, []

    def export(*arguments):
        real(*arguments)
        exported.append(arguments[5])
        if len(exported) == 2:
            terminate()

    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "export_prediction_from_logits", export)
        assert predict(folders, model, "--disable_progress_bar") == errors.EXIT_TERMINATED
    assert capsys.readouterr().err == "mstkd predict: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    first = segmentations(folders / "out")
    assert list(first) == ["complete.nii.gz"] and list(record(folders / "out")["cases"]) == ["complete"]
    assert not [name for name in files(folders / "out") if ".part" in name]

    again = []
    real_step = preprocessing.preprocess_case

    def preprocess(case, *more):
        again.append(case.name)
        return real_step(case, *more)

    monkeypatch.setattr(prediction, "preprocess_case", preprocess)
    assert predict(folders, model, "--continue_prediction") == 0
    assert again == ["one", "two"]
    assert segmentations(folders / "out")["complete.nii.gz"] == first["complete.nii.gz"]


def test_evaluation_resumes_after_sigterm(folders, capsys, monkeypatch):
    model = write_model(trainers.ModalityDropoutTrainer)
    write_dataset(model)
    without_drawing(monkeypatch)
    options = ["-f", "0", "--subsets", "T0", "--metrics", "dice"]
    real, seen = run_module.prepare, []

    def prepare(case, *more):
        if seen:
            terminate()
        seen.append(case.name)
        return real(case, *more)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare", prepare)
        patch.setattr(run_module, "IMAGES_AHEAD", 0)
        assert evaluate(model, *options) == errors.EXIT_TERMINATED
    assert capsys.readouterr().err == "mstkd evaluate: terminated\n"
    assert evaluate(model, *options) == 0
    assert f"cases: {len(CASES[:2])}, already evaluated: 1" in capsys.readouterr().out


def test_conversion_resumes_after_sigterm(folders, capsys, monkeypatch):
    command = make_source(folders)
    real, written = conversion.write_case, []

    def write_case(case, *more):
        if len(written) == 1:
            terminate()  # as it comes: while a thread works on a case
        written.append(case.name)
        return real(case, *more)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_case", write_case)
        assert cli.main(command) == errors.EXIT_TERMINATED
    assert "mstkd convert: terminated" in capsys.readouterr().err
    assert not list((folders / "raw").glob("Dataset*"))
    assert cli.main(command) == 0
    assert "from an interrupted run" in capsys.readouterr().out


def test_a_command_in_a_thread_leaves_signals_alone(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["path"])))
    thread.start()
    thread.join()
    assert codes == [0]


# ---- numbers that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", FULL, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_voxel_that_is_none_stops_the_training_at_its_step(make_trainer, cls, value):
    trainer = make_trainer(cls, block=NO_TERMS)
    trainer.current_epoch = 4
    trainer.on_train_epoch_start()
    assert np.isfinite(trainer.train_step(batch(trainer))["loss"])
    before = [state(trainer.network), copy.deepcopy(memory(trainer))]
    content = batch(trainer)
    content["data"][1, 0, 3, 3, 3] = value
    with pytest.raises(FloatingPointError) as stop:
        trainer.train_step(content)
    message = str(stop.value)
    assert re.search(r"epoch 4, iteration 1: total, segmentation \(cases case_0, case_1\)\. Nothing was saved", message)
    assert "\n" not in message and "--c" in message
    assert same(before, [trainer.network.state_dict(), memory(trainer)])
    assert not list(Path(trainer.output_folder).glob("checkpoint*"))


class Scaler:
    """A gradient scaler whose first ``overflows`` steps overflow, without a GPU."""

    def __init__(self, overflows: int) -> None:
        self.left, self.value = overflows, 2.0**16

    def scale(self, value):
        return value * self.value

    def unscale_(self, optimizer) -> None:
        pass

    def step(self, optimizer) -> None:
        if self.left <= 0:
            optimizer.step()

    def update(self) -> None:
        if self.left > 0:
            self.value /= 2
        self.left -= 1


@pytest.mark.parametrize("cls", FULL, ids=lambda cls: cls.__name__)
def test_amp_stops_after_20_skipped_steps(make_trainer, cls):
    trainer = make_trainer(cls, block=NO_TERMS)
    trainer.on_train_epoch_start()
    content = batch(trainer)
    before = state(trainer.network)
    trainer.grad_scaler = Scaler(MAX_SKIPPED_STEPS - 1)
    for _ in range(MAX_SKIPPED_STEPS - 1):
        trainer.train_step(content)
    assert same(before, state(trainer.network))
    trainer.train_step(content)  # a good one: the count starts anew
    before = state(trainer.network)
    trainer.grad_scaler = Scaler(2 * MAX_SKIPPED_STEPS)
    for _ in range(MAX_SKIPPED_STEPS):
        trainer.train_step(content)
    with pytest.raises(FloatingPointError, match=f"gradients of {MAX_SKIPPED_STEPS} steps in a row"):
        trainer.train_step(content)
    assert same(before, state(trainer.network))


def test_amp_stops_if_single_bad_cases_wear_the_scale_down(make_trainer, monkeypatch):
    """In every second step; a scaler needs 2000 good ones to recover."""
    trainer = make_trainer(trainers.ModalityDropoutTrainer, block=NO_TERMS)
    trainer.on_train_epoch_start()
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *_, **__: None)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    real = trainer.loss
    content = batch(trainer)
    steps = 0
    with pytest.raises(FloatingPointError, match=r"fallen to 0\.000488.*\(most often: bad, case_0") as stopped:
        for steps in range(100):
            bad = steps % 2 == 0
            trainer.loss = (lambda output, target: output[0].sum() * float("nan")) if bad else real
            trainer.train_step({**content, "keys": ["bad", f"case_{steps}"] if bad else ["good"]})
    assert steps == 2 * 27 and "good" not in str(stopped.value).split("most often")[1]


def test_bad_cases_of_another_process_are_named(make_trainer, monkeypatch):
    trainer = make_trainer(trainers.ModalityDropoutTrainer, block=NO_TERMS)
    trainer.on_train_epoch_start()
    monkeypatch.setattr(step, "gather", lambda mine: [mine, Counter({"bad": 20, "other": 1})])
    trainer.grad_scaler = Scaler(2 * MAX_SKIPPED_STEPS)
    for _ in range(MAX_SKIPPED_STEPS):
        trainer.train_step(batch(trainer))
    with pytest.raises(FloatingPointError, match=r"20 steps in a row \(cases bad, other\)"):
        trainer.train_step(batch(trainer))


@pytest.mark.parametrize("cls", [trainers.FullModalityTrainer, trainers.RFNetTrainer], ids=lambda cls: cls.__name__)
def test_gpus_with_unequal_parts_of_a_batch_dice_are_refused(make_trainer, monkeypatch, cls):
    monkeypatch.setattr(base, "world_size", lambda: 2)
    for batch_size, batch_dice in ((3, False), (4, True)):
        trainer = make_trainer(cls, batch_size=batch_size, batch_dice=batch_dice)
        trainer.is_ddp = True
        trainer.check_division()
    trainer = make_trainer(cls, batch_size=3, batch_dice=True)
    trainer.is_ddp, trainer.was_initialized = True, False
    with pytest.raises(UnsupportedError, match="its batch of 3 is no multiple of 2"):
        trainer.initialize()


@pytest.mark.parametrize("cls", FULL, ids=lambda cls: cls.__name__)
def test_amp_skips_nonfinite_losses_and_stops_after_20(make_trainer, monkeypatch, cls):
    trainer = make_trainer(cls, block=NO_TERMS)
    trainer.on_train_epoch_start()
    told = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda text, **_: told.append(text))
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    real, trainer.loss = trainer.loss, lambda output, target: output[0].sum() * float("nan")
    before = state(trainer.network)
    trainer.train_step(batch(trainer))
    assert told == [
        "not finite in epoch 0, iteration 0: total, segmentation (cases case_0, case_1); the step is skipped"
    ]
    assert same(before, state(trainer.network))
    broken, trainer.loss = trainer.loss, real
    trainer.train_step(batch(trainer))
    assert not same(before, state(trainer.network))
    trainer.loss, before = broken, state(trainer.network)
    for _ in range(MAX_SKIPPED_STEPS):
        trainer.train_step(batch(trainer))
    with pytest.raises(FloatingPointError, match=r"iteration 22: total, segmentation .*Nothing was saved"):
        trainer.train_step(batch(trainer))
    assert same(before, state(trainer.network))
