"""The plans' U-Net with AdaMM's parts: adapters per subset of modalities, graph refinement, lesion presence.

AdaMM ("No Modality Left Behind") has a fixed U-Net of four levels. Here encoder and decoder are those that nnU-Net
planned, and every part starts as an exact identity and passes samples with all modalities unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.methods.adamm.adapters import MIN_HIDDEN, AdapterBank, SubsetIndex
from nnunetv2_mstkd.methods.adamm.graph_refinement import GraphRefinement
from nnunetv2_mstkd.networks.plans_unet import Geometry, Halves, build_unet

MIN_POSITIONS = 512
"""Distillation and graph work on the deepest encoder stage with at least so many positions (8^3)."""

MAX_FULL_BANK = 5
"""Up to this many modalities every subset has adapters of its own unless the settings say otherwise."""

LIMIT_FULL_BANK = 8
"""254 subsets; beyond, a full bank is larger than any U-Net."""

PARTS_OFF: dict[str, Any] = {"adapters": False, "refinement": "off", "presence": False}
"""Settings of the teacher's network: the plans' own, which only returns its features."""


class Features(NamedTuple):
    """What a training step reads from one forward pass; nothing of it is computed in prediction.

    Attributes
    ----------
    logits:
        what the plans' network returns: (B, K, *spatial), or a list of these, finest first, under deep supervision.
    content:
        output of the distillation stage before its own adapter, (B, width, *grid).
    style:
        on the same grid: the stage above, all of up to three stages joined, and the content; empty unless asked for.
    presence:
        logits per output channel that there is any of it in the patch, (B, K); None without the head.
    """

    logits: torch.Tensor | list[torch.Tensor]
    content: torch.Tensor
    style: tuple[torch.Tensor, ...]
    presence: torch.Tensor | None


def resolve(adamm: dict[str, Any], num_modalities: int) -> dict[str, Any]:
    """Decide ``bank: auto`` of the ``adamm`` settings.

    Raises
    ------
    ValueError
        for a full bank of more than eight modalities.
    """
    bank = adamm["bank"]
    if bank == "auto":
        listed = bool(adamm["subsets"])
        bank = "full" if num_modalities <= MAX_FULL_BANK and not listed else "factorised"
    if bank == "full" and num_modalities > LIMIT_FULL_BANK:
        raise InputError(
            f"setting adamm.bank is 'full' for {num_modalities} modalities, which would be {2**num_modalities - 2} "
            f"adapters per stage; expected at most {LIMIT_FULL_BANK} modalities. Use 'factorised', and name frequent "
            f"subsets in adamm.subsets"
        )
    return {**adamm, "bank": bank}


def distillation_stage(geometry: Geometry) -> int:
    """The deepest encoder stage with at least 512 positions, or the first one if none has."""
    fitting = [stage for stage, grid in enumerate(geometry.grids) if math.prod(grid) >= MIN_POSITIONS]
    return fitting[-1] if fitting else 0


class PresenceHead(nn.Module):
    """Whether there is any voxel of an output channel: log-mean-exp over space of a 1x1 convolution's logits.

    AdaMM's head averages a nonlinear map over all voxels, in which a small lesion disappears; and it runs at full
    resolution, where it is 9 % of the network's cost.
    """

    def __init__(self, width: int, outputs: int, dimensions: int) -> None:
        super().__init__()
        self.logits = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(width, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decoder features (B, width, *grid) to logits (B, outputs), float32."""
        logits = self.logits(x).flatten(2).float()
        return logits.logsumexp(2) - math.log(logits.shape[2])


class AdaptiveUNet(nn.Module):
    """The plans' network, optionally with adapters, graph refinement and a presence head.

    ``encoder`` and ``decoder`` keep their names in the state dict, so that weights of the plain network load and
    nnU-Net finds ``decoder.deep_supervision``.

    Parameters
    ----------
    unet:
        a network with ``encoder`` and ``decoder`` of dynamic_network_architectures.
    geometry:
        sizes of the U-Net.
    adamm:
        resolved settings, see :func:`resolve`; ``subsets`` as channel numbers, ``"#0+#2"``.
    num_modalities, num_outputs:
        C input channels and K output channels.

    Attributes
    ----------
    availability:
        bool, (1, C) or (B, C): which modalities the case has, if that is known; None: seen from each patch. See
        :func:`nnunetv2_mstkd.modalities.known_availability`.
    gate:
        probability of presence below which prediction may delete an output channel of a case; 0: never.
    presence_seen:
        the largest presence logits, (B, K), since it was set to a tensor of (1, K); None: not recorded.
    """

    def __init__(
        self, unet: Halves, geometry: Geometry, adamm: dict[str, Any], num_modalities: int, num_outputs: int
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self.availability: torch.Tensor | None = None
        self.presence_seen: torch.Tensor | None = None
        self.gate = float(adamm.get("gate", 0.0))
        self.stage = distillation_stage(geometry)
        self.pooling = _pooling(geometry, self.stage)
        stages, dimensions = len(geometry.widths), len(geometry.grids[0])
        self.presence_stage = max(0, stages - 3)  # stride 2, or 1 where there is no other
        self.subsets = self.encoder_adapters = self.decoder_adapters = self.refinement = self.presence = None
        if adamm["adapters"]:
            codes, factorised = _rows(adamm, num_modalities)
            self.subsets = SubsetIndex(num_modalities, codes, factorised=factorised)

            def banks(widths: Sequence[int]) -> nn.ModuleList:
                return nn.ModuleList(
                    AdapterBank(
                        width,
                        max(MIN_HIDDEN, width // adamm["reduction"]),
                        num_modalities,
                        len(codes),
                        factorised=factorised,
                    )
                    for width in widths
                )

            self.encoder_adapters = banks(geometry.widths[1:])
            self.decoder_adapters = banks(geometry.widths[-2::-1])
        if adamm["refinement"] != "off":
            nodes = adamm["nodes"] if adamm["refinement"] == "graph" else 0
            self.refinement = GraphRefinement(geometry.widths[self.stage], nodes, dimensions)
        if adamm["presence"]:
            width = geometry.widths[stages - 2 - self.presence_stage]
            self.presence = PresenceHead(width, num_outputs, dimensions)

    def added_modules(self) -> list[nn.Module]:
        """Adapters and graph; the presence head, a sister of the segmentation layers, is trained as they are."""
        parts = (self.encoder_adapters, self.decoder_adapters, self.refinement)
        return [part for part in parts if part is not None]

    def forward(
        self, x: torch.Tensor, *, return_features: bool = False, return_style: bool = False
    ) -> torch.Tensor | list[torch.Tensor] | Features:
        """Segment a batch.

        Parameters
        ----------
        x:
            shape (B, C, *spatial); absent modalities are zero.
        return_features:
            also return what the training reads.
        return_style:
            the style maps too (needs ``return_features``).

        Returns
        -------
        Exactly what the plans' network returns (a tensor, or a list under deep supervision), or :class:`Features`.
        """
        selection = partial = None
        if self.subsets is not None or self.refinement is not None:
            availability = modalities.known_availability(x, self.availability)
            partial = (~availability.all(1)).float()
            selection = None if self.subsets is None else self.subsets(availability)
        stem = getattr(self.encoder, "stem", None)
        y = x if stem is None else stem(x)
        shared, skips = [], []
        for stage, block in enumerate(self.encoder.stages):
            y = block(y)
            shared.append(y)
            if self.encoder_adapters is not None and stage > 0:
                y = self.encoder_adapters[stage - 1](y, selection)
            skips.append(y)
        if self.refinement is not None:
            skips[self.stage] = self.refinement(skips[self.stage], shared[self.stage], partial)
        seen = None if return_features else self.presence_seen
        presence, outputs = None, []
        low, last = skips[-1], len(self.decoder.stages) - 1
        for stage in range(len(self.decoder.stages)):
            low = torch.cat((self.decoder.transpconvs[stage](low), skips[-(stage + 2)]), 1)
            low = self.decoder.stages[stage](low)
            if self.decoder_adapters is not None:
                low = self.decoder_adapters[stage](low, selection)
            if self.presence is not None and stage == self.presence_stage and (return_features or seen is not None):
                presence = self.presence(low)
            if self.decoder.deep_supervision or stage == last:
                outputs.append(self.decoder.seg_layers[stage](low))
        logits = outputs[::-1] if self.decoder.deep_supervision else outputs[0]
        if seen is not None and presence is not None:
            self.presence_seen = torch.maximum(seen, presence)
        if not return_features:
            return logits
        return Features(logits, shared[self.stage], self._style(shared) if return_style else (), presence)

    def _style(self, shared: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Enter, joined and leave: what AdaMM's style bottleneck is made of, without its learned projection."""
        pool = functional.max_pool3d if shared[0].ndim == 5 else functional.max_pool2d
        maps = [pool(shared[stage], step, step, ceil_mode=True) for stage, step in self.pooling]
        maps.append(shared[self.stage])
        return maps[-2] if len(maps) > 1 else maps[-1], torch.cat(maps, 1), maps[-1]


def _pooling(geometry: Geometry, stage: int) -> list[tuple[int, tuple[int, ...]]]:
    """The up to two stages above ``stage``, finest first, with the steps that bring them to its grid."""
    levels = []
    for above in range(max(0, stage - 2), stage):
        steps = zip(*geometry.strides[above + 1 : stage + 1], strict=True)
        levels.append((above, tuple(math.prod(step) for step in steps)))
    return levels


def style_channels(geometry: Geometry) -> int:
    """Channels of the joined style map."""
    stage = distillation_stage(geometry)
    return sum(geometry.widths[max(0, stage - 2) : stage + 1])


def _rows(adamm: dict[str, Any], num_modalities: int) -> tuple[list[int], bool]:
    """Codes of the subsets with adapters of their own, and whether the others share a factorised bank."""
    full = 2**num_modalities - 1
    if adamm["bank"] == "full":
        return list(range(1, full)), False
    names = [f"#{channel}" for channel in range(num_modalities)]
    codes = [modalities.subset_code(modalities.parse_subset(text, names)) for text in adamm["subsets"]]
    return [code for code in codes if code != full], True


def build(
    architecture_class: str,
    architecture_kwargs: dict,
    requires_import: Sequence[str],
    patch_size: Sequence[int],
    adamm: dict[str, Any],
    num_input_channels: int,
    num_output_channels: int,
    deep_supervision: bool,
) -> AdaptiveUNet:
    """Build the network from the plans; ``adamm`` is the resolved section (see :func:`resolve`).

    Raises
    ------
    ValueError
        if the plans name a network that is neither PlainConvUNet nor ResidualEncoderUNet.
    """
    unet = build_unet(
        architecture_class,
        architecture_kwargs,
        requires_import,
        num_input_channels,
        num_output_channels,
        deep_supervision,
    )
    geometry = Geometry.of(architecture_kwargs, patch_size)
    return AdaptiveUNet(unet, geometry, adamm, num_input_channels, num_output_channels)
