"""Settings of RFNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nnunetv2_mstkd.training.settings import Section, Share, Weight


@dataclass(frozen=True, kw_only=True)
class RFNetSettings(Section):
    """RFNet's encoders and region-aware fusion, and the losses that train them beside the segmentation loss."""

    NAME: ClassVar[str] = "rfnet"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = ("width", "activation", "separate")

    width: Share = 0.5
    """Channels of a one-modality encoder over the planned ones."""
    activation: Literal["auto", "softmax", "sigmoid"] = "auto"
    """How logits become the probability maps that divide features into regions; ``auto``: ``softmax`` over labels,
    ``sigmoid`` for overlapping regions, as the data set has them."""
    maps: Weight = 1.0
    """Weight of the loss of the probability map of each stage, at full resolution."""
    separate: Weight = 1.0
    """Weight of the loss of each modality alone, through a decoder that all of them share; 0 builds no such decoder."""
