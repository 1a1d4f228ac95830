"""Settings of MedMAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from nnunetv2_mstkd.training.settings import Range, Section, Share, Weight


@dataclass(frozen=True, kw_only=True)
class MedMAPSettings(Section):
    """MedMAP's front end, which aligns the features of the modalities, and its loss."""

    NAME: ClassVar[str] = "medmap"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = ("placement", "features", "width", "stages", "anchor")

    placement: Literal["stem", "encoders"] = "stem"
    """``stem``: grouped convolutions in front of the plans' network; ``encoders``: one encoder per modality, fused at
    every stage, in front of the plans' decoder."""
    features: Annotated[int, Range(1, 64)] | None = None
    """Channels of the stem for each modality; null: 4, fewer where there are more than eight modalities. With one
    channel per modality, the non-linearities lose much of the image."""
    width: Share = 0.5
    """Width of a one-modality encoder relative to the planned one."""
    stages: Literal["ends", "all"] = "ends"
    """With one encoder per modality, the stages that are aligned and imputed: ``ends`` (the first and the bottleneck)
    or ``all``. At other stages an absent modality is zero."""
    anchor: Literal["leave_one_out", "star", "fixed", "gaussian", "normal"] = "leave_one_out"
    """``leave_one_out``: for each modality a convex mixture whose weights learn to predict it from the others;
    ``star``: the released form, one mixture for all, which is in effect the mean; ``fixed``: one modality;
    ``gaussian``: a learned Gaussian per channel; ``normal``: the standard normal distribution. Absent modalities are
    always imputed from the weighted mean of the available ones."""
    fixed_channel: Annotated[int, Range(0)] | None = None
    """With anchor ``fixed`` only: channel number of the modality that is the anchor."""
    weight: Weight = 0.1
    """Weight of the alignment loss. The paper's value is not known; this one is ours."""
    normalize: bool = True
    """Standardise features over space before they are compared (not with ``gaussian`` and ``normal``), so that they
    cannot align by shrinking."""
    detach_anchor: bool = False
    """Stop the gradient to the features of the anchor (not with ``gaussian`` and ``normal``); its weights still get
    one."""

    def check(self) -> None:
        self.require(
            (self.anchor == "fixed") == (self.fixed_channel is not None),
            "fixed_channel",
            'a channel number with anchor "fixed" and null with any other',
        )
        self.require(
            self.weight > 0 or self.anchor != "gaussian",
            "weight",
            'a weight above 0 with anchor "gaussian", whose parameters only the alignment trains',
        )
