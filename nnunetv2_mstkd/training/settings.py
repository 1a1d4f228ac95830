"""Settings: frozen dataclasses that are read from the ``"mstkd"`` block of a plans configuration.

``plans["configurations"][name]["mstkd"]`` holds one section per dataclass. A trainer names the sections that it reads
in ``sections``; a method's own section is in its folder. Every key has a default, so a plans file without the block
trains with the defaults. Unknown keys and impossible values are refused by name. Write a block with ``mstkd
configure``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError, did_you_mean
from nnunetv2_mstkd.nnunet import per_channel
from nnunetv2_mstkd.nnunet.plans import BLOCK

RENAMED: Mapping[str, str] = types.MappingProxyType(
    {
        "schedule.transformer_lr": "schedule.added_lr",
        **{
            f"distillation.{key}": f"mstkd.{key}"
            for key in ["recipe", "evd", "maps", "discrepancy", "kl", "style", "adversarial", "tau", "style_encoder"]
        },
    }
)
"""Keys of earlier versions and what they are called now; both are read, the new name is written."""


class SettingsError(InputError):
    """A setting that is unknown or impossible. The message names it, what was found and what is allowed."""


def require(condition: bool, where: str, found: Any, expected: str) -> None:
    """Raise SettingsError unless ``condition`` holds."""
    if not condition:
        raise SettingsError(f"setting {where} is {found!r}, expected {expected}")


# ---- types of values -----------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """Bounds of a number, as an annotation: ``Annotated[float, Range(0, 1)]``."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """The lower bound itself is excluded."""
    below: bool = False
    """The upper bound itself is excluded."""

    def holds(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        return " and ".join(parts)


Count = Annotated[int, Range(1)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, above=True)]


TYPES = "bool, int, float, str, Literal[...], Annotated[number, Range(...)], tuple[T, ...], Mapping[str, T], T | None"
"""What a field of a section may be annotated with; T is one of these."""


def _allowed(hint: Any) -> bool:
    """Whether a field of a section may have this annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        given = [argument for argument in arguments if argument is not types.NoneType]
        return len(given) == 1 and _allowed(given[0])
    if origin is Annotated:
        return len(arguments) == 2 and arguments[0] in (int, float) and isinstance(arguments[1], Range)
    if origin is tuple:
        return len(arguments) == 2 and arguments[1] is ... and _allowed(arguments[0])
    if origin is Mapping:
        return arguments[0] is str and _allowed(arguments[1])
    return origin is Literal or hint in (bool, int, float, str)


def _typed(where: str, value: Any, hint: Any) -> Any:
    """Check a JSON value against the annotation of its field; lists become tuples, integers floats where needed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # T | None
        (given,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _typed(where, value, given)
    if origin is Annotated:
        kind, bounds = arguments
        number = _typed(where, value, kind)
        require(bounds.holds(number), where, value, f"{'an integer' if kind is int else 'a number'} {bounds}")
        return number
    if origin is Literal:
        require(value in arguments, where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), where, value, 'a list such as ["T1", "T1+FLAIR"] or [2, 2, 2]')
        return tuple(_typed(where, item, arguments[0]) for item in value)
    if origin is not None:
        require(isinstance(value, Mapping), where, value, 'a mapping such as {"T1": 1, "T1+FLAIR": 2.5}')
        return {str(key): _typed(f"{where}.{key}", item, arguments[1]) for key, item in value.items()}
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number and math.isfinite(value), where, value, "a finite number")
        return float(value)
    expected = {bool: "true or false", int: "an integer", str: "a string"}[hint]
    require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), where, value, expected)
    return value


# ---- sections ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the block. A subclass is a frozen dataclass whose annotations say what is allowed.

    Annotations are those of :data:`TYPES`, and every key has a default.
    """

    NAME: ClassVar[str]
    """Key of the section in the block."""
    NETWORK_KEYS: ClassVar[tuple[str, ...] | None] = None
    """Keys that the network is built from: weights fit no other values of them. None: all."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = types.MappingProxyType({})
    """What each value of the key ``recipe``, of a section that has it, sets in this and other sections."""

    _namespace: ClassVar[dict[str, Any] | None] = None
    """Names of the class's module, in which its annotations are read: nnU-Net forgets modules of nnUNet_extTrainer."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        module = sys.modules.get(cls.__module__)
        cls._namespace = None if module is None else vars(module)

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            object.__setattr__(self, name, _typed(f"{self.NAME}.{name}", getattr(self, name), hint))
        self.check()

    def check(self) -> None:
        """Refuse what the types of single values cannot: override for conditions between keys."""

    def require(self, condition: bool, key: str, expected: str) -> None:
        """Raise SettingsError about one key unless ``condition`` holds."""
        value = getattr(self, key)
        require(condition, f"{self.NAME}.{key}", list(value) if isinstance(value, tuple) else value, expected)

    @classmethod
    def implied(cls, block: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        """What the section's recipe sets, by section; what is given wins."""
        recipe = block.get(cls.NAME, {}).get("recipe")
        return cls.PRESETS.get(recipe, {}) if isinstance(recipe, str) else {}

    @classmethod
    def forget(cls, block: dict[str, dict[str, Any]], key: str) -> None:
        """Remove in place what a recipe sets, before the section is given another one."""
        for preset in cls.PRESETS.values() if key == "recipe" else ():
            for name, values in preset.items():
                for implied in values:
                    block.get(name, {}).pop(implied, None)

    @classmethod
    def network_keys(cls) -> tuple[str, ...]:
        """Keys that the network is built from."""
        return tuple(field_types(cls)) if cls.NETWORK_KEYS is None else cls.NETWORK_KEYS

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Any:
        """Read a section as plans hold it; SettingsError names an unknown key."""
        return cls(**_known(cls.NAME, content, field_types(cls)))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings, complete."""
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name in field_types(type(self))
            for value in (getattr(self, name),)
        }


def field_types(section: type) -> dict[str, Any]:
    """Type of each key of a section, in their order; TypeError if the class is not written as a section is."""
    problem = section_problem(section)
    if problem is not None:
        raise TypeError(problem)
    hints = _annotations(section)
    return {each.name: hints[each.name] for each in dataclasses.fields(section)}


@functools.cache  # known_sections() reads those of all classes
def _annotations(section: type) -> Mapping[str, Any]:
    """Annotations of a class and its bases, each read in its own module."""
    hints: dict[str, Any] = {}
    for base in reversed(section.__mro__):
        hints |= inspect.get_annotations(base, globals=vars(base).get("_namespace"), eval_str=True)
    return hints


def section_problem(section: type) -> str | None:
    """Return what is wrong with the class of a section, for who writes one; None: nothing."""
    where = f"the section class {section.__qualname__}"
    try:
        hints = _annotations(section)
    except Exception as error:  # whatever an annotation does when it is read: it must not stop other trainers
        return f"{where} has an annotation that cannot be read: {error}"
    fields = {each.name: each for each in dataclasses.fields(section)}
    keys = [name for name, hint in hints.items() if hint is not ClassVar and typing.get_origin(hint) is not ClassVar]
    if not hasattr(section, "NAME") or "NAME" in fields:
        return f'{where} needs a name: NAME: ClassVar[str] = "..."'
    if not keys or set(keys) != set(fields):
        return f"{where} needs @dataclass(frozen=True, kw_only=True) and annotated keys, such as weight: Weight = 1.0"
    for base in section.__mro__[: section.__mro__.index(Section)]:
        for name, value in vars(base).items():
            known = name.startswith("_") or name == "NAME" or hasattr(Section, name)
            method = callable(value) or hasattr(value, "__get__")
            if not (known or method or name in inspect.get_annotations(base)):
                return f"{where} has the key {name} without an annotation, such as {name}: Weight = {value!r}"
    for name, each in fields.items():
        if not _allowed(hints[name]):
            return f"{where} annotates {name} with {each.type}, expected one of {TYPES}"
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            return f"{where} gives {name} no default"
    return None


def known_sections() -> dict[str, type[Section]]:
    """Every section class that has been imported, by name: those of all methods, once the trainers are.

    The first class with a name keeps it, and this package's come first; a class that is made again, as in a notebook or
    by ``dataclass(slots=True)``, replaces itself. Those with a :func:`section_problem` are left out.
    """
    found: list[type[Section]] = []
    pending = list(Section.__subclasses__())
    while pending:
        section = pending.pop(0)
        pending += section.__subclasses__()
        if section_problem(section) is None:
            found.append(section)
    found.sort(key=lambda section: not section.__module__.startswith("nnunetv2_mstkd."))
    known: dict[str, type[Section]] = {}
    for section in found:
        owner = known.setdefault(section.NAME, section)
        if (owner.__module__, owner.__qualname__) == (section.__module__, section.__qualname__):
            known[section.NAME] = section
    return known


def _known(where: str, content: Mapping, allowed: Iterable[str]) -> Mapping:
    for key in content:
        if key not in allowed:
            hint, known = did_you_mean(str(key), allowed), ", ".join(allowed)
            raise SettingsError(f"unknown setting {key!r} in {where!r}{hint}; allowed are {known}")
    return content


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(Section):
    """Which subsets a student sees in training; see :class:`nnunetv2_mstkd.modalities.SubsetSampler`."""

    NAME: ClassVar[str] = "sampler"

    kind: Literal["uniform", "by_size", "weighted", "fixed", "independent"] = "uniform"
    """How subsets are drawn: ``uniform`` (all equally often), ``by_size`` (each number of modalities equally often),
    ``fixed`` (those in ``subsets`` equally often), ``weighted`` (by ``weights``) or ``independent`` (each modality by
    itself, with ``drop`` and ``keep``)."""
    subsets: tuple[str, ...] = ()
    """For ``fixed``: names such as ``"T1ce+FLAIR"``."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """For ``weighted``: a positive weight for each subset name; subsets that are not named are never drawn."""
    drop: Mapping[str, Fraction] = field(default_factory=dict)
    """For ``independent``: the probability with which each modality is absent; 0.5 for those that are not named."""
    keep: tuple[str, ...] = ()
    """For ``independent``: modalities that are never absent."""
    per_batch: bool = False
    """Draw one subset for the whole batch, from the modalities that all of its cases have, instead of one per
    sample."""

    def check(self) -> None:
        for key, kind, what in (
            ("subsets", "fixed", "a list of subsets"),
            ("weights", "weighted", "a mapping of subset to weight"),
        ):
            agrees = (self.kind == kind) == bool(getattr(self, key))
            self.require(agrees, key, f'{what} with kind "{kind}" and none with any other kind')
        for key in ("drop", "keep"):
            self.require(
                self.kind == "independent" or not getattr(self, key), key, 'nothing unless kind is "independent"'
            )

    def build(self, names: Sequence[str]) -> modalities.SubsetSampler:
        """Return the sampler for modalities of these names; InputError names an unknown modality or a bad weight."""
        if self.kind == "independent":
            channels = [
                modalities.parse_modality(name, names, " in sampler.drop or keep") for name in (*self.drop, *self.keep)
            ]
            if len(set(channels)) < len(channels):
                raise SettingsError("a modality appears twice in sampler.drop and sampler.keep")
            drop = dict(zip(channels, (*self.drop.values(), *[0.0] * len(self.keep)), strict=True))
            return modalities.SubsetSampler(
                len(names), self.kind, drop=tuple(drop.get(channel, 0.5) for channel in range(len(names)))
            )
        chosen = self.subsets or tuple(self.weights)
        rows = modalities.parse_subsets(chosen, names).tolist() if chosen else []
        return modalities.SubsetSampler(len(names), self.kind, tuple(map(tuple, rows)), tuple(self.weights.values()))


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(Section):
    """Length, optimiser and start of training. The defaults are nnU-Net's."""

    NAME: ClassVar[str] = "schedule"

    epochs: Count = 1000
    """Epochs of a student, or of a trainer without a teacher; see also ``teacher.epochs``."""
    iterations: Count = 250
    """Training steps per epoch."""
    validation_iterations: Count = 50
    """Online validation steps per epoch; increased if they would not cover all validation subsets."""
    patch_phases: Annotated[int, Range(1, 16)] = 1
    """Number of equally long phases in which the training patch grows, one axis at a time, from the smallest useful
    size to the plan's; 1: the plan's patch from the start. Validation and prediction always use the plan's. The
    published value is 4."""
    batch_repeats: Annotated[int, Range(1, 16)] = 1
    """Number of training steps with each loaded batch (data echoing, arXiv 1907.05550); each repetition draws new
    subsets and new flips. Above 1 it saves time where training waits for the data loader. It must divide
    ``iterations``; 1: nnU-Net's."""
    save_every: Count | None = None
    """Number of epochs between two writes of ``checkpoint_latest.pth``; null: min(50, max(1, epochs // 20))."""
    seed: Annotated[int, Range(0, 2**31 - 1)] | None = None
    """Reseeds all random number generators at the start of each epoch from (seed, fold, epoch, rank); on a CPU,
    training is then exactly reproducible with nnUNet_n_proc_DA=0 (on a GPU nnU-Net lets cuDNN choose algorithms, which
    may differ in rounding). null: no reseeding."""
    optimizer: Literal["sgd", "adamw", "adam"] = "sgd"
    """Optimiser of the U-Net's parameters: ``sgd`` (nnU-Net's: Nesterov 0.99), ``adamw`` or ``adam`` (0.9, 0.99)."""
    initial_lr: Share | None = None
    """Initial learning rate; null: 1e-2 for sgd (nnU-Net), 1e-3 for adamw, 1e-4 for adam (MST-KDNet)."""
    weight_decay: Annotated[float, Range(0, 1)] | None = None
    """Weight decay of the U-Net's optimiser; null: 3e-5 for sgd (nnU-Net), 0.01 for adamw, 0 for adam."""
    added_lr: Share = 3e-4
    """Learning rate of AdamW for what a network has in addition to the plans' U-Net, such as a transformer with its
    upsampling paths, adapters and graph, or conditioning; no effect with optimizer ``adam``."""
    init_from: str | None = None
    """Weights to start from: a trainer's name or a checkpoint file. Name: the final checkpoint of that trainer for the
    same fold, from this configuration or a parent with the same network (that trainer's own training starts from random
    weights). File: absolute or relative to nnUNet_results; it belongs to one fold, so other folds would validate on its
    training cases. Tensors of the same name and shape are loaded; input channels are matched by modality name, and a
    single channel is spread over all. If each modality has an encoder as wide as the U-Net's, each takes the U-Net's
    weights, with the channel of its modality. The log lists all other tensors."""

    def check(self) -> None:
        divides = self.iterations % self.batch_repeats == 0
        self.require(divides, "batch_repeats", f"a divisor of schedule.iterations, {self.iterations}")

    def starts_from(self, trainer: str) -> str | None:
        """What a trainer starts from, as ``init_from``; None: at random, as the trainer that ``init_from`` names."""
        return None if self.init_from == trainer else self.init_from

    @staticmethod
    def is_file(source: str) -> bool:
        """Whether ``init_from`` is a checkpoint file and no trainer."""
        return source.endswith(".pth")

    LEARNING_RATES: ClassVar[Mapping[str, float]] = types.MappingProxyType({"sgd": 1e-2, "adamw": 1e-3, "adam": 1e-4})

    @property
    def learning_rate(self) -> float:
        """Initial rate of the U-Net's optimiser."""
        return self.LEARNING_RATES[self.optimizer] if self.initial_lr is None else self.initial_lr

    def checkpoint_interval(self, epochs: int) -> int:
        """Epochs between two checkpoints, so that at most 5 % (or 50 epochs) of a training can be lost."""
        return self.save_every if self.save_every is not None else min(50, max(1, epochs // 20))


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(Section):
    """When and where a distilling method uses its teacher; the terms are in the method's own section."""

    NAME: ClassVar[str] = "distillation"

    ramp: Fraction = 0.1
    """Fraction of the training over which the weights rise as exp(-5 (1 - t)^2). Of MST-KDNet's terms in the published
    form, only ``discrepancy`` rises."""
    fade: Fraction | None = None
    """Fraction of the training, at its end, over which the weights fall linearly to 0; null: the method's default (0
    for methods with soft labels alone, otherwise 0.5)."""
    where: Literal["everywhere", "teacher_better"] | None = None
    """Logit terms act ``everywhere``, or (``teacher_better``) only at voxels where the teacher's cross-entropy is below
    the student's; null: the method's default (``everywhere`` for methods with soft labels alone, otherwise
    ``teacher_better``)."""
    every: Count | None = None
    """Run the teacher in every k-th step only, with k times the weight of its terms. A frozen teacher's forward pass is
    most of the cost of distillation. A teacher that learns (``teacher.joint``) runs in every step, and so does one that
    guides unlabelled samples, on these. null: the method's default (2 for methods with soft labels alone, otherwise
    1)."""
    soft_labels: Weight | None = None
    """Weight of the divergence from the teacher's probabilities, for any method with a teacher; null: the method's
    default (1 for methods with soft labels alone, which are ``KDTrainer``, ``MedMAPKDTrainer`` and
    ``SelfDistillationTrainer``; otherwise 0)."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Section):
    """Which frozen teacher a student has, and how it is used."""

    NAME: ClassVar[str] = "teacher"

    configuration: str | None = None
    """Configuration that the teacher was trained in; null: the first one with a teacher among the student's own and its
    parents."""
    epochs: Count | None = None
    """Epochs of the teacher's training; null: ``schedule.epochs``."""
    warm_start: bool = True
    """Start the student from the teacher's weights; no effect with ``joint`` or ``schedule.init_from``."""
    joint: bool = False
    """Train the teacher together with the student, both from scratch, instead of loading a frozen one;
    ``configuration`` and ``epochs`` then have no effect. The gradients of terms in their published form, except the
    adversarial one, reach the teacher too."""
    joint_weight: Fraction = 0.4
    """Weight of the segmentation loss of a jointly trained teacher; the student's weight is 1 minus this."""
    cases: Literal["complete", "all"] = "complete"
    """What the teacher is trained on: ``complete`` cases, or ``all``, with zeros for absent modalities."""


@dataclass(frozen=True, kw_only=True)
class UnlabelledSettings(Section):
    """How a student learns from unlabelled studies, in which all voxels have the ignore label."""

    NAME: ClassVar[str] = "unlabelled"

    share: Annotated[float, Range(0, 8)] | None = None
    """Unlabelled samples *added* to each batch (of each GPU), as a fraction of the labelled ones: 0 adds none, any
    larger value at least one. null: 0.5 for trainers with a trained teacher, otherwise 0. On these samples the student
    follows a guide: the teacher or, without one, the network's own prediction from all modalities."""
    weight: Weight = 1.0
    """Weight of the loss of unlabelled samples."""
    dice: Weight = 1.0
    """Weight of the soft Dice in this loss, relative to the cross-entropy."""
    confidence: Annotated[float, Range(0.5, 1, below=True)] = 0.7
    """The cross-entropy only counts voxels where the probability of the guide (teacher or own prediction) is above
    this."""
    temperature: Positive | None = 1.0
    """The guide's logits are divided by this first; null: the temperature that ``mstkd evaluate`` fitted to the teacher
    for all modalities."""
    ramp: Fraction = 0.1
    """Fraction of the training over which the weight rises as exp(-5 (1 - t)^2)."""


@dataclass(frozen=True, kw_only=True)
class InputSettings(Section):
    """How images are normalised. The model's plans store it, so prediction does the same as training."""

    NAME: ClassVar[str] = per_channel.SECTION

    normalization: Literal["auto", "plans", "per_channel"] = "auto"
    """``plans``: nnU-Net's normalisation, which depends on the voxels in which *any* modality is non-zero.
    ``per_channel``: each modality as if it were the only one, so that it is the same whichever others are available;
    this makes a second copy of the preprocessed data from the images in nnUNet_raw. ``auto``: ``per_channel`` if
    removing modalities would change the others, otherwise ``plans``; the model's plans say which was used."""


# ---- the block -----------------------------------------------------------------------------------------------------

S = TypeVar("S", bound=Section)


class Settings:
    """The sections that a trainer reads, and the block that they were read from.

    ``settings[ScheduleSettings].epochs`` is a typed value.
    """

    def __init__(self, sections: Iterable[Section], others: Mapping[str, Any] | None = None) -> None:
        self._sections: dict[type[Section], Section] = {type(section): section for section in sections}
        owners: dict[str, type[Section]] = {}
        for section in self._sections:
            if owners.setdefault(section.NAME, section) is not section:
                raise ValueError(
                    f"the sections {owners[section.NAME].__qualname__} and {section.__qualname__} are both called "
                    f"{section.NAME!r}; give one another NAME"
                )
        self._others = dict(others or {})

    @classmethod
    def read(cls, block: Mapping | None, sections: Iterable[type[Section]], *, strict: bool = True) -> Settings:
        """Read the block of a plans configuration.

        Parameters
        ----------
        block
            As the plans hold it; None: all defaults.
        sections
            Section classes to read. Sections of other trainers stay as they are.
        strict
            Refuse sections that no trainer has, and check those of other trainers too.

        """
        sections = tuple(sections)
        for section in sections:
            field_types(section)  # refuses a class that is not written as a section is
        content = translate(block)
        known = known_sections()
        for section in dict.fromkeys((*sections, *known.values())):
            for name, values in section.implied(content).items():
                content[name] = {**values, **content.get(name, {})}
        names = {section.NAME for section in sections}
        others = {name: value for name, value in content.items() if name not in names}
        if strict:
            _known(BLOCK, content, known)
            for name, value in others.items():
                known[name].read(value)
        return cls([section.read(content.get(section.NAME, {})) for section in sections], others)

    def __getitem__(self, section: type[S]) -> S:
        if section not in self._sections:
            raise LookupError(
                f"{section.__name__} is not read here: list it in `sections` of the trainer or its design"
            )
        return typing.cast(S, self._sections[section])

    def __contains__(self, section: type[Section]) -> bool:
        return section in self._sections

    def to_block(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings: every key of the sections read, and the other sections as given."""
        return {**self._others, **{section.NAME: value.to_dict() for section, value in self._sections.items()}}

    def set_by(self, name: str, key: str) -> str:
        """Return `` (mstkd.recipe=paper sets it ...)`` for a key with the value that a recipe sets, else nothing."""
        value = self.to_block()[name][key]
        told = [recipe for recipe, _, values in self._recipes() if (name, key, value) in values]
        return f" ({told[0]} sets it; take a configuration without this recipe)" if told else ""

    def remarks(self) -> list[str]:
        """What the log should say of a recipe: what it sets for a trainer of another method, and what overrides it."""
        lines, block = [], self.to_block()
        for recipe, read, values in self._recipes():
            places = [(name, key) for name, key, value in values if (block[name][key] == value) is not read]
            text = ", ".join(f"{name}.{key}={json.dumps(block[name][key])}" for name, key in places)
            if places:
                lines.append(
                    f"{recipe}, but the plans say {text}" if read else f"{recipe} of the plans also sets {text}"
                )
        return lines

    def _recipes(self) -> Iterator[tuple[str, bool, list[tuple[str, str, Any]]]]:
        """Each recipe as ``mstkd.recipe=paper``, whether the trainer reads its section, what it sets in those read."""
        block, names = self.to_block(), {section.NAME for section in self._sections}
        for section in known_sections().values():
            presets = section.implied(block)
            if presets:
                values = [(name, key, v) for name in presets if name in names for key, v in presets[name].items()]
                yield f"{section.NAME}.recipe={block[section.NAME]['recipe']}", section in self, values

    def replace(self, section: type[Section], **values: Any) -> Settings:
        """Return a copy with some keys of one section changed."""
        changed = dataclasses.replace(self._sections[section], **values)
        return Settings({**self._sections, section: changed}.values(), self._others)


def translate(block: Mapping | None) -> dict[str, dict[str, Any]]:
    """Return a copy of a block with keys of earlier versions under their present names."""
    block = {} if block is None else block
    require(isinstance(block, Mapping), BLOCK, block, "a mapping of sections")
    for name, value in block.items():
        require(isinstance(value, Mapping), name, value, "a mapping of settings")
    content = {name: dict(value) for name, value in block.items()}
    for old, new in RENAMED.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        if key in content.get(section, {}):
            content.setdefault(new_section, {}).setdefault(new_key, content[section].pop(key))
    return content


def read_assignment(text: str) -> tuple[str, str, Any]:
    """Split ``section.key=value`` as given on a command line; the value is read as JSON, else as a string."""
    name, equals, value = text.partition("=")
    section, dot, key = RENAMED.get(name.strip(), name.strip()).partition(".")
    if not equals or not dot:
        raise SettingsError(f"{text!r} is not of the form section.key=value, for example schedule.epochs=100")
    known = known_sections()
    _known(BLOCK, {section: None}, known)
    _known(section, {key: None}, field_types(known[section]))
    try:
        return section, key, json.loads(value)
    except json.JSONDecodeError:
        return section, key, value.strip()
