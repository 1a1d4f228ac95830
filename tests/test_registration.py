"""The package is installed into environments of their own, which see this one's packages but not its start-up files."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from nnunetv2_mstkd.nnunet import registration

ROOT = Path(__file__).parents[1]
SOURCES = ("nnunetv2_mstkd", "dataset_conversion")
STARTUP_FILES = {"nnunetv2_mstkd.pth", "nnunetv2_mstkd.start"}

# Run where neither this checkout nor the package is in the current folder.
PROBE = """
import json, multiprocessing, os, pickle, sys
from pathlib import Path

facts = {"imported_at_start": sorted({"torch", "numpy", "nnunetv2"} & set(sys.modules))}

def look_up(name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    return recursive_find_trainer_class_by_name(name)

def child(rank, file):
    Path(file).write_text(look_up("MSTKDTrainer").__module__)

if __name__ == "__main__":
    facts["variable"] = os.environ.get("nnUNet_extTrainer")
    trainer = look_up("MSTKDTrainer")
    import torch
    import nnunetv2_mstkd, nnunetv2_mstkd.dataset_conversion.generic
    from nnunetv2_mstkd import methods as trainers
    facts["module"] = trainer.__module__
    facts["still_imported"] = trainer.__module__ in sys.modules
    facts["class_pickles"] = pickle.loads(pickle.dumps(trainer)) is trainer
    transforms = trainer.get_training_transforms((16, 16, 16), (-0.1, 0.1), None, (0, 1, 2), False)
    facts["transforms_pickle"] = repr(pickle.loads(pickle.dumps(transforms))) == repr(transforms)
    facts["all_found"] = all(look_up(name) is getattr(trainers, name) for name in trainers.__all__)
    facts["package"] = nnunetv2_mstkd.__file__
    torch.multiprocessing.spawn(child, args=(sys.argv[1],), nprocs=1)
    facts["module_in_child"] = Path(sys.argv[1]).read_text()
    print(json.dumps(facts))
"""


class Environment:
    """A virtual environment that finds this environment's packages, without a download and without their .pth files."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        self.scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.site_packages = next(folder.rglob("site-packages"))
        self.python = self.scripts / f"python{'.exe' if os.name == 'nt' else ''}"
        outer = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (self.site_packages / "outer.pth").write_text("\n".join(outer) + "\n")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=self.variables(), cwd=self.elsewhere)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *arguments: str | Path, **variables: str) -> str:
        """Run the interpreter far from the checkout and return what it printed."""
        done = subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            env=self.variables() | variables,
            cwd=self.elsewhere,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nnunetv2_mstkd.pth" not in done.stderr, done.stderr  # how site reports a failing start-up file
        return done.stdout

    def external_trainers(self, **variables: str) -> str:
        """Return the value of nnUNet_extTrainer that a program sees."""
        code = "import os; print(os.environ.get('nnUNet_extTrainer', 'unset'))"
        return self.run("-c", code, **variables).strip()

    def files(self) -> set[str]:
        return {path.relative_to(self.site_packages).as_posix() for path in self.site_packages.rglob("*")}

    @staticmethod
    def variables() -> dict[str, str]:
        dropped = ("PYTHONPATH", "nnUNet_extTrainer", "MSTKD_AUTOLOAD", "VIRTUAL_ENV")
        return {name: value for name, value in os.environ.items() if name not in dropped}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a build needs, so that it leaves nothing in the real checkout and takes nothing old from it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder, checkout], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("wheel_environment"))
    environment.pip("install", "--no-deps", "--no-index", wheel)
    return environment


@pytest.fixture(scope="module")
def editable_environment(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("editable_environment"))
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", checkout)
    return environment


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request: pytest.FixtureRequest) -> Environment:
    return request.getfixturevalue(f"{request.param}_environment")


@pytest.fixture(scope="module")
def facts(environment: Environment) -> dict:
    """What a program learns that looks the trainers up as nnU-Net does, with no variable set."""
    probe = environment.elsewhere / "probe.py"
    probe.write_text(PROBE)
    return json.loads(environment.run(probe, environment.elsewhere / "from_child").splitlines()[-1])


def test_nnunet_finds_every_trainer(facts):
    assert facts["module"].startswith("nnunetv2_mstkd.methods.")
    assert facts["all_found"]


def test_nnunet_finds_the_trainer_in_a_spawned_child(facts):
    assert facts["module_in_child"] == facts["module"]


def test_trainer_and_transforms_pickle(facts):
    assert facts["still_imported"] and facts["class_pickles"] and facts["transforms_pickle"]


def test_starting_python_imports_nothing_heavy(facts):
    assert facts["imported_at_start"] == []


def test_installation_under_test_answers(facts, environment, checkout):
    roots = {environment.site_packages.resolve(), checkout.resolve()}
    assert Path(facts["package"]).resolve().parents[1] in roots
    assert facts["variable"] == str(Path(facts["package"]).parent / "nnunet" / "_trainer_path")


def test_mstkd_path_prints_the_registered_folder(environment):
    script = environment.scripts / f"mstkd{'.exe' if os.name == 'nt' else ''}"
    done = subprocess.run([script, "path"], capture_output=True, text=True, check=True, env=environment.variables())
    assert done.stdout.strip() == environment.external_trainers()


def test_the_users_own_trainers_stay_first(wheel_environment, tmp_path):
    (tmp_path / "users_trainer.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class UsersTrainer(nnUNetTrainer):\n    pass\n"
    )
    ours = wheel_environment.external_trainers()
    assert wheel_environment.external_trainers(nnUNet_extTrainer=str(tmp_path)) == f"{tmp_path}{os.pathsep}{ours}"
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "print([find(name).__module__ for name in ('UsersTrainer', 'MSTKDTrainer')])"
    )
    found = wheel_environment.run("-c", code, nnUNet_extTrainer=str(tmp_path)).splitlines()[-1]
    assert found == "['users_trainer', 'nnunetv2_mstkd.methods.mstkd.trainer']"


def test_a_child_process_does_not_register_twice(environment):
    ours = environment.external_trainers()
    assert environment.external_trainers(nnUNet_extTrainer=ours) == ours


def test_the_user_can_switch_the_automatic_registration_off(environment):
    assert environment.external_trainers(MSTKD_AUTOLOAD="0") == "unset"
    assert environment.external_trainers(MSTKD_AUTOLOAD="0", nnUNet_extTrainer="mine") == "mine"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstalling_leaves_nothing_and_nnunet_works(kind, wheel, checkout, tmp_path):
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    source = [wheel] if kind == "wheel" else ["--no-build-isolation", "--editable", checkout]
    environment.pip("install", "--no-deps", "--no-index", *source)
    assert environment.files() - before >= STARTUP_FILES
    environment.pip("uninstall", "--yes", "nnunetv2_mstkd")
    assert environment.files() == before
    code = "import os, nnunetv2.utilities.dataset_name_id_conversion as m; print(m.__file__, os.environ.keys())"
    printed = environment.run("-c", code)
    assert "dataset_name_id_conversion" in printed and "nnUNet_extTrainer" not in printed


def test_a_package_that_was_moved_away_breaks_nothing(wheel, checkout, tmp_path):
    """Its start-up file is silent, and an inherited variable hides no trainer of others."""
    environment = Environment(tmp_path / "environment")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("nnunetv2_mstkd.pth", environment.site_packages)
    assert environment.external_trainers() == "unset"
    own = environment.elsewhere / "own"
    own.mkdir()
    (own / "mine.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class MineTrainer(nnUNetTrainer):\n    pass\n"
    )
    folders = os.pathsep.join([str(checkout / "nnunetv2_mstkd" / "nnunet" / "_trainer_path"), str(own)])
    code = "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find"
    printed = environment.run("-c", f"{code}; print(find('MineTrainer').__name__)", nnUNet_extTrainer=folders)
    assert printed.splitlines()[-1] == "MineTrainer"


def test_wheel_holds_exactly_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {"nnunetv2_mstkd/py.typed", *STARTUP_FILES}
    for source, inside in zip(SOURCES, ("nnunetv2_mstkd", "nnunetv2_mstkd/dataset_conversion"), strict=True):
        modules = (path.relative_to(ROOT / source).as_posix() for path in (ROOT / source).rglob("*.py"))
        expected |= {f"{inside}/{module}" for module in modules}
    for folder in ("reporting/templates", "app/static"):
        expected |= {f"nnunetv2_mstkd/{folder}/{file.name}" for file in (ROOT / "nnunetv2_mstkd" / folder).iterdir()}
    protocols = ROOT / "dataset_conversion" / "protocols"
    expected |= {f"nnunetv2_mstkd/dataset_conversion/protocols/{file.name}" for file in protocols.iterdir()}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_both_start_up_files_name_the_same_function(wheel):
    with zipfile.ZipFile(wheel) as archive:
        legacy, modern = (archive.read(name).decode().strip() for name in sorted(STARTUP_FILES))
    module, _, function = modern.partition(":")
    assert pkgutil.resolve_name(modern) is registration.autoload
    assert legacy.startswith("import sys; exec(") and "\n" not in legacy
    package, _, name = module.rpartition(".")
    assert f"from {package} import {name}\\n    {name}.{function}()\\n" in legacy


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [registration.TRAINER_PATH]),
        ("", [registration.TRAINER_PATH]),
        ("mine", ["mine", registration.TRAINER_PATH]),
        (os.pathsep.join(["mine", "", "yours"]), ["mine", "yours", registration.TRAINER_PATH]),
        (os.pathsep.join([registration.TRAINER_PATH, "mine"]), [registration.TRAINER_PATH, "mine"]),
    ],
)
def test_registering_once_or_twice_gives_the_same(monkeypatch, value, expected):
    monkeypatch.setenv(registration.EXTERNAL_TRAINERS, value or "")
    if value is None:
        monkeypatch.delenv(registration.EXTERNAL_TRAINERS)
    for _ in range(2):
        registration.register()
        assert os.environ[registration.EXTERNAL_TRAINERS].split(os.pathsep) == expected


@pytest.mark.parametrize(
    ("value", "registers"), [("1", True), ("", True), ("true", True), ("0", False), (" False ", False), ("no", False)]
)
def test_only_a_clear_no_switches_autoload_off(monkeypatch, value, registers):
    monkeypatch.setenv(registration.EXTERNAL_TRAINERS, "mine")
    monkeypatch.setenv(registration.AUTOLOAD, value)
    registration.autoload()
    assert (registration.TRAINER_PATH in os.environ[registration.EXTERNAL_TRAINERS]) is registers
    registration.register()
    assert registration.TRAINER_PATH in os.environ[registration.EXTERNAL_TRAINERS]
