"""MST-KDNet on nnU-Net: multi-scale transformer distillation, dual-mode logit distillation, global style matching."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.losses.style import style_matching
from nnunetv2_mstkd.methods.mstkd import losses
from nnunetv2_mstkd.methods.mstkd.network import Features, TransformerDesign
from nnunetv2_mstkd.methods.mstkd.settings import MSTKDSettings, NetworkSettings
from nnunetv2_mstkd.training.base import TeacherTrainer
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.settings import Settings
from nnunetv2_mstkd.training.step import Term, active_terms


class MSTKDTeacherTrainer(TeacherTrainer):
    """The teacher: the network of :class:`MSTKDTrainer` on complete input, trained before the student and then frozen.

    MST-KDNet's released code trains teacher and student together and lets distillation pull the teacher down; its paper
    draws a segmentation loss on both.
    """

    design = TransformerDesign()


class MSTKDTrainer(DistillationTrainer):
    """MST-KDNet: "Bridging the Gap in Missing Modalities: Leveraging Knowledge Distillation and Style Matching for
    Brain Tumor Segmentation", MICCAI 2025.

    Total loss (eq. 12): segmentation + MS-TKD (``evd``, ``maps``; eq. 2-4) + DMLD (``discrepancy``, ``kl``; eq. 5-8)
    + GSME (``style``, ``adversarial``; eq. 9-11). Every weight is a setting and may be 0.
    """

    sections = (*DistillationTrainer.sections, MSTKDSettings)
    design: ClassVar[NetworkDesign | None] = TransformerDesign()
    teacher_trainer = MSTKDTeacherTrainer
    logit_terms = ("discrepancy", "kl")
    feature_terms = ("evd", "maps", "style", "adversarial")

    def make_terms(self) -> tuple[Term, ...]:
        weights = self.settings[MSTKDSettings]

        def style_maps(features: Features) -> tuple[torch.Tensor, ...]:
            return features.f_enc, features.f_dec, features.f_t

        def discrepancy(student: Any, teacher: Any, target: Any) -> torch.Tensor:
            return self.compare_logits(losses.logit_discrepancy, student, teacher, target)

        def kl(student: Any, teacher: Any, target: Any) -> torch.Tensor:
            options = {"target_foreground": target.foreground, "tau": weights.tau}
            return self.compare_logits(losses.standardized_kl, student, teacher, target, **options)

        return active_terms(
            Term("evd", weights.evd, lambda s, t, target: losses.extreme_value_distillation(s.attention, t.attention)),
            Term("maps", weights.maps, lambda s, t, target: losses.multiscale_map_matching(s.maps, t.maps)),
            Term("discrepancy", weights.discrepancy, discrepancy),
            Term("kl", weights.kl, kl),
            Term("style", weights.style, lambda s, t, target: style_matching(style_maps(s), style_maps(t))),
            Term("adversarial", weights.adversarial, self.adversarial),
        )

    def forward_options(self) -> dict[str, Any]:
        return {
            "return_features": True,
            "return_attention": bool(self.active("evd")),
            "pool_encoder": self.settings[MSTKDSettings].style_encoder == "paper",
        }

    def feature_facts(self, network: Any, settings: Settings) -> dict[str, Any]:
        section = settings[NetworkSettings].to_dict()
        keys = ("taps", "patch", "heads") if self.active("evd") else ("taps", "patch")
        return {**super().feature_facts(network, settings), **{f"network.{key}": section[key] for key in keys}}

    # ---- adversary -----------------------------------------------------------------------------------------------

    def style_channels(self) -> int:
        """Channels of f_enc (of the stage above, where it is pooled from there) and f_t."""
        level, widths = self.plain_network.style_level, self.plain_network.encoder.output_channels
        pooled = self.settings[MSTKDSettings].style_encoder == "paper" and level + 2 <= len(widths)
        return widths[-2 - level if pooled else -1 - level] + widths[-1 - level]

    def style_of(self, features: Features) -> torch.Tensor:
        return torch.cat([features.f_enc.float(), features.f_t.float()], 1)
