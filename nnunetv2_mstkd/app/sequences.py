"""Which modality of a model an image is, by its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from nnunetv2_mstkd.dataset_conversion.modality_names import SYNONYMS, canonical_modality

LONGEST = 3
"""Parts of a name that may spell one modality: ``t1_post_contrast``."""

NATIVE, ENHANCED = "T1", "T1ce"

_START, _END = r"(?<![^\W_])", r"(?![^\W_])"
_AGENT = r"(?:ce|km|ga?d|gado[a-z]*|contrast)"
_PLANE = r"(?:(?:ax|tra|cor|sag)[a-z]*|3d)"

NO_CONTRAST = re.compile(
    rf"{_START}(?:pre|non?|without|wo|w/o|before|ohne|vor)[\W_]*(?:{_AGENT}|c){_END}"
    rf"|{_START}(?:vkm|nce|(?:{_AGENT}|c)-){_END}|(?<=[\s_])-(?:{_AGENT}|c){_END}",
    re.IGNORECASE,
)
"""``C-``, ``Gd-``, ``-C`` after a space, ``pre contrast`` and the like."""

CONTRAST = re.compile(
    rf"t1.*(?:{_START}(?:n?{_AGENT}|post){_END}|{_START}c\+|\+\s*ce?{_END}|[\s_]c{_END})"
    rf"|{_START}(?:gado[a-z]*|contrast){_END}|(?<!-){_START}(?:gd|ce|post)[\W_]+(?:{_PLANE}[\W_]+)*t1",
    re.IGNORECASE,
)
"""``+C``, ``Gd``, ``post`` and the like after T1, or just before it."""

PERHAPS = re.compile(rf"{_START}(?:{_AGENT}|post){_END}.*t1", re.IGNORECASE)
"""Earlier in a name they may also be initials, or say when the image was taken."""

WITHOUT_AGENT = re.compile(rf"{_START}(?:pre|nativ[a-z]*|plain|unenhanced|baseline){_END}", re.IGNORECASE)
"""Denies contrast medium where a header claims it; some scanners note it for all images of an examination."""

ENTITIES = re.compile(rf"{_START}(?:sub|ses)-[a-z0-9]+", re.IGNORECASE)
"""Of BIDS: patient and session."""

TREATMENT = re.compile(
    rf"{_START}(?:post|pre)[\W_]*(?:op|surg|rt{_END}|radi|chemo|treat|therap|tx{_END})[a-z]*", re.IGNORECASE
)
"""``post-op`` says nothing about contrast medium."""

OTHER_WEIGHTING = re.compile(
    r"\*|star(?![a-vx-z])|subtract|mask(?![a-z])|(?<=[\W_])sub(?![a-z\-]|[\W_]*\d)"
    r"|(?<![a-z])(?:swi|gre|ha?emo|dwi|adc|dti|asl|dsc|dce|perf(?:usion)?|stir|tirm|seg(?:mentation|mented)?|label|map)"
    r"(?![a-z])",
    re.IGNORECASE,
)
"""``T2*`` is not T2, and a mask, a map or a difference of two images is no sequence."""

DARK_FLUID = re.compile(r"dark[\W_]*fluid", re.IGNORECASE)
WITH_FLAIR = re.compile(rf"{_START}(?:t2w?|tirm){_END}", re.IGNORECASE)
"""``t2_tirm_tra_dark-fluid`` is FLAIR."""

ENDINGS = re.compile(r"(?:\.(?:nii|gz|dcm|ima))+$", re.IGNORECASE)


def recognise(name: str, modalities: Sequence[str], *, contrast: bool = False) -> int | None:
    """Return the channel of the modality that the name of a file or series spells, None if it spells none.

    The longest parts that are modalities count; without one a channel number as in ``CASE_0003.nii.gz``. A T1 is T1ce
    if there is a mark of contrast medium. A name that spells two modalities, or has marks such as ``T2*``, or one that
    may stand for contrast medium or for initials (``KM_T1``), tells nothing.

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
    stem = DARK_FLUID.sub(" FLAIR ", ENTITIES.sub(" ", ENDINGS.sub("", name)))
    if "flair" in stem.casefold():
        stem = WITH_FLAIR.sub(" ", stem)
    stem, denied = NO_CONTRAST.subn(" ", TREATMENT.sub(" ", stem))
    standard = set(map(_key, SYNONYMS))
    found = _spelled(stem, {*channels, *standard})
    marks = OTHER_WEIGHTING.findall(stem)
    if not found & (channels.keys() - standard) and any(mark.casefold() not in own for mark in marks):
        return None
    if not found:
        number = re.search(r"_(\d{4})$", stem)
        return int(number[1]) if number and int(number[1]) < len(modalities) else None
    native, enhanced = _key(NATIVE), _key(ENHANCED)
    if found == {native}:
        marked = bool(CONTRAST.search(stem))
        native_by_name = denied or (WITHOUT_AGENT.search(stem) and not marked)
        if (contrast and native_by_name) or (PERHAPS.search(stem) and not marked and not contrast):
            return None
        found = {enhanced} if contrast or marked else found
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
