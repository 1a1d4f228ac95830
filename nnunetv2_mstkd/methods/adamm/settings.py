"""Settings of AdaMM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.training.settings import Range, Section, Weight

TERMS = ("consistency", "content", "style", "adversarial", "presence", "reliability")
"""Terms of AdaMM: the first four compare with the teacher (BBDM), the others read the student alone (LGRM)."""


@dataclass(frozen=True, kw_only=True)
class AdaMMSettings(Section):
    """AdaMM's parts and the weights of its terms. Parts that are off and terms of weight 0 cost nothing."""

    NAME: ClassVar[str] = "adamm"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = (
        "adapters", "bank", "subsets", "reduction", "refinement", "nodes", "presence",
    )  # fmt: skip

    adapters: bool = True
    """Use adapters that depend on the subset, after every decoder stage and every encoder stage but the first."""
    bank: Literal["auto", "full", "factorised"] = "auto"
    """``full``: every subset has its own adapters; ``factorised``: each adapter is composed of a small one
    per modality; ``auto``: full for up to 5 modalities, unless ``subsets`` names some."""
    subsets: tuple[str, ...] = ()
    """With a factorised bank: subsets such as ``"T1ce+FLAIR"`` that get their own adapters. They are stored by channel
    number (``"#0+#3"``), which is accepted too."""
    reduction: Annotated[int, Range(1, 64)] = 4
    """Ratio of the width of a stage to the hidden width of its adapters, which is at least 8."""
    refinement: Literal["graph", "dense", "off"] = "graph"
    """Refinement of the features at the distillation stage (GARM): ``graph``, ``dense`` (fusion without a graph) or
    ``off``."""
    nodes: Annotated[int, Range(2, 256)] = 8
    """Number of nodes of each of the two graphs."""
    presence: bool = True
    """Use a head that predicts which labels or regions are present in a patch (LGRM)."""
    consistency: Weight = 0.5
    """Weight of the difference of foreground probabilities (BBDM). ``ramp``, ``fade`` and ``where`` of the section
    ``distillation`` apply to it too."""
    content: Weight = 0.1
    """Weight of the difference of features at the distillation stage (BBDM)."""
    style: Weight = 0.1
    """Weight of cross-correlation style matching (BBDM), the same function as MST-KDNet's ``style``."""
    adversarial: Weight = 0.0
    """Weight of the adversarial style term (BBDM); with 0 there is no discriminator."""
    presence_weight: Weight = 0.1
    """Weight of the cross-entropy of the presence head, above 0; for no head, use ``presence = false``."""
    reliability: Weight = 0.5
    """How much an error of the presence head adds to the weight of the Dice loss at full resolution."""
    gate: Annotated[float, Range(0, 1, below=True)] = 0.0
    """``mstkd predict`` and ``mstkd evaluate`` delete a label or region from a whole case if its presence probability
    is below this; 0: never. An error deletes the whole label or region."""

    def check(self) -> None:
        none = "none with bank 'full', in which every subset has its own adapters"
        self.require(not (self.subsets and self.bank == "full"), "subsets", none)
        self.require(self.presence_weight > 0, "presence_weight", "a number above 0; presence = false builds no head")
        self.require(self.presence or self.gate == 0, "gate", "0 without the presence head (presence = false)")

    def channel_numbers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return ``subsets`` with channel numbers for names, ``"#0+#3"``; InputError for an unknown or repeated one."""
        numbers = [f"#{channel}" for channel in range(len(names))]
        rows = [modalities.parse_subset(text, numbers if text.startswith("#") else names) for text in self.subsets]
        texts = tuple(modalities.subset_name(row, numbers) for row in rows)
        if texts:
            modalities.parse_subsets(texts, numbers)  # refuses the same one twice
        return texts


@dataclass(frozen=True, kw_only=True)
class AdaMMTeacherSettings(Section):
    """What AdaMM's teacher has in addition to the plans' network: its own LGRM, as in the released code."""

    NAME: ClassVar[str] = "adamm_teacher"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = ("presence",)

    presence: bool = False
    """Use a presence head in the teacher too, with the two terms below. The student's head then starts from it."""
    presence_weight: Weight = 0.1
    """Weight of the cross-entropy of the teacher's presence head, above 0."""
    reliability: Weight = 0.5
    """How much an error of the teacher's presence head adds to the weight of its Dice loss at full resolution."""

    def check(self) -> None:
        self.require(self.presence_weight > 0, "presence_weight", "a number above 0; presence = false builds no head")
