"""Training networks with one encoder per modality, each of which also has to segment for itself."""

from __future__ import annotations

from typing import Any

import torch

from nnunetv2_mstkd.networks.multi_encoder import MultiEncoderOutput
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distributed import within_process
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.step import Target, Term


class MultiEncoderDesign(NetworkDesign):
    """Base of designs that build a :class:`~nnunetv2_mstkd.networks.multi_encoder.MultiEncoderUNet`."""

    def input_weights(self, network: Any) -> list[torch.Tensor]:
        return []

    def modality_weights(self, network: Any) -> list[torch.Tensor]:
        """The encoders, which may be in a front before the network, and the fusion of their features."""
        parts = [part for part in (network.modality_encoders, network.encoder) if part is not None]
        return [weight for part in parts for weight in part.parameters()]


class MultiEncoderTrainer(ModalityDropoutTrainer):
    """Modality dropout behind one encoder per modality, with the terms that RFNet and mmFormer share."""

    def forward_student(self, inputs: torch.Tensor, complete: torch.Tensor) -> MultiEncoderOutput:
        return self.run_network(inputs, complete, auxiliary=complete)

    def separate_term(self, weight: float) -> Term:
        """Return the term of the decoder that segments from each modality alone."""
        return Term("separate", weight, self._separate_loss, needs_teacher=False)

    def _separate_loss(self, student: MultiEncoderOutput, teacher: None, target: Target) -> torch.Tensor:
        """Sum over the modalities of nnU-Net's loss; modalities that a case lacks are left out, at equal weight."""
        assert student.separate is not None
        rows, count = student.encoded, student.encoded.shape[1]

        def repeated(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value[:, None].expand(-1, count, *value.shape[1:])[rows]

        label = Target(*map(repeated, target))  # type: ignore[arg-type]
        with within_process(self.loss):
            return count * self.full_resolution_loss(student.separate[rows], label)
