"""AdaMM on nnU-Net: adapters per subset of modalities, distillation through two bottlenecks, lesion presence."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.losses.relative import relative_difference
from nnunetv2_mstkd.losses.style import style_matching
from nnunetv2_mstkd.methods.adamm import losses
from nnunetv2_mstkd.methods.adamm.network import AdaptiveDesign, Features, PlainDesign, style_channels
from nnunetv2_mstkd.methods.adamm.settings import AdaMMSettings, AdaMMTeacherSettings
from nnunetv2_mstkd.networks.decoding import finest
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.full_modality import TeacherTrainer
from nnunetv2_mstkd.training.settings import Settings, TeacherSettings
from nnunetv2_mstkd.training.step import Losses, Target, Term, active_terms, add_terms


def presence_terms(trainer: SettingsTrainer, presence: float, reliability: float) -> list[Term]:
    """The terms of LGRM, with these weights, of a network with a presence head."""
    regions = trainer.label_manager.has_regions

    def read(output: Features, target: Target) -> tuple[torch.Tensor, losses.Presence]:
        """Presence logits of the foreground heads, and the truth."""
        assert output.presence is not None
        logits = output.presence if regions else output.presence[:, 1:]
        return logits, losses.presence_target(target.label, logits.shape[1], regions=regions, valid=target.valid)

    def weighted_dice(output: Features, teacher: None, target: Target) -> torch.Tensor:
        return losses.reliability_dice(
            finest(output.logits),
            target.label,
            losses.presence_gap(*read(output, target)),
            regions=regions,
            batch_dice=trainer.configuration_manager.batch_dice,
            valid=target.valid,
        )

    return [
        Term(
            "presence", presence, lambda output, _, target: losses.presence_loss(*read(output, target)),
            needs_teacher=False,
        ),
        Term("reliability", reliability, weighted_dice, needs_teacher=False),
    ]  # fmt: skip


class AdaMMTeacherTrainer(TeacherTrainer):
    """The teacher: the plans' own network on complete input, trained before the student.

    AdaMM's released code trains it together with the student and lets distillation pull it down. There it also has a
    presence head with the student's two terms, which is ``adamm_teacher.presence`` here.
    """

    design = PlainDesign()
    terms: tuple[Term, ...] = ()

    def apply_settings(self, settings: Settings) -> None:
        super().apply_settings(settings)
        section = self.settings[AdaMMTeacherSettings]
        terms = presence_terms(self, section.presence_weight, section.reliability) if section.presence else ()
        self.terms = active_terms(*terms)
        self.logs_terms = bool(self.terms)

    def compute_losses(self, data: torch.Tensor, target: Any, present: torch.Tensor | None = None) -> Losses:
        if not self.terms:
            return super().compute_losses(data, target, present)
        output = self.network(data, return_features=True)
        total = self.loss(output.logits, target)
        values = {"segmentation": total}
        return Losses(add_terms(total, values, self.terms, output, self.read_target(finest(target))), values)


class AdaMMTrainer(DistillationTrainer):
    """AdaMM, "No Modality Left Behind" (Medical Image Analysis 2026).

    Segmentation + BBDM (``consistency``, ``content``, ``style``, ``adversarial``) + LGRM (``presence``,
    ``reliability``), on a network with adapters per subset and graph refinement (GARM). Every part can be switched off.
    """

    design: ClassVar[NetworkDesign | None] = AdaptiveDesign()
    teacher_trainer = AdaMMTeacherTrainer
    logit_terms = ("consistency",)
    feature_terms = ("content", "style", "adversarial")

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        section = cls.teacher_trainer.read_settings(configuration_manager)[AdaMMTeacherSettings]
        by = settings.set_by(TeacherSettings.NAME, "joint")
        expected = f"false with teacher.joint{by}, whose teacher has the segmentation loss alone"
        section.require(not (section.presence and settings[TeacherSettings].joint), "presence", expected)

    def make_terms(self) -> tuple[Term, ...]:
        section = self.settings[AdaMMSettings]
        terms = [
            Term("consistency", section.consistency, partial(self.compare_logits, losses.probability_consistency)),
            Term("content", section.content, lambda s, t, target: relative_difference(s.content, t.content.detach())),
            Term("style", section.style, lambda s, t, target: style_matching(s.style, t.style)),
            Term("adversarial", section.adversarial, self.adversarial),
        ]
        if section.presence:
            terms += presence_terms(self, section.presence_weight, section.reliability)
        return tuple(terms)

    def forward_options(self) -> dict[str, Any]:
        return {"return_features": True, "return_style": bool(self.active("style", "adversarial"))}

    # ---- adversary -----------------------------------------------------------------------------------------------

    def style_channels(self) -> int:
        return style_channels(UNetPlan.of(self.configuration_manager).shape)

    def style_of(self, features: Features) -> torch.Tensor:
        return features.style[1].float()
