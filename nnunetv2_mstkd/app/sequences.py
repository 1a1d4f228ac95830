"""Which modality of a model an image is, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nnunetv2_mstkd.dataset_conversion.modality_names import canonical_modality

LONGEST = 3
"""Parts of a name that may spell one modality: ``t1_post_contrast``."""

NATIVE, ENHANCED = "T1", "T1ce"


def recognise(name: str, modalities: Sequence[str], *, contrast: bool = False) -> int | None:
    """Return the channel of the modality that the name of a file or series spells, None if it spells none.

    The longest part that is a modality counts, the last one of several; without one a channel number as in
    ``CASE_0003.nii.gz``.

    Parameters
    ----------
    contrast
        The image was taken after contrast medium, whatever its name: a T1 is then T1ce, if the model has that.

    >>> recognise("BraTS-GLI-00042-000-t2f.nii.gz", ("T1", "T1ce", "T2", "FLAIR"))
    3
    >>> recognise("patient_T1_post.nii.gz", ("T1", "T1ce"))
    1
    """
    channels = {_key(modality): channel for channel, modality in enumerate(modalities)}
    stem = re.sub(r"(\.[A-Za-z]\w*)+$", "", name)
    parts = [part for part in re.split(r"[\W_]+", stem) if part]
    found = None
    for length in range(1, LONGEST + 1):  # longer ones replace what shorter ones found
        spelled = [_key("".join(parts[start : start + length])) for start in range(len(parts) - length + 1)]
        found = next((channels[key] for key in reversed(spelled) if key in channels), found)
    if found is None:
        number = re.search(r"_(\d{4})$", stem)
        return int(number[1]) if number and int(number[1]) < len(modalities) else None
    if contrast and found == channels.get(_key(NATIVE)):
        return channels.get(_key(ENHANCED), found)
    return found


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", canonical_modality(name)).casefold()
