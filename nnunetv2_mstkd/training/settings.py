"""The ``"mstkd"`` block of a plans configuration: frozen dataclasses, validated.

``plans["configurations"][name]["mstkd"]`` holds one section per dataclass below. Every key has a default, so that a
plans file without the block trains with the defaults. Unknown keys and impossible values are refused by name. Write a
block with ``mstkd configure``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError

BLOCK = "mstkd"
"""Key of our settings in a plans configuration and in a checkpoint."""


class SettingsError(InputError):
    """A setting that is unknown or impossible. The message names it, the allowed ones and what was found."""


def _require(condition: bool, where: str, found: Any, expected: str) -> None:
    if not condition:
        raise SettingsError(f"setting {where} is {found!r}, expected {expected}")


def _one_of(where: str, found: str, allowed: Sequence[str]) -> None:
    _require(found in allowed, where, found, "one of " + ", ".join(allowed))


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Which subsets a student sees in training; see :class:`nnunetv2_mstkd.modalities.SubsetSampler`."""

    kind: str = "uniform"
    """``uniform``, ``by_size``, ``fixed`` (``subsets`` equally often) or ``weighted`` (``weights`` by subset name)."""
    subsets: tuple[str, ...] = ()
    """For ``fixed``: names such as ``"T1ce+FLAIR"``."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """For ``weighted``: subset name to positive weight; subsets that are not named are never drawn."""

    def __post_init__(self) -> None:
        _one_of("sampler.kind", self.kind, modalities.SubsetSampler.KINDS)
        _require(
            (self.kind == "fixed") == bool(self.subsets),
            "sampler.subsets",
            list(self.subsets),
            'a list of subsets with kind "fixed" and none with any other kind',
        )
        _require(
            (self.kind == "weighted") == bool(self.weights),
            "sampler.weights",
            dict(self.weights),
            'a table of subset: weight with kind "weighted" and none with any other kind',
        )

    def build(self, names: Sequence[str]) -> modalities.SubsetSampler:
        """The sampler for modalities of these names; ValueError names an unknown modality or a bad weight."""
        chosen = self.subsets if self.kind == "fixed" else tuple(self.weights)
        rows = modalities.parse_subsets(chosen, names).tolist() if chosen else []
        return modalities.SubsetSampler(
            num_modalities=len(names),
            kind=self.kind,
            subsets=tuple(map(tuple, rows)),
            weights=tuple(float(self.weights[name]) for name in self.weights),
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Length, optimiser and start of a training. The defaults are nnU-Net's."""

    epochs: int = 1000
    """Of a student, or of a trainer without a teacher; see also ``teacher.epochs``."""
    iterations: int = 250
    """Training steps per epoch."""
    validation_iterations: int = 50
    """Online validation steps per epoch; raised where fewer would not go through all validation subsets."""
    save_every: int | None = None
    """Epochs between two ``checkpoint_latest.pth``; null: min(50, max(1, epochs // 20))."""
    seed: int | None = None
    """Reseeds everything at each epoch's start from (seed, fold, epoch, rank); exact with nnUNet_n_proc_DA=0."""
    optimizer: str = "sgd"
    """Of the U-Net's parameters: ``sgd`` (nnU-Net's: Nesterov 0.99), ``adamw`` or ``adam`` (0.9, 0.99)."""
    initial_lr: float | None = None
    """Null: 1e-2 for sgd (nnU-Net), 1e-3 for adamw, 1e-4 for adam (MST-KDNet)."""
    transformer_lr: float = 3e-4
    """AdamW rate of what a network has beyond the plans' U-Net: transformer and pyramids, adapters and graph."""
    init_from: str | None = None
    """Weights to start from: the name of a trainer whose final checkpoint of the same configuration and fold is taken
    (that trainer itself starts at random), or a checkpoint file (absolute or below nnUNet_results; it is of one fold,
    whose training cases another fold validates on). Matching tensors are loaded, the rest is listed."""

    LEARNING_RATES = types.MappingProxyType({"sgd": 1e-2, "adamw": 1e-3, "adam": 1e-4})

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations", "validation_iterations"):
            _require(getattr(self, name) >= 1, f"schedule.{name}", getattr(self, name), "a whole number of at least 1")
        _require(
            self.save_every is None or self.save_every >= 1, "schedule.save_every", self.save_every, "null or >= 1"
        )
        _require(self.seed is None or 0 <= self.seed < 2**31, "schedule.seed", self.seed, "null or 0 ... 2^31 - 1")
        _one_of("schedule.optimizer", self.optimizer, tuple(self.LEARNING_RATES))
        for name in ("initial_lr", "transformer_lr"):
            rate = getattr(self, name)
            _require(rate is None or 0 < rate <= 1, f"schedule.{name}", rate, "a rate above 0 and at most 1")

    @property
    def learning_rate(self) -> float:
        return self.LEARNING_RATES[self.optimizer] if self.initial_lr is None else self.initial_lr

    def checkpoint_interval(self, epochs: int) -> int:
        """Epochs between two checkpoints, so that at most 5 % (or 50 epochs) of a training can be lost."""
        return self.save_every if self.save_every is not None else min(50, max(1, epochs // 20))


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The multi-scale transformer between the plans' encoder and decoder. Null: derived from the plans.

    A checkpoint depends on every one of these; the resolved numbers are stored with the model.
    """

    depth: int | None = None
    """Transformer blocks, a multiple of ``taps``. Null: 12, fewer where they would cost too much."""
    heads: int | None = None
    """Attention heads; null: heads of 32 ... 64 channels."""
    taps: int | None = None
    """Blocks whose hidden state is used, at equal distances; null: 4, fewer where the U-Net has fewer stages."""
    patch: tuple[int, ...] | None = None
    """Edges of the patches of bottleneck positions that make one token; null: smallest that gives ``max_tokens``."""
    max_tokens: int = 1024
    """Largest number of tokens; attention maps, and with them the memory of ``evd``, grow with its square."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer over the token width."""

    def __post_init__(self) -> None:
        for name in ("depth", "heads", "taps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"network.{name}", value, "null or a whole number of at least 1")
        _require(self.taps is None or self.taps >= 2, "network.taps", self.taps, "null or at least 2")
        if self.depth is not None and self.taps is not None:
            _require(self.depth % self.taps == 0, "network.depth", self.depth, f"a multiple of taps ({self.taps})")
        _require(self.patch is None or all(edge >= 1 for edge in self.patch), "network.patch", self.patch, "edges >= 1")
        _require(self.max_tokens >= 8, "network.max_tokens", self.max_tokens, "at least 8")
        _require(0 < self.mlp_ratio <= 16, "network.mlp_ratio", self.mlp_ratio, "above 0 and at most 16")


TERMS = ("evd", "maps", "discrepancy", "kl", "style", "adversarial")
"""Distillation terms of MST-KDNet: EVD and multi-scale maps (MS-TKD), logit discrepancy and standardised KL (DMLD),
style matching and adversarial term (GSME)."""

RECIPES: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "default": types.MappingProxyType({}),
        "paper": types.MappingProxyType(
            {
                "evd": 1.0,
                "maps": 0.2,
                "discrepancy": 10.0,
                "kl": 1.0,
                "style": 1.0,
                "adversarial": 2e-4,
                "where": "everywhere",
                "fade": 0.0,
            }
        ),
    }
)
"""Named presets of the distillation section; a key given beside ``recipe`` wins over the preset."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """Weights and form of the distillation terms. A term of weight 0 costs nothing."""

    recipe: str = "default"
    """``default`` or ``paper``: the released weights of MST-KDNet as far as they carry over to scale-free terms, and
    Adam for all parameters unless ``schedule.optimizer`` says otherwise."""
    evd: float = 0.1
    """Weight of extreme value distillation of the attention maps (MS-TKD, eq. 2-4)."""
    maps: float = 0.1
    """Weight of multi-scale map matching (MS-TKD, eq. 4)."""
    discrepancy: float = 0.2
    """Weight of the squared logit difference (DMLD, eq. 5)."""
    kl: float = 0.5
    """Weight of the standardised-logit KL divergence (DMLD, eq. 6-8)."""
    style: float = 0.1
    """Weight of cross-correlation style matching (GSME, eq. 10-11)."""
    adversarial: float = 0.005
    """Weight of the adversarial term (GSME, eq. 9); 0 builds no discriminator."""
    tau: float = 2.0
    """Temperature of the KL divergence."""
    ramp: float = 0.1
    """Fraction of the training over which the weights rise as exp(-5 (1 - t)^2)."""
    fade: float = 0.5
    """Fraction of the training, at its end, over which the weights fall linearly to 0."""
    where: str = "teacher_better"
    """``everywhere``, or logit terms only at voxels where the teacher's cross-entropy is below the student's."""
    style_encoder: str = "stage"
    """Encoder feature of GSME: ``stage`` output on the style grid, or ``paper``: max-pooled from the stage above."""

    def __post_init__(self) -> None:
        _one_of("distillation.recipe", self.recipe, tuple(RECIPES))
        for name in TERMS:
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"distillation.{name}", value, "a finite weight of at least 0")
        _require(0 < self.tau < math.inf, "distillation.tau", self.tau, "a temperature above 0")
        for name in ("ramp", "fade"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"distillation.{name}", value, "a fraction from 0 to 1")
        _one_of("distillation.where", self.where, ("everywhere", "teacher_better"))
        _one_of("distillation.style_encoder", self.style_encoder, ("stage", "paper"))

    @property
    def weights(self) -> dict[str, float]:
        """The terms of weight above 0, in the order in which they are logged."""
        return {name: float(getattr(self, name)) for name in TERMS if getattr(self, name) > 0}


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Where the frozen teacher is and how it is used."""

    configuration: str | None = None
    """Configuration that the teacher was trained in; null: the first of the student's own and its parents."""
    epochs: int | None = None
    """Epochs of the teacher's own training; null: ``schedule.epochs``."""
    warm_start: bool = True
    """Start the student from the teacher's weights."""

    def __post_init__(self) -> None:
        _require(self.epochs is None or self.epochs >= 1, "teacher.epochs", self.epochs, "null or at least 1")


ADAMM_TERMS = ("consistency", "content", "style", "adversarial", "presence", "reliability")
"""Terms of AdaMM: the first four compare with the teacher (BBDM), the others are the student's own (LGRM)."""


@dataclass(frozen=True, kw_only=True)
class AdaMMSettings:
    """AdaMM's parts and the weights of its terms. A part that is off, or a term of weight 0, costs nothing."""

    adapters: bool = True
    """Adapters that depend on the subset, after each encoder stage but the first and each decoder stage."""
    bank: str = "auto"
    """``full``: adapters for every subset; ``factorised``: composed of one per modality; ``auto``: full for up to 5
    modalities unless ``subsets`` names some."""
    subsets: tuple[str, ...] = ()
    """With a factorised bank: subsets such as ``"T1ce+FLAIR"`` that get adapters of their own. They are stored by
    channel number, ``"#0+#3"``, which may be given too."""
    reduction: int = 4
    """Width of a stage over the hidden width of its adapters, which is at least 8."""
    refinement: str = "graph"
    """Of the features on the distillation stage (GARM): ``graph``, ``dense`` (fusion without a graph) or ``off``."""
    nodes: int = 8
    """Nodes of each of the two graphs."""
    presence: bool = True
    """A head that says which labels or regions a patch has any voxel of (LGRM)."""
    consistency: float = 0.5
    """Weight of the difference of foreground probabilities (BBDM). ``ramp``, ``fade`` and ``where`` of the section
    ``distillation`` hold here too."""
    content: float = 0.1
    """Weight of the difference of the features of the distillation stage (BBDM)."""
    style: float = 0.1
    """Weight of cross-correlation style matching (BBDM), the function that MST-KDNet's ``style`` uses."""
    adversarial: float = 0.0
    """Weight of the adversarial style term (BBDM); 0 builds no discriminator."""
    presence_weight: float = 0.1
    """Weight of the cross-entropy of the presence head."""
    reliability: float = 0.5
    """How much a wrong presence adds to the weight of the Dice loss at full resolution; 0: nothing."""
    gate: float = 0.0
    """Probability of presence below which ``mstkd predict`` and ``mstkd evaluate`` delete a label or region from a
    whole case; 0: never. A wrong gate costs the whole of it."""

    NETWORK_KEYS: typing.ClassVar[tuple[str, ...]] = (
        "adapters",
        "bank",
        "subsets",
        "reduction",
        "refinement",
        "nodes",
        "presence",
    )

    def __post_init__(self) -> None:
        _one_of("adamm.bank", self.bank, ("auto", "full", "factorised"))
        _require(
            not (self.subsets and self.bank == "full"),
            "adamm.subsets",
            list(self.subsets),
            "none with bank 'full', in which every subset has its own adapters",
        )
        _one_of("adamm.refinement", self.refinement, ("graph", "dense", "off"))
        _require(1 <= self.reduction <= 64, "adamm.reduction", self.reduction, "1 ... 64")
        _require(2 <= self.nodes <= 256, "adamm.nodes", self.nodes, "2 ... 256")
        for name in ("consistency", "content", "style", "adversarial", "reliability"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"adamm.{name}", value, "a finite weight of at least 0")
        _require(
            0 < self.presence_weight < math.inf,
            "adamm.presence_weight",
            self.presence_weight,
            "a weight above 0; presence = false builds no head",
        )
        _require(0 <= self.gate < 1, "adamm.gate", self.gate, "a probability from 0 to below 1")
        _require(
            self.presence or self.gate == 0, "adamm.gate", self.gate, "0 without the presence head (presence = false)"
        )

    @property
    def weights(self) -> dict[str, float]:
        """The terms of weight above 0, in the order in which they are logged."""
        values = {name: float(getattr(self, name)) for name in ADAMM_TERMS[:4]}
        if self.presence:
            values.update(presence=float(self.presence_weight), reliability=float(self.reliability))
        return {name: value for name, value in values.items() if value > 0}

    def channel_numbers(self, names: Sequence[str]) -> tuple[str, ...]:
        """``subsets`` with channel numbers for names, ``"#0+#3"``; ValueError for an unknown or repeated one."""
        numbers = [f"#{channel}" for channel in range(len(names))]
        rows = [modalities.parse_subset(text, numbers if text.startswith("#") else names) for text in self.subsets]
        texts = tuple(modalities.subset_name(row, numbers) for row in rows)
        if texts:
            modalities.parse_subsets(texts, numbers)  # refuses the same one twice
        return texts


@dataclass(frozen=True, kw_only=True)
class MedMAPSettings:
    """The aligning front of MedMAP and its loss."""

    placement: str = "stem"
    """``stem``: grouped convolutions in front of the plans' network; ``encoders``: one encoder per modality, fused at
    every stage, in front of the plans' decoder."""
    features: int | None = None
    """Channels per modality of the stem; null: half of the planned finest width for all modalities, 1 ... 4 each."""
    width: float = 0.5
    """Channels of a one-modality encoder over the planned ones."""
    stages: str = "ends"
    """Stages that are aligned and imputed with one encoder per modality: ``ends`` (the first and the bottleneck) or
    ``all``. At the others an absent modality is zero."""
    anchor: str = "star"
    """``star``: learned convex mixture of all modalities; ``fixed``: one modality; ``gaussian``: a learned Gaussian per
    channel; ``normal``: the standard normal distribution. Absent modalities are imputed from the mixture of the
    available ones in any case."""
    fixed_channel: int | None = None
    """Channel number of the modality that is the anchor; with anchor ``fixed`` only."""
    weight: float = 0.1
    """Weight of the alignment loss. No value is published; this one is ours."""
    normalize: bool = True
    """Standardise features over space before they are compared (``star`` and ``fixed``), so that they cannot align by
    shrinking."""
    detach_anchor: bool = False
    """No gradient to the features of the anchor (``star`` and ``fixed``); its learned weights still get one."""

    NETWORK_KEYS: typing.ClassVar[tuple[str, ...]] = ("placement", "features", "width", "stages", "anchor")

    def __post_init__(self) -> None:
        _one_of("medmap.placement", self.placement, ("stem", "encoders"))
        _require(
            self.features is None or 1 <= self.features <= 64, "medmap.features", self.features, "null or 1 ... 64"
        )
        _require(0 < self.width <= 1, "medmap.width", self.width, "above 0 and at most 1")
        _one_of("medmap.stages", self.stages, ("ends", "all"))
        _one_of("medmap.anchor", self.anchor, ("star", "fixed", "gaussian", "normal"))
        fixed = self.fixed_channel is not None and self.fixed_channel >= 0
        _require(
            fixed if self.anchor == "fixed" else self.fixed_channel is None,
            "medmap.fixed_channel",
            self.fixed_channel,
            'a channel number with anchor "fixed" and null with any other',
        )
        _require(0 <= self.weight < math.inf, "medmap.weight", self.weight, "a finite weight of at least 0")
        _require(
            self.weight > 0 or self.anchor != "gaussian",
            "medmap.weight",
            self.weight,
            'a weight above 0 with anchor "gaussian", whose parameters only the alignment trains',
        )


@dataclass(frozen=True, kw_only=True)
class SMMLSettings:
    """The two students of SMML, what they learn from one another and from a semantic prior."""

    light: bool = True
    """Students that are the plans' network on zeroed channels; false: one encoder per modality in each student."""
    width: float = 0.5
    """Without ``light``: channels of a one-modality encoder over the planned ones."""
    pixel: float = 0.1
    """Weight of the pixel-level constraint: divergence from the other student at voxels where it is more reliable. The
    released code has 1, for a form of it that is not known; at 1 this one outweighs the segmentation loss."""
    feature: float = 1.0
    """Weight of the feature-level constraint: relations between positions and to class prototypes at the bottleneck."""
    guidance: float = 1.0
    """Weight of the divergence from the refinement network's output; without a prior there is none."""
    warmup: float = 0.1
    """Fraction of the training before ``pixel`` and ``guidance`` begin."""
    tau: float = 1.0
    """Temperature of the pixel-level divergence."""
    require_correct: bool = False
    """Also ask that the more reliable student is right at the voxel."""
    balanced: bool = True
    """Mean of the pixel-level divergence over classes first, so that a small one counts as much as the background."""
    prior: str = "none"
    """Semantic prior of the refinement networks: ``none`` (no refinement); ``self``: what a moving average of the first
    student says from one modality; ``precomputed``: label maps of each modality; ``checkpoint``: a TorchScript network.
    A trained model predicts without it."""
    prior_path: str | None = None
    """For ``precomputed``: folder of label maps CASE_000k, named as the images are, absolute or below the raw data set;
    for ``checkpoint``: a file with a network from one modality (B, 1, ...) to logits (B, heads, ...)."""
    ema: float = 0.999
    """For ``self``: how much of the moving average stays in each step."""
    refinement_width: float = 0.5
    """Channels of the refinement networks over the planned ones; they have at most four stages."""
    sequential: bool = False
    """Backward pass of one student before the other's forward pass: less memory, one forward pass more. One GPU."""

    NETWORK_KEYS: typing.ClassVar[tuple[str, ...]] = ("light", "width")

    def __post_init__(self) -> None:
        for name in ("width", "refinement_width"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"smml.{name}", value, "above 0 and at most 1")
        for name in ("pixel", "feature", "guidance"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"smml.{name}", value, "a finite weight of at least 0")
        _require(0 <= self.warmup <= 1, "smml.warmup", self.warmup, "a fraction from 0 to 1")
        _require(0 < self.tau < math.inf, "smml.tau", self.tau, "a temperature above 0")
        _require(0 <= self.ema < 1, "smml.ema", self.ema, "a fraction from 0 to below 1")
        _one_of("smml.prior", self.prior, ("none", "self", "precomputed", "checkpoint"))
        _require(
            bool(self.prior_path) == (self.prior in ("precomputed", "checkpoint")),
            "smml.prior_path",
            self.prior_path,
            'a path with prior "precomputed" or "checkpoint" and null with any other',
        )


SECTIONS: Mapping[str, type] = types.MappingProxyType(
    {
        "sampler": SamplerSettings,
        "schedule": ScheduleSettings,
        "network": NetworkSettings,
        "distillation": DistillationSettings,
        "teacher": TeacherSettings,
        "adamm": AdaMMSettings,
        "medmap": MedMAPSettings,
        "smml": SMMLSettings,
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole block, one attribute per section."""

    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    adamm: AdaMMSettings = field(default_factory=AdaMMSettings)
    medmap: MedMAPSettings = field(default_factory=MedMAPSettings)
    smml: SMMLSettings = field(default_factory=SMMLSettings)

    @classmethod
    def from_block(cls, block: Mapping | None) -> Settings:
        """Read a block from a plans file.

        Raises
        ------
        SettingsError
            for an unknown section or key, a value of another type and an impossible value.
        """
        block = {} if block is None else block
        _require(isinstance(block, Mapping), BLOCK, block, "a table of sections: " + ", ".join(SECTIONS))
        sections = {name: _read_section(name, content) for name, content in _known(BLOCK, block, SECTIONS).items()}
        settings = cls(**sections)
        if settings.distillation.recipe == "paper" and "optimizer" not in (block.get("schedule") or {}):
            settings = settings.replace("schedule", optimizer="adam")
        return settings

    def to_block(self) -> dict[str, dict[str, Any]]:
        """Plain dicts, lists, numbers and strings, complete: every key of every section."""
        return {name: _plain(getattr(self, name)) for name in SECTIONS}

    def replace(self, section: str, **values: Any) -> Settings:
        """A copy with some keys of one section changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **values)})


def network_keys(section: str) -> tuple[str, ...]:
    """Keys of a section that a network is built from: all, unless the section's class names some in NETWORK_KEYS."""
    names = tuple(field.name for field in dataclasses.fields(SECTIONS[section]))
    return tuple(getattr(SECTIONS[section], "NETWORK_KEYS", names))


def read_assignment(text: str) -> tuple[str, str, Any]:
    """Split ``section.key=value`` as given on a command line; the value is read as JSON, else as text."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise SettingsError(f"{text!r} is not of the form section.key=value, for example schedule.epochs=100")
    _known(BLOCK, {section: None}, SECTIONS)
    _known(section, {key: None}, {f.name: f for f in dataclasses.fields(SECTIONS[section])})
    try:
        return section, key, json.loads(value)
    except json.JSONDecodeError:
        return section, key, value.strip()


def _known(where: str, content: Mapping, allowed: Mapping) -> Mapping:
    for key in content:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), list(allowed), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise SettingsError(f"unknown setting {key!r} in {where!r}{hint}; allowed are {', '.join(allowed)}")
    return content


def _read_section(name: str, content: Any) -> Any:
    section = SECTIONS[name]
    _require(isinstance(content, Mapping), name, content, "a table of settings")
    fields = {f.name: f for f in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    values = {key: _typed(f"{name}.{key}", value, hints[key]) for key, value in _known(name, content, fields).items()}
    if name == "distillation":
        recipe = values.get("recipe", "default")
        _one_of("distillation.recipe", recipe, tuple(RECIPES))
        values = {**RECIPES[recipe], **values}
    return section(**values)


def _typed(where: str, value: Any, hint: Any) -> Any:
    """Check a JSON value against the annotation of its dataclass field; lists become tuples, ints floats."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _typed(where, value, inner[0])
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), where, value, 'a list such as ["T1", "T1+FLAIR"] or [2, 2, 2]')
        return tuple(_typed(where, item, typing.get_args(hint)[0]) for item in value)
    if origin is not None:
        _require(isinstance(value, Mapping), where, value, 'a table such as {"T1": 1, "T1+FLAIR": 2.5}')
        return {str(key): _typed(f"{where}.{key}", item, float) for key, item in value.items()}
    if hint is bool:
        _require(isinstance(value, bool), where, value, "true or false")
        return value
    if hint is int:
        _require(isinstance(value, int) and not isinstance(value, bool), where, value, "a whole number")
        return value
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(number and math.isfinite(value), where, value, "a finite number")
        return float(value)
    _require(isinstance(value, str), where, value, "a text")
    return value


def _plain(section: Any) -> dict[str, Any]:
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {
        key: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }
