"""MedMAP on nnU-Net: modalities aligned to one anchor distribution, absent ones imputed; alone and with MST-KDNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods.medmap.network import build, resolve
from nnunetv2_mstkd.methods.mstkd.network import Features
from nnunetv2_mstkd.methods.mstkd.trainer import MSTKDTrainer
from nnunetv2_mstkd.networks.plans_unet import check_architecture
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.distillation import Target, Term
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer, StepLoss
from nnunetv2_mstkd.training.settings import BLOCK, Settings, SettingsError


class AligningTrainer(SettingsTrainer):
    """Base of all trainers whose network has an aligning front: its settings."""

    network_sections: ClassVar[tuple[str, ...]] = ("medmap",)

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        check_architecture(configuration_manager.network_arch_class_name)
        fixed, names = settings.medmap.fixed_channel, modalities.modality_names(dataset_json)
        if fixed is not None and fixed >= len(names):
            raise SettingsError(
                f"setting medmap.fixed_channel is {fixed}, expected a channel number of the data set: 0 ... "
                f"{len(names) - 1} ({', '.join(names)})"
            )

    @classmethod
    def resolve(cls, settings: Settings, configuration_manager) -> Settings:
        settings = super().resolve(settings, configuration_manager)
        channels = len(configuration_manager.normalization_schemes)
        kwargs = configuration_manager.network_arch_init_kwargs
        return settings.replace("medmap", **resolve(settings.to_block()["medmap"], kwargs, channels))

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> Any:
        """The network as its plans describe it; called by training and, on the class, by prediction."""
        settings = Settings.from_block(configuration_manager.configuration.get(BLOCK))
        block = cls.resolve(settings, configuration_manager).to_block()
        return build(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            configuration_manager.patch_size,
            block["medmap"],
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            block["network"] if "network" in cls.network_sections else None,
        )

    @property
    def aligns(self) -> bool:
        return self.settings.medmap.weight > 0


class MedMAPTrainer(AligningTrainer, ModalityDropoutTrainer):
    """MedMAP: "Promoting Incomplete Multi-modal Brain Tumor Segmentation with Alignment", arXiv 2408.09465.

    Segmentation loss on a random subset, plus ``medmap.weight`` times the distance of every modality's features to the
    anchor. The alignment reads the complete training batch; the logits read the subset alone.
    """

    def compute_loss(self, data: torch.Tensor, target: Any, availability: torch.Tensor) -> StepLoss:
        if not self.aligns:
            return super().compute_loss(data, target, availability)
        output = self.network(modalities.mask_modalities(data, availability), complete=data)
        segmentation = self.loss(output.logits, target)
        total = segmentation + self.settings.medmap.weight * output.alignment
        return StepLoss(total, {"segmentation": segmentation, "alignment": output.alignment})


class MedMAPMSTKDTrainer(AligningTrainer, MSTKDTrainer):
    """MST-KDNet whose student has an aligning front; the teacher is MST-KDNet's own."""

    network_sections: ClassVar[tuple[str, ...]] = (*MSTKDTrainer.network_sections, *AligningTrainer.network_sections)
    own_terms: ClassVar[tuple[str, ...]] = ("alignment",)
    _complete: torch.Tensor | None = None

    def distillation_weights(self) -> Mapping[str, float]:
        weights = super().distillation_weights()
        return {**weights, "alignment": self.settings.medmap.weight} if self.aligns else weights

    def distillation_terms(self) -> Mapping[str, Term]:
        return {**super().distillation_terms(), "alignment": self._alignment}

    @staticmethod
    def _alignment(student: Any, teacher: Any, target: Target) -> torch.Tensor:
        return student.alignment

    def compute_loss(self, data: torch.Tensor, target: Any, availability: torch.Tensor) -> StepLoss:
        self._complete = data if self.aligns else None
        try:
            return super().compute_loss(data, target, availability)
        finally:
            self._complete = None

    def forward_student(self, data: torch.Tensor) -> Features:
        return self.network(data, complete=self._complete, **self._feature_options())
