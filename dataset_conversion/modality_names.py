"""One name for each MRI sequence, so that a model trained on one release knows the channels of another."""

from __future__ import annotations

import re
from types import MappingProxyType

BRATS_MODALITIES = ("T1", "T1ce", "T2", "FLAIR")
"""Names and order of the channels of every BraTS data set that this package writes, as in nnU-Net's own converters."""

SYNONYMS = MappingProxyType(
    {
        "T1": ("t1n", "t1w", "t1native", "t1pre", "t1weighted"),
        "T1ce": ("t1c", "t1gd", "t1wce", "t1cw", "t1post", "t1postcontrast", "t1contrast", "t1gad", "t1gadolinium"),
        "T2": ("t2w", "t2weighted"),
        "FLAIR": ("t2f", "t2flair", "flairw", "t2wflair"),
    }
)
"""Other names in use, in lower case and without signs."""

_BY_KEY = {name.lower(): name for name in SYNONYMS} | {key: name for name, keys in SYNONYMS.items() for key in keys}


def canonical_modality(name: str) -> str:
    """Return the name that this package gives a sequence: ``T1ce`` for ``t1c``, ``T1_Gd`` or ``t1-post``.

    Case, spaces and signs are ignored. The name of an unknown sequence is returned unchanged.

    >>> canonical_modality("t2-flair")
    'FLAIR'
    >>> canonical_modality("ADC")
    'ADC'
    """
    return _BY_KEY.get(re.sub(r"[\W_]+", "", name).lower(), name)
