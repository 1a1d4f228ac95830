"""The plans' U-Net with a multi-scale transformer between encoder and decoder.

MST-KDNet (MICCAI 2025) puts transformer blocks on the 1/32 grid of a fixed 160 x 192 x 128 crop and merges hidden
states of several depths into the decoder, as UNETR does. Here encoder and decoder are those that nnU-Net planned, of
any dimension, width and number of stages. ``network.placement`` says how the transformer joins them: as a branch that
starts as an exact identity, or on the main path, as published.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.methods.mstkd.settings import NetworkSettings
from nnunetv2_mstkd.networks.attention import TransformerBlock, default_heads, positions_on
from nnunetv2_mstkd.networks.decoding import decode
from nnunetv2_mstkd.nnunet.unet import UNetPlan, UNetShape
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.settings import Section, Settings, require

MIN_STYLE_POSITIONS = 512
"""Style is matched on the deepest decoder stage with at least this many positions (8^3)."""

FLOPS_SHARE = 0.05
PARAMETER_SHARE = 0.5
"""Blocks and pyramids together cost at most these shares of the U-Net's own; depth is reduced from 12 to fit."""

MAX_DEPTH = 12
"""Transformer blocks in the paper."""


class Features(NamedTuple):
    """What a training step reads from one forward pass; none of it is computed in prediction."""

    logits: torch.Tensor | list[torch.Tensor]
    """What the plans' network returns: (B, K, *spatial), or a list of these, finest first, under deep supervision."""
    attention: tuple[torch.Tensor, ...]
    """Maps of the tapped blocks, shallow to deep, each (B, heads, N, N); empty unless asked for."""
    maps: tuple[torch.Tensor, ...]
    """Multi-scale maps z of MS-TKD, deep to shallow, each (B, width of the stage, *grid of the stage)."""
    f_enc: torch.Tensor
    """Encoder stage on the style grid (GSME), (B, channels, *grid); then transformer pyramid and decoder stage."""
    f_t: torch.Tensor
    f_dec: torch.Tensor
    content: torch.Tensor
    """What the decoder starts from, (B, channels, *bottleneck grid)."""


def token_patch(grid: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """Smallest patch edge P (the paper's P) that cuts ``grid`` into at most ``max_tokens`` tokens; 1 if none is needed.

    An axis shorter than P is cut by its own length only.
    """
    for edge in range(1, max(grid) + 1):
        patch = tuple(min(edge, size) for size in grid)
        if math.prod(math.ceil(size / step) for size, step in zip(grid, patch, strict=True)) <= max_tokens:
            return patch
    return tuple(grid)


def resolve(section: NetworkSettings, plan: UNetPlan) -> NetworkSettings:
    """Fill the nulls of the ``network`` settings from the plans; SettingsError for a number that does not fit these.

    Depth starts at 12 (the paper's) and falls by ``taps`` until blocks and pyramids cost at most 5 % of the U-Net's
    multiply-adds and 50 % of its parameters, but not below 4 blocks.
    """
    shape = plan.shape
    width, grid, stages = shape.widths[-1], shape.grids[-1], len(shape.widths)
    if stages < 2:
        raise InputError(f"the plans' network has {stages} stage; the multi-scale transformer needs at least 2")
    taps = min(4, stages) if section.taps is None else section.taps
    require(taps <= stages, "network.taps", taps, f"at most the {stages} stages of the plans")
    heads = default_heads(width) if section.heads is None else section.heads
    require(width % heads == 0, "network.heads", heads, f"a divisor of the bottleneck width {width}")
    patch = token_patch(grid, section.max_tokens) if section.patch is None else section.patch
    require(
        len(patch) == len(grid) and all(edge <= size for edge, size in zip(patch, grid, strict=True)),
        "network.patch",
        list(patch),
        f"{len(grid)} edges of at most those of the bottleneck grid, {list(grid)}",
    )
    resolved = dataclasses.replace(section, taps=taps, heads=heads, patch=patch)
    if section.depth is None:
        return dataclasses.replace(resolved, depth=_affordable_depth(plan, resolved))
    require(section.depth % taps == 0, "network.depth", section.depth, f"a multiple of taps ({taps})")
    return resolved


def _affordable_depth(plan: UNetPlan, section: NetworkSettings) -> int:
    shape, taps, patch = plan.shape, section.taps or 0, section.patch or ()
    unet_parameters, unet_flops = _unet_cost(shape, plan.architecture_kwargs)
    width = shape.widths[-1]
    tokens = math.prod(math.ceil(edge / step) for edge, step in zip(shape.grids[-1], patch, strict=True))
    pyramid_parameters, pyramid_flops = _pyramid_cost(shape, taps, 2 if section.placement == "main" else 1)
    patching = width**2 * math.prod(patch)  # of the convolution into tokens, and of the one back
    pyramid_parameters += 2 * patching
    pyramid_flops += (1 + taps) * patching * tokens
    block_parameters = (4 + 2 * section.mlp_ratio) * width**2
    block_flops = block_parameters * tokens + 2 * tokens**2 * width
    floor = taps * math.ceil(4 / taps)
    for depth in range(taps * (MAX_DEPTH // taps), floor, -taps):
        parameters = pyramid_parameters + depth * block_parameters
        flops = pyramid_flops + depth * block_flops
        if parameters <= PARAMETER_SHARE * unet_parameters and flops <= FLOPS_SHARE * unet_flops:
            return depth
    return floor


def _per_stage(value: int | Sequence[int], stages: int) -> list[int]:
    return [value] * stages if isinstance(value, int) else list(value)


def _unet_cost(shape: UNetShape, architecture_kwargs: Mapping[str, Any]) -> tuple[float, float]:
    """Parameters and multiply-adds of the plans' U-Net; what depends on modalities and labels is left out."""
    stages, plain = len(shape.widths), "n_conv_per_stage" in architecture_kwargs
    if plain:
        encoder = _per_stage(architecture_kwargs["n_conv_per_stage"], stages)
    else:  # residual blocks of two convolutions each
        encoder = [2 * blocks for blocks in _per_stage(architecture_kwargs["n_blocks_per_stage"], stages)]
    decoder = _per_stage(architecture_kwargs["n_conv_per_stage_decoder"], stages - 1)[::-1]
    parameters = flops = 0.0
    # the stem before residual blocks already gives the first width; a plain encoder's first convolution is left out
    below = 0 if plain else shape.widths[0]
    for stage, (width, grid) in enumerate(zip(shape.widths, shape.grids, strict=True)):
        kernel = architecture_kwargs["kernel_sizes"][stage]
        taps = math.prod(kernel) if isinstance(kernel, (list, tuple)) else kernel ** len(grid)
        weights = taps * (below * width + (encoder[stage] - 1) * width**2)
        if stage < stages - 1:
            deeper = shape.widths[stage + 1] * width * math.prod(shape.strides[stage + 1])
            flops += deeper * math.prod(shape.grids[stage + 1])
            parameters += deeper
            weights += taps * width**2 * (1 + decoder[stage])
        parameters += weights
        flops += weights * math.prod(grid)
        below = width
    return parameters, flops


def _pyramid_cost(shape: UNetShape, taps: int, joined: int) -> tuple[float, float]:
    """The same for the transposed convolutions and the projections, which read ``joined`` maps, back into the U-Net."""
    parameters = float(joined * shape.widths[-1] ** 2)
    flops = parameters * math.prod(shape.grids[-1])
    for level in range(1, taps):
        incoming = shape.widths[-1]
        for step in range(1, level + 1):
            width = shape.widths[-1 - step]
            weights = incoming * width * math.prod(shape.strides[-step])
            parameters += weights
            flops += weights * math.prod(shape.grids[-step])
            incoming = width
        parameters += joined * incoming**2
        flops += joined * incoming**2 * math.prod(shape.grids[-1 - level])
    return parameters, flops


class MultiScaleTransformer(nn.Module):
    """Bottleneck tokens through transformer blocks, hidden states back at several scales (MST-KDNet, Fig. 1).

    Hidden state i of ``taps``, counted from the last block, is brought to the i-th stage above the bottleneck by
    repeated transposed convolutions with the plans' own strides and widths; that map is z_i of eq. (4). As a branch, a
    zero-initialised 1x1 projection adds it to the skip connection; on the main path, a 1x1 convolution of both joined
    takes the skip connection's place (f_enc and f_t of Fig. 1). The settings are resolved ones.
    """

    def __init__(self, shape: UNetShape, section: NetworkSettings) -> None:
        super().__init__()
        depth, taps, heads = section.depth or 0, section.taps or 0, section.heads or 0
        width, dimensions = shape.widths[-1], len(shape.grids[-1])
        convolution: type[Any] = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        transposed: type[Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dimensions]
        self.patch = tuple(section.patch or ())
        self.joins = section.placement == "main"
        joined = 2 if self.joins else 1
        self.tapped = tuple(depth // taps * (index + 1) - 1 for index in range(taps))
        tokens = [math.ceil(edge / step) for edge, step in zip(shape.grids[-1], self.patch, strict=True)]
        self.embed = convolution(width, width, self.patch, self.patch)
        self.position = nn.Parameter(torch.zeros(1, width, *tokens))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, section.mlp_ratio) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(taps))
        self.unpatch = transposed(width, width, self.patch, self.patch)
        self.pyramids = nn.ModuleList()
        self.projections = nn.ModuleList([convolution(joined * width, width, 1)])
        for level in range(1, taps):
            layers: list[nn.Module] = []
            incoming = width
            for step in range(1, level + 1):
                stride, outgoing = shape.strides[-step], shape.widths[-1 - step]
                if step > 1:
                    layers.append(nn.LeakyReLU(inplace=True))
                layers.append(transposed(incoming, outgoing, stride, stride))
                incoming = outgoing
            self.pyramids.append(nn.Sequential(*layers))
            self.projections.append(convolution(joined * incoming, incoming, 1))
        if not self.joins:
            for parameter in self.projections.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, skips: Sequence[torch.Tensor], *, return_attention: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Return (skip connections with the transformer's part, multi-scale maps, attention maps).

        The skip connections, finest first as given, change at the tapped stages. Maps are ordered deep to shallow
        (level 0 is the bottleneck itself), the attention maps shallow to deep; they are empty unless
        ``return_attention``.
        """
        maps, attention = self.tokens(skips[-1], return_attention=return_attention)
        skips = list(skips)
        for level, z in enumerate(maps):
            skip, projection = skips[-1 - level], self.projections[level]
            skips[-1 - level] = projection(torch.cat([skip, z], 1)) if self.joins else skip + projection(z)
        return skips, maps, attention

    def tokens(
        self, bottleneck: torch.Tensor, *, return_attention: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the blocks; return the multi-scale maps, deep to shallow, and the attention maps."""
        within = (..., *(slice(size) for size in bottleneck.shape[2:]))  # without the padding
        x = self.embed(self._pad(bottleneck))
        token_grid = x.shape[2:]
        x = (x + positions_on(self.position, token_grid)).flatten(2).transpose(1, 2)
        hidden, attention = [], []
        for index, block in enumerate(self.blocks):
            tapped = index in self.tapped
            x, scores = block(x, return_attention=return_attention and tapped)
            if tapped:
                hidden.append(x)
                if scores is not None:
                    attention.append(scores)
        maps = []
        for level, state in enumerate(reversed(hidden)):
            state = self.norms[level](state).transpose(1, 2).unflatten(2, token_grid)
            state = self.unpatch(state)[within]
            if level > 0:
                state = self.pyramids[level - 1](state)
            maps.append(state)
        return maps, attention

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """Zero-pad at the far end of each axis to a multiple of the token patch."""
        missing = [-size % step for size, step in zip(x.shape[2:], self.patch, strict=True)]
        if not any(missing):
            return x
        return functional.pad(x, [edge for size in reversed(missing) for edge in (0, size)])


class MultiScaleTransformerUNet(nn.Module):
    """The plans' network with :class:`MultiScaleTransformer` in between.

    ``encoder`` and ``decoder`` are the modules of PlainConvUNet or ResidualEncoderUNet and keep their names in the
    state dict, so that weights of the plain network load and nnU-Net finds ``decoder.deep_supervision``.
    """

    def __init__(self, encoder: Any, decoder: Any, shape: UNetShape, section: NetworkSettings) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.transformer = MultiScaleTransformer(shape, section)
        self.style_level = style_level(shape, section.taps or 0)

    def forward(
        self,
        x: torch.Tensor,
        *,
        return_features: bool = False,
        return_attention: bool = False,
        pool_encoder: bool = False,
    ) -> torch.Tensor | list[torch.Tensor] | Features:
        """Segment a batch (B, C, *spatial) whose absent modalities are zero.

        Parameters
        ----------
        return_features
            Return :class:`Features`, what the distillation terms read, instead of what the plans' network returns.
        return_attention
            Compute the attention maps explicitly (needs ``return_features``).
        pool_encoder
            f_enc as in the paper: max-pooled from the encoder stage above the style grid.
        """
        encoded = list(self.encoder(x))
        skips, maps, attention = self.transformer(encoded, return_attention=return_attention)
        stages: list[torch.Tensor] = []

        def visit(stage: int, features: torch.Tensor) -> torch.Tensor:
            if stage + 1 == self.style_level:
                stages.append(features)
            return features

        logits = decode(self.decoder, skips, visit)
        if not return_features:
            return logits
        f_enc, f_t = self._encoder_feature(encoded, pool_encoder), maps[self.style_level]
        return Features(logits, tuple(attention), tuple(maps), f_enc, f_t, stages[0], skips[-1])

    def _encoder_feature(self, skips: list[torch.Tensor], pool: bool) -> torch.Tensor:
        own = skips[-1 - self.style_level]
        if not pool or self.style_level + 2 > len(skips):
            return own
        above = skips[-2 - self.style_level]
        stride = [a // b for a, b in zip(above.shape[2:], own.shape[2:], strict=True)]
        pooling = functional.max_pool3d if own.ndim == 5 else functional.max_pool2d
        return pooling(above, stride, stride)


def style_level(shape: UNetShape, taps: int) -> int:
    """Stages above the bottleneck at which style is matched; never the bottleneck itself.

    The deepest decoder stage of at least 512 positions that has a pyramid level, else the largest that has one.
    """
    for level in range(1, taps):
        if math.prod(shape.grids[-1 - level]) >= MIN_STYLE_POSITIONS:
            return level
    return taps - 1


class TransformerDesign(NetworkDesign):
    """The network of MST-KDNet's teacher and student."""

    sections: ClassVar[tuple[type[Section], ...]] = (NetworkSettings,)

    def resolve(self, settings: Settings, plan: UNetPlan, names: Sequence[str] | None = None) -> Settings:
        return settings.replace(NetworkSettings, **resolve(settings[NetworkSettings], plan).to_dict())

    def build(self, plan: UNetPlan, settings: Settings) -> MultiScaleTransformerUNet:
        unet = plan.build()
        return MultiScaleTransformerUNet(unet.encoder, unet.decoder, plan.shape, settings[NetworkSettings])

    def added_modules(self, network: Any) -> list[nn.Module]:
        return [network.transformer]
