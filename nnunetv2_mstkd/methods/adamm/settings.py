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
    """AdaMM's parts and the weights of its terms. A part that is off, or a term of weight 0, costs nothing."""

    NAME: ClassVar[str] = "adamm"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = (
        "adapters", "bank", "subsets", "reduction", "refinement", "nodes", "presence",
    )  # fmt: skip

    adapters: bool = True
    """Adapters that depend on the subset, after each encoder stage but the first and each decoder stage."""
    bank: Literal["auto", "full", "factorised"] = "auto"
    """``full``: adapters for every subset; ``factorised``: composed of one per modality; ``auto``: full for up to 5
    modalities unless ``subsets`` names some."""
    subsets: tuple[str, ...] = ()
    """With a factorised bank: subsets such as ``"T1ce+FLAIR"`` that get adapters of their own. They are stored by
    channel number, ``"#0+#3"``, which may be given too."""
    reduction: Annotated[int, Range(1, 64)] = 4
    """Width of a stage over the hidden width of its adapters, which is at least 8."""
    refinement: Literal["graph", "dense", "off"] = "graph"
    """Refinement of the features on the distillation stage (GARM): ``graph``, ``dense`` (fusion without a graph) or
    ``off``."""
    nodes: Annotated[int, Range(2, 256)] = 8
    """Nodes of each of the two graphs."""
    presence: bool = True
    """A head that says which labels or regions a patch has any voxel of (LGRM)."""
    consistency: Weight = 0.5
    """Weight of the difference of foreground probabilities (BBDM). ``ramp``, ``fade`` and ``where`` of the section
    ``distillation`` hold here too."""
    content: Weight = 0.1
    """Weight of the difference of the features of the distillation stage (BBDM)."""
    style: Weight = 0.1
    """Weight of cross-correlation style matching (BBDM), the function that MST-KDNet's ``style`` uses."""
    adversarial: Weight = 0.0
    """Weight of the adversarial style term (BBDM); 0 builds no discriminator."""
    presence_weight: Weight = 0.1
    """Weight of the cross-entropy of the presence head, above 0; ``presence = false`` builds no head."""
    reliability: Weight = 0.5
    """How much a wrong presence adds to the weight of the Dice loss at full resolution; 0: nothing."""
    gate: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Probability of presence below which ``mstkd predict`` and ``mstkd evaluate`` delete a label or region from a
    whole case; 0: never. A wrong gate costs the whole of it."""

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
    """What AdaMM's teacher has beyond the plans' network: its own LGRM, as in the released code."""

    NAME: ClassVar[str] = "adamm_teacher"
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = ("presence",)

    presence: bool = False
    """A presence head in the teacher too, with the two terms below. The student's head then starts from it."""
    presence_weight: Weight = 0.1
    """Weight of the cross-entropy of the teacher's presence head, above 0."""
    reliability: Weight = 0.5
    """How much a wrong presence adds to the weight of the teacher's Dice loss at full resolution; 0: nothing."""

    def check(self) -> None:
        self.require(self.presence_weight > 0, "presence_weight", "a number above 0; presence = false builds no head")
