"""The network of mmFormer (MICCAI 2022) around the U-Net that nnU-Net planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from nnunetv2_mstkd.methods.mmformer.settings import MMFormerSettings
from nnunetv2_mstkd.networks.attention import TransformerBlock, default_heads, positions_on
from nnunetv2_mstkd.networks.modality_encoders import mask_features
from nnunetv2_mstkd.networks.multi_encoder import Fused, MultiEncoderUNet
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.multi_encoder import MultiEncoderDesign
from nnunetv2_mstkd.training.settings import Section, Settings


class ModalityTransformer(nn.Module):
    """Bottleneck features of C modalities, first each for itself, then all together.

    With tokens x_m of modality m, one per bottleneck position, and learned positions p_m:
    x_m = Intra_m(embed_m(f_m) + p_m), and of the available modalities {x_m} = Inter(concat_m(x_m + p_m)). Tokens of
    absent modalities are not attended to. One linear layer of all modalities at a position leads back to the features.

    Parameters
    ----------
    num_modalities
        C.
    features
        Channels F of a modality's bottleneck.
    grid
        Sizes of the bottleneck of one patch; positions are interpolated to others.
    width
        Channels of a token.
    depth, mlp_ratio
        See :class:`~nnunetv2_mstkd.methods.mmformer.settings.MMFormerSettings`.
    """

    def __init__(
        self, num_modalities: int, features: int, grid: Sequence[int], width: int, *, depth: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        heads, every = default_heads(width), range(num_modalities)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(TransformerBlock(width, heads, mlp_ratio) for _ in range(depth))

        self.embed = nn.ModuleList(nn.Linear(features, width) for _ in every)
        self.position = nn.Parameter(torch.zeros(num_modalities, width, *grid))
        self.intra = nn.ModuleList(blocks() for _ in every)
        self.inter = blocks()
        self.leave = nn.Linear(num_modalities * width, num_modalities * features)

    def forward(self, features: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Features (B, C, F, *grid) to features of the same shape, zero where a modality is absent: bool, (B, C)."""
        grid, count = features.shape[3:], features.shape[1]
        positions = positions_on(self.position, grid).flatten(2).transpose(1, 2)  # (C, N, width)
        tokens = []
        for number, (embed, blocks) in enumerate(zip(self.embed, self.intra, strict=True)):
            x = embed(features[:, number].flatten(2).transpose(1, 2)) + positions[number]
            for block in blocks:  # type: ignore[attr-defined]
                x, _ = block(x)
            tokens.append(x)
        y = mask_features(torch.stack(tokens, 1), available) + positions
        y = y.flatten(1, 2)  # (B, C N, width)
        mask = available.repeat_interleave(positions.shape[1], 1)
        for block in self.inter:
            y, _ = block(y, mask=mask)
        y = mask_features(y.unflatten(1, (count, -1)), available)
        y = self.leave(y.transpose(1, 2).flatten(2))  # (B, N, C F)
        y = y.unflatten(2, (count, -1)).permute(0, 2, 3, 1).unflatten(3, grid)
        return mask_features(y, available)


class MMFormer(MultiEncoderUNet):
    """One encoder per modality with a :class:`ModalityTransformer` at the bottleneck, and the plans' decoder."""

    def __init__(self, plan: UNetPlan, section: MMFormerSettings) -> None:
        super().__init__(plan, section.width, separate=section.separate > 0)
        self.transformer = ModalityTransformer(
            plan.num_modalities,
            self.modality_encoders[0].output_channels[-1],
            plan.shape.grids[-1],
            plan.shape.widths[-1],
            depth=section.depth,
            mlp_ratio=section.mlp_ratio,
        )

    def fuse(self, stages: Sequence[torch.Tensor], available: torch.Tensor) -> Fused:
        return super().fuse([*stages[:-1], self.transformer(stages[-1], available)], available)


class MMFormerDesign(MultiEncoderDesign):
    """The network of mmFormer."""

    sections: ClassVar[tuple[type[Section], ...]] = (MMFormerSettings,)

    def build(self, plan: UNetPlan, settings: Settings) -> MMFormer:
        return MMFormer(plan, settings[MMFormerSettings])

    def added_modules(self, network: Any) -> list[nn.Module]:
        return [network.transformer]

    def modality_weights(self, network: Any) -> list[torch.Tensor]:
        return [*super().modality_weights(network), *network.transformer.parameters()]
