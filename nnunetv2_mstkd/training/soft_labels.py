"""The base of trainers whose terms compare the student with a network that sees all modalities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mstkd.losses.advantage import teacher_advantage
from nnunetv2_mstkd.losses.soft_labels import soft_label_divergence
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.settings import DistillationSettings, Settings
from nnunetv2_mstkd.training.step import Target, Term

SOFT_LABELS = "soft_labels"
"""Name of the term that every distilling method can have."""
SOFT_LABELS_ALONE = DistillationSettings(where="everywhere", fade=0.0, every=2, soft_labels=1.0)
"""Defaults of methods whose only link to the teacher are its probabilities."""


class SoftLabelTrainer(ModalityDropoutTrainer):
    """Segmentation loss on a random subset, plus the divergence from a teacher's probabilities as soft labels.

    The teacher sees all modalities of the same augmented batch. The subclass decides which network this is.
    """

    sections = (*ModalityDropoutTrainer.sections, DistillationSettings)
    logit_terms: ClassVar[tuple[str, ...]] = ()
    """Terms per voxel, which ``distillation.where`` restricts."""
    distillation_defaults: ClassVar[DistillationSettings] = SOFT_LABELS_ALONE
    """What this method takes for the nulls of the section ``distillation``."""

    @classmethod
    def resolve(cls, settings: Settings, configuration_manager: ConfigurationManager, dataset_json: dict) -> Settings:
        settings = super().resolve(settings, configuration_manager, dataset_json)
        given = settings[DistillationSettings].to_dict()
        missing = {key: getattr(cls.distillation_defaults, key) for key, value in given.items() if value is None}
        return settings.replace(DistillationSettings, **missing)

    @property
    def teacher_period(self) -> int:  # type: ignore[override]
        """``distillation.every``."""
        return self.settings[DistillationSettings].every or 1

    def guide(self, teacher: Any, complete: torch.Tensor) -> torch.Tensor:
        """The teacher's logits: it has seen the labels of other patients, and all modalities of this one."""
        return teacher.logits

    def common_terms(self) -> tuple[Term, ...]:
        weight = self.settings[DistillationSettings].soft_labels or 0.0
        return (Term(SOFT_LABELS, weight, partial(self.compare_logits, soft_label_divergence)),)

    def compare_logits(
        self, loss: Callable[..., torch.Tensor], student: Any, teacher: Any, target: Target, **options: Any
    ) -> torch.Tensor:
        """Return a loss of logits; see :mod:`nnunetv2_mstkd.losses` for the arguments that all of these take."""
        regions, valid, weight = self.label_manager.has_regions, target.valid, target.weight
        return loss(student.logits, teacher.logits, regions=regions, valid=valid, voxel_weight=weight, **options)

    def teacher_factor(self) -> float:
        """Ramp at the start, linear fade at the end."""
        return self.rise(self.settings[DistillationSettings].ramp) * self.fading()

    def fading(self) -> float:
        """The linear fade at the end alone."""
        fade, left = self.settings[DistillationSettings].fade, 1 - self.iteration / self.total_iterations
        return min(1.0, left / fade) if fade else 1.0

    def voxel_weight(self, student: Any, teacher: Any, target: Target) -> torch.Tensor | None:
        """1 where the teacher is more right than the student, if the settings ask to distil only there."""
        everywhere = self.settings[DistillationSettings].where == "everywhere"
        if everywhere or teacher is None or not self.active(*self.logit_terms, SOFT_LABELS):
            return None
        regions = self.label_manager.has_regions
        return teacher_advantage(student.logits, teacher.logits, target.label, regions=regions, valid=target.valid)
