"""mmFormer on nnU-Net: transformers within and between modalities."""

from __future__ import annotations

from typing import ClassVar

from nnunetv2_mstkd.methods.mmformer.network import MMFormerDesign
from nnunetv2_mstkd.methods.mmformer.settings import MMFormerSettings
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.multi_encoder import MultiEncoderTrainer
from nnunetv2_mstkd.training.step import Term


class MMFormerTrainer(MultiEncoderTrainer):
    """mmFormer: "Multimodal Medical Transformer for Incomplete Multimodal Learning" (MICCAI 2022, arXiv 2206.02425).

    nnU-Net's loss with deep supervision of the fused modalities, and the loss of each modality alone (``separate``).
    """

    design: ClassVar[NetworkDesign | None] = MMFormerDesign()
    reads_complete = ("mmformer.separate",)

    def make_terms(self) -> tuple[Term, ...]:
        return (self.separate_term(self.settings[MMFormerSettings].separate),)
