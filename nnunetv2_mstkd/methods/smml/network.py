"""The two students of SMML in one network, whose prediction is the mean of their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.networks.modality_encoders import ModalityEncoders, build_modality_encoders
from nnunetv2_mstkd.networks.plans_unet import build_unet


class StudentOutput(NamedTuple):
    """What a training step reads from one student.

    Attributes
    ----------
    logits:
        (B, K, *spatial), or a list of these, finest first, under deep supervision.
    bottleneck:
        (B, D, *grid), the deepest encoder features.
    """

    logits: torch.Tensor | list[torch.Tensor]
    bottleneck: torch.Tensor


class Student(nn.Module):
    """The plans' U-Net, or one encoder per modality, fused at every stage, in front of the plans' decoder.

    Parameters
    ----------
    encoder, decoder:
        of the plans' network, or the fusion instead of the encoder.
    modality_encoders:
        None: the encoder takes the image.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, modality_encoders: ModalityEncoders | None) -> None:
        super().__init__()
        self.modality_encoders = modality_encoders
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: torch.Tensor, availability: torch.Tensor | None = None) -> StudentOutput:
        """Segment a batch (B, C, *spatial) whose absent modalities are zero.

        ``availability``: what is known of the cases, see :func:`nnunetv2_mstkd.modalities.known_availability`.
        """
        y: Any = x
        if self.modality_encoders is not None:
            available = modalities.known_availability(x, availability)
            y = []
            for stage in self.modality_encoders(x):
                keep = available.reshape(*available.shape, *[1] * (stage.ndim - 2))
                y.append(torch.where(keep, stage, stage.new_zeros(())))
        skips = self.encoder(y)
        return StudentOutput(self.decoder(skips), skips[-1])


class MutualNet(nn.Module):
    """Two students, initialised each for itself, without shared weights.

    Attributes
    ----------
    availability:
        bool, (1, C) or (B, C), on the device, set by prediction; None: channels that are zero are absent.
    only:
        number of the one student that predicts, 0 or 1; None: the mean of both. Neither is in the state dict.
    """

    def __init__(self, students: Sequence[Student]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        self.availability: torch.Tensor | None = None
        self.only: int | None = None

    def forward(self, x: torch.Tensor, *, other: torch.Tensor | None = None, student: int | None = None):
        """Segment a batch.

        Parameters
        ----------
        x:
            shape (B, C, *spatial); absent modalities are zero.
        other:
            the same batch with other modalities zero, for the second student.
        student:
            run this one alone.

        Returns
        -------
        The mean of both students' logits, as the plans' network returns them; with ``other`` a pair of
        :class:`StudentOutput`, with ``student`` one.
        """
        if student is not None:
            return self.students[student](x, self.availability)
        if other is not None:
            return self.students[0](x, self.availability), self.students[1](other, self.availability)
        if self.only is not None:
            return self.students[self.only](x, self.availability).logits
        first, second = (member(x, self.availability).logits for member in self.students)
        if isinstance(first, (list, tuple)):
            return [(one + two) / 2 for one, two in zip(first, second, strict=True)]
        return (first + second) / 2


def build(
    architecture_class: str,
    architecture_kwargs: dict[str, Any],
    requires_import: Sequence[str],
    smml: Mapping[str, Any],
    num_modalities: int,
    num_output_channels: int,
    deep_supervision: bool,
) -> MutualNet:
    """Build the network from the plans and the section ``smml`` of the settings.

    Raises
    ------
    ValueError
        if the plans name a network that is neither PlainConvUNet nor ResidualEncoderUNet.
    """
    students = []
    arguments = (architecture_class, architecture_kwargs, requires_import)
    for _ in range(2):
        if smml["light"]:
            unet = build_unet(*arguments, num_modalities, num_output_channels, deep_supervision)
            students.append(Student(unet.encoder, unet.decoder, None))
        else:
            encoders, fusion, decoder = build_modality_encoders(
                *arguments, num_modalities, num_output_channels, deep_supervision, smml["width"]
            )
            students.append(Student(fusion, decoder, encoders))
    return MutualNet(students)
