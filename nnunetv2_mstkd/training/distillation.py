"""The base of distilling trainers: a frozen full-modality teacher beside a student with missing modalities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.losses.advantage import teacher_advantage
from nnunetv2_mstkd.losses.ramp import ramp
from nnunetv2_mstkd.nnunet.folders import dataset_number
from nnunetv2_mstkd.training.adversary import Adversary
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer, Target
from nnunetv2_mstkd.training.settings import DistillationSettings, Section, TeacherSettings
from nnunetv2_mstkd.training.teacher import Teacher, find_teacher, load_teacher


class DistillationTrainer(ModalityDropoutTrainer):
    """Segmentation loss on a random subset, plus weighted terms that compare the student with a frozen teacher.

    A method is a subclass that names its teacher's trainer and lists its terms. The teacher sees all modalities of the
    same augmented batch, under no_grad; it is held outside ``self.network``, so that the checkpoint is the student
    alone.
    """

    sections: ClassVar[tuple[type[Section], ...]] = (
        *ModalityDropoutTrainer.sections,
        TeacherSettings,
        DistillationSettings,
    )
    teacher_trainer: ClassVar[type]
    """Trainer whose final checkpoint of the same fold is the teacher."""
    adversarial_term: ClassVar[str] = "adversarial"
    """Name of the term that needs an adversary; without an active term of that name none is built."""
    logit_terms: ClassVar[tuple[str, ...]] = ()
    """Terms per voxel, which ``distillation.where`` restricts."""
    feature_terms: ClassVar[tuple[str, ...]] = ()
    """Terms that compare features, so that teacher and student need features of equal shape."""
    _teacher_identity: dict[str, str] | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether any active term compares with a teacher."""
        return any(term.needs_teacher for term in self.terms)

    def is_active(self, *names: str) -> bool:
        """Whether any of these terms has a weight above 0."""
        return any(term.name in names for term in self.terms)

    def active(self, names: Sequence[str]) -> list[str]:
        """Return those of the names that are active terms."""
        return [name for name in names if self.is_active(name)]

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
        self.adversary = None
        if self.is_active(self.adversarial_term):
            self.adversary = Adversary(
                self.style_channels(),
                len(self.configuration_manager.patch_size),
                self.style_of,
                self.device,
                distributed=self.is_ddp,
            )

    # ---- teacher -------------------------------------------------------------------------------------------------

    def prepare_training(self) -> None:
        super().prepare_training()
        if self.finished:
            return
        warm_start = self.settings[TeacherSettings].warm_start and self.initial_source is None and not self._resumed
        if not self.needs_teacher and not warm_start:
            return
        teacher = self._load_teacher()
        if warm_start:
            self._start_from(teacher.weights, "the teacher")
        if self.needs_teacher:  # an ablation without any term does not pay for a teacher
            self.teacher = torch.compile(teacher.network) if self._do_i_compile() else teacher.network

    def _load_teacher(self) -> Teacher:
        results = Path(self.output_folder_base).parent
        path = find_teacher(
            results,
            trainer=self.teacher_trainer.__name__,
            plans=self.plans_manager.plans,
            configuration=self.configuration_name,
            fold=self.fold,
            wanted=self.settings[TeacherSettings].configuration,
            dataset=dataset_number(self.plans_manager.dataset_name),
        )
        teacher = load_teacher(
            path,
            results_root=results.parent,
            trainer=self.teacher_trainer,
            student_configuration=self.configuration_manager,
            student_plans=self.plans_manager,
            dataset_json=self.dataset_json,
            split=self._split or {},
            device=self.device,
        )
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

    def check_teacher(self, teacher: Teacher) -> None:
        """Refuse a teacher whose encoder has other widths or strides, if active terms compare features.

        Raises
        ------
        InputError
            Naming the difference and the terms.
        """
        active = self.active(self.feature_terms)
        if not active:
            return
        encoder: Any = self.plain_network.encoder
        other: Any = teacher.network.encoder
        for name, here, there in (
            ("channels per stage", list(encoder.output_channels), list(other.output_channels)),
            ("strides", list(map(tuple, encoder.strides)), list(map(tuple, other.strides))),
        ):
            if here != there:
                raise InputError(
                    f"teacher {teacher.identity['path']} has the {name} {there}, the student {here}; the terms "
                    f"{', '.join(active)} compare features of equal shape. Set their weights to 0 or use one network"
                )

    # ---- loss ----------------------------------------------------------------------------------------------------

    def teacher_factor(self) -> float:
        """Ramp at the start, linear fade at the end."""
        settings = self.settings[DistillationSettings]
        factor = ramp(self.iteration, self.total_iterations, settings.ramp) if settings.ramp > 0 else 1.0
        left = 1 - self.iteration / self.total_iterations
        return factor * (min(1.0, left / settings.fade) if settings.fade > 0 else 1.0)

    def voxel_weight(self, student: Any, teacher: Any, target: Target) -> torch.Tensor | None:
        """1 where the teacher is more right than the student, if the settings ask to distil only there."""
        everywhere = self.settings[DistillationSettings].where == "everywhere"
        if everywhere or teacher is None or not self.is_active(*self.logit_terms):
            return None
        regions = self.label_manager.has_regions
        return teacher_advantage(student.logits, teacher.logits, target.label, regions=regions, valid=target.valid)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        adversary = {} if self.adversary is None else self.adversary.state_dict()
        return {**super().extra_state(), "teacher": self._teacher_identity, **adversary}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self._teacher_identity = state.get("teacher")
        if self.adversary is not None:
            self.adversary.load_state_dict(state)
