"""Settings of MST-KDNet: its network and its terms."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from nnunetv2_mstkd.training.settings import Count, Positive, Range, Section, Weight

TERMS = ("evd", "maps", "discrepancy", "kl", "style", "adversarial")
"""Distillation terms: EVD and multi-scale maps (MS-TKD), logit discrepancy and standardised KL (DMLD), style matching
and adversarial term (GSME)."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Section):
    """The multi-scale transformer between the plans' encoder and decoder. Null: derived from the plans.

    A checkpoint depends on every one of these; the resolved numbers are stored with the model.
    """

    NAME: ClassVar[str] = "network"

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
    """Preset of the keys below: ``default``, or ``paper``: the released weights of MST-KDNet as far as they carry over
    to scale-free terms, and Adam for all parameters unless ``schedule.optimizer`` says otherwise. Keys given beside it
    win."""
    evd: Weight = 0.1
    """Weight of extreme value distillation of the attention maps (MS-TKD, eq. 2-4)."""
    maps: Weight = 0.1
    """Weight of multi-scale map matching (MS-TKD, eq. 4)."""
    discrepancy: Weight = 0.2
    """Weight of the squared logit difference (DMLD, eq. 5)."""
    kl: Weight = 0.5
    """Weight of the standardised-logit KL divergence (DMLD, eq. 6-8)."""
    style: Weight = 0.1
    """Weight of cross-correlation style matching (GSME, eq. 10-11)."""
    adversarial: Weight = 0.005
    """Weight of the adversarial term (GSME, eq. 9); 0 builds no discriminator."""
    tau: Positive = 2.0
    """Temperature of the KL divergence."""
    style_encoder: Literal["stage", "paper"] = "stage"
    """Encoder feature of GSME: ``stage`` output on the style grid, or ``paper``: max-pooled from the stage above."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = types.MappingProxyType(
        {
            "paper": {
                "mstkd": {
                    "evd": 1.0, "maps": 0.2, "discrepancy": 10.0, "kl": 1.0, "style": 1.0, "adversarial": 2e-4,
                },
                "distillation": {"where": "everywhere", "fade": 0.0},
                "schedule": {"optimizer": "adam"},
            }
        }
    )  # fmt: skip
    """What each recipe implies, by section."""

    @classmethod
    def forget(cls, block: dict[str, dict[str, Any]], key: str) -> None:
        if key == "recipe":
            block.pop(cls.NAME, None)
            block.pop("distillation", None)
            block.get("schedule", {}).pop("optimizer", None)

    @classmethod
    def imply(cls, block: dict[str, dict[str, Any]]) -> None:
        recipe = block.get(cls.NAME, {}).get("recipe")
        for name, values in (cls.PRESETS.get(recipe, {}) if isinstance(recipe, str) else {}).items():
            block[name] = {**values, **block.get(name, {})}
