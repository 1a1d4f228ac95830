"""One encoder per modality, fused stage by stage, in front of the plans' decoder.

The late-fusion layout of RFNet and mmFormer with the encoder that nnU-Net planned: C copies of it with one input
channel each, and per stage a fusion of three convolutions (1, 3, 1 wide) back to the planned width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from nnunetv2_mstkd.nnunet.unet import UNetPlan

MIN_WIDTH = 4
"""Channels that a stage of a one-modality encoder keeps at least."""


class ModalityEncoders(nn.ModuleList):
    """C encoders of the plans' kind, one input channel each, no weights shared."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of a batch (B, C, *spatial): per stage, finest first, (B, C, F, *grid)."""
        per_modality = [encoder(x[:, index : index + 1]) for index, encoder in enumerate(self)]
        return [torch.stack(stage, 1) for stage in zip(*per_modality, strict=True)]


class StageFusion(nn.Module):
    """Fuses the modalities of every stage to the planned width; takes the place of the plans' encoder.

    The encoder's sizes and kinds of layers are kept as attributes of the same names. ``modality_widths`` are the
    channels per stage of one modality.
    """

    LAYERS = ("conv_bias", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs")
    DESCRIPTION = ("output_channels", "strides", "kernel_sizes", "conv_op", *LAYERS)

    def __init__(self, encoder: Any, modality_widths: Sequence[int], num_modalities: int) -> None:
        super().__init__()
        for name in self.DESCRIPTION:
            setattr(self, name, getattr(encoder, name))
        common = {name: getattr(encoder, name) for name in self.LAYERS}
        self.stages = nn.ModuleList()
        for stage, (features, width) in enumerate(zip(encoder.output_channels, modality_widths, strict=True)):
            incoming = (num_modalities * width, features, features)
            layers = [
                ConvDropoutNormReLU(encoder.conv_op, channels, features, kernel, 1, **common)
                for channels, kernel in zip(incoming, (1, encoder.kernel_sizes[stage], 1), strict=True)
            ]
            self.stages.append(nn.Sequential(*layers))
        self.apply(InitWeights_He(1e-2))

    def forward(self, stages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Per stage (B, C, F, *grid) to (B, planned width, *grid)."""
        return [fuse(stage.flatten(1, 2)) for fuse, stage in zip(self.stages, stages, strict=True)]


def build_modality_encoders(plan: UNetPlan, width: float) -> tuple[ModalityEncoders, StageFusion, nn.Module]:
    """Build one encoder per modality, of ``width`` times the planned channels, their fusion and the plans' decoder."""
    widths = [max(MIN_WIDTH, round(width * planned)) for planned in plan.shape.widths]
    single = plan.replace(num_modalities=1)
    encoders = ModalityEncoders(single.replace(widths=widths).build().encoder for _ in range(plan.num_modalities))
    planned = single.build()
    fusion = StageFusion(planned.encoder, widths, plan.num_modalities)
    decoder = planned.decoder
    del decoder.encoder  # it keeps the encoder it was built for, whose weights would be saved and never used
    return encoders, fusion, decoder


def mask_features(features: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Set the features of absent modalities to zero: features (B, C, F, *grid), available bool (B, C)."""
    keep = available.reshape(*available.shape, *[1] * (features.ndim - 2))
    return torch.where(keep, features, features.new_zeros(()))
