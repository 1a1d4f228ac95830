"""The algebra of modality subsets: names, enumeration, sampling, masking and detection.

A *subset* is a row of booleans of shape ``(C,)``, True where the modality is available. No subset of this package is
empty. Everything in the package that says "missing" comes from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nnunetv2_mstkd.errors import InputError, did_you_mean

MIN_MODALITIES = 2
MAX_MODALITIES = 16
"""2^16 - 1 subsets still fit a table that is built in a moment; no MRI protocol comes near it."""

SEPARATOR = "+"
ALL = "all"
"""Stands for the full set where a subset is read from text."""

ENUMERATION_LIMIT = 6
"""All 2^C - 1 subsets are evaluated by default up to this many modalities (63 subsets)."""

ZERO_KEEPING_NORMALIZATIONS = (
    "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization",
)  # fmt: skip
"""nnU-Net's normalisation schemes under which an all-zero image stays all-zero; zero is how a modality is missing."""


def check_count(num_modalities: int) -> None:
    """Raise InputError unless ``num_modalities`` is between 2 and 16."""
    if num_modalities < MIN_MODALITIES:
        raise InputError(
            f"the data set has {num_modalities} input channel; a missing-modality trainer needs at least "
            f"{MIN_MODALITIES}. With one channel use nnUNetTrainer"
        )
    if num_modalities > MAX_MODALITIES:
        raise InputError(
            f"the data set has {num_modalities} input channels; subsets are supported for at most {MAX_MODALITIES}"
        )


def check_normalization(schemes: Sequence[str]) -> None:
    """Raise InputError if a channel's normalisation does not keep zero, because zero means missing."""
    for channel, scheme in enumerate(schemes):
        if scheme not in ZERO_KEEPING_NORMALIZATIONS:
            raise InputError(
                f"channel {channel} is normalised with {scheme}, which turns the zero image of a missing modality into "
                f"another value; expected one of {', '.join(ZERO_KEEPING_NORMALIZATIONS)}. Plan the data set again "
                f'with another channel name in dataset.json (for example "T1" instead of "CT")'
            )


def modality_names(dataset_json: Mapping) -> tuple[str, ...]:
    """Return the names of the input channels of an nnU-Net ``dataset.json``, in channel order.

    nnU-Net allows any text, duplicates too; here a name must be usable in ``"T1ce+FLAIR"``. So spaces at the ends are
    dropped, ``+`` and ``,`` become ``_``, and a name that is empty, ``all`` or used twice (case is ignored) gets its
    channel number.
    """
    channels = dataset_json.get("channel_names", dataset_json.get("modality"))
    if not isinstance(channels, Mapping) or not channels:
        raise InputError(
            f"dataset.json has the channel_names {channels!r}; expected a name for each input channel, for example "
            f'{{"0": "T1", "1": "FLAIR"}}'
        )
    by_number = {str(number): str(name) for number, name in channels.items()}
    numbers = [str(number) for number in range(len(channels))]
    if set(by_number) != set(numbers):
        raise InputError(
            f"channel_names in dataset.json has the keys {', '.join(map(str, channels))}, expected the numbers 0 ... "
            f"{len(channels) - 1} (number: name, not name: number)"
        )
    names = [by_number[number].strip().replace(SEPARATOR, "_").replace(",", "_") for number in numbers]
    folded = [name.casefold() for name in names]
    taken = {name for name in folded if folded.count(name) == 1} - {"", ALL}
    for number, name in enumerate(names):
        if name.casefold() not in taken:
            name = f"{name or 'channel'}_{number}"
            while name.casefold() in taken:
                name += "_"
            taken.add(name.casefold())
            names[number] = name
    return tuple(names)


def all_subsets(num_modalities: int) -> torch.Tensor:
    """Return all non-empty subsets, by size and then by channel number: bool, shape (2^C - 1, C).

    The first C rows are the single modalities, the last one is the full set.
    """
    check_count(num_modalities)
    codes = torch.arange(2**num_modalities - 1, 0, -1)
    # falling codes with channel 0 as the highest bit put {0, 1} before {0, 2} before {1, 2}; the sort keeps that order
    rows = (codes[:, None] >> torch.arange(num_modalities - 1, -1, -1)) & 1 == 1
    return rows[rows.sum(1).argsort(stable=True)]


def subset_name(subset: Iterable[bool], names: Sequence[str]) -> str:
    """Return ``"T1ce+FLAIR"``: the available channels of one subset, in channel order."""
    present = [name for name, available in zip(names, subset, strict=True) if bool(available)]
    if not present:
        raise InputError("a subset without any modality has no name; at least one modality must be available")
    return SEPARATOR.join(present)


def parse_modality(text: str, names: Sequence[str], where: str = "") -> int:
    """Return the channel number of a modality, named in upper or lower case; InputError for an unknown one.

    ``where`` follows the name in the message.
    """
    for channel, name in enumerate(names):
        if name.casefold() == text.strip().casefold():
            return channel
    hint = did_you_mean(text.strip(), names)
    raise InputError(f"unknown modality {text.strip()!r}{where}{hint}; known are {', '.join(names)}")


def parse_subset(text: str, names: Sequence[str]) -> torch.Tensor:
    """Return the subset, bool of shape (C,), that ``"T1ce+FLAIR"``, ``"T1ce,FLAIR"`` or ``"all"`` means.

    Case and order do not matter; an unknown or repeated modality and an empty subset are InputErrors.
    """
    subset = torch.zeros(len(names), dtype=torch.bool)
    if text.strip().casefold() == ALL:
        return ~subset
    for part in text.replace(",", SEPARATOR).split(SEPARATOR):
        if not part.strip():
            raise InputError(f"the subset {text!r} has an empty part; write for example {names[0]}+{names[-1]}")
        channel = parse_modality(part, names, f" in subset {text!r}")
        if subset[channel]:
            raise InputError(f"modality {part.strip()!r} appears twice in subset {text!r}")
        subset[channel] = True
    return subset


def parse_subsets(texts: Iterable[str], names: Sequence[str]) -> torch.Tensor:
    """Return several subsets, shape (S, C), in the order given; InputError if one is repeated."""
    rows = [parse_subset(text, names) for text in texts]
    if not rows:
        raise InputError(f"the list of subsets is empty; name at least one, for example {SEPARATOR.join(names)}")
    codes = [subset_code(row) for row in rows]
    for index, code in enumerate(codes):
        if code in codes[:index]:
            raise InputError(f"the subset {subset_name(rows[index], names)} appears twice in the list")
    return torch.stack(rows)


def subset_code(subset: Iterable[bool]) -> int:
    """Return the integer whose bit c is set where channel c is available: 1 ... 2^C - 1."""
    return sum(1 << channel for channel, available in enumerate(subset) if bool(available))


@dataclass(frozen=True)
class SubsetSampler:
    """Draws which modalities each sample of a batch keeps.

    Drawing (here) is separate from applying (:func:`mask_modalities`), so that teacher, student and loss can get the
    same draw.
    """

    num_modalities: int
    kind: str = "uniform"
    """``"uniform"`` over the 2^C - 1 non-empty subsets, the full one included (MST-KDNet, AdaMM, RFNet);
    ``"by_size"`` first the number of modalities uniformly over 1 ... C, then a subset of that size;
    ``"weighted"`` over ``subsets`` in proportion to ``weights``; ``"fixed"`` uniformly over ``subsets``;
    ``"independent"`` each modality is absent with its own probability in ``drop``, and an empty draw is repeated."""
    subsets: tuple[tuple[bool, ...], ...] = ()
    weights: tuple[float, ...] = ()
    drop: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_count(self.num_modalities)
        if self.drop and min(self.drop) == 1:
            raise InputError("every modality is dropped with probability 1; at least one must be available")
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"the weights of subsets must be positive and finite, found {list(self.weights)}")

    @property
    def varies(self) -> bool:
        """Whether two different subsets can be drawn."""
        return self.outcomes((True,) * self.num_modalities) > 1

    def outcomes(self, present: Sequence[bool]) -> int:
        """Return how many different subsets a case that has only the modalities ``present`` can get."""
        if self.kind in ("weighted", "fixed"):
            met = {tuple(a and b for a, b in zip(row, present, strict=True)) for row in self.subsets}
            return sum(map(any, met))
        drop = [p for p, there in zip(self.drop or (0.5,) * self.num_modalities, present, strict=True) if there]
        empty = 0 not in drop  # counted among the 2^k, but never returned
        return max(0, 2 ** sum(0 < p < 1 for p in drop) - empty)

    def sample(
        self, batch_size: int, *, present: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Draw one subset per sample.

        Parameters
        ----------
        batch_size
            B.
        present
            Which modalities each sample's case has: bool, (B, C), no row empty. A subset is drawn *within* them:
            ``by_size`` among those, the others as the part of a subset that the case has, empty parts excluded. A case
            of which the sampler never keeps anything keeps all that it has. None: every case is complete.

        Returns
        -------
        Bool on the CPU, (B, C), True where available, no row empty.
        """
        if present is None or bool(present.all()):
            return self._draw(batch_size, generator)
        if self.kind == "by_size":
            sizes = (torch.rand(batch_size, 1, generator=generator) * present.sum(1, keepdim=True)).long() + 1
            order = torch.rand(batch_size, self.num_modalities, generator=generator).masked_fill(~present, 2.0)
            return order.argsort(1).argsort(1) < sizes
        rows = self._draw(batch_size, generator) & present
        stuck = torch.tensor([self.outcomes(row) == 0 for row in present.tolist()])
        rows[stuck] = present[stuck]
        while bool((empty := ~rows.any(1)).any()):
            rows[empty] = self._draw(int(empty.sum()), generator) & present[empty]
        return rows

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> torch.Tensor:
        channels = torch.arange(self.num_modalities)
        if self.kind == "uniform":
            codes = torch.randint(1, 2**self.num_modalities, (batch_size,), generator=generator)
            return (codes[:, None] >> channels) & 1 == 1
        if self.kind == "by_size":
            sizes = torch.randint(1, self.num_modalities + 1, (batch_size, 1), generator=generator)
            ranks = torch.rand(batch_size, self.num_modalities, generator=generator).argsort(1).argsort(1)
            return ranks < sizes
        if self.kind == "independent":
            drop = torch.tensor(self.drop)
            rows = torch.zeros(batch_size, self.num_modalities, dtype=torch.bool)
            while bool((empty := ~rows.any(1)).any()):
                rows[empty] = torch.rand(int(empty.sum()), self.num_modalities, generator=generator) >= drop
            return rows
        weights = torch.tensor(self.weights or (1.0,) * len(self.subsets), dtype=torch.float64)
        rows = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
        return torch.tensor(self.subsets, dtype=torch.bool)[rows]

    def sample_other(
        self,
        first: torch.Tensor,
        *,
        present: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draw a second subset per sample that differs from the ``first``; together a draw without replacement.

        A sample for which the sampler has one subset only, such as a case with a single modality, gets it again.
        """
        if not self.varies:
            raise InputError("the sampler has one subset, from which two different ones cannot be drawn")
        second = first.clone()
        free = torch.ones(len(first), dtype=torch.bool)
        if present is not None:
            free = torch.tensor([self.outcomes(row) > 1 for row in present.tolist()])
        while bool((same := (second == first).all(1) & free).any()):
            within = None if present is None else present[same]
            second[same] = self.sample(int(same.sum()), present=within, generator=generator)
        return second


def mask_modalities(batch: torch.Tensor, availability: torch.Tensor) -> torch.Tensor:
    """Set the absent channels of each sample to exactly zero.

    With ``torch.where``, because NaN * 0 is NaN: nothing of an absent channel may reach the network.

    Parameters
    ----------
    batch
        Shape (B, C, *spatial), 2-D or 3-D images.
    availability
        Bool, shape (B, C) on any device.
    """
    if tuple(availability.shape) != tuple(batch.shape[:2]):
        raise ValueError(
            f"availability has shape {tuple(availability.shape)}, expected {tuple(batch.shape[:2])} (batch, channels)"
        )
    if availability.device.type == "cpu" and not bool(availability.any(1).all()):
        raise ValueError("a sample keeps no modality; at least one channel must stay available")
    keep = availability.to(batch.device, non_blocking=True).reshape(*batch.shape[:2], *[1] * (batch.ndim - 2))
    return torch.where(keep, batch, batch.new_zeros(()))


def complete_unless_empty(batch: torch.Tensor, complete: torch.Tensor) -> torch.Tensor:
    """Return a batch with all modalities, but samples without any voxel as they are in ``batch``.

    These count as complete: their logits must not read what is in the others.
    """
    return torch.where(batch.flatten(1).any(1).reshape(-1, *[1] * (batch.ndim - 1)), complete, batch)


def known_availability(batch: torch.Tensor, availability: torch.Tensor | None = None) -> torch.Tensor:
    """Return the subsets, bool of shape (B, C), that a network works with which asks for them.

    The one rule of all such networks, in training and in prediction: what ``mstkd predict`` says about the case wins,
    otherwise channels that are all zero in the patch are absent; a sample whose channels are *all* zero says nothing
    and counts as complete, whatever was said. Free of branches that depend on data.

    Parameters
    ----------
    batch
        Shape (B, C, *spatial), absent channels zero.
    availability
        Bool, (B, C) or (1, C), on the batch's device: the attribute ``availability`` of the network. None: nothing is
        known, and the batch decides.
    """
    found = (batch != 0).flatten(2).any(2)
    if availability is None:
        return found | ~found.any(1, keepdim=True)
    if availability.ndim != 2 or availability.shape[1] != found.shape[1] or len(availability) not in (1, len(found)):
        raise ValueError(
            f"availability has shape {tuple(availability.shape)}, expected {tuple(found.shape)} or (1, "
            f"{found.shape[1]})"
        )
    return availability | ~found.any(1, keepdim=True)


def validation_subsets(num_modalities: int, *, limit: int = 16, seed: int = 0) -> torch.Tensor:
    """Return the fixed list of subsets, shape (S, C), that online validation goes through.

    All subsets for C <= 4; for more, ``limit`` of them: the full set, the single modalities (as many as fit), then
    distinct ones drawn with ``seed``.
    """
    every = all_subsets(num_modalities)
    if len(every) <= limit:
        return every
    singles = min(num_modalities, limit - 1)
    middle = torch.arange(num_modalities, len(every) - 1)
    drawn = torch.randperm(len(middle), generator=torch.Generator().manual_seed(seed))[: limit - 1 - singles]
    rows = torch.cat([torch.tensor([len(every) - 1]), torch.arange(singles), middle[drawn].sort().values])
    return every[rows]


def rows_within(subsets: torch.Tensor, rows: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Return rows of a list of subsets (S, C) for cases that may lack modalities, none beyond what its case has.

    Each is the part of the wished row, long (B,), that the case has, ``present`` bool (B, C). Where that part is not in
    the list, it is the first subset of the list that the case has, or the full set with zeros.
    """
    listed = subsets.tolist()
    codes = {subset_code(subset): row for row, subset in enumerate(listed)}
    found = []
    for row, there in zip(rows.tolist(), present.tolist(), strict=True):
        part = subset_code(a and b for a, b in zip(listed[row], there, strict=True))
        within = (r for r, subset in enumerate(listed) if all(b or not a for a, b in zip(subset, there, strict=True)))
        found.append(codes[part] if part in codes else next(within, codes[2 ** len(there) - 1]))
    return torch.tensor(found)
