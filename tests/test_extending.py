"""The package of documentation/extending.md: built, installed without a network, and used by every command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGURATION, PHANTOM

from nnunetv2_mstkd import testing

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


@pytest.fixture
def call(site, phantom):
    """Run a command in an environment that has the package."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path}

    def run(*words: object, code: int = 0) -> str:
        program = Path(sys.executable).with_name(str(words[0]))
        done = subprocess.run([program, *map(str, words[1:])], env=variables, capture_output=True, text=True)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def test_example_is_complete():
    assert set(FILES) == {"pyproject.toml", "matching/__init__.py", "matching/trainer.py"}


def test_every_command_knows_it(call, phantom, tmp_path):
    settings = ("--set", "matching.weight=3", "--epochs", 1)
    assert "matching.weight = 3.0" in call(
        "mstkd", "configure", "-d", PHANTOM, "-c", CONFIGURATION, "--name", "strong", *settings
    )
    for trainer in ("FullModalityTrainer", "MatchingTrainer"):
        call("nnUNetv2_train", PHANTOM, "strong", 0, "-tr", trainer, "-device", "cpu")
    fold = phantom.fold("MatchingTrainer", configuration="strong")
    log = next(fold.glob("training_log_*.txt")).read_text()
    assert re.search(r"terms: segmentation \S+, matching \S+", log) and "started from the teacher" in log

    model = ("-d", PHANTOM, "-c", "strong", "-f", 0, "-device", "cpu", "-tr")
    options = ("-npp", 0, "-nps", 0, "--disable_tta", "--disable_progress_bar")
    images = phantom.raw / phantom.dataset / "imagesTs"
    call("mstkd", "predict", "-i", images, "-o", tmp_path / "out", *model, "MatchingTrainer", *options, "--drop", "T1")
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    for trainer in ("MatchingTrainer", "FullModalityTrainer"):
        call("mstkd", "evaluate", *model, trainer, *options, "--subsets", "T1", "all")
    folders = [fold.parent, phantom.fold("FullModalityTrainer", configuration="strong").parent]
    assert "MatchingTrainer" in call("mstkd", "compare", *folders, "-o", tmp_path / "comparison")
    steps = call("mstkd", "crossval", "-d", PHANTOM, "-c", "strong", "-tr", "MatchingTrainer", "-f", 1, "--dry-run")
    assert "train FullModalityTrainer (tiny), fold 1" in steps and "train MatchingTrainer (strong), fold 1" in steps


def test_unknown_section_without_the_package(phantom, capsys):
    from nnunetv2_mstkd import cli

    words = ["configure", "-d", str(PHANTOM), "-c", CONFIGURATION, "--name", "strong", "--set", "matching.weight=3"]
    assert cli.main(words) == 2
    assert "unknown setting 'matching'" in capsys.readouterr().err


def test_properties_of_the_example(call, tmp_path):
    file = tmp_path / "test_matching.py"
    file.write_text(re.search(r"```python\n(import pytest\n.*?)```", TEXT, re.DOTALL)[1])
    assert f"{len(testing.CHECKS)} passed" in call(
        "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, file
    )


def test_medmap_fits_before_the_example(call, tmp_path):
    code = re.search(r"### MedMAP in front of it\n.*?```python\n(.*?)```", TEXT, re.DOTALL)[1]
    test = """
import pytest
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
    file = tmp_path / "test_both.py"
    file.write_text(test.replace("CODE", code))
    done = call("pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, file)
    assert f"{len(testing.CHECKS) + 1} passed" in done


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise RuntimeError('broken')", "cannot be imported"),
        ("class MatchingTrainer: pass", "does not derive from"),
        ("from nnunetv2_mstkd.methods import MSTKDTrainer as MatchingTrainer", "its class is called MSTKDTrainer"),
    ],
    ids=["broken", "no trainer", "other name"],
)
def test_bad_registrations_are_left_out(call, site, tmp_path, monkeypatch, code, problem):
    own = tmp_path / "matching"
    own.mkdir()
    (own / "__init__.py").touch()
    (own / "trainer.py").write_text(code)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from nnunetv2_mstkd.methods.registry import trainers\n"
        "print('MatchingTrainer' in trainers(), 'MSTKDTrainer' in trainers())"
    )
    found = call("python", "-c", script)
    assert "False True" in found and problem in found
