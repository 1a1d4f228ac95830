"""Modality dropout with a U-Net whose encoder is scaled and shifted by which modalities are available."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.settings import Settings


class ConditionedNorm(nn.Module):
    """Instance normalisation with a scale and shift per subset: y = IN(x) (1 + W_g (a - 1)) + W_b (a - 1).

    a is 1 for an available modality and 0 for an absent one. W_g and W_b start at zero, and with all modalities a - 1
    is zero, so the network then is the plans' own. The conditioning comes after the normalisation, which would undo it.

    Parameters
    ----------
    norm
        Affine instance normalisation whose weights are taken over, under their names.
    num_modalities
        C.
    """

    def __init__(self, norm: Any, num_modalities: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.scale = nn.Linear(num_modalities, norm.num_features, bias=False)
        self.shift = nn.Linear(num_modalities, norm.num_features, bias=False)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)
        self.absence: torch.Tensor | None = None
        """a - 1 of the batch, (B, C), set by the network for the time of a forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        over_space = (..., *[None] * (x.ndim - 2))
        return y * (1 + self.scale(self.absence)[over_space]) + self.shift(self.absence)[over_space]


class ConditionedUNet(AvailabilityAware):
    """The plans' U-Net with a :class:`ConditionedNorm` for each norm of its encoder.

    Parameters
    ----------
    plan
        The U-Net to build.
    """

    def __init__(self, plan: UNetPlan) -> None:
        super().__init__()
        unet = plan.build()
        self.encoder, self.decoder = unet.encoder, unet.decoder
        replaced: dict[nn.Module, ConditionedNorm] = {}  # nnU-Net's blocks hold each norm twice
        for module in list(self.encoder.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, (nn.InstanceNorm2d, nn.InstanceNorm3d)):
                    if child not in replaced:
                        replaced[child] = ConditionedNorm(child, plan.num_modalities)
                    setattr(module, name, replaced[child])
        self.norms = list(replaced.values())

    def forward(
        self, x: torch.Tensor, *, availability: torch.Tensor | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Segment a batch (B, C, *spatial) whose absent modalities are zero, as the plans' network does.

        ``availability``, bool (B, C), says which modalities there are where ``x`` is not the image.
        """
        absence = (self.available(x) if availability is None else availability).float() - 1
        for norm in self.norms:
            norm.absence = absence
        return self.decoder(self.encoder(x))


class ConditionedDesign(NetworkDesign):
    """The network of :class:`ModalityConditionedTrainer`."""

    def check(self, plan: UNetPlan, settings: Settings, names: Sequence[str]) -> None:
        super().check(plan, settings, names)
        norm, options = plan.architecture_kwargs["norm_op"], plan.architecture_kwargs["norm_op_kwargs"] or {}
        if not str(norm).endswith(("InstanceNorm2d", "InstanceNorm3d")) or not options.get("affine"):
            raise InputError(f"the plans normalise with {norm} {options}, expected affine instance normalisation")

    def build(self, plan: UNetPlan, settings: Settings) -> ConditionedUNet:
        return ConditionedUNet(plan)

    def added_modules(self, network: Any) -> list[nn.Module]:
        return [part for norm in network.norms for part in (norm.scale, norm.shift)]

    def input_weights(self, network: Any) -> list[torch.Tensor]:
        return [
            *super().input_weights(network),
            *(part.weight for norm in network.norms for part in (norm.scale, norm.shift)),
        ]


class ModalityConditionedTrainer(ModalityDropoutTrainer):
    """Modality dropout whose encoder has an availability-conditioned scale and shift after each norm.

    It costs nothing with complete input, no teacher and no additional forward pass.
    """

    design = ConditionedDesign()
