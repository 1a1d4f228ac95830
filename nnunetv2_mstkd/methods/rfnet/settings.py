"""Settings of RFNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nnunetv2_mstkd.training.settings import Section, Share, Weight


@dataclass(frozen=True, kw_only=True)
class RFNetSettings(Section):
    """RFNet's encoders and region-aware fusion, and its losses in addition to the segmentation loss."""

    NAME: ClassVar[str] = "rfnet"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = ("width", "activation", "separate")

    width: Share = 0.5
    """Width of a one-modality encoder relative to the planned one."""
    activation: Literal["auto", "softmax", "sigmoid"] = "auto"
    """How logits become the probability maps that divide the features into regions; ``auto``: ``softmax`` for labels,
    ``sigmoid`` for overlapping regions."""
    maps: Weight = 1.0
    """Weight of the loss of the probability maps of all stages, at full resolution; above 0, because the maps learn
    from nothing else."""
    separate: Weight = 1.0
    """Weight of the loss of each modality alone, through a decoder that all modalities share; with 0 there is no such
    decoder."""

    def check(self) -> None:
        self.require(self.maps > 0, "maps", "a number above 0: the maps learn from nothing else")
