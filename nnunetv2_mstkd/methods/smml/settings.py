"""Settings of SMML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from nnunetv2_mstkd.training.settings import Fraction, Positive, Range, Section, Share, Weight


@dataclass(frozen=True, kw_only=True)
class SMMLSettings(Section):
    """The two students of SMML, and what they learn from each other and from a semantic prior."""

    NAME: ClassVar[str] = "smml"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = ("light", "width")

    light: bool = True
    """Each student is the plans' network on zeroed channels; false: each student has one encoder per modality. Students
    that are mmFormers or RFNets always do."""
    width: Share = 0.5
    """Without ``light``: width of a one-modality encoder relative to the planned one. For mmFormer and RFNet, their own
    sections set it."""
    pixel: Weight = 0.1
    """Weight of the pixel-level constraint, the divergence from the other student at voxels where that one is more
    reliable. The released code has 1, but for an unknown formula; with 1, this package's outweighs the segmentation
    loss."""
    feature: Weight = 1.0
    """Weight of the feature-level constraint: relations between positions, and to class prototypes, at the
    bottleneck."""
    guidance: Weight = 1.0
    """Weight of the divergence from the refinement network's output; no effect without a prior."""
    warmup: Fraction = 0.1
    """Fraction of the training before ``pixel`` and ``guidance`` begin."""
    tau: Positive = 1.0
    """Temperature of the pixel-level divergence."""
    require_correct: bool = False
    """Also require that the more reliable student is right at the voxel."""
    balanced: bool = True
    """Average the pixel-level divergence within each class first, so that a small class counts as much as the
    background."""
    prior: Literal["none", "self", "precomputed", "checkpoint"] = "none"
    """Semantic prior of the refinement networks: ``none`` (no refinement); ``self``: the prediction of a moving average
    of the first student from one modality; ``precomputed``: label or probability maps of each modality; ``checkpoint``:
    a TorchScript network. A trained model predicts without the prior."""
    prior_path: str | None = None
    """For ``precomputed``: a folder, absolute or relative to the raw data set, of label maps CASE_000k named like the
    images, or of CASE_000k.npz with ``probabilities`` of each label or region as nnU-Net saves them. For
    ``checkpoint``: a file with a network from one modality (B, 1, ...) to logits (B, heads, ...)."""
    ema: Annotated[float, Range(0, 1, below=True)] = 0.999
    """For ``self``: how much of the moving average is kept in each step."""
    refinement_width: Share = 0.5
    """Width of the refinement networks relative to the planned one; they have at most four stages."""
    sequential: bool = False
    """Run the backward pass of one student before the forward pass of the other: needs less memory and one more forward
    pass. One GPU only."""

    def check(self) -> None:
        self.require(
            bool(self.prior_path) == (self.prior in ("precomputed", "checkpoint")),
            "prior_path",
            'a path with prior "precomputed" or "checkpoint" and null with any other',
        )
