"""MST-KDNet on nnU-Net: multi-scale transformer distillation, dual-mode logit distillation, global style matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.losses import dmld, gsme
from nnunetv2_mstkd.methods.mstkd import ms_tkd
from nnunetv2_mstkd.methods.mstkd.network import Features, MultiScaleTransformerUNet, build, resolve
from nnunetv2_mstkd.networks.plans_unet import check_architecture
from nnunetv2_mstkd.training.adversary import AdversarialTrainer
from nnunetv2_mstkd.training.base import SettingsTrainer, TeacherTrainer
from nnunetv2_mstkd.training.distillation import Target, Term
from nnunetv2_mstkd.training.settings import BLOCK, Settings
from nnunetv2_mstkd.training.teacher import Teacher

FEATURE_TERMS = ("evd", "maps", "style", "adversarial")
"""Terms that compare features, so that teacher and student need transformers of one shape."""

LOGIT_TERMS = ("discrepancy", "kl")
"""Terms per voxel, which ``distillation.where`` restricts."""


class TransformerTrainer(SettingsTrainer):
    """Base of teacher and student of MST-KDNet: the plans' U-Net with a multi-scale transformer, and its optimisers."""

    network_sections: ClassVar[tuple[str, ...]] = ("network",)

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        check_architecture(configuration_manager.network_arch_class_name)

    @classmethod
    def resolve(cls, settings: Settings, configuration_manager) -> Settings:
        network = resolve(
            settings.to_block()["network"],
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.patch_size,
        )
        return settings.replace("network", **{**network, "patch": tuple(network["patch"])})

    @staticmethod
    def build_network_architecture(
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> MultiScaleTransformerUNet:
        """The network as its plans describe it; called by training and, on the class, by prediction."""
        settings = Settings.from_block(configuration_manager.configuration.get(BLOCK))
        network = TransformerTrainer.resolve(settings, configuration_manager).to_block()["network"]
        return build(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            configuration_manager.patch_size,
            network,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )

    def added_modules(self, network: Any) -> list[torch.nn.Module]:
        return [network.transformer]


class MSTKDTeacherTrainer(TransformerTrainer, TeacherTrainer):
    """The teacher: the network of :class:`MSTKDTrainer` on complete input, trained before the student.

    MST-KDNet's released code trains it together with the student and lets distillation pull it down; here it is
    trained first and then frozen, as the paper describes it.
    """


class MSTKDTrainer(TransformerTrainer, AdversarialTrainer):
    """MST-KDNet: "Bridging the Gap in Missing Modalities: Leveraging Knowledge Distillation and Style Matching for
    Brain Tumor Segmentation", MICCAI 2025.

    Total loss (eq. 12): segmentation + MS-TKD (``evd``, ``maps``; eq. 2-4) + DMLD (``discrepancy``, ``kl``; eq. 5-8)
    + GSME (``style``, ``adversarial``; eq. 9-11). Every weight is a setting and may be 0.
    """

    teacher_trainer: ClassVar[type] = MSTKDTeacherTrainer

    def distillation_weights(self) -> Mapping[str, float]:
        return self.settings.distillation.weights

    def discriminator_channels(self) -> int:
        """f_enc and f_t, see :meth:`style_of`."""
        level = self.plain_network.style_level
        return self._encoder_width(level) + self.plain_network.encoder.output_channels[-1 - level]

    def _encoder_width(self, level: int) -> int:
        """Channels of f_enc; those of the stage above where it is pooled from there."""
        widths = self.plain_network.encoder.output_channels
        pooled = self.settings.distillation.style_encoder == "paper" and level + 2 <= len(widths)
        return widths[-2 - level] if pooled else widths[-1 - level]

    def check_teacher(self, teacher: Teacher) -> None:
        active = [name for name in FEATURE_TERMS if name in self.weights]
        own = self.settings.to_block()["network"]
        self.check_same_encoder(teacher, active)
        for key in ("taps", "patch") + (("heads",) if "evd" in active else ()):
            found = teacher.network_settings.get(key)
            if active and found != own[key]:
                raise InputError(
                    f"teacher {teacher.identity['path']} has network.{key} = {found}, the student {own[key]}; the "
                    f"terms {', '.join(active)} compare features of equal shape. Set their weights to 0 or train the "
                    f"teacher with the same network settings"
                )

    def _feature_options(self) -> dict[str, bool]:
        return {
            "return_features": True,
            "return_attention": "evd" in self.weights,
            "pool_encoder": self.settings.distillation.style_encoder == "paper",
        }

    def voxel_weight(self, student: Features, teacher: Features, target: Target) -> torch.Tensor | None:
        # no cost without a term that reads it
        return super().voxel_weight(student, teacher, target) if self.weights.keys() & set(LOGIT_TERMS) else None

    def forward_student(self, data: torch.Tensor) -> Features:
        return self.network(data, **self._feature_options())

    def forward_teacher(self, data: torch.Tensor) -> Features:
        return self.teacher(data, **self._feature_options())

    def distillation_terms(self) -> Mapping[str, Term]:
        return {
            "evd": lambda s, t, target: ms_tkd.extreme_value_distillation(s.attention, t.attention),
            "maps": lambda s, t, target: ms_tkd.multiscale_map_matching(s.maps, t.maps),
            "discrepancy": self._discrepancy,
            "kl": self._kl,
            "style": lambda s, t, target: gsme.style_matching((s.f_enc, s.f_dec, s.f_t), (t.f_enc, t.f_dec, t.f_t)),
            "adversarial": self.adversarial_term,
        }

    def _discrepancy(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return dmld.logit_discrepancy(
            student.logits,
            teacher.logits,
            regions=self.label_manager.has_regions,
            valid=target.valid,
            voxel_weight=target.weight,
        )

    def _kl(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return dmld.standardized_kl(
            student.logits,
            teacher.logits,
            regions=self.label_manager.has_regions,
            target_foreground=target.foreground,
            valid=target.valid,
            voxel_weight=target.weight,
            tau=self.settings.distillation.tau,
        )

    def style_of(self, features: Features) -> torch.Tensor:
        return torch.cat([features.f_enc.float(), features.f_t.float()], 1)
