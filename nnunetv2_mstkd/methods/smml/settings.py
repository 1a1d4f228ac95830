"""Settings of SMML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from nnunetv2_mstkd.training.settings import Fraction, Positive, Range, Section, Share, Weight


@dataclass(frozen=True, kw_only=True)
class SMMLSettings(Section):
    """The two students of SMML, what they learn from one another and from a semantic prior."""

    NAME: ClassVar[str] = "smml"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = ("light", "width")

    light: bool = True
    """Students that are the plans' network on zeroed channels; false: one encoder per modality in each student, which
    students that are mmFormers or RFNets always have."""
    width: Share = 0.5
    """Without ``light``: channels of a one-modality encoder over the planned ones. mmFormer and RFNet have their
    own."""
    pixel: Weight = 0.1
    """Weight of the pixel-level constraint: divergence from the other student at voxels where it is more reliable. The
    released code has 1, for a form of it that is not known; at 1 this one outweighs the segmentation loss."""
    feature: Weight = 1.0
    """Weight of the feature-level constraint: relations between positions and to class prototypes at the bottleneck."""
    guidance: Weight = 1.0
    """Weight of the divergence from the refinement network's output; no effect without a prior."""
    warmup: Fraction = 0.1
    """Fraction of the training before ``pixel`` and ``guidance`` begin."""
    tau: Positive = 1.0
    """Temperature of the pixel-level divergence."""
    require_correct: bool = False
    """Also ask that the more reliable student is right at the voxel."""
    balanced: bool = True
    """Mean of the pixel-level divergence over classes first, so that a small one counts as much as the background."""
    prior: Literal["none", "self", "precomputed", "checkpoint"] = "none"
    """Semantic prior of the refinement networks: ``none`` (no refinement); ``self``: what a moving average of the first
    student says from one modality; ``precomputed``: label or probability maps of each modality;
    ``checkpoint``: a TorchScript network. A trained model predicts without it."""
    prior_path: str | None = None
    """For ``precomputed``: folder of label maps CASE_000k, named as the images are, or of CASE_000k.npz with
    ``probabilities`` of each label or region, as nnU-Net saves them; absolute or below the raw data set;
    for ``checkpoint``: a file with a network from one modality (B, 1, ...) to logits (B, heads, ...)."""
    ema: Annotated[float, Range(0, 1, below=True)] = 0.999
    """For ``self``: how much of the moving average stays in each step."""
    refinement_width: Share = 0.5
    """Channels of the refinement networks over the planned ones; they have at most four stages."""
    sequential: bool = False
    """Backward pass of one student before the other's forward pass: less memory, one forward pass more. One GPU."""

    def check(self) -> None:
        self.require(
            bool(self.prior_path) == (self.prior in ("precomputed", "checkpoint")),
            "prior_path",
            'a path with prior "precomputed" or "checkpoint" and null with any other',
        )
