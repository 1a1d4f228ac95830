"""The examples of documentation/bad_input.md, and bad models and options that no other test covers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from evaluate_inputs import label_image
from predict_inputs import edit_checkpoint, noise, set_up, write, write_case, write_model
from test_faults import full_disk

from nnunetv2_mstkd import cli, methods
from nnunetv2_mstkd.errors import UserError

PAGE = Path(__file__).parents[1] / "documentation" / "bad_input.md"
EXAMPLE = re.compile(r"^### (.+?)\n(?:(?!^#).)*?```text\n\$ (.+?)\n(.+?)\n```", re.DOTALL | re.MULTILINE)
EXAMPLES = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
QUICK = "-device cpu -npp 0 -nps 0 --disable_progress_bar -f 0 -m model"
USUAL = {
    "predict": f"-i in -o out {QUICK}",
    "evaluate": f"--subsets T0 {QUICK}",
    "fill-missing": "-i in -o out -m model --disable_progress_bar",
}
"""What the page abbreviates in a command."""


@dataclass
class World:
    """The working folder: ``model``, ``in`` with the cases one and two, and their ``labels``."""

    top: Path

    @property
    def model(self) -> Path:
        return self.top / "model"

    def edit_json(self, name: str, change: Callable[[dict], object]) -> None:
        file = self.model / name
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    def edit_configuration(self, change: Callable[[dict], object]) -> None:
        self.edit_json("plans.json", lambda content: change(content["configurations"]["tiny"]))

    def edit_checkpoint(self, change: Callable[[dict], object]) -> None:
        edit_checkpoint(self.model, change)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a model and its input, made once."""
    top = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        set_up(top, patch)
        shutil.rmtree(top / "in")
        (top / "labels").mkdir()
        for name in ("one", "two"):
            write_case(top / "in", name, range(4))
            write(top / "labels" / f"{name}.nii.gz", label_image(1))
        preprocessed = top / "preprocessed" / tiny.DATASET
        preprocessed.mkdir()
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps(tiny.plans()))
        (preprocessed / "dataset.json").write_text(json.dumps(tiny.dataset_json()))
        write_model(methods.MSTKDTrainer).rename(top / "model")
    return top


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    top = tmp_path / "data"
    shutil.copytree(template, top)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(top / name))
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(top)
    return World(top)


# ---- what the examples of the page need ----------------------------------------------------------------------------


def trainer(name: str, **changes: Any) -> Any:
    content = tiny.plans()
    content["configurations"]["tiny"].update(changes)
    made = tiny.make_trainer(getattr(methods, name), content)
    made.split = {"train": ["a"], "val": ["b"]}
    return made


def start_student(**changes: Any) -> None:
    """Start a student; beside it a teacher with `changes` in its plans, if there are any."""
    if changes:
        teacher = trainer("MSTKDTeacherTrainer", **changes)
        os.makedirs(teacher.output_folder, exist_ok=True)
        teacher.save_checkpoint(f"{teacher.output_folder}/checkpoint_final.pth")
    trainer("MSTKDTrainer").prepare_training()


def step_on_nan() -> None:
    made = trainer("ModalityDropoutTrainer")
    made.on_train_epoch_start()
    batch = tiny.batch(made)
    batch["data"][0] = float("nan")
    made.train_step(batch)


SCHEMES = ["ZScoreNormalization", "ZScoreNormalization", "CTNormalization", "ZScoreNormalization"]
TRAININGS: dict[str, Callable[[], object]] = {
    "The teacher is missing": start_student,
    "The teacher was trained with another patch size": lambda: start_student(patch_size=[8, 8, 8]),
    "A normalisation does not keep zero": lambda: trainer("ModalityDropoutTrainer", normalization_schemes=SCHEMES),
    "The loss is not finite": step_on_nan,
}
"""What stands for ``nnUNetv2_train``, which would need preprocessed data."""


def put_nan(world: World) -> None:
    image = noise(1)
    image[3:5] = np.nan
    write(world.top / "in" / "one_0001.nii.gz", image)


PREPARATIONS: dict[str, Callable[[World], object]] = {
    "A fold is not finished": lambda world: (world.model / "fold_0" / "checkpoint_final.pth").rename(
        world.model / "fold_0" / "checkpoint_latest.pth"
    ),
    "The trainer of a model is not installed": lambda world: world.edit_checkpoint(
        lambda content: content.update(trainer_name="SomebodysTrainer")
    ),
    "A checkpoint contains code": lambda world: world.edit_checkpoint(
        lambda content: content.update(x=re.compile("code"))
    ),
    "An image has NaN voxels": put_nan,
    "An image is on another grid": lambda world: write(
        world.top / "in" / "one_0001.nii.gz", noise(1), spacing=(1.0, 1.0, 2.0)
    ),
    "The disk is full": lambda world: (world.top / "in" / "one_0001.nii.gz").unlink(),
    "A label is missing": lambda world: (world.top / "labels" / "two.nii.gz").unlink(),
}


# ---- the page ------------------------------------------------------------------------------------------------------


def run(command: str) -> int:
    """Run an ``mstkd`` command in this process and return its exit code."""
    name = command.split()[1]
    try:
        return cli.main(shlex.split(command.replace("…", USUAL.get(name, "")))[1:])
    except SystemExit as stop:
        return stop.code


def answer(title: str, command: str, world: World, capsys: pytest.CaptureFixture) -> str:
    """What the user sees on stderr."""
    if command.startswith("nnUNetv2_train"):  # tests/test_errors.py checks how it prints a UserError
        with pytest.raises(UserError) as caught:
            TRAININGS[title]()
        return f"nnunetv2_mstkd: {caught.value}"
    PREPARATIONS.get(title, lambda world: None)(world)
    capsys.readouterr()
    with full_disk(50) if "disk" in title else contextlib.nullcontext():
        assert run(command) == 2
    return capsys.readouterr().err.strip()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("title", "command", "shown"), EXAMPLES, ids=[title for title, *_ in EXAMPLES])
def test_page_shows_the_message(world, capsys, title, command, shown):
    message = answer(title, command, world, capsys)
    assert re.fullmatch(".*".join(map(re.escape, shown.split("…"))), message), message


def test_every_heading_is_an_example():
    titles = [title for title, *_ in EXAMPLES]
    assert titles == re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {*TRAININGS, *PREPARATIONS} <= set(titles)


# ---- bad models and options that no other test covers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("break_model", "phrase"),
    [
        (lambda world: world.edit_configuration(lambda c: c.pop("patch_size")), "has no 'patch_size'"),
        (lambda world: world.edit_configuration(lambda c: c.update(patch_size=[16, 0, 16])), "[16, 0, 16], expected 2"),
        (lambda world: world.edit_configuration(lambda c: c.update(inherits_from="tiny")), "inherit"),
        (
            lambda world: world.edit_configuration(lambda c: c["architecture"]["arch_kwargs"].update(n_stages=7)),
            "no network that MSTKDTrainer can build",
        ),
        (lambda world: world.edit_json("dataset.json", lambda c: c.pop("channel_names")), "channel_names"),
        (lambda world: world.edit_json("dataset.json", lambda c: c.pop("labels")), "dataset.json has no labels"),
        (lambda world: world.edit_checkpoint(lambda c: c.update(network_weights={"a": 1})), "tensors"),
        (
            lambda world: world.edit_checkpoint(lambda c: c.update(inference_allowed_mirroring_axes=(7,))),
            "mirroring_axes",
        ),
        (lambda world: (world.top / "out").touch(), "out is a file"),
    ],
    ids=["no patch", "bad patch", "inheritance circle", "no network", "no channels", "no labels", "no tensors",
         "mirror axis", "output is a file"],
)  # fmt: skip
def test_predict_refuses(world, capsys, break_model, phrase):
    break_model(world)
    assert run("mstkd predict …") == 2
    error = capsys.readouterr().err
    assert phrase in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "phrase"),
    [
        ("status -d 555 -c tiny", "no folder Dataset555_*"),
        ("demo --out in --spacing 9", "--spacing is 9.0, expected 2 to 6"),
        ("demo --out in --epochs 0", "--epochs is 0, expected at least 1"),
        ("demo --out in", "is not empty and holds no demo"),
        ("phantom -d 5 --spacing 60", "between 1 and 6 mm"),
    ],
)
def test_command_refuses(world, capsys, command, phrase):
    assert run(f"mstkd {command}") == 2
    error = capsys.readouterr().err
    assert phrase in error and error.count("\n") == 1
