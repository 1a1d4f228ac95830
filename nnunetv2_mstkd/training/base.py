"""What every trainer of this package shares: settings from the plans, schedule, seeds and checkpoints."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Mapping
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch.nn import functional

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import DivergenceError, InputError, UnsupportedError
from nnunetv2_mstkd.images.atomic import clear_scratch
from nnunetv2_mstkd.nnunet import checkpoints, per_channel
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts, read_case_facts
from nnunetv2_mstkd.nnunet.folders import BEST
from nnunetv2_mstkd.nnunet.mask_differences import MaskDifferences
from nnunetv2_mstkd.nnunet.per_channel import data_folder
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distributed import (
    first_process_first,
    gather,
    rank,
    unwrapped,
    world_size,
    wrapped_for_ddp,
)
from nnunetv2_mstkd.training.finished import finished_checkpoint
from nnunetv2_mstkd.training.fold_cases import describe_cases, divide_cases
from nnunetv2_mstkd.training.initial_weights import checkpoint_modalities, load_initial_weights
from nnunetv2_mstkd.training.loader_processes import report_dead_workers, start_workers
from nnunetv2_mstkd.training.loaders import (
    REPEATED,
    end_workers,
    foreground_samples,
    loader_with_patch,
    repeating,
)
from nnunetv2_mstkd.training.model_identity import given_otherwise, refuse_mixed_folds, refuse_other_network
from nnunetv2_mstkd.training.normalization import complete_data, describe_normalization, find_mask_differences
from nnunetv2_mstkd.training.optimizers import WarmupPolyScheduler, build_optimizer
from nnunetv2_mstkd.training.patch_growth import Phase, compile_each_size, phase_of
from nnunetv2_mstkd.training.progress import TermLog
from nnunetv2_mstkd.training.settings import (
    InputSettings,
    ScheduleSettings,
    Section,
    Settings,
)
from nnunetv2_mstkd.training.step import ANEW, Losses, LossMonitor, Target


class SettingsTrainer(nnUNetTrainer):
    """nnU-Net's trainer, with the ``"mstkd"`` block of the plans as its settings.

    The block is completed and written back into the plans before anything is built, so that it reaches the checkpoint,
    the model folder's plans.json and, with it, prediction.
    """

    sections: ClassVar[tuple[type[Section], ...]] = (ScheduleSettings, InputSettings)
    """Sections of the settings that this trainer reads, besides those of its network's design."""
    design: ClassVar[NetworkDesign | None] = None
    """How the network is made from the plans; None: nnU-Net's own way, whatever the plans name."""
    logs_terms: bool = False
    """Whether the terms of the loss are logged by name."""
    unlabelled_keys: tuple[str, ...] = ()
    """Cases of this step beside the labelled ones."""
    heads: Mapping[str, torch.nn.Module] = MappingProxyType({})
    """What :meth:`make_heads` has returned, by name."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isinstance(cls.design, type):
            name = cls.design.__name__
            raise TypeError(f"{cls.__name__}.design is the class {name}, expected an instance: design = {name}()")

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
        settings = self.read_settings(manager)
        # all that can be refused is refused here, before nnU-Net makes the output folder
        self.check_plans(manager, dataset_json, settings)
        settings = self.resolve(settings, manager, dataset_json)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._from_settings: dict[str, Any] = {}
        self._given = dict(self.configuration_manager.configuration.get(BLOCK) or {})
        self._resumed = False
        self.split: dict[str, Any] | None = None
        self.case_facts: dict[str, CaseFacts] = {}
        self._initial_sum = 0.0
        self._loader_processes: list[BaseProcess] = []
        self._loaded_phase = 0
        self._step_in_epoch = 0
        self.monitor = LossMonitor(lambda line: self.print_to_log_file(line))
        self.term_log = TermLog(self.logger, self.output_folder)
        self.apply_settings(settings)

    # ---- settings and network ----------------------------------------------------------------------------------

    @classmethod
    def all_sections(cls) -> tuple[type[Section], ...]:
        """Sections of the trainer and of its network."""
        return tuple(dict.fromkeys((*cls.sections, *cls.network_sections())))

    @classmethod
    def network_sections(cls) -> tuple[type[Section], ...]:
        """Sections that the network is built from."""
        return cls.design.sections if cls.design else ()

    @classmethod
    def read_settings(cls, configuration_manager: ConfigurationManager, *, strict: bool = True) -> Settings:
        """Read the trainer's settings from a plans configuration."""
        return Settings.read(configuration_manager.configuration.get(BLOCK), cls.all_sections(), strict=strict)

    @classmethod
    def check_plans(cls, configuration_manager: ConfigurationManager, dataset_json: dict, settings: Settings) -> None:
        """Refuse, before anything is written, what this trainer or its design cannot train."""
        if configuration_manager.previous_stage_name is not None:
            raise UnsupportedError(
                f"{cls.__name__} does not support the cascade (the configuration continues "
                f"{configuration_manager.previous_stage_name}); train 2d, 3d_fullres or 3d_lowres"
            )
        if cls.design is not None:
            cls.design.check(UNetPlan.of(configuration_manager), settings, modalities.modality_names(dataset_json))

    @classmethod
    def resolve(cls, settings: Settings, configuration_manager: ConfigurationManager, dataset_json: dict) -> Settings:
        """Fill in the settings that depend on plans and data set."""
        if cls.design is None:
            return settings
        return cls.design.resolve(settings, UNetPlan.of(configuration_manager), modalities.modality_names(dataset_json))

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> Any:
        """Build the network as its plans describe it; called by training and, on the class, by prediction."""
        per_channel.warn_unless_applied(configuration_manager)
        if cls.design is None:
            return nnUNetTrainer.build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )
        plan = UNetPlan.of(
            configuration_manager,
            num_modalities=num_input_channels,
            num_outputs=num_output_channels,
            deep_supervision=enable_deep_supervision,
        )
        # at prediction sections of trainers that are not installed here do not matter
        settings = cls.read_settings(configuration_manager, strict=False)
        return cls.design.build(plan, cls.design.resolve(settings, plan))

    def epochs(self, settings: Settings) -> int:
        """Length of the training."""
        return settings[ScheduleSettings].epochs

    def validation_iterations(self, settings: Settings) -> int:
        """Length of an online validation."""
        return settings[ScheduleSettings].validation_iterations

    def apply_settings(self, settings: Settings) -> None:
        """Complete the settings, write them into the plans and set nnU-Net's own attributes.

        An attribute that a subclass has set itself, as is usual with nnU-Net's trainers, keeps its value.
        """
        self.settings = self.resolve(settings, self.configuration_manager, self.dataset_json)
        block = self.settings.to_block()
        self.plans_manager.plans["configurations"][self.configuration_name][BLOCK] = block
        self.configuration_manager.configuration[BLOCK] = block
        if self.preprocessed_dataset_folder_base is not None:
            folder = data_folder(Path(self.preprocessed_dataset_folder_base), self.configuration_manager)
            self.preprocessed_dataset_folder = str(folder)
        schedule = self.settings[ScheduleSettings]
        self._follow("num_epochs", self.epochs(self.settings))
        self._follow("num_iterations_per_epoch", schedule.iterations)
        self._follow("num_val_iterations_per_epoch", self.validation_iterations(self.settings))
        self._follow("initial_lr", schedule.learning_rate)
        self._follow("save_every", schedule.checkpoint_interval(self.num_epochs))

    def _follow(self, attribute: str, value: Any) -> None:
        """Set an attribute to what the settings say, unless it was changed since they last did."""
        if attribute not in self._from_settings or getattr(self, attribute) == self._from_settings[attribute]:
            setattr(self, attribute, value)
        self._from_settings[attribute] = value

    @property
    def plans_as_given(self) -> dict[str, Any]:
        """The plans with the settings of this training as they were given, not as they were completed."""
        plans, name = self.plans_manager.plans, self.configuration_name
        own = {**plans["configurations"][name], BLOCK: self._given}
        return {**plans, "configurations": {**plans["configurations"], name: own}}

    @property
    def plain_network(self) -> Any:
        """The network without the wrappers of DDP and torch.compile."""
        return unwrapped(self.network)

    def initialize(self) -> None:
        self.check_division()
        self.choose_normalization()
        complete_data(self)
        self._seed_everything(-1)
        phases = self.settings[ScheduleSettings].patch_phases
        if phases > 1 and self._do_i_compile():
            compile_each_size(phases)
        with per_channel.applied():
            super().initialize()
        if self.is_ddp:
            self.heads = {name: wrapped_for_ddp(head, self.device) for name, head in self.heads.items()}
        self._step_in_epoch = 0
        self._initial_sum = self._weight_sum()

    def check_division(self) -> None:
        """Refuse GPUs that would have unequal parts of a batch whose Dice nnU-Net computes over all of them."""
        batch_size = self.configuration_manager.batch_size
        if self.is_ddp and self.configuration_manager.batch_dice and batch_size % world_size():
            raise UnsupportedError(
                f"configuration {self.configuration_name} has batch_dice, for which all GPUs need as many samples; its "
                f"batch of {batch_size} is no multiple of {world_size()}: take another -num_gpus or another batch size"
            )

    def configure_optimizers(self):
        networks = self.trained_networks()
        for network in networks if not self.enable_deep_supervision else ():
            for layer in getattr(getattr(network, "decoder", None), "seg_layers", [])[:-1]:
                layer.requires_grad_(False)  # without a loss
        added = [] if self.design is None else [each for net in networks for each in self.design.added_modules(net)]
        return self.optimizer_of(networks, added)

    def optimizer_of(self, networks: list[Any], added: list[torch.nn.Module]) -> tuple[Any, WarmupPolyScheduler]:
        """Return optimiser and scheduler of the networks and of the heads, which are made here."""
        try:
            heads = torch.nn.ModuleDict(self.make_heads()).to(self.device)
        except KeyError as error:  # torch does not take every name
            raise ValueError(f"make_heads of {type(self).__name__}: {error.args[0]}") from error
        self.heads = dict(heads.items())
        every, schedule = torch.nn.ModuleList([*networks, heads]), self.settings[ScheduleSettings]
        return build_optimizer(every, schedule, self.num_epochs, self.weight_decay, added, self.initial_lr)

    def trained_networks(self) -> list[Any]:
        """Return the networks that the optimiser moves, without wrappers; asked once, when it is built."""
        return [self.plain_network]

    def make_heads(self) -> dict[str, torch.nn.Module]:
        """Return modules that terms need and prediction does not, by name; asked once, when the optimiser is built.

        They are trained like the U-Net, are then in ``heads``, wrapped for a training on several GPUs, and their
        weights go to ``checkpoint["mstkd"]``. Call them in ``forward_student``: terms run outside autocast.
        """
        return {}

    # ---- one training step ---------------------------------------------------------------------------------------

    def train_step(self, batch: dict) -> dict:
        """Take one step of the optimiser; return nnU-Net's ``loss`` and ``terms``, the values of all terms by name."""
        if isinstance(self.lr_scheduler, WarmupPolyScheduler):  # another trainer's own only moves between epochs
            self.lr_scheduler.step(self.current_epoch + self._step_in_epoch / self.num_iterations_per_epoch)
        data, target, present = self._to_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            losses = self.compute_losses(data, target, present)
        self.backward(losses.total)
        values = self.monitor.read(
            losses,
            self.grad_scaler,
            moment=f"epoch {self.current_epoch}, iteration {self._step_in_epoch}",
            cases=[*batch.get("keys", ["unknown"]), *self.unlabelled_keys],
        )
        self._update_weights()
        self.after_step(losses)
        self._step_in_epoch += 1
        return {"loss": values["segmentation"], "terms": values}

    def compute_losses(self, data: torch.Tensor, target: Any, present: torch.Tensor | None = None) -> Losses:
        """Run the forward pass and the loss of one step, under autocast: nnU-Net's own here.

        Parameters
        ----------
        data
            The batch with all modalities that its cases have, (B, C, *spatial), on the device.
        target
            A tensor, or a list of tensors under deep supervision.
        present
            Which modalities the cases have: bool, (B, C), on the CPU. None: all of them.
        """
        loss = self.loss(self.network(data), target)
        return Losses(loss, {"segmentation": loss})

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled where the training is in mixed precision."""
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def clip_groups(self) -> list[torch.nn.Module]:
        """Return the modules whose gradients are clipped to a norm of 12 (nnU-Net's), each separately."""
        return [self.network]

    def read_target(self, target: torch.Tensor) -> Target:
        """Split nnU-Net's full-resolution target into label, foreground and valid voxels."""
        labels = self.label_manager
        if labels.has_regions:
            valid = ~target[:, -1:].bool() if labels.has_ignore_label else None
            label = target[:, :-1] if labels.has_ignore_label else target
            return Target(label, label.bool().any(1, keepdim=True), valid)
        valid = target != labels.ignore_label if labels.has_ignore_label else None
        label = target if valid is None else torch.where(valid, target, 0)
        return Target(label, label > 0, valid)

    def full_resolution_loss(self, logits: torch.Tensor, target: Target) -> torch.Tensor:
        """Return nnU-Net's loss, without deep supervision, of logits (B, K, *spatial) and a :meth:`read_target`."""
        labels, label = self.label_manager, target.label
        if target.valid is not None:
            if labels.has_regions:
                label = torch.cat([label, (~target.valid).to(label.dtype)], 1)
            else:
                label = torch.where(target.valid, label, labels.ignore_label)
        loss = self.loss.loss if isinstance(self.loss, DeepSupervisionWrapper) else self.loss
        return loss(logits.float(), label)

    def after_step(self, losses: Losses) -> None:
        """Override for what follows the optimiser's step, such as an adversary's own."""

    def _update_weights(self) -> None:
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        for module in (*self.clip_groups(), *self.heads.values()):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 12)
        if self.grad_scaler is None:
            self.optimizer.step()
            return
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _to_device(self, batch: dict) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
        """Images and labels on the device, and which modalities the cases have; None: all.

        Augmentation adds noise to the zeros of an absent modality; here they are zeros again.
        """
        data, target = batch["data"].to(self.device, non_blocking=True), batch["target"]
        if isinstance(target, list):
            target = [level.to(self.device, non_blocking=True) for level in target]
        else:
            target = target.to(self.device, non_blocking=True)
        if batch.get(REPEATED):
            data, target = self.flip(data, target)
        cases, present = [str(case) for case in batch["keys"]], None
        if any(case in self.case_facts and not self.case_facts[case].complete for case in cases):
            present = torch.tensor([self.case_facts[case].present for case in cases])
            behind = data.shape[1] - present.shape[1]  # label maps of a prior
            data = modalities.mask_modalities(data, functional.pad(present, (0, behind), value=True))
        return data, target, present

    def flip(self, data: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
        """Flip a batch along random axes among those that nnU-Net's augmentation flips."""
        axes = [2 + axis for axis in self.inference_allowed_mirroring_axes or () if torch.rand(()) < 0.5]
        if not axes:
            return data, target
        flipped = [level.flip(axes) for level in target] if isinstance(target, list) else target.flip(axes)
        return data.flip(axes), flipped

    def _autocast(self):
        # nnU-Net's rule: only CUDA gains from autocast
        return torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext()

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Training steps taken so far, over all epochs."""
        return self.current_epoch * self.num_iterations_per_epoch + self._step_in_epoch

    @property
    def total_iterations(self) -> int:
        """Training steps of the whole training."""
        return self.num_epochs * self.num_iterations_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done; ``--c`` then only repeats the validation."""
        return self.current_epoch >= self.num_epochs

    def on_train_start(self) -> None:
        self.choose_normalization()
        if self.local_rank == 0:  # which writes plans.json next, while the others would read it
            folder, sections = Path(self.output_folder_base), (*self.network_sections(), InputSettings)
            refuse_mixed_folds(folder, self.configuration_name, self.fold, sections, self.settings)
        if not self.was_initialized:
            self.initialize()
        with first_process_first():  # reads the cases, the others what it has kept
            self.do_split()
        line = describe_normalization(self.settings[InputSettings].normalization, self.mask_differences)
        if line is not None:
            self.print_to_log_file(line)
        assert self.split is not None
        line = describe_cases(self.split, self.case_facts, modalities.modality_names(self.dataset_json))
        if line is not None:
            self.print_to_log_file(line)
        for line in self.settings.remarks():
            self.print_to_log_file(line)
        own = [
            f"{name}={getattr(self, name)}" for name, told in self._from_settings.items() if getattr(self, name) != told
        ]
        if own:
            self.print_to_log_file(f"set by {type(self).__name__} itself, whatever the settings say: {', '.join(own)}")
        self.prepare_training()
        super().on_train_start()
        if self.local_rank == 0:
            clear_scratch(Path(self.output_folder), "checkpoint_*.pth")
            self._save_missing_best()

    # ---- normalisation -------------------------------------------------------------------------------------------

    def choose_normalization(self) -> None:
        """Decide what ``input.normalization`` leaves open; the whole data set decides, so that all folds agree."""
        if self.settings[InputSettings].normalization != "auto":
            return
        chosen = per_channel.PER_CHANNEL if self.mask_differences else per_channel.PLANS
        self.apply_settings(self.settings.replace(InputSettings, normalization=chosen))

    @cached_property
    def mask_differences(self) -> MaskDifferences | None:
        """Which modalities change when others are taken away; None if that is not known."""
        return find_mask_differences(self)

    # ---- cases ---------------------------------------------------------------------------------------------------

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return nnU-Net's training and validation cases without those that this trainer does not use.

        ``split`` says what became of the fold's cases; see :func:`nnunetv2_mstkd.training.fold_cases.divide_cases`.
        """
        train, validation = (list(map(str, cases)) for cases in super().do_split())
        folder, names = Path(self.preprocessed_dataset_folder), modalities.modality_names(self.dataset_json)
        cases = sorted({*train, *validation})
        self.case_facts = read_case_facts(folder, cases, self.dataset_json, names, self.print_to_log_file)
        split = divide_cases(
            train,
            validation,
            self.case_facts,
            trains_on=self.trains_on,
            use_unlabelled=self.unlabelled_share > 0,
            fold=self.fold,
            trainer=type(self).__name__,
        )
        self.split = {**split, "train": sorted(split["train"]), "val": sorted(split["val"])}
        return split["train"], split["val"]

    def trains_on(self, facts: CaseFacts) -> bool:
        """Whether this trainer trains on labelled cases of this kind."""
        return True

    @property
    def unlabelled_share(self) -> float:
        """Unlabelled samples of each batch as a share of the labelled ones; 0: unlabelled cases are left out."""
        return 0.0

    def _save_missing_best(self) -> None:
        """Save the best checkpoint if the training was killed after nnU-Net saved the latest one, before the best."""
        scores = self.logger.get_value("ema_fg_dice", step=None)
        if not self._resumed or self.finished or not scores[-1] > max(scores[:-1], default=-1):
            return
        best = Path(self.output_folder, BEST)
        if not best.is_file() or checkpoints.read(best)["current_epoch"] < self.current_epoch:
            self.current_epoch -= 1
            self.save_checkpoint(str(best))
            self.current_epoch += 1

    def prepare_training(self) -> None:
        """Load weights to start from; called once before the first epoch, before nnU-Net writes anything."""
        if self._resumed:
            return
        if self.initial_source is None:
            if self.settings[ScheduleSettings].init_from is not None:
                self.print_to_log_file("schedule.init_from names this trainer, which starts from random weights")
            return
        path = self._initial_checkpoint(self.initial_source)
        content = checkpoints.read(path)
        self._start_from(content["network_weights"], str(path), checkpoint_modalities(content, f"checkpoint {path}"))

    @property
    def initial_source(self) -> str | None:
        """``schedule.init_from``; None for the trainer that it names, from which others of the configuration start."""
        return self.settings[ScheduleSettings].starts_from(type(self).__name__)

    def _initial_checkpoint(self, source: str) -> Path:
        results = Path(self.output_folder_base).parents[1]
        if ScheduleSettings.is_file(source):
            return Path(source) if Path(source).is_absolute() else results / source
        return finished_checkpoint(source, self, "model to start from (schedule.init_from)", same=True)

    def _start_from(self, weights: dict[str, torch.Tensor], source: str, names: tuple[str, ...] | None = None) -> None:
        """Load weights, whose input channels have these ``names``; None: they are those of this training."""
        # another memory format or number of threads adds up in another order
        if not math.isclose(self._weight_sum(), self._initial_sum, rel_tol=1e-9):
            self.print_to_log_file(f"weights were already loaded (-pretrained_weights); not starting from {source}")
            return
        own_names, design = modalities.modality_names(self.dataset_json), self.design or NetworkDesign()
        lines = load_initial_weights(self.plain_network, design, weights, own_names, names)
        self.print_to_log_file(f"started from {source}: {lines[0]}")
        for line in lines[1:]:
            self.print_to_log_file(f"  {line}")

    def _weight_sum(self) -> float:
        """Sum of absolute weights: it changes if weights are loaded after the network was built."""
        return float(sum(parameter.detach().cpu().double().abs().sum() for parameter in self.network.parameters()))

    def get_dataloaders(self):
        loaders, self._loader_processes = start_workers(self.make_loaders)
        return loaders

    def make_loaders(self) -> tuple[Any, Any]:
        """Return the loaders of training and validation batches, whose workers have started: nnU-Net's own.

        In a phase with smaller patches those of the training are smaller, and more samples must show foreground.
        """
        train, validation = super().get_dataloaders()
        phase, schedule = self.patch_phase, self.settings[ScheduleSettings]
        self._loaded_phase = phase.number
        if phase.patch != tuple(self.configuration_manager.patch_size):
            train = loader_with_patch(self, train, phase)
            size, phases = " x ".join(map(str, phase.patch)), min(schedule.patch_phases, self.num_epochs)
            forced, samples = foreground_samples(train)
            self.print_to_log_file(
                f"training patch {size} (phase {phase.number + 1} of {phases}); {forced} of {samples} samples must "
                f"show foreground"
            )
        return repeating(train, schedule.batch_repeats), validation

    @property
    def patch_phase(self) -> Phase:
        """Patch size of the training at this epoch."""
        strides = np.prod(self.configuration_manager.pool_op_kernel_sizes, axis=0).tolist()
        phases, patch = self.settings[ScheduleSettings].patch_phases, self.configuration_manager.patch_size
        return phase_of(self.current_epoch, self.num_epochs, phases, patch, strides)

    def finish_loaders(self) -> None:
        """End the workers that are left; nnU-Net does so for its own after the last epoch."""
        for loader in (self.dataloader_train, self.dataloader_val):
            end_workers(loader)

    def run_training(self) -> None:
        """Run nnU-Net's loop; WorkerError if a process of a data loader died."""
        with report_dead_workers(self._moment, lambda: self._loader_processes):
            try:
                super().run_training()
            except RuntimeError:  # nothing else ends the processes that are left
                self.finish_loaders()
                raise

    def on_train_end(self) -> None:
        super().on_train_end()
        self.finish_loaders()

    def _moment(self) -> str:
        if self.dataloader_train is None:
            return "before the first iteration"
        if self._step_in_epoch == self.num_iterations_per_epoch:
            return f"in the online validation of epoch {self.current_epoch}"
        return f"in epoch {self.current_epoch}, iteration {self._step_in_epoch},"

    def on_epoch_start(self) -> None:
        started = getattr(self, "dataloader_train", None) is not None
        if started and self.patch_phase.number != self._loaded_phase:
            self.finish_loaders()
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self._seed_everything(self.current_epoch)
        super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        self._step_in_epoch = 0
        super().on_train_epoch_start()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Raise DivergenceError if no step had a finite loss, before nnU-Net saves over the last good checkpoint."""
        if not np.isfinite([output["loss"] for output in train_outputs]).any():
            raise DivergenceError(
                f"the loss of every iteration of epoch {self.current_epoch} is not finite; nothing was saved. Look for "
                f"NaN or extreme voxels in the training cases and continue from the last checkpoint with --c, or {ANEW}"
            )
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        if self.logs_terms:
            # a term of a teacher that is not asked in every step has its mean over the steps in which it was
            terms = [output["terms"] for output in train_outputs]
            names = max(map(list, terms), key=len)
            means = [np.mean([values[name] for values in terms if name in values]) for name in names]
            self.log_terms(dict(zip(names, np.mean(gather(means), 0).tolist(), strict=True)))

    def log_terms(self, values: dict[str, float]) -> None:
        """One line in the log file, one entry in nnU-Net's logger."""
        self.term_log.log(values, self.current_epoch)
        self.print_to_log_file("terms: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def on_epoch_end(self) -> None:
        if self.local_rank == 0:
            self.term_log.plot(self.current_epoch)
        super().on_epoch_end()

    def _seed_everything(self, epoch: int) -> None:
        """With a seed in the settings, an epoch depends on (seed, fold, epoch, rank) only; so a resumed run repeats."""
        seed = self.settings[ScheduleSettings].seed
        if seed is None:
            return
        fold = 1000 if self.fold == "all" else int(self.fold)
        # before the first epoch all processes draw the same initial weights
        state = np.random.SeedSequence([seed, fold, epoch + 1, rank() if epoch >= 0 else 0]).generate_state(2)
        random.seed(int(state[0]))
        np.random.seed(int(state[0]))  # nnU-Net's loaders draw from the global state
        torch.manual_seed(int(state[1]))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return what goes to ``checkpoint["mstkd"]``: tensors and plain Python, nothing that prediction needs."""
        heads = {name: unwrapped(head).state_dict() for name, head in self.heads.items()}
        return {"split": self.split, **({"heads": heads} if heads else {})}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned."""
        self.split = state.get("split")
        for name, head in self.heads.items():
            unwrapped(head).load_state_dict(state["heads"][name])

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with one more key, to a temporary file first: never half a file."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        plans = self.my_init_kwargs["plans"]["configurations"][self.configuration_name]
        assert BLOCK in plans, "nnU-Net no longer saves the plans that apply_settings changes"
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

        Those that are not used are logged. SettingsError if the preprocessed plans explicitly ask for another network.
        """
        content = checkpoints.read(filename_or_checkpoint)
        plans = content["init_args"]["plans"]["configurations"].get(self.configuration_name, {})
        if plans.get(BLOCK) is not None:
            stored, source = Settings.read(plans[BLOCK], self.all_sections()), str(filename_or_checkpoint)
            if InputSettings.NAME not in plans[BLOCK]:  # of an earlier version
                stored = stored.replace(InputSettings, normalization=per_channel.PLANS)
            sections = self.network_sections()
            if self.settings[InputSettings].normalization != "auto":
                sections = (*sections, InputSettings)
            refuse_other_network(self._given, sections, self.settings, stored, source)
            for section, key, mine, theirs in given_otherwise(self._given, self.all_sections(), self.settings, stored):
                if mine != "auto":
                    self.print_to_log_file(
                        f"{section.NAME}.{key}={mine!r} of the plans is not used: this training began with {theirs!r}"
                    )
            self.apply_settings(stored)
        self._restore(content)
        self._resumed = True
        self.load_extra_state(content.get(BLOCK) or {})

    def _restore(self, content: dict[str, Any]) -> None:
        """Take over what nnU-Net's own method takes; that one unpickles the file, and takes no content."""
        if not self.was_initialized:
            self.initialize()
        stored = (content.get(BLOCK) or {}).get("heads", {})
        if stored.keys() != self.heads.keys():
            raise InputError(
                f"the checkpoint has the heads {', '.join(stored) or 'none'}, make_heads of {type(self).__name__} has "
                f"{', '.join(self.heads) or 'none'}; continue with the trainer as it was, or train anew"
            )
        self.plain_network.load_state_dict(content["network_weights"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            state = content["grad_scaler_state"]
            # one that bad cases have worn down begins anew, or the first skipped step would end the training
            self.grad_scaler.load_state_dict(state if state["scale"] >= 1 else {**state, "scale": 2.0**16})
        self.my_init_kwargs = content["init_args"]
        self.current_epoch = content["current_epoch"]
        self.logger.load_checkpoint(content["logging"])
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
        # nnU-Net saves latest before it updates best: the log is ahead of _best_ema
        logged = self.logger.get_value("ema_fg_dice", step=None)
        self._best_ema = max(logged) if len(logged) else content["_best_ema"]
