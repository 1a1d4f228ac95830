"""The plans' U-Net with AdaMM's parts: adapters per subset of modalities, graph refinement, lesion presence.

AdaMM ("No Modality Left Behind") has a fixed U-Net of four levels. Here encoder and decoder are those that nnU-Net
planned, and every part starts as an exact identity and passes samples with all modalities unchanged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods.adamm.adapters import MIN_HIDDEN, AdapterBank, SubsetIndex
from nnunetv2_mstkd.methods.adamm.graph_refinement import GraphRefinement
from nnunetv2_mstkd.methods.adamm.presence_gate import PresenceGate
from nnunetv2_mstkd.methods.adamm.settings import AdaMMSettings, AdaMMTeacherSettings
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.networks.decoding import decode
from nnunetv2_mstkd.nnunet.unet import UNetPlan, UNetShape
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.settings import Section, Settings, SettingsError

MIN_POSITIONS = 512
"""Distillation and graph work on the deepest encoder stage with at least so many positions (8^3)."""

MAX_FULL_BANK = 5
"""Up to this many modalities every subset has adapters of its own unless the settings say otherwise."""

LIMIT_FULL_BANK = 8
"""254 subsets; beyond, a full bank is larger than any U-Net."""

PARTS_OFF = AdaMMSettings(adapters=False, refinement="off", presence=False)
"""Settings of the teacher's network: the plans' own, which only returns its features."""


class Features(NamedTuple):
    """What a training step reads from one forward pass; none of it is computed in prediction."""

    logits: torch.Tensor | list[torch.Tensor]
    """What the plans' network returns: (B, K, *spatial), or a list of these, finest first, under deep supervision."""
    content: torch.Tensor
    """Output of the distillation stage before its own adapter, (B, width, *grid)."""
    style: tuple[torch.Tensor, ...]
    """On the same grid: the stage above, all of up to three stages joined, and the content; empty unless asked for."""
    presence: torch.Tensor | None
    """Logits per output channel that there is any of it in the patch, (B, K); None without the head."""


def choose_bank(section: AdaMMSettings, num_modalities: int) -> str:
    """Decide ``bank: auto``; SettingsError for a full bank of more than eight modalities."""
    bank: str = section.bank
    if bank == "auto":
        bank = "full" if num_modalities <= MAX_FULL_BANK and not section.subsets else "factorised"
    if bank == "full" and num_modalities > LIMIT_FULL_BANK:
        raise SettingsError(
            f"setting adamm.bank is 'full' for {num_modalities} modalities, which would be {2**num_modalities - 2} "
            f"adapters per stage; expected at most {LIMIT_FULL_BANK} modalities. Use 'factorised', and name frequent "
            f"subsets in adamm.subsets"
        )
    return bank


def distillation_stage(shape: UNetShape) -> int:
    """The deepest encoder stage with at least 512 positions, or the first one if none has."""
    fitting = [stage for stage, grid in enumerate(shape.grids) if math.prod(grid) >= MIN_POSITIONS]
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


class AdaptiveUNet(AvailabilityAware):
    """The plans' network, optionally with adapters, graph refinement and a presence head.

    ``encoder`` and ``decoder`` keep their names in the state dict, so that weights of the plain network load and
    nnU-Net finds ``decoder.deep_supervision``. The settings are resolved ones: ``subsets`` are channel numbers.
    """

    def __init__(self, plan: UNetPlan, section: AdaMMSettings) -> None:
        super().__init__()
        unet, shape, num_modalities = plan.build(), plan.shape, plan.num_modalities
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self._gate: PresenceGate | None = None
        self.gate = section.gate
        self.stage = distillation_stage(shape)
        self.pooling = _pooling(shape, self.stage)
        stages = len(shape.widths)
        self.presence_stage = max(0, stages - 3)  # stride 2, or 1 where there is no other
        self.subsets = self.encoder_adapters = self.decoder_adapters = self.refinement = self.presence = None
        if section.adapters:
            codes, factorised = _rows(section, num_modalities)
            self.subsets = SubsetIndex(num_modalities, codes, factorised=factorised)

            def banks(widths: Sequence[int]) -> nn.ModuleList:
                hidden = [max(MIN_HIDDEN, width // section.reduction) for width in widths]
                return nn.ModuleList(
                    AdapterBank(width, inner, num_modalities, len(codes), factorised=factorised)
                    for width, inner in zip(widths, hidden, strict=True)
                )

            self.encoder_adapters = banks(shape.widths[1:])
            self.decoder_adapters = banks(shape.widths[-2::-1])
        if section.refinement != "off":
            nodes = section.nodes if section.refinement == "graph" else 0
            self.refinement = GraphRefinement(shape.widths[self.stage], nodes, plan.dimensions)
        if section.presence:
            width = shape.widths[stages - 2 - self.presence_stage]
            self.presence = PresenceHead(width, plan.num_outputs, plan.dimensions)

    def forward(
        self,
        x: torch.Tensor,
        *,
        availability: torch.Tensor | None = None,
        return_features: bool = False,
        return_style: bool = False,
    ) -> torch.Tensor | list[torch.Tensor] | Features:
        """Segment a batch (B, C, *spatial) whose absent modalities are zero, as the plans' network does.

        With ``return_features`` the result is :class:`Features`, with ``return_style`` its style maps too.
        ``availability``, bool (B, C), says which modalities there are where ``x`` is not the image.
        """
        selection = partial = None
        if self.subsets is not None or self.refinement is not None:
            availability = self.available(x) if availability is None else availability
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
        presence: list[torch.Tensor] = []

        def visit(stage: int, features: torch.Tensor) -> torch.Tensor:
            if self.decoder_adapters is not None:
                features = self.decoder_adapters[stage](features, selection)
            if self.presence is not None and stage == self.presence_stage and (return_features or self._gate):
                presence.append(self.presence(features))
            return features

        logits = decode(self.decoder, skips, visit)
        if not return_features:
            if self._gate is not None and presence:
                self._gate.see(presence[0])
            return logits
        style = self._style(shared) if return_style else ()
        return Features(logits, shared[self.stage], style, presence[0] if presence else None)

    @contextlib.contextmanager
    def conditioned(
        self, availability: torch.Tensor, label_manager: Any, student: int | None = None
    ) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
        """What finishes the logits (S, K, *spatial) of a case knows what the presence head has seen in its patches;
        with ``adamm.gate`` above 0 it deletes from them what the head has not seen in any."""
        if self.presence is not None:
            self._gate = PresenceGate(self.gate, label_manager, availability.device)
        try:
            with super().conditioned(availability, label_manager) as unchanged:
                yield unchanged if self._gate is None else self._gate
        finally:
            self._gate = None

    def _style(self, shared: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Enter, joined and leave: what AdaMM's style bottleneck is made of, without its learned projection."""
        pool = functional.max_pool3d if shared[0].ndim == 5 else functional.max_pool2d
        maps = [pool(shared[stage], step, step, ceil_mode=True) for stage, step in self.pooling]
        maps.append(shared[self.stage])
        return maps[-2] if len(maps) > 1 else maps[-1], torch.cat(maps, 1), maps[-1]


def _pooling(shape: UNetShape, stage: int) -> list[tuple[int, tuple[int, ...]]]:
    """The up to two stages above ``stage``, finest first, with the steps that bring them to its grid."""
    levels = []
    for above in range(max(0, stage - 2), stage):
        steps = zip(*shape.strides[above + 1 : stage + 1], strict=True)
        levels.append((above, tuple(math.prod(step) for step in steps)))
    return levels


def style_channels(shape: UNetShape) -> int:
    """Channels of the joined style map."""
    stage = distillation_stage(shape)
    return sum(shape.widths[max(0, stage - 2) : stage + 1])


def _rows(section: AdaMMSettings, num_modalities: int) -> tuple[list[int], bool]:
    """Codes of the subsets with adapters of their own, and whether the others share a factorised bank."""
    full = 2**num_modalities - 1
    if section.bank == "full":
        return list(range(1, full)), False
    names = [f"#{channel}" for channel in range(num_modalities)]
    codes = [modalities.subset_code(modalities.parse_subset(text, names)) for text in section.subsets]
    return [code for code in codes if code != full], True


class AdaptiveDesign(NetworkDesign):
    """The student's network."""

    sections: ClassVar[tuple[type[Section], ...]] = (AdaMMSettings,)

    def check(self, plan: UNetPlan, settings: Settings, names: Sequence[str]) -> None:
        super().check(plan, settings, names)
        settings[AdaMMSettings].channel_numbers(names)

    def resolve(self, settings: Settings, plan: UNetPlan, names: Sequence[str] | None = None) -> Settings:
        section = settings[AdaMMSettings]
        # prediction builds the network without dataset.json, so subsets are stored by channel number
        subsets = section.subsets if names is None else section.channel_numbers(names)
        return settings.replace(AdaMMSettings, bank=choose_bank(section, plan.num_modalities), subsets=subsets)

    def build(self, plan: UNetPlan, settings: Settings) -> AdaptiveUNet:
        return AdaptiveUNet(plan, settings[AdaMMSettings])

    def added_modules(self, network: Any) -> list[nn.Module]:
        """Adapters and graph; the presence head, a sister of the segmentation layers, is trained as they are."""
        parts = (network.encoder_adapters, network.decoder_adapters, network.refinement)
        return [part for part in parts if part is not None]

    def modality_weights(self, network: Any) -> list[torch.Tensor]:
        banks = [bank for bank in (network.encoder_adapters, network.decoder_adapters) if bank is not None]
        return [weight for bank in banks for weight in bank.parameters()]


class PlainDesign(NetworkDesign):
    """The teacher's network: the plans' own, which can return its encoder's features, and may have a presence head."""

    sections: ClassVar[tuple[type[Section], ...]] = (AdaMMTeacherSettings,)

    def build(self, plan: UNetPlan, settings: Settings) -> AdaptiveUNet:
        return AdaptiveUNet(plan, replace(PARTS_OFF, presence=settings[AdaMMTeacherSettings].presence))
