"""RFNet on nnU-Net: modalities fused region by region."""

from __future__ import annotations

from typing import ClassVar

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch.nn import functional

from nnunetv2_mstkd.methods.rfnet.network import RFNetDesign
from nnunetv2_mstkd.methods.rfnet.settings import RFNetSettings
from nnunetv2_mstkd.networks.multi_encoder import MultiEncoderOutput
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.multi_encoder import MultiEncoderTrainer
from nnunetv2_mstkd.training.settings import Settings
from nnunetv2_mstkd.training.step import Target, Term


class RFNetTrainer(MultiEncoderTrainer):
    """RFNet: "Region-aware Fusion Network for Incomplete Multi-modal Brain Tumor Segmentation" (ICCV 2021).

    nnU-Net's loss with deep supervision of the fused modalities, the loss of every stage's probability map (``maps``),
    and the loss of each modality alone (``separate``).
    """

    design: ClassVar[NetworkDesign | None] = RFNetDesign()
    reads_complete = ("rfnet.separate",)

    @classmethod
    def resolve(cls, settings: Settings, configuration_manager: ConfigurationManager, dataset_json: dict) -> Settings:
        """``activation``: sigmoid for overlapping regions; prediction builds the network without dataset.json."""
        settings = super().resolve(settings, configuration_manager, dataset_json)
        if settings[RFNetSettings].activation != "auto":
            return settings
        regions = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order")).has_regions
        return settings.replace(RFNetSettings, activation="sigmoid" if regions else "softmax")

    def make_terms(self) -> tuple[Term, ...]:
        section = self.settings[RFNetSettings]
        maps = Term("maps", section.maps, self._map_loss, needs_teacher=False)
        return maps, self.separate_term(section.separate)

    def _map_loss(self, student: MultiEncoderOutput, teacher: None, target: Target) -> torch.Tensor:
        """Sum over the stages of nnU-Net's loss of the probability map, brought to full resolution."""
        size = target.label.shape[2:]
        mode = "trilinear" if len(size) == 3 else "bilinear"
        enlarged = (functional.interpolate(logits.float(), size, mode=mode) for logits in student.maps)
        return torch.stack([self.full_resolution_loss(logits, target) for logits in enlarged]).sum()
