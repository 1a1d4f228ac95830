"""MedMAP on nnU-Net: modalities aligned to one anchor distribution, absent ones imputed; alone and with MST-KDNet."""

from __future__ import annotations

from typing import Any

import torch

from nnunetv2_mstkd.methods.medmap.network import AlignedDesign, AlignedTransformerDesign
from nnunetv2_mstkd.methods.medmap.settings import MedMAPSettings
from nnunetv2_mstkd.methods.mstkd.trainer import MSTKDTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.settings import Settings
from nnunetv2_mstkd.training.step import Term, active_terms


def alignment_term(settings: Settings) -> tuple[Term, ...]:
    """The alignment loss, which the network computes while it segments; none with weight 0."""
    weight = settings[MedMAPSettings].weight
    return active_terms(
        Term("alignment", weight, lambda student, teacher, target: student.alignment, needs_teacher=False)
    )


class MedMAPTrainer(ModalityDropoutTrainer):
    """MedMAP: "Promoting Incomplete Multi-modal Brain Tumor Segmentation with Alignment", arXiv 2408.09465.

    Segmentation loss on a random subset, plus ``medmap.weight`` times the distance of every modality's features to the
    anchor. The alignment reads the complete training batch; the logits read the subset alone.
    """

    design = AlignedDesign()

    def make_terms(self) -> tuple[Term, ...]:
        return alignment_term(self.settings)

    def forward_student(self, inputs: torch.Tensor, complete: torch.Tensor) -> Any:
        return self.network(inputs, complete=complete)


class MedMAPMSTKDTrainer(MSTKDTrainer):
    """MST-KDNet whose student has an aligning front; the teacher is MST-KDNet's own."""

    design = AlignedTransformerDesign()

    def make_terms(self) -> tuple[Term, ...]:
        return (*super().make_terms(), *alignment_term(self.settings))

    def forward_student(self, inputs: torch.Tensor, complete: torch.Tensor) -> Any:
        aligned = {"complete": complete} if self.active("alignment") else {}
        return self.network(inputs, **self.forward_options(), **aligned)
