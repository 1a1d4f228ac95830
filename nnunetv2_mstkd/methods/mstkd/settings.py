"""Settings of MST-KDNet: its network and its terms."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from nnunetv2_mstkd.training.settings import Count, Positive, Range, Section, Weight

TERMS = ("evd", "maps", "discrepancy", "kl", "style", "adversarial")
"""The paper's distillation terms: EVD and multi-scale maps (MS-TKD), logit discrepancy and standardised KL (DMLD),
style matching and adversarial term (GSME)."""


STYLE = 1e-5
"""Weight of the published form of ``style``, which the paper does not print and the released code does not use: with it
the term pulled a tenth as hard as the segmentation loss, half-way through a training on the phantom."""

_RELATIVE_PAPER = {*TERMS, "tau", "style_encoder"}
"""Keys that earlier versions stored beside ``recipe = "paper"``, which was this package's terms with other weights."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Section):
    """The multi-scale transformer between the plans' encoder and decoder. Null values are derived from the plans.

    A checkpoint depends on every one of these; the resolved numbers are stored with the model.
    """

    NAME: ClassVar[str] = "network"

    placement: Literal["branch", "main"] = "branch"
    """How the transformer joins the U-Net: ``branch``: its zero-initialised projections are added to the skip
    connections; ``main``, as published: a convolution combines both, so that the decoder also starts from the
    transformer."""
    depth: Count | None = None
    """Number of transformer blocks, a multiple of ``taps``; null: 12, or fewer where they would cost too much."""
    heads: Count | None = None
    """Attention heads; null: as many as give heads of 32 to 64 channels."""
    taps: Annotated[int, Range(2)] | None = None
    """Number of blocks, equally spaced, whose hidden states are used; null: 4, or fewer if the U-Net has fewer
    stages."""
    patch: tuple[Count, ...] | None = None
    """Size of the patches of bottleneck positions that form one token; null: the smallest that gives at most
    ``max_tokens``."""
    max_tokens: Annotated[int, Range(8)] = 1024
    """Largest number of tokens; the size of the attention maps, and with them the memory of ``evd``, grows with its
    square."""
    mlp_ratio: Annotated[float, Range(0, 16, above=True)] = 4.0
    """Ratio of the width of a block's hidden layer to the token width."""

    def check(self) -> None:
        if self.depth is not None and self.taps is not None:
            self.require(self.depth % self.taps == 0, "depth", f"a multiple of taps ({self.taps})")


@dataclass(frozen=True, kw_only=True)
class MSTKDSettings(Section):
    """Weights and form of the distillation terms. Terms of weight 0 cost nothing."""

    NAME: ClassVar[str] = "mstkd"

    recipe: Literal["default", "paper"] = "default"
    """``default``, or ``paper``, a preset: MST-KDNet as published, and as released where the paper is silent. It sets
    ``mstkd``, ``network.placement``, ``teacher.joint``, ``distillation``, ``schedule`` and ``sampler`` (see the method
    card). Keys that are given in addition take precedence."""
    evd: Weight = 0.1
    """Weight of extreme value distillation of the attention maps (MS-TKD, eq. 2-4)."""
    maps: Weight = 0.1
    """Weight of multi-scale map matching (MS-TKD, eq. 4)."""
    discrepancy: Weight = 0.2
    """Weight of the squared difference of logits or, in the published form, of probabilities (DMLD, eq. 5)."""
    kl: Weight = 0.5
    """Weight of the standardised-logit KL divergence (DMLD, eq. 6-8)."""
    style: Weight = 0.1
    """Weight of cross-correlation style matching (GSME, eq. 10-11)."""
    adversarial: Weight = 0.005
    """Weight of the adversarial term (GSME, eq. 9); with 0 there is no discriminator."""
    content: Weight = 0.0
    """Weight of the difference of the features that the decoders start from (released code)."""
    form: Literal["relative", "published"] = "relative"
    """Formulas of the terms: ``relative``, divided by the scale of what they compare (this package's), or
    ``published``, plain squared errors. The weights of the two forms cannot be compared."""
    tau: Positive = 2.0
    """Temperature of the KL divergence."""
    regions: Literal["coupled", "separate"] = "coupled"
    """KL divergence of overlapping regions, in the relative form: ``coupled``, of one vector of all regions and the
    background, or ``separate``, of the two outcomes of each region."""
    segmentation: Literal["nnunet", "dice"] = "nnunet"
    """Segmentation loss: ``nnunet`` (Dice and cross-entropy with deep supervision) or, as published, ``dice`` (Dice
    alone at full resolution)."""
    style_encoder: Literal["stage", "paper"] = "stage"
    """Encoder features of GSME: ``stage``, the output on the style grid, or ``paper``, max-pooled from the stage
    above."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = types.MappingProxyType(
        {
            "paper": {
                "mstkd": {
                    "form": "published", "evd": 1e8, "maps": 0.2, "discrepancy": 10.0, "kl": 1.0, "style": STYLE,
                    "adversarial": 2e-4, "content": 0.2, "tau": 7.0, "style_encoder": "paper", "segmentation": "dice",
                },
                "network": {"placement": "main"},
                "distillation": {"where": "everywhere", "ramp": 0.2, "fade": 0.0},
                "teacher": {"joint": True, "joint_weight": 0.4, "warm_start": False},
                "schedule": {"optimizer": "adam", "weight_decay": 1e-5},
                "sampler": {"per_batch": True},
            }
        }
    )  # fmt: skip

    @classmethod
    def implied(cls, block: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        own = block.get(cls.NAME, {})
        return {} if "form" not in own and _RELATIVE_PAPER.issubset(own) else super().implied(block)
