"""What every trainer of this package shares: settings from the plans, schedule, seeds and checkpoints."""

from __future__ import annotations

import math
import random
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import distributed as dist
from torch._dynamo import OptimizedModule

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import DivergenceError, UnsupportedError
from nnunetv2_mstkd.images.atomic import clear_scratch
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.loader_processes import one_line_for_dead_processes, started_by
from nnunetv2_mstkd.training.optimizers import WarmupPolyScheduler, build_optimizer
from nnunetv2_mstkd.training.progress import TermLog
from nnunetv2_mstkd.training.settings import BLOCK, Settings, SettingsError, network_keys
from nnunetv2_mstkd.training.step import CheckedStepTrainer


class SettingsTrainer(CheckedStepTrainer):
    """nnU-Net's trainer, with the ``"mstkd"`` block of the plans as its settings.

    The block is completed and written back into the plans before anything is built, so that it reaches the checkpoint,
    the model folder's plans.json and, with it, prediction.
    """

    network_sections: ClassVar[tuple[str, ...]] = ()
    """Sections of the settings that this trainer's network is built from: weights fit no other values of their
    :func:`~nnunetv2_mstkd.training.settings.network_keys`."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature
    ) -> None:
        plans.setdefault("continue_training", False)
        manager = PlansManager(plans).get_configuration(configuration)
        settings = Settings.from_block(manager.configuration.get(BLOCK))
        # all that can be refused is refused here, before nnU-Net makes the output folder
        self.check_plans(manager, dataset_json, settings)
        settings = self.resolve(settings, manager)
        super().__init__(plans, configuration, fold, dataset_json, device)
        given = self.configuration_manager.configuration.get(BLOCK) or {}
        self._given_network = {
            section: [key for key in given.get(section) or {} if key in network_keys(section)]
            for section in self.network_sections
        }
        self._resumed = False
        self._split: dict[str, list[str]] | None = None
        self._initial_sum = 0.0
        self._loader_processes: list[BaseProcess] = []
        self.terms = TermLog(self.logger, self.output_folder)
        self.adopt(settings)

    # ---- settings ----------------------------------------------------------------------------------------------

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        """Refuse, before anything is written, what this trainer cannot train.

        Raises
        ------
        NotImplementedError
            for the second stage of a cascade.
        """
        if configuration_manager.previous_stage_name is not None:
            raise UnsupportedError(
                f"{cls.__name__} does not support the cascade (the configuration continues "
                f"{configuration_manager.previous_stage_name}); train 2d, 3d_fullres or 3d_lowres"
            )

    @classmethod
    def resolve(cls, settings: Settings, configuration_manager) -> Settings:
        """Fill the settings that depend on the plans; without a network of our own there are none."""
        return settings

    def epochs(self, settings: Settings) -> int:
        return settings.schedule.epochs

    def adopt(self, settings: Settings) -> None:
        """Take settings over: complete them, write them into the plans, set nnU-Net's own attributes."""
        self.settings = self.resolve(settings, self.configuration_manager)
        block = self.settings.to_block()
        self.plans_manager.plans["configurations"][self.configuration_name][BLOCK] = block
        self.configuration_manager.configuration[BLOCK] = block
        schedule = self.settings.schedule
        self.num_epochs = self.epochs(self.settings)
        self.num_iterations_per_epoch = schedule.iterations
        self.num_val_iterations_per_epoch = schedule.validation_iterations
        self.initial_lr = schedule.learning_rate
        self.save_every = schedule.checkpoint_interval(self.num_epochs)

    def _refuse_other_network(self, stored: Settings, source: str) -> None:
        there, here = stored.to_block(), self.settings.to_block()
        for section, keys in self._given_network.items():
            for key in keys:
                if there[section][key] != here[section][key]:
                    raise SettingsError(
                        f"the plans ask for {section}.{key} = {here[section][key]!r}, {source} was trained with "
                        f"{there[section][key]!r}. Put the old value back, or train it as a configuration of its own "
                        f"(mstkd configure)"
                    )

    def _refuse_mixed_folds(self) -> None:
        """All folds of a model folder share one plans.json, so they must share the network."""
        plans_file = join(self.output_folder_base, "plans.json")
        if not isfile(plans_file):
            return
        others = [
            path.parent.name
            for path in sorted(Path(self.output_folder_base).glob("fold_*/checkpoint_*.pth"))
            if path.parent.name != f"fold_{self.fold}"
        ]
        if not others:
            return
        there = load_json(plans_file)["configurations"].get(self.configuration_name, {}).get(BLOCK) or {}
        here = self.settings.to_block()
        changed = [
            f"{section}.{key} is {old!r} there and {here[section].get(key)!r} here"
            for section in self.network_sections
            for key, old in (there.get(section) or {}).items()
            if key in network_keys(section) and old != here[section].get(key)
        ]
        if changed:
            listed = ", ".join(changed)
            raise SettingsError(
                f"{others[0]} in {self.output_folder_base} was trained with another network: {listed}. Train this one "
                f"as a configuration of its own (mstkd configure)"
            )

    # ---- training ----------------------------------------------------------------------------------------------

    @property
    def plain_network(self) -> Any:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network.module if self.is_ddp else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    @property
    def iteration(self) -> int:
        """Training steps taken so far, over all epochs."""
        return self.current_epoch * self.num_iterations_per_epoch + self._step_in_epoch

    @property
    def total_iterations(self) -> int:
        return self.num_epochs * self.num_iterations_per_epoch

    def initialize(self) -> None:
        self._seed_everything(-1)
        super().initialize()
        self._step_in_epoch = 0
        self._initial_sum = self._weight_sum()

    def added_modules(self, network: Any) -> list[torch.nn.Module]:
        """Hook: what the network has beyond the plans' U-Net, trained with AdamW at ``schedule.transformer_lr``."""
        return []

    def configure_optimizers(self):
        network = getattr(self.network, "_orig_mod", self.network)  # compiled, but not yet wrapped for DDP
        added = self.added_modules(network)
        return build_optimizer(network, self.settings.schedule, self.num_epochs, self.weight_decay, added)

    def on_train_start(self) -> None:
        if self.local_rank == 0:  # which writes plans.json next, while the others would read it
            self._refuse_mixed_folds()
        if not self.was_initialized:
            self.initialize()
        train, validation = self.do_split()
        self._split = {"train": sorted(map(str, train)), "val": sorted(map(str, validation))}
        self.prepare_training()
        super().on_train_start()
        if self.local_rank == 0:
            clear_scratch(Path(self.output_folder), "checkpoint_*.pth")
            self._save_missing_best()

    def _save_missing_best(self) -> None:
        """nnU-Net saves latest, then best; here goes on what was killed in between."""
        scores = self.logger.get_value("ema_fg_dice", step=None)
        if not self._resumed or self.current_epoch >= self.num_epochs or not scores[-1] > max(scores[:-1], default=-1):
            return
        best = Path(self.output_folder, "checkpoint_best.pth")
        if not best.is_file() or checkpoints.read(best)["current_epoch"] < self.current_epoch:
            self.current_epoch -= 1
            self.save_checkpoint(str(best))
            self.current_epoch += 1

    def prepare_training(self) -> None:
        """Called once before the first epoch, before nnU-Net writes anything: weights to start from."""
        if self._resumed or self.initial_source is None:
            return
        path = self._initial_checkpoint(self.initial_source)
        self._start_from(checkpoints.read(path)["network_weights"], str(path))

    @property
    def initial_source(self) -> str | None:
        """``schedule.init_from``; None for the trainer that it names, from which others of the configuration start."""
        source = self.settings.schedule.init_from
        return None if source == type(self).__name__ else source

    def _initial_checkpoint(self, source: str) -> Path:
        results = Path(self.output_folder_base).parents[1]
        if source.endswith(".pth"):
            return Path(source) if Path(source).is_absolute() else results / source
        name = f"{source}__{self.plans_manager.plans_name}__{self.configuration_name}"
        return Path(self.output_folder_base).parent / name / f"fold_{self.fold}" / "checkpoint_final.pth"

    def _start_from(self, weights: dict[str, torch.Tensor], source: str) -> None:
        # another memory format or number of threads adds up in another order
        if not math.isclose(self._weight_sum(), self._initial_sum, rel_tol=1e-9):
            self.print_to_log_file(f"weights were already loaded (-pretrained_weights); not starting from {source}")
            return
        loaded, kept = checkpoints.load_matching(self.plain_network, weights)
        self.print_to_log_file(
            f"started from {source}: {len(loaded)} tensors loaded, {len(kept)} kept their initial value"
        )
        for name in kept:
            self.print_to_log_file(f"  not in it or of another shape: {name}")

    def _weight_sum(self) -> float:
        """Tells whether somebody loaded weights after the network was built."""
        return float(sum(parameter.detach().cpu().double().abs().sum() for parameter in self.network.parameters()))

    def get_dataloaders(self):
        loaders, self._loader_processes = started_by(super().get_dataloaders)
        return loaders

    def run_training(self) -> None:
        """nnU-Net's loop.

        Raises
        ------
        ChildProcessError
            if a process of a data loader died.
        """
        with one_line_for_dead_processes(self._moment, lambda: self._loader_processes):
            try:
                super().run_training()
            except RuntimeError:  # as after the last epoch: nobody else ends the processes that are left
                for loader in (self.dataloader_train, self.dataloader_val):
                    if isinstance(loader, NonDetMultiThreadedAugmenter):
                        loader._finish()
                raise

    def _moment(self) -> str:
        if self.dataloader_train is None:
            return "before the first iteration"
        if self._step_in_epoch == self.num_iterations_per_epoch:
            return f"in the online validation of epoch {self.current_epoch}"
        return f"in epoch {self.current_epoch}, iteration {self._step_in_epoch},"

    def on_epoch_start(self) -> None:
        self._seed_everything(self.current_epoch)
        super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        self._step_in_epoch = 0
        super().on_train_epoch_start()

    def train_step(self, batch: dict) -> dict:
        if isinstance(self.lr_scheduler, WarmupPolyScheduler):
            self.lr_scheduler.step(self.current_epoch + self._step_in_epoch / self.num_iterations_per_epoch)
        result = self.optimise(batch)
        self._step_in_epoch += 1
        return result

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Stop a training that has diverged before nnU-Net saves its weights over the last good checkpoint.

        Raises
        ------
        FloatingPointError
            if no step of the epoch had a finite loss.
        """
        if not np.isfinite([output["loss"] for output in train_outputs]).any():
            raise DivergenceError(
                f"the loss of every iteration of epoch {self.current_epoch} is not finite; nothing was saved. Look for "
                f"NaN or extreme voxels in the training cases, or lower schedule.initial_lr; continue from the last "
                f"checkpoint with --c"
            )
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])

    def on_epoch_end(self) -> None:
        if self.local_rank == 0:
            self.terms.plot(self.current_epoch)
        super().on_epoch_end()

    def _seed_everything(self, epoch: int) -> None:
        """With a seed in the settings, an epoch depends on (seed, fold, epoch, rank) only; so a resumed run repeats."""
        seed = self.settings.schedule.seed
        if seed is None:
            return
        fold = 1000 if self.fold == "all" else int(self.fold)
        rank = dist.get_rank() if self.is_ddp and epoch >= 0 else 0
        state = np.random.SeedSequence([seed, fold, epoch + 1, rank]).generate_state(2)
        random.seed(int(state[0]))
        np.random.seed(int(state[0]))  # nnU-Net's loaders draw from the global state
        torch.manual_seed(int(state[1]))

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """What goes to ``checkpoint["mstkd"]``: tensors and plain Python only, nothing that prediction needs."""
        return {"split": self._split}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self._split = state.get("split")

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with one more key, written to a temporary file first: never half a file."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        checkpoints.write(
            {
                "network_weights": self.plain_network.state_dict(),
                "optimizer_state": self.optimizer.state_dict(),
                "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
                "logging": self.logger.get_checkpoint(),
                "_best_ema": self._best_ema,
                "current_epoch": self.current_epoch + 1,
                "init_args": self.my_init_kwargs,
                "trainer_name": self.__class__.__name__,
                "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
                BLOCK: self.extra_state(),
            },
            filename,
        )

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continue from, or validate, a checkpoint; its own settings win over those of the preprocessed plans.

        Raises
        ------
        SettingsError
            if the preprocessed plans explicitly ask for another network.
        """
        content = checkpoints.read(filename_or_checkpoint)
        plans = content["init_args"]["plans"]["configurations"].get(self.configuration_name, {})
        if plans.get(BLOCK) is not None:
            stored = Settings.from_block(plans[BLOCK])
            self._refuse_other_network(stored, str(filename_or_checkpoint))
            self.adopt(stored)
        self._restore(content)
        self._resumed = True
        self.load_extra_state(content.get(BLOCK) or {})

    def _restore(self, content: dict[str, Any]) -> None:
        """What nnU-Net's own method takes from a checkpoint; that one unpickles the file, and takes no content."""
        if not self.was_initialized:
            self.initialize()
        self.plain_network.load_state_dict(content["network_weights"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.my_init_kwargs = content["init_args"]
        self.current_epoch = content["current_epoch"]
        self.logger.load_checkpoint(content["logging"])
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
        # nnU-Net saves latest before it updates best: the log is ahead of _best_ema
        logged = self.logger.get_value("ema_fg_dice", step=None)
        self._best_ema = max(logged) if len(logged) else content["_best_ema"]


class FullModalityTrainer(SettingsTrainer):
    """nnUNetTrainer with epochs, iterations, save interval and seed from the settings, and nothing else changed.

    The floor of every comparison: a model that has only ever seen complete input, given zeros. nnU-Net itself cannot
    be given a budget, its number of iterations is fixed.
    """


def check_subsets(cls: type, configuration_manager, dataset_json: dict, settings: Settings) -> None:
    """What every trainer that takes modalities away needs: at least two of them, and a zero that stays zero."""
    names = modalities.modality_names(dataset_json)
    modalities.check_count(len(names))
    modalities.check_normalization(configuration_manager.normalization_schemes)
    settings.sampler.build(names)


class TeacherTrainer(FullModalityTrainer):
    """A frozen teacher-to-be: full modality, with its own number of epochs.

    It refuses what its student would refuse, before the time for a teacher is spent.
    """

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        check_subsets(cls, configuration_manager, dataset_json, settings)

    def epochs(self, settings: Settings) -> int:
        return settings.teacher.epochs or settings.schedule.epochs
