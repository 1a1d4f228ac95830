"""AdaMM on nnU-Net: adapters per subset of modalities, distillation through two bottlenecks, lesion presence."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.losses.relative import relative_difference
from nnunetv2_mstkd.losses.style import style_matching
from nnunetv2_mstkd.methods.adamm import losses
from nnunetv2_mstkd.methods.adamm.network import AdaptiveDesign, Features, PlainDesign, style_channels
from nnunetv2_mstkd.methods.adamm.settings import AdaMMSettings
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.base import TeacherTrainer
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.modality_dropout import Target
from nnunetv2_mstkd.training.step import Term, active_terms


class AdaMMTeacherTrainer(TeacherTrainer):
    """The teacher: the plans' own network on complete input, trained before the student.

    AdaMM's released code trains it together with the student and lets distillation pull it down.
    """

    design = PlainDesign()


class AdaMMTrainer(DistillationTrainer):
    """AdaMM, "No Modality Left Behind" (Medical Image Analysis 2026).

    Segmentation + BBDM (``consistency``, ``content``, ``style``, ``adversarial``) + LGRM (``presence``,
    ``reliability``), on a network with adapters per subset and graph refinement (GARM). Every part can be switched off.
    """

    design: ClassVar[NetworkDesign | None] = AdaptiveDesign()
    teacher_trainer = AdaMMTeacherTrainer
    logit_terms = ("consistency",)
    feature_terms = ("content", "style", "adversarial")

    def make_terms(self) -> tuple[Term, ...]:
        section = self.settings[AdaMMSettings]
        terms = [
            Term("consistency", section.consistency, partial(self.compare_logits, losses.probability_consistency)),
            Term("content", section.content, lambda s, t, target: relative_difference(s.content, t.content.detach())),
            Term("style", section.style, lambda s, t, target: style_matching(s.style, t.style)),
            Term("adversarial", section.adversarial, self.adversarial),
        ]
        if section.presence:
            terms += [
                Term("presence", section.presence_weight, self._presence, needs_teacher=False),
                Term("reliability", section.reliability, self._reliability, needs_teacher=False),
            ]
        return active_terms(*terms)

    def forward_options(self) -> dict[str, Any]:
        return {"return_features": True, "return_style": bool(self.active("style", "adversarial"))}

    def _presence_of(self, student: Any, target: Target) -> tuple[torch.Tensor, losses.Presence]:
        """Presence logits of the foreground heads, and the truth."""
        regions, presence = self.label_manager.has_regions, student.presence
        logits = presence if regions else presence[:, 1:]
        return logits, losses.presence_target(target.label, logits.shape[1], regions=regions, valid=target.valid)

    def _presence(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return losses.presence_loss(*self._presence_of(student, target))

    def _reliability(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return losses.reliability_dice(
            student.logits,
            target.label,
            losses.presence_gap(*self._presence_of(student, target)),
            regions=self.label_manager.has_regions,
            batch_dice=self.configuration_manager.batch_dice,
            valid=target.valid,
        )

    # ---- adversary -----------------------------------------------------------------------------------------------

    def style_channels(self) -> int:
        return style_channels(UNetPlan.of(self.configuration_manager).shape)

    def style_of(self, features: Features) -> torch.Tensor:
        return features.style[1].float()
