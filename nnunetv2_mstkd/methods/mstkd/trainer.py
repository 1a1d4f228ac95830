"""MST-KDNet on nnU-Net: multi-scale transformer distillation, dual-mode logit distillation, global style matching."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.losses.style import style_matching
from nnunetv2_mstkd.methods.mstkd import losses
from nnunetv2_mstkd.methods.mstkd.network import Features, TransformerDesign
from nnunetv2_mstkd.methods.mstkd.settings import MSTKDSettings, NetworkSettings
from nnunetv2_mstkd.training.base import TeacherTrainer
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.modality_dropout import Target
from nnunetv2_mstkd.training.settings import Section
from nnunetv2_mstkd.training.step import Term, active_terms
from nnunetv2_mstkd.training.teacher import Teacher


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

    sections: ClassVar[tuple[type[Section], ...]] = (*DistillationTrainer.sections, MSTKDSettings)
    design: ClassVar[NetworkDesign | None] = TransformerDesign()
    teacher_trainer: ClassVar[type] = MSTKDTeacherTrainer
    logit_terms: ClassVar[tuple[str, ...]] = ("discrepancy", "kl")
    feature_terms: ClassVar[tuple[str, ...]] = ("evd", "maps", "style", "adversarial")

    def make_terms(self) -> tuple[Term, ...]:
        weights = self.settings[MSTKDSettings]
        return active_terms(
            Term("evd", weights.evd, lambda s, t, target: losses.extreme_value_distillation(s.attention, t.attention)),
            Term("maps", weights.maps, lambda s, t, target: losses.multiscale_map_matching(s.maps, t.maps)),
            Term("discrepancy", weights.discrepancy, self._discrepancy),
            Term("kl", weights.kl, self._kl),
            Term("style", weights.style, self._style),
            Term("adversarial", weights.adversarial, self.adversarial),
        )

    # ---- networks ------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, bool]:
        """What the active terms ask of a forward pass."""
        return {
            "return_features": True,
            "return_attention": self.is_active("evd"),
            "pool_encoder": self.settings[MSTKDSettings].style_encoder == "paper",
        }

    def forward_student(self, inputs: torch.Tensor, complete: torch.Tensor) -> Features:
        return self.network(inputs, **self._options())

    def forward_teacher(self, complete: torch.Tensor) -> Features:
        return self.teacher(complete, **self._options())

    def check_teacher(self, teacher: Teacher) -> None:
        super().check_teacher(teacher)
        active = self.active(self.feature_terms)
        mine, theirs = (each[NetworkSettings].to_dict() for each in (self.settings, teacher.settings))
        for key in ("taps", "patch") + (("heads",) if "evd" in active else ()):
            if active and theirs[key] != mine[key]:
                raise InputError(
                    f"teacher {teacher.identity['path']} has network.{key} = {theirs[key]}, the student {mine[key]}; "
                    f"the terms {', '.join(active)} compare features of equal shape. Set their weights to 0 or train "
                    f"the teacher with the same network settings"
                )

    # ---- terms ---------------------------------------------------------------------------------------------------

    def _discrepancy(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return losses.logit_discrepancy(
            student.logits,
            teacher.logits,
            regions=self.label_manager.has_regions,
            valid=target.valid,
            voxel_weight=target.weight,
        )

    def _kl(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return losses.standardized_kl(
            student.logits,
            teacher.logits,
            regions=self.label_manager.has_regions,
            target_foreground=target.foreground,
            valid=target.valid,
            voxel_weight=target.weight,
            tau=self.settings[MSTKDSettings].tau,
        )

    @staticmethod
    def _style(student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return style_matching((student.f_enc, student.f_dec, student.f_t), (teacher.f_enc, teacher.f_dec, teacher.f_t))

    # ---- adversary -----------------------------------------------------------------------------------------------

    def style_channels(self) -> int:
        """Channels of f_enc (of the stage above, where it is pooled from there) and f_t."""
        level, widths = self.plain_network.style_level, self.plain_network.encoder.output_channels
        pooled = self.settings[MSTKDSettings].style_encoder == "paper" and level + 2 <= len(widths)
        return widths[-2 - level if pooled else -1 - level] + widths[-1 - level]

    def style_of(self, features: Features) -> torch.Tensor:
        return torch.cat([features.f_enc.float(), features.f_t.float()], 1)
