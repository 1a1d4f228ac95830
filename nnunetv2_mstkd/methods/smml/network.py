"""The two students of SMML in one network, whose prediction is the mean of their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from nnunetv2_mstkd.methods.smml.settings import SMMLSettings
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.networks.decoding import logits_of
from nnunetv2_mstkd.networks.multi_encoder import MultiEncoderUNet
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.design import NetworkDesign, first_weights
from nnunetv2_mstkd.training.multi_encoder import MultiEncoderDesign
from nnunetv2_mstkd.training.settings import Section, Settings


class StudentOutput(NamedTuple):
    """What a training step reads from one student."""

    logits: torch.Tensor | list[torch.Tensor]
    """(B, K, *spatial), or a list of these, finest first, under deep supervision."""
    bottleneck: torch.Tensor
    """The deepest encoder features, (B, D, *grid)."""


class Student(nn.Module):
    """The plans' U-Net, which also returns its bottleneck."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = unet.encoder, unet.decoder

    def forward(self, x: Any, availability: torch.Tensor | None = None) -> StudentOutput:
        """Segment a batch (B, C, *spatial) whose absent modalities are zero, whichever those are."""
        skips = self.encoder(x)
        return StudentOutput(self.decoder(skips), skips[-1])


class MutualNet(AvailabilityAware):
    """Two students, initialised separately, without shared weights."""

    def __init__(self, students: Sequence[nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)

    def forward(
        self,
        x: torch.Tensor,
        *,
        other: torch.Tensor | None = None,
        other_availability: torch.Tensor | None = None,
        student: int | None = None,
        **options: Any,
    ):
        """Segment a batch (B, C, *spatial) whose absent modalities are zero.

        Parameters
        ----------
        other
            The same batch with other modalities zero, for the second student.
        other_availability
            The modalities of ``other``, bool (B, C); None: those that are not zero.
        student
            Run this one, 0 or 1, alone.
        options
            Further arguments of the students, with ``other`` or ``student``.

        Returns
        -------
        The mean of both students' logits, or those of the one that predicts, as the plans' network returns them; with
        ``other`` the outputs of both, with ``student`` that of one.
        """
        if student is not None:
            return self.students[student](x, availability=self.availability, **options)
        if other is not None:
            second = self.students[1](other, availability=other_availability, **options)
            return self.students[0](x, availability=self.availability, **options), second
        if self.student is not None:
            return logits_of(self.students[self.student - 1](x, availability=self.availability))
        first, second = (logits_of(member(x, availability=self.availability)) for member in self.students)
        if isinstance(first, (list, tuple)):
            return [(one + two) / 2 for one, two in zip(first, second, strict=True)]
        return (first + second) / 2


class StudentDesign(NetworkDesign):
    """One student: the plans' U-Net, or one encoder per modality, fused at every stage."""

    sections: ClassVar[tuple[type[Section], ...]] = (SMMLSettings,)

    def build(self, plan: UNetPlan, settings: Settings) -> Student | MultiEncoderUNet:
        section = settings[SMMLSettings]
        return Student(plan.build()) if section.light else MultiEncoderUNet(plan, section.width, separate=False)

    def input_weights(self, network: Any) -> list[torch.Tensor]:
        return [] if isinstance(network, MultiEncoderUNet) else first_weights(network)

    def modality_weights(self, network: Any) -> list[torch.Tensor]:
        return MultiEncoderDesign().modality_weights(network) if isinstance(network, MultiEncoderUNet) else []


class MutualDesign(NetworkDesign):
    """The network of SMML: two students of one design."""

    def __init__(self, student: NetworkDesign | None = None) -> None:
        self.student = StudentDesign() if student is None else student
        self.sections = self.student.sections  # type: ignore[misc]

    def check(self, plan: UNetPlan, settings: Settings, names: Sequence[str]) -> None:
        self.student.check(plan, settings, names)

    def resolve(self, settings: Settings, plan: UNetPlan, names: Sequence[str] | None = None) -> Settings:
        return self.student.resolve(settings, plan, names)

    def build(self, plan: UNetPlan, settings: Settings) -> MutualNet:
        return MutualNet([self.student.build(plan, settings) for _ in range(2)])

    def added_modules(self, network: Any) -> list[nn.Module]:
        return [module for student in network.students for module in self.student.added_modules(student)]

    def translate(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give the weights of a plain U-Net to both students.

        They are then equal, but see different subsets in every step, so their gradients and soon their weights differ.
        """
        if any(name.startswith("students.") for name in weights):
            return dict(weights)
        return {f"students.{number}.{name}": value for number in range(2) for name, value in weights.items()}

    def input_weights(self, network: Any) -> list[torch.Tensor]:
        return [weight for student in network.students for weight in self.student.input_weights(student)]

    def modality_weights(self, network: Any) -> list[torch.Tensor]:
        return [weight for student in network.students for weight in self.student.modality_weights(student)]
