"""Checking all cases before any network runs, and finding out which modalities they have."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.images.completeness import UNUSABLE
from nnunetv2_mstkd.images.geometry import Forms, Geometry
from nnunetv2_mstkd.nnunet.input_folder import Case, Problem
from nnunetv2_mstkd.nnunet.reading import Channel, Reader, read_checked


@dataclass(frozen=True)
class Checker:
    """Checks cases one by one."""

    names: Sequence[str]
    """Names of the C channels."""
    reader: Reader
    normalization_schemes: Sequence[str] = ()
    """nnU-Net's normalisation of each channel; empty if no network is going to see the cases."""
    target: Sequence[float] = ()
    """Spacing of all three axes in mm to which the images are going to be resampled; empty: they are not, or in 2-D."""

    def check(self, case: Case) -> tuple[Case, list[Problem]]:
        """Read all files of a case.

        Returns
        -------
        The case, with all-zero images turned into absent ones, and its problems: unreadable files, NaN, infinite
        or huge voxels, constant images, and grids, or places by the sform, that differ from the first image's.
        """
        texts: list[str] = []
        grids: dict[int, Geometry] = {}
        forms: dict[int, Forms] = {}
        zero = []
        for channel, path in enumerate(case.files):
            if path is None:
                continue
            try:
                found = read_checked(path, self.reader)
            except (ValueError, OSError) as error:
                texts.append(f"{self.names[channel]} ({path.name}) {error}")
                continue
            if not found.unusable and not found.image.any():
                zero.append(channel)
                continue
            texts += [f"{self.names[channel]} ({path.name}) {text}" for text in _wrong_voxels(found)]
            grids[channel] = found.grid
            if found.forms is not None:
                forms[channel] = found.forms
        texts += self._other_grids(grids) or self._other_forms(forms) or self._too_large(grids)
        checked = replace(case.without(zero), all_zero=tuple(zero))
        if not any(checked.availability):
            texts.append("has no modality" + (", only all-zero images" if zero else ""))
        texts += [
            f"{self.names[channel]} is absent, but {scheme} turns the zeros of an absent channel into other values"
            for channel, scheme in enumerate(self.normalization_schemes)
            if not checked.availability[channel] and scheme not in modalities.ZERO_KEEPING_NORMALIZATIONS
        ]
        return checked, [Problem(case.name, text) for text in texts]

    def _other_grids(self, grids: Mapping[int, Geometry]) -> list[str]:
        """What differs between the first image's grid and those of the others."""
        if not grids:
            return []
        first, reference = next(iter(grids.items()))
        return [
            f"{self.names[channel]} has {difference} as in {self.names[first]}; resample it to the same grid"
            for channel, geometry in grids.items()
            for difference in reference.differences(geometry)
        ]

    def _too_large(self, grids: Mapping[int, Geometry]) -> list[str]:
        """Whether the resampled images cannot fit into memory: the system would kill the process with all cases."""
        if not grids or len(self.target) != 3:
            return []
        grid = next(iter(grids.values()))
        voxels = math.prod(grid.size) * math.prod(grid.spacing) / math.prod(self.target)
        needed, available = 4 * len(self.names) * voxels, memory()  # float32
        if available is None or needed <= available:
            return []
        spacing = " x ".join(f"{edge:g}" for edge in grid.spacing)
        return [
            f"needs {needed / 2**30:.0f} GiB after resampling, and this machine has {available / 2**30:.0f} GiB of "
            f"memory; is the spacing of {spacing} mm right?"
        ]

    def _other_forms(self, forms: Mapping[int, Forms]) -> list[str]:
        """Which images other tools than nnU-Net's reader see in another place than the first one."""
        if not forms:
            return []
        first, reference = next(iter(forms.items()))
        return [
            f"{self.names[channel]} has another position than {self.names[first]} by its sform. Probably only the "
            f"sform was changed; make both equal (fslorient -copysform2qform)"
            for channel, each in forms.items()
            if reference.displaced(reference.preferred, each.preferred)
        ]


def memory() -> int | None:
    """Main memory of this machine in bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _wrong_voxels(channel: Channel) -> list[str]:
    """Whether the voxels of an image that is not zero everywhere are unusable."""
    if channel.unusable:
        return [f"has {channel.unusable} of {channel.image.size} voxels that are {UNUSABLE}"]
    low, high = float(channel.image.min()), float(channel.image.max())
    if low == high:
        return [f"is constant, {low:g} everywhere; an absent modality is zero or has no file"]
    return []


def count_problems(problems: Sequence[Problem]) -> str:
    """``3 problems in 2 cases``, or ``3 problems`` if no case is concerned."""
    number, bad = len(problems), len({problem.case for problem in problems if problem.case is not None})
    return f"{number} problem{'s' * (number != 1)}" + (f" in {bad} case{'s' * (bad != 1)}" if bad else "")


def format_problems(problems: Sequence[Problem]) -> str:
    """List all problems, one indented line each, those of one case together."""
    lines = sorted(f"{problem.case}: {problem.text}" if problem.case else problem.text for problem in problems)
    return "".join(f"\n  {line}" for line in lines)
