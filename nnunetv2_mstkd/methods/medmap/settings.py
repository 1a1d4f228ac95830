"""Settings of MedMAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from nnunetv2_mstkd.training.settings import Range, Section, Share, Weight


@dataclass(frozen=True, kw_only=True)
class MedMAPSettings(Section):
    """The aligning front of MedMAP and its loss."""

    NAME: ClassVar[str] = "medmap"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = ("placement", "features", "width", "stages", "anchor")

    placement: Literal["stem", "encoders"] = "stem"
    """``stem``: grouped convolutions in front of the plans' network; ``encoders``: one encoder per modality, fused at
    every stage, in front of the plans' decoder."""
    features: Annotated[int, Range(1, 64)] | None = None
    """Channels per modality of the stem; null: half of the planned finest width for all modalities, 1 ... 4 each."""
    width: Share = 0.5
    """Channels of a one-modality encoder over the planned ones."""
    stages: Literal["ends", "all"] = "ends"
    """Stages that are aligned and imputed with one encoder per modality: ``ends`` (the first and the bottleneck) or
    ``all``. At the others an absent modality is zero."""
    anchor: Literal["leave_one_out", "star", "fixed", "gaussian", "normal"] = "leave_one_out"
    """``leave_one_out``: for each modality a convex mixture whose weights learn to predict it from the others;
    ``star``: one mixture for all, the released form, in effect the mean; ``fixed``: one modality; ``gaussian``: a
    learned Gaussian per channel; ``normal``: the standard normal distribution. Absent modalities are imputed from the
    weighted mean of the available ones in any case."""
    fixed_channel: Annotated[int, Range(0)] | None = None
    """Channel number of the modality that is the anchor; with anchor ``fixed`` only."""
    weight: Weight = 0.1
    """Weight of the alignment loss. No value is published; this one is ours."""
    normalize: bool = True
    """Standardise features over space before they are compared (not ``gaussian`` and ``normal``), so that they cannot
    align by shrinking."""
    detach_anchor: bool = False
    """No gradient to the features of the anchor (not ``gaussian`` and ``normal``); its weights still get one."""

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
