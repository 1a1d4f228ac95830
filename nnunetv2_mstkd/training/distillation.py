"""The base of distilling trainers: a full-modality teacher beside a student with missing modalities."""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.inference.expected_dice import read_temperatures
from nnunetv2_mstkd.training.adversary import Adversary
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.distributed import unwrapped, wrapped_for_ddp
from nnunetv2_mstkd.training.modality_dropout import with_logits
from nnunetv2_mstkd.training.settings import DistillationSettings, Settings, TeacherSettings, UnlabelledSettings
from nnunetv2_mstkd.training.soft_labels import SoftLabelTrainer
from nnunetv2_mstkd.training.step import Target
from nnunetv2_mstkd.training.teacher import Teacher, find_teacher, load_teacher

DEFAULT_SHARE = 0.5
"""Unlabelled samples for each labelled one, where there are unlabelled cases and the settings say nothing."""


class DistillationTrainer(SoftLabelTrainer):
    """Segmentation loss on a random subset, plus weighted terms that compare the student with a teacher.

    A method is a subclass that names its teacher's trainer and lists its terms. The teacher was trained before and is
    frozen, or is trained in the same steps (``teacher.joint``). It is held outside ``self.network``, so that the
    checkpoint is the student alone.
    """

    sections = (*SoftLabelTrainer.sections, TeacherSettings)
    teacher_trainer: ClassVar[type[SettingsTrainer]]
    """Trainer whose final checkpoint of the same fold is the teacher."""
    feature_terms: ClassVar[tuple[str, ...]] = ()
    """Terms that compare features, so that teacher and student need features of equal shape."""
    distillation_defaults = DistillationSettings(where="teacher_better", fade=0.5, every=1, soft_labels=0.0)
    _teacher_identity: dict[str, str] | None = None

    @property
    def teacher_learns(self) -> bool:  # type: ignore[override]
        """``teacher.joint``."""
        return self.settings[TeacherSettings].joint

    @property
    def needs_teacher(self) -> bool:
        """Whether any active term compares with a teacher, or there are unlabelled cases for it to guide."""
        return self.has_teacher_terms or bool(self.split and self.split.get("unlabelled"))

    @property
    def unlabelled_share(self) -> float:
        share = self.settings[UnlabelledSettings].share
        return DEFAULT_SHARE if share is None else share

    @cached_property
    def guide_temperature(self) -> float:
        """``unlabelled.temperature``, or that of the teacher's evaluation."""
        if self.settings[UnlabelledSettings].temperature is not None or self._teacher_identity is None:
            return super().guide_temperature
        checkpoint = Path(self.output_folder_base).parents[1] / self._teacher_identity["path"]
        weights = {checkpoint.parent.name.removeprefix("fold_"): self._teacher_identity["sha256"]}
        temperatures = read_temperatures(checkpoint.parents[1], weights=weights)
        count = len(modalities.modality_names(self.dataset_json))
        if count not in temperatures:
            raise InputError(
                f"{checkpoint.parents[1]} was not evaluated with all {count} modalities; give a temperature"
            )
        return temperatures[count]

    def forward_options(self) -> dict[str, Any]:
        """Return what the active terms ask of a forward pass, as keyword arguments of both networks."""
        return {}

    def forward_student(self, inputs: torch.Tensor, complete: torch.Tensor) -> Any:
        return with_logits(self.run_network(inputs, complete, **self.forward_options()))

    def forward_teacher(self, complete: torch.Tensor) -> Any:
        return with_logits(self.teacher(complete, **self.forward_options()))

    # ---- adversary -----------------------------------------------------------------------------------------------

    def style_channels(self) -> int:
        """Channels of :meth:`style_of`."""
        raise NotImplementedError

    def style_of(self, features: Any) -> torch.Tensor:
        """Return the discriminator's input, (B, channels, *grid) float32, from a network's output."""
        raise NotImplementedError

    def adversarial(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        """The adversarial term; the adversary is built with the network, after the terms are listed."""
        return self.adversary.term(student)

    def initialize(self) -> None:
        super().initialize()
        if self.teacher_learns:
            self.teacher = torch.compile(self.teacher) if self._do_i_compile() else self.teacher
            self.teacher = wrapped_for_ddp(self.teacher, self.device) if self.is_ddp else self.teacher
        self.adversary = None
        if self.active("adversarial"):
            dimensions = len(self.configuration_manager.patch_size)
            self.adversary = Adversary(
                self.style_channels(), dimensions, self.style_of, self.device, distributed=self.is_ddp
            )

    # ---- teacher -------------------------------------------------------------------------------------------------

    def trained_networks(self) -> list[Any]:
        """The student, and a teacher that is trained with it, which is built here, before the optimiser."""
        if not self.teacher_learns:
            return super().trained_networks()
        self.teacher = self.teacher_trainer.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        self.check_options(self.teacher, f"of {self.teacher_trainer.__name__}")
        return [*super().trained_networks(), self.teacher]

    def clip_groups(self) -> list[torch.nn.Module]:
        return [*super().clip_groups(), *([self.teacher] if self.teacher_learns else [])]

    def prepare_training(self) -> None:
        super().prepare_training()
        if self.finished:
            return
        if self.teacher_learns:
            self._check_joint_teacher()
            scratch = "both from scratch" if self.initial_source is None else "the teacher from scratch"
            self.print_to_log_file(f"teacher.joint: teacher and student are trained together, {scratch}")
            return
        warm_start = self.settings[TeacherSettings].warm_start and self.initial_source is None and not self._resumed
        if not self.needs_teacher and not warm_start:
            return
        teacher = self._load_teacher()
        if warm_start:
            self._start_from(teacher.weights, "the teacher")
        if self.needs_teacher:  # an ablation without any term does not pay for a teacher
            self.teacher = torch.compile(teacher.network) if self._do_i_compile() else teacher.network

    def _check_joint_teacher(self) -> None:
        """Refuse to train a teacher on complete cases where there are none: it would guide with random weights."""
        if self.split is None or self.settings[TeacherSettings].cases == "all":
            return
        if not any(self.case_facts[case].complete for case in self.split["train"]):
            raise InputError(
                f"teacher.joint: fold {self.fold} has no labelled training case with all modalities for the teacher; "
                f"teacher.cases=all trains it on incomplete cases"
            )

    def _load_teacher(self) -> Teacher:
        teacher = load_teacher(find_teacher(self.teacher_trainer, self), self.teacher_trainer, self)
        stored = self._teacher_identity
        if self._resumed and stored is not None and stored["sha256"] != teacher.identity["sha256"]:
            raise InputError(
                f"the teacher was replaced since this training started: {teacher.identity['path']} has weights "
                f"{teacher.identity['sha256'][:12]}, the checkpoint was trained with {stored['path']} "
                f"{stored['sha256'][:12]}. Restore the old teacher, or start this training anew without --c"
            )
        self.check_teacher(teacher)
        self._teacher_identity = teacher.identity
        self.print_to_log_file(f"teacher: {teacher.identity['path']}, sha256 {teacher.identity['sha256'][:12]}")
        return teacher

    def feature_facts(self, network: Any, settings: Settings) -> dict[str, Any]:
        """Return, by name, what teacher and student must have alike where active terms compare features."""
        encoder = network.encoder
        return {"channels per stage": list(encoder.output_channels), "strides": list(map(tuple, encoder.strides))}

    def check_options(self, network: Any, teacher: str) -> None:
        """Refuse a teacher whose network cannot be called with :meth:`forward_options`."""
        options = self.forward_options()
        try:
            inspect.signature(network.forward).bind(None, **options)
        except TypeError as error:
            raise InputError(
                f"teacher {teacher} is a {type(network).__name__}, which does not take the options "
                f"{', '.join(options)} of {type(self).__name__}. Name in teacher_trainer a TeacherTrainer whose design "
                f"builds such a network, like the student's, and train it"
            ) from error

    def check_teacher(self, teacher: Teacher) -> None:
        """Refuse a teacher that does not take the options of the terms, or whose features have other shapes.

        Shapes matter if active terms compare features.
        """
        if self.needs_teacher:
            self.check_options(teacher.network, teacher.identity["path"])
        active = self.active(*self.feature_terms)
        if not active:
            return
        mine = self.feature_facts(self.plain_network, self.settings)
        for name, there in self.feature_facts(teacher.network, teacher.settings).items():
            if there != mine[name]:
                raise InputError(
                    f"teacher {teacher.identity['path']} has {name} = {there}, the student {mine[name]}; the terms "
                    f"{', '.join(active)} compare features of equal shape. Set their weights to 0 or use one network"
                )

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        adversary = {} if self.adversary is None else self.adversary.state_dict()
        learning = {"teacher_network": unwrapped(self.teacher).state_dict()} if self.teacher_learns else {}
        return {**super().extra_state(), "teacher": self._teacher_identity, **learning, **adversary}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self._teacher_identity = state.get("teacher")
        if self.teacher_learns:
            unwrapped(self.teacher).load_state_dict(state["teacher_network"])
        if self.adversary is not None:
            self.adversary.load_state_dict(state)
