"""Every kind of bad input in documentation/bad_input.md, and the very lines that the page shows.

``python tests/test_bad_input_page.py`` writes the page from what the commands say now.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import tiny
import torch
from evaluate_inputs import label_image
from predict_inputs import noise, set_up, write, write_case, write_model

from nnunetv2_mstkd import cli, errors
from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd.evaluation.results import COLUMNS

PAGE = Path(__file__).parents[1] / "documentation" / "bad_input.md"
HEAD = """# Bad input, and what the commands answer

For each kind of bad input the exact line, or lines where all problems of a folder are listed together. `/data` stands
for the folders of the example, `…` for long lists; the model has the channels T0, T1, T2, T3 and the configuration
`tiny`. Every command ends with exit code 2, or 1 where some cases were skipped and the others done. `MSTKD_DEBUG=1`
adds the traceback. An error that is none of these has a traceback and exit code 3.

This page is written and checked by `tests/test_bad_input_page.py`: each entry is a test.
"""

Train = Callable[[], Any]


class Entry(NamedTuple):
    """One kind of bad input."""

    command: str
    what: str
    prepare: Callable[[World], list[str] | Train]


ENTRIES: list[Entry] = []


@dataclass
class World:
    """Folders with a model and an input of two cases, of which an entry breaks something."""

    top: Path
    model: Path

    @property
    def input(self) -> Path:
        return self.top / "in"

    @property
    def plans(self) -> Path:
        return self.model / "plans.json"

    @property
    def checkpoint(self) -> Path:
        return self.model / "fold_0" / "checkpoint_final.pth"

    def edit(self, file: Path, change: Callable[[dict], object]) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    def predict(self, *options: str) -> list[str]:
        output = [] if "-o" in options else ["-o", str(self.top / "out")]
        folds = [] if "-f" in options else ["-f", "0"]
        model = [] if "-d" in options else ["-m", str(self.model)]
        more = [*output, *folds, *model, *([] if "-device" in options else ["-device", "cpu"]), *options]
        return ["predict", "-i", str(self.input), "-npp", "0", "-nps", "0", "--disable_progress_bar", *more]

    def evaluate(self, *options: str) -> list[str]:
        folds = [] if "-f" in options else ["-f", "0"]
        common = ["-device", "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar", *folds]
        return ["evaluate", "-m", str(self.model), *common, *options]

    def evaluate_images(self, *options: str) -> list[str]:
        labels = self.top / "labels"
        write_case(self.input, "two", range(4))
        return self.evaluate(
            "-i", str(self.input), "-l", str(labels), "-o", str(self.top / "out"), "--subsets", "T0", *options
        )

    def replace(self, name: str, array: np.ndarray, **geometry: Any) -> list[str]:
        write(self.input / f"{name}.nii.gz", array, **geometry)
        return self.predict()

    def train(self, trainer: str, content: dict | None = None, **options: Any) -> Train:
        cls = getattr(trainers, trainer)
        return lambda: tiny.make_trainer(cls, content, **options)

    def results(self, name: str, change: Callable[[pd.DataFrame], object] = lambda table: None) -> str:
        rows = [
            (name, "MSTKDTrainer", "0", case, "T0", 1, "core", "dice", 0.5 + 0.1 * number)
            for number, case in enumerate("abc")
        ]
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        change(table)
        file = self.top / name / "results.csv"
        file.parent.mkdir()
        table.to_csv(file, index=False)
        return str(file)

    def compare(self, *arguments: str) -> list[str]:
        return ["compare", *arguments, "-o", str(self.top / "out")]

    def preprocessed(self) -> Path:
        folder = Path(os.environ["nnUNet_preprocessed"], tiny.DATASET)
        (folder / "nnUNetPlans.json").write_text(json.dumps(tiny.plans()))
        (folder / "dataset.json").write_text(json.dumps(tiny.dataset_json()))
        return folder

    def configure(self, *options: str, plans: bool = True) -> list[str]:
        if plans:
            self.preprocessed()
        name = [] if "--name" in options else ["--name", "short"]
        parent = [] if "-c" in options else ["-c", "tiny"]
        return ["configure", "-d", "901", *parent, *name, *options]

    def crossval(self, *options: str, configuration: str = "tiny") -> list[str]:
        self.preprocessed()
        return ["crossval", "901", configuration, "-f", "0", "--dry-run", *options]

    def convert(self, description: Any = None, *options: str) -> list[str]:
        source = self.top / "source"
        (source / "a").mkdir(parents=True, exist_ok=True)
        for seed, name in enumerate(("t1", "t2")):
            write(source / "a" / f"{name}.nii.gz", noise(seed))
        write(source / "a" / "seg.nii.gz", label_image(1))
        file = self.top / "description.json"
        file.write_text(json.dumps({**DESCRIPTION, **(description or {})}))
        number = [] if "-d" in options else ["-d", "5"]
        return ["convert", "generic", str(source), *number, "--name", "New", "--description", str(file), *options]


DESCRIPTION = {
    "modalities": {"T1": "t1.nii.gz", "T2": "t2.nii.gz"},
    "label": "seg.nii.gz",
    "labels": {"background": 0, "edema": 1, "core": 2},
}


def entry(command: str, what: str) -> Callable:
    def add(prepare: Callable) -> Callable:
        ENTRIES.append(Entry(command, what, prepare))
        return prepare

    return add


def arguments(command: str, what: str, *options: str) -> None:
    """An entry that is nothing but options of a method of World."""
    ENTRIES.append(Entry(command, what, lambda world: getattr(world, command)(*options)))


# ---- predict: arguments --------------------------------------------------------------------------------------------

arguments("predict", "`-step_size 2`", "-step_size", "2")
arguments("predict", "`-f one`", "-f", "one")
arguments("predict", "a fold that was not trained", "-f", "0", "3")
arguments("predict", "`-num_parts 2 -part_id 2`", "-num_parts", "2", "-part_id", "2")
arguments("predict", "`--drop` with a modality that the model does not have", "--drop", "T1,T9")
arguments("predict", "`--drop` of everything", "--drop", "T0,T1,T2,T3")
arguments("predict", "`-d` without `-c`", "-d", "901")
arguments("predict", "a data set that is not there", "-d", "555", "-c", "tiny")
arguments("predict", "a trainer that was not trained", "-d", "901", "-c", "tiny", "-tr", "AdaMMTrainer")
arguments("predict", "a checkpoint that is not there", "-chk", "checkpoint_best.pth")


@entry("predict", "the output folder is the input folder")
def _(world: World) -> list[str]:
    return world.predict("-o", str(world.input))


@entry("predict", "the output folder is the model folder")
def _(world: World) -> list[str]:
    return world.predict("-o", str(world.model))


@entry("predict", "the output folder is a file")
def _(world: World) -> list[str]:
    (world.top / "out").touch()
    return world.predict()


@entry("predict", "no GPU, and no `-device cpu`")
def _(world: World) -> list[str]:
    return world.predict("-device", "cuda")


# ---- predict: files and headers ------------------------------------------------------------------------------------


@entry("predict", "an input folder that is not there")
def _(world: World) -> list[str]:
    shutil.rmtree(world.input)
    return world.predict()


@entry("predict", "an input folder without images")
def _(world: World) -> list[str]:
    shutil.rmtree(world.input)
    world.input.mkdir()
    return world.predict()


@entry("predict", "an image without a channel number")
def _(world: World) -> list[str]:
    write(world.input / "three.nii.gz", noise(1))
    return world.predict()


@entry("predict", "a channel number that the model does not have")
def _(world: World) -> list[str]:
    write(world.input / "one_0007.nii.gz", noise(1))
    return world.predict()


@entry("predict", "an image of another format")
def _(world: World) -> list[str]:
    write(world.input / "three_0000.mha", noise(1))
    return world.predict()


@entry("predict", "case ids that differ in upper and lower case only")
def _(world: World) -> list[str]:
    write_case(world.input, "ONE", [0])
    return world.predict()


@entry("predict", "a truncated image")
def _(world: World) -> list[str]:
    file = world.input / "one_0001.nii.gz"
    file.write_bytes(file.read_bytes()[:-900])
    return world.predict()


@entry("predict", "an empty file")
def _(world: World) -> list[str]:
    (world.input / "one_0001.nii.gz").write_bytes(b"")
    return world.predict()


@entry("predict", "voxels that are NaN")
def _(world: World) -> list[str]:
    image = noise(1)
    image[3:5] = np.nan
    return world.replace("one_0001", image)


_IMAGES: list[tuple[str, np.ndarray, dict]] = [
    ("a constant image that is not zero", np.full(noise(1).shape, 7, np.float32), {}),
    ("another shape than the other images of the case", noise(1)[:, :, :-2], {}),
    ("another voxel size", noise(1), {"spacing": (1.0, 1.0, 2.0)}),
    ("another origin", noise(1), {"origin": (0.0, 0.0, 0.0)}),
    ("another orientation", noise(1), {"direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}),
]
for _what, _image, _geometry in _IMAGES:
    ENTRIES.append(
        Entry("predict", _what, lambda world, image=_image, more=_geometry: world.replace("one_0001", image, **more))
    )


@entry("predict", "an image of four dimensions")
def _(world: World) -> list[str]:
    image = sitk.JoinSeries([sitk.GetImageFromArray(noise(seed)) for seed in range(2)])
    sitk.WriteImage(image, str(world.input / "one_0001.nii.gz"))
    return world.predict()


@entry("predict", "a case whose images are all zero")
def _(world: World) -> list[str]:
    for channel in range(4):
        write(world.input / f"one_{channel:04d}.nii.gz", np.zeros_like(noise(1)))
    return world.predict()


@entry("predict", "several problems at once")
def _(world: World) -> list[str]:
    write(world.input / "three.nii.gz", noise(1))
    world.replace("one_0001", noise(1), spacing=(1.0, 1.0, 2.0))
    return world.replace("two_0001", np.full(noise(1).shape, 7, np.float32))


@entry("predict", "several problems at once, with `--skip-bad` (exit code 1)")
def _(world: World) -> list[str]:
    world.replace("one_0001", noise(1), spacing=(1.0, 1.0, 2.0))
    return world.predict("--skip-bad")


@entry("predict", "an absent modality whose normalisation turns zero into something else")
def _(world: World) -> list[str]:
    world.edit(
        world.plans,
        lambda content: content["configurations"]["tiny"].update(normalization_schemes=["CTNormalization"] * 4),
    )
    return world.predict("--drop", "T0")


# ---- predict: models -----------------------------------------------------------------------------------------------


def _model(what: str) -> Callable:
    """An entry that breaks the model and predicts."""

    def add(change: Callable[[World], object]) -> Callable:
        def prepare(world: World) -> list[str]:
            change(world)
            return world.predict()

        ENTRIES.append(Entry("predict", what, prepare))
        return change

    return add


def _in_plans(what: str, change: Callable[[dict], object], *, of_configuration: bool = True) -> None:
    def prepare(world: World) -> list[str]:
        world.edit(
            world.plans, lambda content: change(content["configurations"]["tiny"] if of_configuration else content)
        )
        return world.predict()

    ENTRIES.append(Entry("predict", what, prepare))


@_model("a model folder without plans.json")
def _(world: World) -> None:
    world.plans.unlink()


@_model("a plans.json that is not a table")
def _(world: World) -> None:
    world.plans.write_text("[]")


_in_plans("a plans.json without patch_size", lambda content: content.pop("patch_size"))
_in_plans("an impossible patch_size", lambda content: content.update(patch_size=[16, 0, 16]))
_in_plans("the second stage of a cascade", lambda content: content.update(previous_stage="3d_lowres"))
_in_plans(
    "a plans.json that names a program as a layer",
    lambda content: content["architecture"]["arch_kwargs"].update(nonlin="os.system"),
)
_in_plans("a preprocessor that is none", lambda content: content.update(preprocessor_name="maybe_mkdir_p"))
_in_plans(
    "a reader that is none", lambda content: content.update(image_reader_writer="tifffile"), of_configuration=False
)
_in_plans("preprocessed data elsewhere", lambda content: content.update(data_identifier="../../elsewhere"))
_in_plans("a configuration that inherits from itself", lambda content: content.update(inherits_from="tiny"))
_in_plans(
    "settings of the network that fit no network",
    lambda content: content["architecture"]["arch_kwargs"].update(n_conv_per_stage=[1]),
)


@_model("a dataset.json without channel names")
def _(world: World) -> None:
    world.edit(world.model / "dataset.json", lambda content: content.pop("channel_names"))


@_model("a dataset.json without labels")
def _(world: World) -> None:
    world.edit(world.model / "dataset.json", lambda content: content.pop("labels"))


@_model("a file ending that leads elsewhere")
def _(world: World) -> None:
    world.edit(world.model / "dataset.json", lambda content: content.update(file_ending="/../x.nii.gz"))


@_model("a truncated checkpoint")
def _(world: World) -> None:
    world.checkpoint.write_bytes(world.checkpoint.read_bytes()[:5000])


def _checkpoint(what: str, change: Callable[[dict], object]) -> None:
    def prepare(world: World) -> list[str]:
        content = torch.load(world.checkpoint, weights_only=False)
        change(content)
        torch.save(content, world.checkpoint)
        return world.predict()

    ENTRIES.append(Entry("predict", what, prepare))


_checkpoint("a checkpoint that is a program", lambda content: content.update(x=re.compile("a program")))
_checkpoint("a checkpoint of something else", lambda content: content.pop("network_weights"))
_checkpoint("a checkpoint whose weights are no tensors", lambda content: content.update(network_weights={"a": 1}))
_checkpoint("a checkpoint of another network", lambda content: content["network_weights"].popitem())
_checkpoint("a trainer that is not installed", lambda content: content.update(trainer_name="SomebodysTrainer"))
_checkpoint("a checkpoint of another configuration", lambda content: content["init_args"].update(configuration="2d"))
_checkpoint(
    "mirroring along an axis that is none", lambda content: content.update(inference_allowed_mirroring_axes=(7,))
)


@entry("predict", "`--continue_prediction` with other options")
def _(world: World) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(world.predict("--drop", "T3", "--disable_tta", "-step_size", "1")) == 0
    return world.predict("--continue_prediction", "--disable_tta", "-step_size", "1")


@entry("predict", "`--continue_prediction` with a damaged predictions.json")
def _(world: World) -> list[str]:
    (world.top / "out").mkdir()
    (world.top / "out" / "predictions.json").write_text('{"cases": 3}')
    return world.predict("--continue_prediction")


# ---- evaluate ------------------------------------------------------------------------------------------------------

arguments("evaluate", "`-i` without `-l`", "-i", "images")
arguments("evaluate", "`--stack 0`", "--stack", "0")
arguments("evaluate", "a metric that does not exist", "--metrics", "dyce")
arguments("evaluate", "a subset with an unknown modality", "--subsets", "T0+T9")
arguments("evaluate", "rules for empty masks that do not exist", "--convention", "ours")
arguments("evaluate", "a fold that was not trained", "-f", "2")
arguments("evaluate", "validation cases without preprocessed data")


@entry("evaluate", "a case without a label")
def _(world: World) -> list[str]:
    (world.top / "labels" / "two.nii.gz").unlink()
    return world.evaluate_images()


@entry("evaluate", "a label with a value that the data set does not have")
def _(world: World) -> list[str]:
    write(world.top / "labels" / "two.nii.gz", label_image(1) * 3)
    return world.evaluate_images()


@entry("evaluate", "a label that lies elsewhere")
def _(world: World) -> list[str]:
    write(world.top / "labels" / "two.nii.gz", label_image(1), origin=(0.0, 0.0, 0.0))
    return world.evaluate_images()


@entry("evaluate", "a case without one of the modalities")
def _(world: World) -> list[str]:
    command = world.evaluate_images()
    (world.input / "two_0002.nii.gz").unlink()
    return command


@entry("evaluate", "results of other options in the folder")
def _(world: World) -> list[str]:
    folder = world.top / "out" / "cases"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"folder": "another_model"}))
    return world.evaluate_images()


@entry("evaluate", "a damaged record of a case")
def _(world: World) -> list[str]:
    file = world.top / "out" / "cases" / "fold_0" / "two.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"subsets": 3}')
    return world.evaluate_images()


# ---- compare -------------------------------------------------------------------------------------------------------


@entry("compare", "a model that was not evaluated")
def _(world: World) -> list[str]:
    return world.compare(str(world.model), world.results("b"))


@entry("compare", "one model only")
def _(world: World) -> list[str]:
    return world.compare(world.results("a"))


@entry("compare", "a table that is none")
def _(world: World) -> list[str]:
    file = world.results("a")
    Path(file).write_text("no table\n")
    return world.compare(file, world.results("b"))


@entry("compare", "a table without a column")
def _(world: World) -> list[str]:
    return world.compare(world.results("a", lambda table: table.pop("case")), world.results("b"))


@entry("compare", "an impossible value")
def _(world: World) -> list[str]:
    return world.compare(world.results("a", lambda table: table.__setitem__("value", 50.0)), world.results("b"))


@entry("compare", "a row that stands twice")
def _(world: World) -> list[str]:
    return world.compare(world.results("a", lambda table: table.__setitem__("case", "a")), world.results("b"))


@entry("compare", "a baseline that is none of the models")
def _(world: World) -> list[str]:
    return world.compare(world.results("a"), world.results("b"), "--baseline", "c")


@entry("compare", "a metric that was not measured")
def _(world: World) -> list[str]:
    return world.compare(world.results("a"), world.results("b"), "--metrics", "hd95")


# ---- fill-missing, restore-labels ----------------------------------------------------------------------------------


@entry("fill-missing", "an output folder that is not empty")
def _(world: World) -> list[str]:
    return [
        "fill-missing",
        "-i",
        str(world.input),
        "-o",
        str(world.model),
        "-m",
        str(world.model),
        "--disable_progress_bar",
    ]


@entry("fill-missing", "a data set that is not there")
def _(world: World) -> list[str]:
    return ["fill-missing", "-i", str(world.input), "-o", str(world.top / "out"), "-d", "555"]


@entry("restore-labels", "predictions for a data set that `mstkd convert` did not make")
def _(world: World) -> list[str]:
    shutil.copyfile(world.model / "dataset.json", world.input / "dataset.json")
    return ["restore-labels", "-i", str(world.input), "-o", str(world.top / "out")]


@entry("restore-labels", "predictions without dataset.json")
def _(world: World) -> list[str]:
    return ["restore-labels", "-i", str(world.input), "-o", str(world.top / "out")]


@entry("restore-labels", "a dataset.json that would write elsewhere")
def _(world: World) -> list[str]:
    record = {"release_values": {"0": 0}, "label_file": "../{case}.nii.gz"}
    content = {**tiny.dataset_json(), "mstkd_conversion": record}
    (world.input / "dataset.json").write_text(json.dumps(content))
    return ["restore-labels", "-i", str(world.input), "-o", str(world.top / "out")]


# ---- configure -----------------------------------------------------------------------------------------------------

arguments("configure", "a parent that the plans do not have", "-c", "3d_ultra")
arguments("configure", "a name that cannot be part of a folder name", "--name", "a__b")
arguments("configure", "nnU-Net's own name", "--name", "2d")
arguments("configure", "a setting that does not exist", "--set", "schedule.epoch=3")
arguments("configure", "an impossible value", "--epochs", "0")
arguments("configure", "an assignment that is none", "--set", "schedule")
arguments("configure", "more stages than the patch allows", "--features", "8", "8", "8", "8", "8", "8")
arguments(
    "configure",
    "a subset with an unknown modality",
    "--set",
    "sampler.kind=fixed",
    "--set",
    'sampler.subsets=["T0+T9"]',
)


@entry("configure", "a data set that was not planned")
def _(world: World) -> list[str]:
    return world.configure(plans=False)


@entry("configure", "a name that is taken")
def _(world: World) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(world.configure("--epochs", "3")) == 0
    return ["configure", "-d", "901", "-c", "tiny", "--name", "short", "--epochs", "4"]


# ---- convert -------------------------------------------------------------------------------------------------------


def _description(what: str, description: dict, *options: str) -> None:
    ENTRIES.append(Entry("convert", what, lambda world: world.convert(description, *options)))


_description("a description with an unknown key", {"modality": {}})
_description("labels that are not consecutive", {"labels": {"background": 0, "core": 4}})
_description("a pattern that leads elsewhere", {"label": "/etc/passwd"})
_description("a pattern that no file matches", {"label": "labels.nii.gz"})
_description("a label value that the description does not have", {"labels": {"background": 0, "core": 1}})
_description("an impossible number of the data set", {}, "-d", "0")
_description("more folds than patients", {}, "--folds", "5")


@entry("convert", "a source that is not there")
def _(world: World) -> list[str]:
    command = world.convert()
    shutil.rmtree(world.top / "source")
    return command


@entry("convert", "a truncated image")
def _(world: World) -> list[str]:
    command = world.convert()
    file = world.top / "source" / "a" / "t1.nii.gz"
    file.write_bytes(file.read_bytes()[:-900])
    return command


@entry("convert", "the folder of another release")
def _(world: World) -> list[str]:
    (world.top / "source" / "BraTS-GLI-00000-000").mkdir(parents=True)
    return ["convert", "brats2021", str(world.top / "source"), "-d", "5"]


# ---- crossval, status, demo, phantom -------------------------------------------------------------------------------

arguments("crossval", "a fold twice", "-f", "0", "0")
arguments("crossval", "a trainer that does not exist", "--trainer", "SomebodysTrainer")
arguments("crossval", "options of SLURM without SLURM", "--slurm-partition", "gpu")
arguments("crossval", "`--jobs 0`", "--jobs", "0")
ENTRIES.append(
    Entry("crossval", "a configuration that the plans do not have", lambda world: world.crossval(configuration="3d"))
)


@entry("status", "a data set that was not preprocessed")
def _(world: World) -> list[str]:
    return ["status", "555", "3d_fullres"]


for _what, _options in (
    ("`--spacing 9`", ["--spacing", "9"]),
    ("`--epochs 0`", ["--epochs", "0"]),
    ("a folder that is not the demo's", []),
):
    ENTRIES.append(Entry("demo", _what, lambda world, options=_options: ["demo", "--out", str(world.input), *options]))
for _what, _options in (
    ("an impossible number of the data set", ["-d", "0"]),
    ("an impossible name", ["-d", "5", "--name", "a/b"]),
    ("a recipe that does not exist", ["-d", "5", "--recipe", "easy"]),
    ("voxels that are too large", ["-d", "5", "--spacing", "60"]),
):
    ENTRIES.append(Entry("phantom", _what, lambda world, options=_options: ["phantom", *options]))


# ---- training ------------------------------------------------------------------------------------------------------

TRAIN = "nnUNetv2_train"


def _setting(what: str, block: Any, trainer: str = "MSTKDTrainer", **options: Any) -> None:
    ENTRIES.append(Entry(TRAIN, what, lambda world: world.train(trainer, block=block, **options)))


_setting("a section of settings that does not exist", {"distilation": {}})
_setting("a setting that does not exist", {"schedule": {"epoch": 3}})
_setting("an impossible value", {"schedule": {"epochs": 0}})
_setting("text in place of a number", {"distillation": {"kl": "1"}})
_setting("a subset with an unknown modality", {"sampler": {"kind": "fixed", "subsets": ["T0+T9"]}})
_setting("a transformer that does not fit the network", {"network": {"heads": 5}})
_setting("one input channel", {}, "ModalityDropoutTrainer", channels=1)


@entry(TRAIN, "a normalisation that turns zero into something else")
def _(world: World) -> Train:
    content = tiny.plans()
    content["configurations"]["tiny"]["normalization_schemes"][2] = "CTNormalization"
    return world.train("ModalityDropoutTrainer", content)


@entry(TRAIN, "the second stage of a cascade")
def _(world: World) -> Train:
    content = tiny.plans()
    content["configurations"]["tiny"]["previous_stage"] = "3d_lowres"
    return world.train("ModalityDropoutTrainer", content)


def _start(what: str, trainer: str, block: dict, prepare: Callable[[World, Any], object] = lambda *_: None) -> None:
    def make(world: World) -> Train:
        made = world.train(trainer, block=block)()
        made._split = {"train": ["a"], "val": ["b"]}
        prepare(world, made)
        return made.prepare_training

    ENTRIES.append(Entry(TRAIN, what, make))


_start("a student without a teacher", "MSTKDTrainer", {})


def _unfinished_teacher(world: World, made: Any) -> None:
    folder = Path(made.output_folder_base).with_name("MSTKDTeacherTrainer__nnUNetPlans__tiny") / "fold_0"
    folder.mkdir(parents=True)
    made.save_checkpoint(str(folder / "checkpoint_latest.pth"))


_start("a teacher that is not finished", "MSTKDTrainer", {}, _unfinished_teacher)
_start(
    "weights to start from that are not there",
    "ModalityDropoutTrainer",
    {"schedule": {"init_from": "nowhere/checkpoint_final.pth"}},
)


@entry(TRAIN, "`--c` from a truncated checkpoint")
def _(world: World) -> Train:
    made = world.train("MSTKDTrainer")()
    world.checkpoint.write_bytes(world.checkpoint.read_bytes()[:5000])
    return lambda: made.load_checkpoint(str(world.checkpoint))


@entry(TRAIN, "`--c` with another network in the plans")
def _(world: World) -> Train:
    made = world.train("MSTKDTrainer", block={"network": {"heads": 2}})()
    return lambda: made.load_checkpoint(str(world.checkpoint))


@entry(TRAIN, "a voxel that is NaN in a training case")
def _(world: World) -> Train:
    made = world.train("ModalityDropoutTrainer", block={"sampler": {"kind": "fixed", "subsets": ["all"]}})()
    made.on_train_epoch_start()
    batch = tiny.batch(made)
    batch["data"][0, 0, 0, 0, 0] = float("nan")
    return lambda: made.train_step(batch)


# ---- the page ------------------------------------------------------------------------------------------------------


def answer(case: Entry, world: World) -> str:
    """What the user sees, with the folders of the test written as /data."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepared = case.prepare(world)
    error = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(error),
    ):
        warnings.simplefilter("ignore")
        if isinstance(prepared, list):
            assert cli.main(prepared) in ((1, 2) if case.command in ("predict", "convert") else (2,))
        else:
            _refused_by_nnunets_command(prepared)
    text = re.sub(r"\d+ bytes", "N bytes", error.getvalue().replace(str(world.top), "/data").strip())
    assert text and "Traceback" not in text
    # lists that grow with every new method
    return re.sub(r"(allowed are |package has it \()[^)\n]+", r"\1…", text)


def _refused_by_nnunets_command(call: Train) -> None:
    """What the end of a process with this exception prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        errors.install_excepthook()
        with pytest.raises(Exception) as caught, contextlib.redirect_stderr(io.StringIO()):
            call()
        with pytest.raises(SystemExit) as ended:
            sys.excepthook(caught.type, caught.value, caught.tb)
        assert ended.value.code == 2


def text_of(case: Entry, line: str) -> str:
    return f"* {case.what}\n\n  ```text\n" + "".join(f"  {part}\n" for part in line.split("\n")) + "  ```\n"


def page(answers: dict[int, str]) -> str:
    parts = [HEAD]
    for command in dict.fromkeys(case.command for case in ENTRIES):
        name = command if command == TRAIN else f"mstkd {command}"
        parts.append(f"## `{name}`\n")
        parts += [text_of(case, answers[n]) for n, case in enumerate(ENTRIES) if case.command == command]
    return "\n".join(parts)


def make_template(top: Path, patch: pytest.MonkeyPatch) -> None:
    set_up(top, patch)
    shutil.rmtree(top / "in")
    for name in ("one", "two"):
        write_case(top / "in", name, range(4))
    (top / "labels").mkdir()
    for name in ("one", "two"):
        write(top / "labels" / f"{name}.nii.gz", label_image(1))
    with contextlib.redirect_stdout(io.StringIO()):
        write_model(trainers.MSTKDTrainer)


@contextlib.contextmanager
def new_world(template: Path) -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        top = Path(folder, "data")
        shutil.copytree(template, top)
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(top / name))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("nnUNet_compile", "f")
        yield World(top, next((top / "results").glob("*/*")))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    top = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        make_template(top, patch)
    return top


@pytest.mark.parametrize("number", range(len(ENTRIES)), ids=lambda n: f"{ENTRIES[n].command}: {ENTRIES[n].what}")
def test_the_page_shows_what_the_user_sees(template, number):
    with new_world(template) as world:
        shown = answer(ENTRIES[number], world)
    assert text_of(ENTRIES[number], shown) in PAGE.read_text(encoding="utf-8"), (
        f"run python tests/test_bad_input_page.py; the command says:\n{shown}"
    )


def test_the_page_has_these_entries_and_no_others():
    listed = re.findall(r"^\* (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(case.what for case in ENTRIES)
    assert len(ENTRIES) >= 40


if __name__ == "__main__":
    answers = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        top = Path(folder, "template")
        top.mkdir()
        make_template(top, patch)
        for n, case in enumerate(ENTRIES):
            with new_world(top) as world:
                answers[n] = answer(case, world)
    PAGE.write_text(page(answers), encoding="utf-8")
