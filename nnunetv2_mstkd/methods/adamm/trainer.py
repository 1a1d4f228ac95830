"""AdaMM on nnU-Net: adapters per subset of modalities, distillation through two bottlenecks, lesion presence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.losses import gsme
from nnunetv2_mstkd.losses.relative import relative_difference
from nnunetv2_mstkd.methods.adamm.consistency import probability_consistency
from nnunetv2_mstkd.methods.adamm.network import PARTS_OFF, AdaptiveUNet, Features, build, resolve, style_channels
from nnunetv2_mstkd.methods.adamm.presence import (
    Presence,
    presence_gap,
    presence_loss,
    presence_target,
    reliability_dice,
)
from nnunetv2_mstkd.networks.plans_unet import Geometry, check_architecture
from nnunetv2_mstkd.training.adversary import AdversarialTrainer
from nnunetv2_mstkd.training.base import SettingsTrainer, TeacherTrainer
from nnunetv2_mstkd.training.distillation import Target, Term
from nnunetv2_mstkd.training.settings import BLOCK, Settings
from nnunetv2_mstkd.training.teacher import Teacher

FEATURE_TERMS = ("content", "style", "adversarial")
"""Terms that compare features, so that teacher and student need encoders of one shape."""

STYLE_TERMS = ("style", "adversarial")


def _build(plans_configuration, channels: int, outputs: int, deep_supervision: bool, adamm: dict) -> AdaptiveUNet:
    return build(
        plans_configuration.network_arch_class_name,
        plans_configuration.network_arch_init_kwargs,
        plans_configuration.network_arch_init_kwargs_req_import,
        plans_configuration.patch_size,
        adamm,
        channels,
        outputs,
        deep_supervision,
    )


class AdaptiveUNetTrainer(SettingsTrainer):
    """Base of teacher and student of AdaMM: the plans' U-Net, able to return the features of its encoder."""

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        check_architecture(configuration_manager.network_arch_class_name)


class AdaMMTeacherTrainer(AdaptiveUNetTrainer, TeacherTrainer):
    """The teacher: the plans' own network on complete input, trained before the student.

    AdaMM's released code trains it together with the student and lets distillation pull it down.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> AdaptiveUNet:
        """The plans' own network, without any of AdaMM's parts."""
        return _build(
            configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision, PARTS_OFF
        )


class AdaMMTrainer(AdaptiveUNetTrainer, AdversarialTrainer):
    """AdaMM, "No Modality Left Behind" (Medical Image Analysis 2026).

    Segmentation + BBDM (``consistency``, ``content``, ``style``, ``adversarial``) + LGRM (``presence``,
    ``reliability``), on a network with adapters per subset and graph refinement (GARM). Every part can be switched off.
    """

    teacher_trainer: ClassVar[type] = AdaMMTeacherTrainer
    network_sections: ClassVar[tuple[str, ...]] = ("adamm",)
    own_terms: ClassVar[tuple[str, ...]] = ("presence", "reliability")

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        settings.adamm.channel_numbers(modalities.modality_names(dataset_json))

    @classmethod
    def resolve(cls, settings: Settings, configuration_manager) -> Settings:
        channels = len(configuration_manager.normalization_schemes)
        resolved = resolve(settings.to_block()["adamm"], channels)
        return settings.replace("adamm", bank=resolved["bank"])

    def adopt(self, settings: Settings) -> None:
        # prediction builds the network without dataset.json, so subsets are stored by channel number
        subsets = settings.adamm.channel_numbers(modalities.modality_names(self.dataset_json))
        super().adopt(settings.replace("adamm", subsets=subsets))

    @staticmethod
    def build_network_architecture(
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> AdaptiveUNet:
        """The network as its plans describe it; called by training and, on the class, by prediction."""
        settings = Settings.from_block(configuration_manager.configuration.get(BLOCK))
        adamm = resolve(settings.to_block()["adamm"], num_input_channels)
        return _build(configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision, adamm)

    def added_modules(self, network: Any) -> list[torch.nn.Module]:
        return network.added_modules()

    def distillation_weights(self) -> Mapping[str, float]:
        return self.settings.adamm.weights

    def check_teacher(self, teacher: Teacher) -> None:
        self.check_same_encoder(teacher, [name for name in FEATURE_TERMS if name in self.weights])

    # ---- loss --------------------------------------------------------------------------------------------------

    def _feature_options(self) -> dict[str, bool]:
        return {"return_features": True, "return_style": any(name in self.weights for name in STYLE_TERMS)}

    def forward_student(self, data: torch.Tensor) -> Features:
        return self.network(data, **self._feature_options())

    def forward_teacher(self, data: torch.Tensor) -> Features:
        return self.teacher(data, **self._feature_options())

    def voxel_weight(self, student: Features, teacher: Features, target: Target) -> torch.Tensor | None:
        # no cost without a term that reads it
        return super().voxel_weight(student, teacher, target) if "consistency" in self.weights else None

    def distillation_terms(self) -> Mapping[str, Term]:
        return {
            "consistency": self._consistency,
            "content": lambda s, t, target: relative_difference(s.content, t.content.detach()),
            "style": lambda s, t, target: gsme.style_matching(s.style, t.style),
            "adversarial": self.adversarial_term,
            "presence": self._presence_term,
            "reliability": self._reliability,
        }

    def _consistency(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return probability_consistency(
            student.logits,
            teacher.logits,
            regions=self.label_manager.has_regions,
            valid=target.valid,
            voxel_weight=target.weight,
        )

    def _foreground_presence(self, student: Any) -> torch.Tensor:
        return student.presence if self.label_manager.has_regions else student.presence[:, 1:]

    def _presence_of(self, student: Any, target: Target) -> tuple[torch.Tensor, Presence]:
        logits = self._foreground_presence(student)
        regions = self.label_manager.has_regions
        return logits, presence_target(target.label, logits.shape[1], regions=regions, valid=target.valid)

    def _presence_term(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return presence_loss(*self._presence_of(student, target))

    def _reliability(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return reliability_dice(
            student.logits,
            target.label,
            presence_gap(*self._presence_of(student, target)),
            regions=self.label_manager.has_regions,
            batch_dice=self.configuration_manager.batch_dice,
            valid=target.valid,
        )

    # ---- adversary ---------------------------------------------------------------------------------------------

    def discriminator_channels(self) -> int:
        configuration = self.configuration_manager
        return style_channels(Geometry.of(configuration.network_arch_init_kwargs, configuration.patch_size))

    def style_of(self, features: Features) -> torch.Tensor:
        return features.style[1].float()
