"""Which modality of a model an image is, by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from nnunetv2_mstkd.dataset_conversion.modality_names import SYNONYMS, canonical_modality

LONGEST = 3
"""Parts of a name that may spell one modality: ``t1_post_contrast``."""

NATIVE, ENHANCED = "T1", "T1ce"

_START, _END = r"(?<![^\W_])", r"(?![^\W_])"
_AGENT = r"(?:ce|km|ga?d[a-z]*|contrast)"

NO_CONTRAST = re.compile(
    rf"{_START}(?:pre|non?|without|wo|w/o|before|ohne|vor)[\W_]*(?:{_AGENT}|c){_END}|{_START}c-{_END}|(?<=[\s_])-c{_END}",
    re.IGNORECASE,
)
"""``C-``, ``-C`` after a space, ``pre contrast`` and the like."""

CONTRAST = re.compile(rf"t1.*(?:{_START}(?:{_AGENT}|post(?![\W_]*op)){_END}|{_START}c\+|\+\s*ce?{_END})", re.IGNORECASE)
"""``+C``, ``Gd`` and the like, anywhere after T1."""

OTHER_WEIGHTING = re.compile(r"\*|star(?![a-vx-z])|(?<![a-z])(?:swi|gre)(?![a-z])", re.IGNORECASE)
"""``T2*`` is not T2."""


def recognise(name: str, modalities: Sequence[str], *, contrast: bool = False) -> int | None:
    """Return the channel of the modality that the name of a file or series spells, None if it spells none.

    The longest parts that are modalities count; without one a channel number as in ``CASE_0003.nii.gz``. A T1 is T1ce
    if a mark of contrast medium follows. A name that spells two modalities, or marks such as ``T2*``, tells nothing.

    Parameters
    ----------
    contrast
        The image was taken after contrast medium: a T1 is then T1ce, if the model has that. If its name says the
        opposite, neither is believed.

    >>> recognise("BraTS-GLI-00042-000-t2f.nii.gz", ("T1", "T1ce", "T2", "FLAIR"))
    3
    >>> recognise("ax T1 se +C", ("T1", "T1ce"))
    1
    >>> recognise("ax T1 se C-", ("T1", "T1ce"))
    0
    """
    channels = {_key(modality): channel for channel, modality in enumerate(modalities)}
    own = " ".join(modalities).casefold()
    if any(mark.casefold() not in own for mark in OTHER_WEIGHTING.findall(name)):
        return None
    name, denied = NO_CONTRAST.subn(" ", name)
    stem = re.sub(r"(\.[A-Za-z]\w*)+$", "", name)
    found = _spelled(stem, {*channels, *map(_key, SYNONYMS)})
    if not found:
        number = re.search(r"_(\d{4})$", stem)
        return int(number[1]) if number and int(number[1]) < len(modalities) else None
    native, enhanced = _key(NATIVE), _key(ENHANCED)
    if found == {native}:
        if contrast and denied:
            return None
        found = {enhanced} if contrast or CONTRAST.search(name) else found
    if found == {enhanced} and enhanced not in channels:
        found = {native}
    return channels.get(found.pop()) if len(found) == 1 else None


def _spelled(stem: str, known: Collection[str]) -> set[str]:
    """The modalities that a name spells, each from as many parts as possible."""
    parts = [part for part in re.split(r"[\W_]+", stem) if part]
    found = set()
    for length in range(LONGEST, 0, -1):
        for start in range(len(parts) - length, -1, -1):
            words = parts[start : start + length]
            if all(words) and (key := _key("".join(words))) in known:
                found.add(key)
                parts[start : start + length] = [""] * length  # used
    return found


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", canonical_modality(name)).casefold()
