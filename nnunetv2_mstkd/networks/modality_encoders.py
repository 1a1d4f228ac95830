"""One encoder per modality, fused stage by stage, in front of the plans' decoder.

The late-fusion layout of RFNet and mmFormer with the encoder that nnU-Net planned: C copies of it with one input
channel each, and per stage a fusion of three convolutions (1, 3, 1 wide) back to the planned width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    channels per stage of one modality; ``options`` go to :meth:`make_stage`.
    """

    LAYERS = ("conv_bias", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs")
    output_channels: Sequence[int]
    kernel_sizes: Sequence[Any]
    conv_op: Any

    DESCRIPTION = ("output_channels", "strides", "kernel_sizes", "conv_op", *LAYERS)

    def __init__(self, encoder: Any, modality_widths: Sequence[int], num_modalities: int, **options: Any) -> None:
        super().__init__()
        for name in self.DESCRIPTION:
            setattr(self, name, getattr(encoder, name))
        self.stages = nn.ModuleList(
            self.make_stage(stage, width, num_modalities, **options) for stage, width in enumerate(modality_widths)
        )
        self.apply(InitWeights_He(1e-2))

    def make_stage(self, stage: int, width: int, num_modalities: int) -> nn.Module:
        """Build what fuses C modalities of ``width`` channels."""
        return self.convolutions(stage, num_modalities * width, self.output_channels[stage])

    def convolutions(self, stage: int, incoming: int, features: int) -> nn.Sequential:
        """Build three convolutions, the second one as wide as the stage's kernel, to ``features`` channels."""
        common = {name: getattr(self, name) for name in self.LAYERS}
        return nn.Sequential(
            *(
                ConvDropoutNormReLU(self.conv_op, channels, features, kernel, 1, **common)
                for channels, kernel in ((incoming, 1), (features, self.kernel_sizes[stage]), (features, 1))
            )
        )

    def forward(self, stages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Per stage (B, C, F, *grid) to (B, planned width, *grid)."""
        return [fuse(stage.flatten(1, 2)) for fuse, stage in zip(self.stages, stages, strict=True)]


def modality_plan(plan: UNetPlan, width: float) -> UNetPlan:
    """Return the plan of the U-Net of one modality, of ``width`` times the planned channels."""
    widths = [max(MIN_WIDTH, round(width * planned)) for planned in plan.shape.widths]
    return plan.replace(num_modalities=1, widths=widths)


def decoder_alone(unet: Any) -> Any:
    """Return a U-Net's decoder without the encoder that it was built for: its weights would be saved and never used."""
    decoder = unet.decoder
    del decoder.encoder
    return decoder


def build_modality_encoders(
    plan: UNetPlan, width: float, make_fusion: Callable[..., StageFusion] = StageFusion
) -> tuple[ModalityEncoders, StageFusion, Any]:
    """Build one encoder per modality, of ``width`` times the planned channels, their fusion and the plans' decoder.

    ``make_fusion`` takes the planned encoder, the channels per stage of one modality and C.
    """
    single = modality_plan(plan, width)
    encoders = ModalityEncoders(single.build().encoder for _ in range(plan.num_modalities))
    planned = plan.replace(num_modalities=1).build()
    fusion = make_fusion(planned.encoder, single.shape.widths, plan.num_modalities)
    return encoders, fusion, decoder_alone(planned)


def mask_features(features: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Set the features of absent modalities to zero: features (B, C, F, *grid), available bool (B, C)."""
    keep = available.reshape(*available.shape, *[1] * (features.ndim - 2))
    return torch.where(keep, features, features.new_zeros(()))
