"""The package of documentation/extending.md: built, installed without a network, and used by every command."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGURATION, PHANTOM
from tiny import batch, give_teacher, same, state

from nnunetv2_mstkd import testing
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.methods import registry
from nnunetv2_mstkd.methods.kd.trainer import KDTeacherTrainer
from nnunetv2_mstkd.methods.registry import trainers
from nnunetv2_mstkd.nnunet.trainers import find_trainer
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.full_modality import TeacherTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.settings import Section, Settings, TeacherSettings, read_assignment
from nnunetv2_mstkd.training.step import Term
from nnunetv2_mstkd.training.teacher import Teacher

PAGE = Path(__file__).parents[1] / "documentation" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, for PYTHONPATH."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, content in FILES.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", site, source], check=True, capture_output=True, text=True)
    return site


@pytest.fixture(scope="module")
def environment(site) -> dict[str, str]:
    """Variables of a process that has the package, and the modules of the tests."""
    path = [str(site), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


COMMANDS = """
import json, sys
from conftest import command
for words in json.loads(sys.argv[1]):
    command(*words)
    print(chr(0), flush=True)
"""


def call(environment: dict[str, str], *commands: tuple[object, ...]) -> list[str]:
    """Run commands one after another in one process; what each printed."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, words],
        env=environment | {name: value for name, value in os.environ.items() if name.startswith("nnUNet_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.split(chr(0))


def test_example_is_complete():
    assert set(FILES) == {"pyproject.toml", "matching/__init__.py", "matching/trainer.py"}


def test_every_command_knows_it(environment, phantom, tmp_path):
    model = ("-d", PHANTOM, "-c", "strong", "-f", 0, "-device", "cpu", "-tr")
    options = ("-npp", 0, "-nps", 0, "--disable_tta", "--disable_progress_bar")
    images, out = phantom.raw / phantom.dataset / "imagesTs", tmp_path / "out"
    fold, other = (phantom.fold(trainer, configuration="strong") for trainer in ("MatchingTrainer", "KDTeacherTrainer"))
    settings = ("--set", "matching.weight=3", "--epochs", 1)
    configured, *_, compared, steps, _ = call(
        environment,
        ("mstkd", "configure", "-d", PHANTOM, "-c", CONFIGURATION, "--name", "strong", *settings),
        ("nnUNetv2_train", PHANTOM, "strong", 0, "-tr", "KDTeacherTrainer", "-device", "cpu"),
        ("nnUNetv2_train", PHANTOM, "strong", 0, "-tr", "MatchingTrainer", "-device", "cpu"),
        ("mstkd", "predict", "-i", images, "-o", out, *model, "MatchingTrainer", *options, "--drop", "T1"),
        ("mstkd", "evaluate", *model, "MatchingTrainer", *options, "--subsets", "T1", "all"),
        ("mstkd", "evaluate", *model, "KDTeacherTrainer", *options, "--subsets", "T1", "all"),
        ("mstkd", "compare", fold.parent, other.parent, "-o", tmp_path / "comparison"),
        (
            "mstkd",
            "crossval",
            "-d",
            PHANTOM,
            "-c",
            "strong",
            "-tr",
            "MatchingTrainer",
            "-f",
            1,
            "--disable_tta",
            "--dry-run",
        ),
    )
    assert "matching.weight = 3.0" in configured
    log = next(fold.glob("training_log_*.txt")).read_text()
    assert re.search(r"terms: segmentation \S+, matching \S+", log) and "started from the teacher" in log
    assert len(list(out.glob("*.nii.gz"))) == 2
    assert "MatchingTrainer" in compared
    assert "train KDTeacherTrainer (tiny), fold 1" in steps and "train MatchingTrainer (strong), fold 1" in steps


def test_unknown_section_without_the_package(phantom, capsys):
    from nnunetv2_mstkd import cli

    words = ["configure", "-d", str(PHANTOM), "-c", CONFIGURATION, "--name", "strong", "--set", "matching.weight=3"]
    assert cli.main(words) == 2
    assert "unknown setting 'matching'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def passed(environment, tmp_path_factory) -> list[str]:
    """The file of each test that passed: those of the page, and the same checks with MedMAP in front."""
    folder = tmp_path_factory.mktemp("tests")
    (folder / "test_matching.py").write_text(re.search(r"```python\n(import pytest\n.*?)```", TEXT, re.DOTALL)[1])
    code = re.search(r"### Put MedMAP in front of it\n.*?```python\n(.*?)```", TEXT, re.DOTALL)[1]
    (folder / "test_both.py").write_text(TEST_BOTH.replace("CODE", code))
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", folder, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return re.findall(r"(test_\w+)\.py::\S+ PASSED", done.stdout)


TEST_BOTH = """
import pytest
import torch
from matching.trainer import MatchingTrainer
from nnunetv2_mstkd import testing

CODE

@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_both(check, tmp_path):
    check(MedMAPMatchingTrainer, tmp_path)

def test_terms(tmp_path):
    with testing.nnunet_folders(tmp_path):
        trainer = testing.give_teacher(testing.make_trainer(MedMAPMatchingTrainer))
        trainer.on_train_epoch_start()
        terms = trainer.train_step(testing.batch(trainer))["terms"]
        assert set(terms) == {"segmentation", "matching", "alignment"} and terms["alignment"] > 0
"""


def test_properties_of_the_example(passed):
    assert passed.count("test_matching") == len(testing.CHECKS)


def test_medmap_fits_before_the_example(passed):
    assert passed.count("test_both") == len(testing.CHECKS) + 1


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise RuntimeError('broken')", "cannot be imported"),
        ("class MatchingTrainer: pass", "does not derive from"),
        ("from nnunetv2_mstkd.methods import MSTKDTrainer as MatchingTrainer", "its class is called MSTKDTrainer"),
    ],
    ids=["broken", "no trainer", "other name"],
)
def test_bad_registrations_are_left_out(site, tmp_path, monkeypatch, code, problem):
    own = tmp_path / "matching"
    own.mkdir()
    (own / "__init__.py").touch()
    (own / "trainer.py").write_text(code)
    for folder in (site, tmp_path):
        monkeypatch.syspath_prepend(folder)
    try:
        with pytest.warns(UserWarning, match=problem):
            found = trainers()
    finally:
        for name in ("matching", "matching.trainer"):
            sys.modules.pop(name, None)
    assert "MatchingTrainer" not in found and "MSTKDTrainer" in found


def section(name: str, **keys: object) -> type[Section]:
    """A section called ``name`` with these keys, whose values are their defaults."""
    content = {"NAME": name, "__annotations__": {key: type(value) for key, value in keys.items()}, **keys}
    return dataclass(frozen=True, kw_only=True)(type(f"{name.title()}{''.join(keys)}Section", (Section,), content))


def register(monkeypatch: pytest.MonkeyPatch, *added: type) -> None:
    """Let these classes be what other packages register."""
    entries = [
        SimpleNamespace(name=cls.__name__, value=f"package:{cls.__name__}", load=lambda cls=cls: cls) for cls in added
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)


def test_a_section_name_in_use_is_refused(monkeypatch):
    first, second, taken = section("rivals", a=1), section("rivals", b=2), section("teacher", a=1)
    classes = [
        type(name, (ModalityDropoutTrainer,), {"sections": (*ModalityDropoutTrainer.sections, own)})
        for name, own in (("FirstTrainer", first), ("SecondTrainer", second), ("TakenTrainer", taken))
    ]
    register(monkeypatch, *classes)
    with pytest.warns(UserWarning, match=r"is called 'rivals', like|is called 'teacher', like") as told:
        found = trainers()
    assert len(told) == 2 and "FirstTrainer" in found and not {"SecondTrainer", "TakenTrainer"} & found.keys()
    assert read_assignment("teacher.warm_start=false") == ("teacher", "warm_start", False)


def test_a_badly_written_section_is_left_out(monkeypatch):
    own = type("OwnSection", (Section,), {"NAME": "own", "__annotations__": {"a": int}, "a": 1})  # no dataclass
    cls = type("OwnTrainer", (ModalityDropoutTrainer,), {"sections": (*ModalityDropoutTrainer.sections, own)})
    register(monkeypatch, cls)
    with pytest.warns(UserWarning, match="OwnSection needs @dataclass"):
        assert "OwnTrainer" not in trainers()


@pytest.mark.parametrize("order", [1, -1])
def test_an_annotation_that_fails_stops_no_other_trainer(monkeypatch, order):
    content = {"NAME": "old", "__annotations__": {"a": "torch.Float"}, "a": 1.0}
    old = dataclass(frozen=True, kw_only=True)(type("OldSection", (Section,), content))
    classes = [
        type(name, (ModalityDropoutTrainer,), {"sections": (*ModalityDropoutTrainer.sections, own)})
        for name, own in (("OldTrainer", old), ("GoodTrainer", section("good", a=1)))
    ]
    register(monkeypatch, *classes[::order])
    with pytest.warns(UserWarning, match="OldSection has an annotation that cannot be read"):
        found = trainers()
    assert "GoodTrainer" in found and "OldTrainer" not in found
    assert Settings.read({}, ModalityDropoutTrainer.all_sections())


def test_sections_may_have_slots_or_a_base_with_their_name(monkeypatch):
    content = {"NAME": "slotted", "__annotations__": {"a": int}, "a": 1}
    slots = dataclass(frozen=True, kw_only=True, slots=True)(type("SlottedSection", (Section,), content))
    base = type("BaseSection", (Section,), {"NAME": "based"})
    derived = dataclass(frozen=True, kw_only=True)(type("Derived", (base,), {"__annotations__": {"a": int}, "a": 1}))
    own = (*ModalityDropoutTrainer.sections, slots, derived)
    register(monkeypatch, type("OwnTrainer", (ModalityDropoutTrainer,), {"sections": own}))
    assert "OwnTrainer" in trainers()
    settings = Settings.read({"slotted": {"a": 2}, "based": {"a": 3}}, (slots, derived))
    assert (settings[slots].a, settings[derived].a) == (2, 3)


def test_a_trainer_with_two_sections_of_one_name_is_refused():
    with pytest.raises(ValueError, match="both called 'teacher'"):
        Settings.read(None, (TeacherSettings, section("teacher", a=1)))


def test_example_in_a_folder_of_nnunet(tmp_path, monkeypatch):
    """nnU-Net forgets the module of a trainer that it has found in ``nnUNet_extTrainer``."""
    (tmp_path / "matching_trainer.py").write_text(FILES["matching/trainer.py"])
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    trainer = find_trainer("MatchingTrainer")
    assert trainer.__module__ not in sys.modules
    settings = Settings.read({"matching": {"weight": 3}}, trainer.all_sections())
    assert settings.to_block()["matching"] == {"weight": 3.0}


@pytest.fixture
def reconstruction(tmp_path, monkeypatch) -> type[ModalityDropoutTrainer]:
    """The trainer of the section about a head that prediction does not need."""
    code = re.search(r"^## A network of your own.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)[1]
    (tmp_path / "reconstruction.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reconstruction", raising=False)
    return importlib.import_module("reconstruction").ReconstructionTrainer


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_properties_of_the_head(reconstruction, check, tmp_path):
    check(reconstruction, tmp_path / "folder", dimensions=2)


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_a_head_is_trained_clipped_and_saved_outside_the_model(reconstruction, make_trainer, deep_supervision):
    trainer = make_trainer(reconstruction, dimensions=2, deep_supervision=deep_supervision)
    head, content = trainer.heads["images"], batch(trainer)
    before = state(head)
    content["data"] *= 1e4
    trainer.train_step(content)
    assert torch.stack([each.grad.norm() for each in head.parameters()]).norm() <= 12.01
    assert not any(map(torch.equal, before.values(), state(head).values()))
    assert not any("images" in name for name in trainer.plain_network.state_dict())
    kept = copy.deepcopy(trainer.extra_state())
    fresh = make_trainer(reconstruction, dimensions=2, seed=1)
    fresh.load_extra_state(kept)
    assert same(fresh.extra_state(), kept) and same(state(fresh.heads["images"]), state(head))


def test_a_training_does_not_continue_with_other_heads(reconstruction, make_trainer, tmp_path):
    trainer = make_trainer(reconstruction, dimensions=2)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))

    class Renamed(reconstruction):
        def make_heads(self):
            return {"pictures": super().make_heads()["images"]}

    with pytest.raises(InputError, match="has the heads images, make_heads of Renamed has pictures"):
        make_trainer(Renamed, dimensions=2).load_checkpoint(str(tmp_path / "checkpoint.pth"))

    class Dotted(reconstruction):
        def make_heads(self):
            return {"a.b": super().make_heads()["images"]}

    with pytest.raises(ValueError, match=r"make_heads of Dotted: .*\."):
        make_trainer(Dotted, dimensions=2)


def test_reconstruction_leaves_out_what_a_case_lacks(reconstruction, make_trainer):
    trainer = make_trainer(reconstruction, dimensions=2)
    complete = batch(trainer)["data"]
    complete[:, 1] = 0
    assert not trainer.forward_student(complete, complete).difference[:, 1].any()


@pytest.mark.parametrize("joint", [False, True], ids=["trained before", "joint"])
def test_a_teacher_needs_the_students_options(reconstruction, make_trainer, joint):
    class OwnTrainer(DistillationTrainer):
        design = reconstruction.design
        teacher_trainer = KDTeacherTrainer

        def make_terms(self):
            return (Term("own", 1.0, lambda s, t, target: (s.features - t.features).square().mean()),)

        def forward_options(self):
            return {"features": True}

    class OwnTeacherTrainer(TeacherTrainer):
        design = reconstruction.design

    options = {"dimensions": 2, "block": {"teacher": {"joint": joint}}}

    def begin() -> None:
        trainer = make_trainer(OwnTrainer, **options)
        if not joint:
            give_teacher(trainer)
            trainer.check_teacher(Teacher(trainer.teacher, {}, {"path": "somewhere"}, Settings([])))
        trainer.train_step(batch(trainer))

    with pytest.raises(InputError, match="does not take the options features of OwnTrainer"):
        begin()
    OwnTrainer.teacher_trainer = OwnTeacherTrainer
    begin()


def test_why_a_registered_trainer_is_not_found_is_said(monkeypatch):
    def load() -> None:
        raise ImportError("no module of this kind")

    entry = SimpleNamespace(name="BrokenTrainer", value="package:BrokenTrainer", load=load)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InputError, match="no module of this kind"):
        find_trainer("BrokenTrainer")
    with pytest.warns(UserWarning, match="left out"):
        assert find_trainer("KDTrainer").__name__ == "KDTrainer"


def test_a_design_is_an_instance():
    with pytest.raises(TypeError, match=r"expected an instance: design = NetworkDesign\(\)"):
        type("OwnTrainer", (ModalityDropoutTrainer,), {"design": NetworkDesign})


def test_subsets_may_be_drawn_otherwise(make_trainer):
    class OwnTrainer(ModalityDropoutTrainer):
        def draw_availability(self, batch_size, present=None):
            return torch.tensor([[True, False, False, False]]).repeat(batch_size, 1)

    trainer = make_trainer(OwnTrainer, dimensions=2)
    seen = []
    trainer.network.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    trainer.train_step(batch(trainer))
    assert seen[0][:, 0].any() and not seen[0][:, 1:].any()
