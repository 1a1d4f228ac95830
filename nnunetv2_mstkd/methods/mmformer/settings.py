"""Settings of mmFormer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from nnunetv2_mstkd.training.settings import Count, Range, Section, Share, Weight


@dataclass(frozen=True, kw_only=True)
class MMFormerSettings(Section):
    """mmFormer's encoders, its transformers at the bottleneck, and the single-modality loss."""

    NAME: ClassVar[str] = "mmformer"

    width: Share = 0.5
    """Width of a one-modality encoder relative to the planned one."""
    depth: Count = 1
    """Number of blocks in each modality's own transformer, and also in the transformer over all modalities."""
    mlp_ratio: Annotated[float, Range(0, 16, above=True)] = 8.0
    """Ratio of the width of a block's hidden layer to the token width, which is the planned width of the bottleneck."""
    separate: Weight = 1.0
    """Weight of the loss of each modality alone, through a decoder that all modalities share; with 0 there is no such
    decoder."""
