from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2_mstkd.cli import collect_rarely

# nnU-Net reads it when it is imported
os.environ.setdefault("nnUNet_def_n_proc", "1")

# on few cores the threads of one process only get in each other's way
torch.set_num_threads(1)

collect_rarely()

PHANTOM = 902
CONFIGURATION = "tiny"


@dataclass(frozen=True)
class Folders:
    """nnU-Net's three folders."""

    raw: Path
    preprocessed: Path
    results: Path
    dataset: str = f"Dataset{PHANTOM}_Phantom"

    def variables(self) -> dict[str, str]:
        """What nnU-Net's commands and API read, for quick runs on a CPU."""
        from nnunetv2_mstkd.nnunet.registration import TRAINER_PATH

        return {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": TRAINER_PATH,
            "nnUNet_n_proc_DA": "0",
            "nnUNet_compile": "f",
        }

    @property
    def plans_file(self) -> Path:
        return self.preprocessed / self.dataset / "nnUNetPlans.json"

    def fold(self, trainer: str, *, fold: int | str = 0, configuration: str = CONFIGURATION) -> Path:
        """The folder of one training."""
        return self.results / self.dataset / f"{trainer}__nnUNetPlans__{configuration}" / f"fold_{fold}"

    def use(self, patch: pytest.MonkeyPatch) -> None:
        for name, value in self.variables().items():
            patch.setenv(name, value)


LONGEST = (
    *("trainers_runs", "incomplete_training", "normalization", "killed_training", "end_to_end", "demo", "method_runs"),
    *("crossval_slurm", "extending", "ddp", "registration", "patch_growth", "crossval", "papers_table", "tutorial"),
)
"""These files come first, so that processes that take one file after the other end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def locate_modules_once() -> None:
    """At each search for a trainer, nnU-Net asks of all 5000 modules whether they are in a folder."""
    from nnunetv2.utilities import find_class_by_name as finder

    ask = finder._module_originates_from_path

    @functools.cache
    def within(file: str, path: str) -> bool:
        return ask(SimpleNamespace(__file__=file), path)

    def ask_once(module, path: str) -> bool:
        file = getattr(module, "__file__", None)
        return within(file, path) if isinstance(file, str) else ask(module, path)

    finder._module_originates_from_path = ask_once


locate_modules_once()


@pytest.fixture(autouse=True)
def random_numbers_are_the_same() -> None:
    """A test draws the same numbers in each run, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads_are_given_back() -> Iterator[None]:
    """A command for the CPU takes all cores; with another number of threads sums differ in the last bit."""
    yield
    torch.set_num_threads(1)


@contextmanager
def in_this_process(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let nnU-Net's process pools be pools of threads: each new process would import PyTorch again."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.training.dataloading import data_loader
    from nnunetv2.utilities import utils

    real, initialize = multiprocessing.get_context, DatasetFingerprintExtractor.__init__

    def with_few_voxels(self, *args, **kwargs) -> None:
        initialize(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 1e4  # 1e8 take half a minute

    with patch.context() as inner:
        inner.setattr(DatasetFingerprintExtractor, "__init__", with_few_voxels)
        inner.setattr(utils, "Pool", ThreadPool)  # twelve processes that match names of files
        # for each batch it searches all loaded libraries; there is one thread anyway
        inner.setattr(data_loader, "threadpool_limits", lambda **limits: nullcontext())
        inner.setattr(
            multiprocessing,
            "get_context",
            lambda method=None: SimpleNamespace(Pool=ThreadPool) if method == "spawn" else real(method),
        )
        yield


def command(name: str, *arguments: object) -> None:
    """One of nnU-Net's commands or ours, in this process, which has imported what it needs."""
    script = next(iter(entry_points(group="console_scripts", name=name))).load()
    with pytest.MonkeyPatch.context() as patch, in_this_process(patch):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        assert not script(), (name, *arguments)


def train(
    trainer: str,
    *,
    dataset: int = PHANTOM,
    fold: int | str = 0,
    configuration: str = CONFIGURATION,
    validate: bool = False,
    plot: bool = False,
    device: torch.device | None = None,
    **options,
) -> None:
    """``nnUNetv2_train``, in this process; ``options`` are those of nnU-Net's ``run_training``."""
    from nnunetv2.run.run_training import run_training
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    with pytest.MonkeyPatch.context() as patch, in_this_process(patch):
        if not validate:
            patch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, save_probabilities=False: None)
        if not plot:
            draw_nothing(patch)
        run_training(str(dataset), configuration, fold, trainer, device=device or torch.device("cpu"), **options)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let trainings draw no pictures of their progress and network, which take seconds per epoch."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunetv2_mstkd.training.progress import TermLog

    patch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: None)
    patch.setattr(TermLog, "draw", lambda self, history: None)
    patch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)


class KilledError(Exception):
    """Simulates a killed job."""


def train_until_killed(trainer: str, epoch: int, **options) -> None:
    """:func:`train`, which is killed at the start of an epoch."""
    from nnunetv2_mstkd.training.base import SettingsTrainer

    start = SettingsTrainer.on_epoch_start

    def interrupt(self) -> None:
        if self.current_epoch == epoch:
            raise KilledError
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SettingsTrainer, "on_epoch_start", interrupt)
        with pytest.raises(KilledError):
            train(trainer, **options)


def plan_and_preprocess(
    folders: Folders, dataset_id: int, *configurations: str, spacing: tuple[float, ...] | None = None
) -> None:
    """nnU-Net's own fingerprint, planning and preprocessing in this process."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    with pytest.MonkeyPatch.context() as patch, in_this_process(patch):
        folders.use(patch)
        extract_fingerprints([dataset_id], num_processes=1)
        patch.delenv("nnUNet_n_proc_DA")  # nnU-Net's planner gives it to torch.set_num_threads
        plan_experiments([dataset_id], overwrite_target_spacing=spacing)
        torch.set_num_threads(1)
        preprocess([dataset_id], configurations=configurations, num_processes=[1], show_progress_bar=False)


def add_configuration(plans_file: Path, name: str, parent: str = "3d_fullres", **options) -> None:
    """``mstkd configure``: ``settings={"schedule.epochs": 2}`` and the options of ``configure``."""
    from nnunetv2_mstkd.methods.configuration import configure
    from nnunetv2_mstkd.nnunet.plans import read_plans, write_configuration

    settings = options.pop("settings", {})
    assignments = [(*key.split("."), value) for key, value in settings.items()]
    entry = configure(read_plans(plans_file), parent, name, assignments=assignments, **options)
    write_configuration(plans_file, name, entry, overwrite=True)


TINY = {
    "schedule.epochs": 2,
    "schedule.iterations": 2,
    "schedule.validation_iterations": 1,
    "schedule.save_every": 1,
    "schedule.seed": 7,
}


def configure(
    folders: Folders,
    name: str = CONFIGURATION,
    parent: str = "3d_fullres",
    *,
    features: Sequence[int] | None = (8, 16, 24),
    **settings,
) -> None:
    """Write a configuration with the settings of :data:`TINY`, but for these (``schedule__epochs=3``)."""
    settings = {**TINY, **{key.replace("__", "."): value for key, value in settings.items()}}
    add_configuration(folders.plans_file, name, parent, features=features, batch_size=2, settings=settings)


def empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make nnU-Net's three folders, set its variables, and return their parent."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def write_phantom(top: Path, spacing: tuple[float, ...] | None) -> Folders:
    """A phantom of six training and two test cases at 6 mm, planned for ``spacing``, with the configuration "tiny"."""
    from nnunetv2_mstkd.phantom.dataset import write_dataset

    folders = Folders(top / "raw", top / "preprocessed", top / "results")
    for folder in (folders.raw, folders.preprocessed, folders.results):
        folder.mkdir()
    write_dataset(folders.raw, PHANTOM, cases=6, test_cases=2, spacing=6.0, workers=1)
    plan_and_preprocess(folders, PHANTOM, "3d_fullres", spacing=spacing)
    configure(folders)
    return folders


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """:func:`write_phantom`, with half as many voxels as at 6 mm. Never changed."""
    return write_phantom(tmp_path_factory.mktemp("phantom"), (8.0, 8.0, 8.0))


@pytest.fixture(scope="session")
def trained(preprocessed: Folders) -> Folders:
    """With a teacher and a student of fold 0, two epochs of two iterations each. Never changed."""
    with pytest.MonkeyPatch.context() as patch:
        preprocessed.use(patch)
        train("MSTKDTeacherTrainer")
        train("MSTKDTrainer")
    return preprocessed


def use_copy(folders: Folders, target: Path, patch: pytest.MonkeyPatch, *, results: bool = False) -> Folders:
    """Preprocessed data with plans of their own, with or without the results, in nnU-Net's variables."""
    own = replace(folders, preprocessed=target / "preprocessed", results=target / "results")
    # only the small files are copied
    shutil.copytree(folders.preprocessed, own.preprocessed, copy_function=_copy_or_link)
    if results:
        shutil.copytree(folders.results, own.results)
    else:
        own.results.mkdir()
    own.use(patch)
    return own


def _copy_or_link(source: str, target: str) -> None:
    if source.endswith(".json"):
        shutil.copyfile(source, target)
    else:
        os.symlink(source, target)


@pytest.fixture(scope="session")
def preprocessed_at_6_mm(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The phantom planned at the spacing of its images. Never changed."""
    return write_phantom(tmp_path_factory.mktemp("phantom6"), None)


@pytest.fixture
def phantom_at_6_mm(preprocessed_at_6_mm: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """As ``phantom``, at the spacing of the images."""
    return use_copy(preprocessed_at_6_mm, tmp_path, monkeypatch)


@pytest.fixture
def phantom(preprocessed: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """The preprocessed phantom with plans of its own and no results, in nnU-Net's variables."""
    return use_copy(preprocessed, tmp_path, monkeypatch)


@pytest.fixture
def models(trained: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """The preprocessed phantom with plans and trained models of its own, in nnU-Net's variables."""
    return use_copy(trained, tmp_path, monkeypatch, results=True)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders, empty, and an input folder ``in`` with the cases of ``predict_inputs.PRESENT``."""
    from predict_inputs import set_up

    return set_up(tmp_path, monkeypatch)


@pytest.fixture
def model(folders: Path) -> Path:
    """A student with random weights that predicts the cases of ``folders``."""
    from predict_inputs import trainer_class, write_model

    return write_model(trainer_class("MSTKDTrainer"))


@pytest.fixture
def make_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Builds tiny trainers on hand-made plans; see :func:`nnunetv2_mstkd.testing.make_trainer`."""
    from tiny import make_trainer

    folders = Folders(tmp_path / "raw", tmp_path / "preprocessed", tmp_path / "results")
    folders.use(monkeypatch)
    return make_trainer


def read_plans(folders: Folders) -> dict:
    """The preprocessed plans, which nnU-Net's commands read."""
    return json.loads(folders.plans_file.read_text())


def snapshot(folders: Folders) -> dict[str, bytes]:
    """Name and content of all results but nnU-Net's log files, of which it begins one whenever a trainer is made."""
    return {
        str(path.relative_to(folders.results)): path.read_bytes()
        for path in sorted(folders.results.rglob("*"))
        if path.is_file() and not path.name.startswith("training_log_")
    }
