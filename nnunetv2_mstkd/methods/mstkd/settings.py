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
    """The multi-scale transformer between the plans' encoder and decoder. Null: derived from the plans.

    A checkpoint depends on every one of these; the resolved numbers are stored with the model.
    """

    NAME: ClassVar[str] = "network"

    placement: Literal["branch", "main"] = "branch"
    """How the transformer joins the U-Net: ``branch``, zero-initialised additions to the skip connections, or ``main``,
    as published: a convolution of both, so that the decoder starts from the transformer too."""
    depth: Count | None = None
    """Transformer blocks, a multiple of ``taps``. Null: 12, fewer where they would cost too much."""
    heads: Count | None = None
    """Attention heads; null: heads of 32 ... 64 channels."""
    taps: Annotated[int, Range(2)] | None = None
    """Blocks whose hidden state is used, at equal distances; null: 4, fewer where the U-Net has fewer stages."""
    patch: tuple[Count, ...] | None = None
    """Edges of the patches of bottleneck positions that make one token; null: smallest that gives ``max_tokens``."""
    max_tokens: Annotated[int, Range(8)] = 1024
    """Largest number of tokens; attention maps, and with them the memory of ``evd``, grow with its square."""
    mlp_ratio: Annotated[float, Range(0, 16, above=True)] = 4.0
    """Width of a block's hidden layer over the token width."""

    def check(self) -> None:
        if self.depth is not None and self.taps is not None:
            self.require(self.depth % self.taps == 0, "depth", f"a multiple of taps ({self.taps})")


@dataclass(frozen=True, kw_only=True)
class MSTKDSettings(Section):
    """Weights and form of the distillation terms. A term of weight 0 costs nothing."""

    NAME: ClassVar[str] = "mstkd"

    recipe: Literal["default", "paper"] = "default"
    """Preset of many keys: ``default``, or ``paper``: MST-KDNet as published, and as released where the paper is
    silent; it sets ``mstkd``, ``network.placement``, ``teacher.joint``, ``distillation``, ``schedule`` and ``sampler``
    (see the method card). Keys given beside it win."""
    evd: Weight = 0.1
    """Weight of extreme value distillation of the attention maps (MS-TKD, eq. 2-4)."""
    maps: Weight = 0.1
    """Weight of multi-scale map matching (MS-TKD, eq. 4)."""
    discrepancy: Weight = 0.2
    """Weight of the squared difference of logits; as published, of probabilities (DMLD, eq. 5)."""
    kl: Weight = 0.5
    """Weight of the standardised-logit KL divergence (DMLD, eq. 6-8)."""
    style: Weight = 0.1
    """Weight of cross-correlation style matching (GSME, eq. 10-11)."""
    adversarial: Weight = 0.005
    """Weight of the adversarial term (GSME, eq. 9); 0 builds no discriminator."""
    content: Weight = 0.0
    """Weight of the difference of what the decoders start from (released code)."""
    form: Literal["relative", "published"] = "relative"
    """Formulas of the terms: ``relative`` to the size of what they compare (this package's), or ``published``, plain
    squared errors. A weight has another meaning in each."""
    tau: Positive = 2.0
    """Temperature of the KL divergence."""
    regions: Literal["coupled", "separate"] = "coupled"
    """KL divergence of overlapping regions, relative form: ``coupled``, of one vector of all regions and background,
    or ``separate``, of each region's two outcomes."""
    segmentation: Literal["nnunet", "dice"] = "nnunet"
    """Segmentation loss: ``nnunet``, Dice and cross-entropy with deep supervision, or ``dice``, as published, Dice
    alone at full resolution."""
    style_encoder: Literal["stage", "paper"] = "stage"
    """Encoder feature of GSME: ``stage`` output on the style grid, or ``paper``: max-pooled from the stage above."""

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
    """What each recipe implies, by section."""

    @classmethod
    def forget(cls, block: dict[str, dict[str, Any]], key: str) -> None:
        if key == "recipe":
            for preset in cls.PRESETS.values():
                for name, values in preset.items():
                    for implied in values:
                        block.get(name, {}).pop(implied, None)

    @classmethod
    def imply(cls, block: dict[str, dict[str, Any]]) -> None:
        recipe = block.get(cls.NAME, {}).get("recipe")
        if not isinstance(recipe, str) or ("form" not in block[cls.NAME] and _RELATIVE_PAPER.issubset(block[cls.NAME])):
            return
        for name, values in cls.PRESETS.get(recipe, {}).items():
            block[name] = {**values, **block.get(name, {})}
