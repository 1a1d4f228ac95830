"""The network of RFNet (ICCV 2021) around the U-Net that nnU-Net planned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from nnunetv2_mstkd.methods.rfnet.settings import RFNetSettings
from nnunetv2_mstkd.networks.decoding import decode
from nnunetv2_mstkd.networks.modality_encoders import StageFusion
from nnunetv2_mstkd.networks.multi_encoder import Fused, MultiEncoderUNet
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.multi_encoder import MultiEncoderDesign
from nnunetv2_mstkd.training.settings import Section, Settings

MAP_FEATURES = 16
"""Channels from which a probability map is made."""
HIDDEN = 128
"""Hidden width of the layers that weigh modalities."""


class RegionWeights(nn.Module):
    """How much each modality counts in each region, from its mean features there.

    w_r = sigmoid(W2 lrelu(W1 [mean of f_1 in r, ..., mean of f_C in r, share of r])), with layers per region, and the
    mean weighted by the region's probability.
    """

    def __init__(self, num_regions: int, num_modalities: int, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(num_modalities * features + 1, HIDDEN),
                nn.LeakyReLU(inplace=True),
                nn.Linear(HIDDEN, num_modalities),
                nn.Sigmoid(),
            )
            for _ in range(num_regions)
        )

    def forward(self, features: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
        """Features (B, C, F, N) and probabilities of regions (B, R, N) to weights (B, R, C)."""
        with torch.autocast(features.device.type, enabled=False):  # sums over a whole patch
            size = regions.float().sum(2)
            inside = torch.einsum("brn,bcfn->brcf", regions.float(), features.float())
            means = inside.flatten(2) / size.clamp(min=1)[..., None]
            share = size[..., None] / regions.shape[2]
        described = torch.cat([means, share], 2)
        return torch.stack([layers(described[:, number]) for number, layers in enumerate(self.layers)], 1)


class RegionFusion(nn.Module):
    """Region-aware fusion of one stage (RFM).

    A probability map says which regions a voxel is in. Within each region r the modalities are added up with the
    weights of :class:`RegionWeights`, p_r sum_m w_rm f_m. Convolutions of all regions give half of the fused features,
    convolutions of the modalities as they are the other half. The map has a loss; the fusion gives it no gradient.
    """

    def __init__(
        self, fusion: StageFusion, stage: int, width: int, num_modalities: int, *, heads: int, sigmoid: bool
    ) -> None:
        super().__init__()
        features, joined = fusion.output_channels[stage], num_modalities * width
        below = 0 if stage == len(fusion.output_channels) - 1 else features
        num_regions = heads + sigmoid  # beside overlapping regions the background is added
        self.sigmoid = sigmoid
        self.map = fusion.convolutions(stage, joined + below, MAP_FEATURES)
        self.map.append(fusion.conv_op(MAP_FEATURES, heads, 1))
        self.weights = RegionWeights(num_regions, num_modalities, width)
        self.regional = fusion.convolutions(stage, num_regions * width, features - features // 2)
        self.direct = fusion.convolutions(stage, joined, features // 2)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, R, *grid) of the regions, background included, of logits (B, K, *grid)."""
        if not self.sigmoid:
            return logits.softmax(1)
        regions = logits.sigmoid()
        return torch.cat([1 - regions.amax(1, keepdim=True), regions], 1)

    def forward(self, features: torch.Tensor, below: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, C, F, *grid) and those that come up in the decoder to fused ones, and the map's logits."""
        grid, joined = features.shape[3:], features.flatten(1, 2)
        logits = self.map(joined if below is None else torch.cat([joined, below], 1))
        regions = self.probabilities(logits.detach()).flatten(2)
        flat = features.flatten(3)
        weights = self.weights(flat, regions).to(flat.dtype)
        mixed = torch.einsum("brc,bcfn->brfn", weights, flat) * regions[:, :, None].to(flat.dtype)
        regional = self.regional(mixed.flatten(1, 2).unflatten(2, grid))
        return torch.cat([regional, self.direct(joined)], 1), logits


class RegionFusionStages(StageFusion):
    """A :class:`RegionFusion` per stage; ``heads`` and ``sigmoid`` say what the probability maps are of."""

    def make_stage(self, stage: int, width: int, num_modalities: int, **options: Any) -> nn.Module:
        return RegionFusion(self, stage, width, num_modalities, **options)


class RFNet(MultiEncoderUNet):
    """One encoder per modality, a :class:`RegionFusion` at every stage, and the plans' decoder."""

    def __init__(self, plan: UNetPlan, section: RFNetSettings) -> None:
        make_fusion = partial(RegionFusionStages, heads=plan.num_outputs, sigmoid=section.activation == "sigmoid")
        super().__init__(plan, section.width, separate=section.separate > 0, make_fusion=make_fusion)

    def fuse(self, stages: Sequence[torch.Tensor], available: torch.Tensor) -> Fused:
        deepest, logits = self.encoder.stages[-1](stages[-1], None)
        maps = [logits]

        def join(stage: int, upsampled: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
            fused, logits = self.encoder.stages[-2 - stage](features, upsampled)
            maps.append(logits)
            return fused

        return Fused(decode(self.decoder, [*stages[:-1], deepest], join=join), deepest, tuple(maps))


class RFNetDesign(MultiEncoderDesign):
    """The network of RFNet."""

    sections: ClassVar[tuple[type[Section], ...]] = (RFNetSettings,)

    def build(self, plan: UNetPlan, settings: Settings) -> RFNet:
        return RFNet(plan, settings[RFNetSettings])
