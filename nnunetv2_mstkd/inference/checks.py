"""Checking all cases before any network runs, and finding out which modalities they have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from tqdm import tqdm

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.images.geometry import Geometry
from nnunetv2_mstkd.inference.input_folder import Case, Problem
from nnunetv2_mstkd.nnunet.reading import read_checked


@dataclass(frozen=True)
class Checker:
    """Checks cases one by one.

    Attributes
    ----------
    names:
        of the C channels.
    reader:
        nnU-Net's reader of the plans.
    normalization_schemes:
        of the plans, one per channel; None where no network is going to see the cases.
    """

    names: Sequence[str]
    reader: type[BaseReaderWriter]
    normalization_schemes: Sequence[str] | None = None

    def check(self, case: Case) -> tuple[Case, list[Problem]]:
        """Read all files of a case.

        Returns
        -------
        The case, with all-zero images turned into absent ones, and what is wrong with it: nothing, or a problem for
        each unreadable file, NaN or infinite voxel, constant image and grid other than the first image's.
        """
        texts: list[str] = []
        grids: dict[int, Geometry] = {}
        zero = []
        for channel, path in enumerate(case.files):
            if path is None:
                continue
            where = f"{self.names[channel]} ({path.name})"
            try:
                found = read_checked(path, self.reader)
            except (ValueError, OSError) as error:
                texts.append(f"{where} {error}")
                continue
            low, high = float(found.image.min()), float(found.image.max())
            if found.not_finite:
                texts.append(f"{where} has {found.not_finite} of {found.image.size} voxels that are NaN or infinite")
            elif low == high == 0:
                zero.append(channel)
                continue
            elif low == high:
                texts.append(f"{where} is constant, {low:g} everywhere; an absent modality is zero or has no file")
            grids[channel] = found.grid
        if grids:
            first, reference = next(iter(grids.items()))
            texts += [
                f"{self.names[channel]} has {difference} as in {self.names[first]}; resample it to the same grid"
                for channel, geometry in grids.items()
                for difference in reference.differences(geometry)
            ]
        checked = replace(case.without(zero), all_zero=tuple(zero))
        if not any(checked.availability):
            texts.append("has no modality" + (", only all-zero images" if zero else ""))
        texts += self._absent_but_not_zero(checked)
        return checked, [Problem(case.name, text) for text in texts]

    def check_all(
        self, cases: Sequence[Case], *, threads: int = 1, progress: bool = False
    ) -> tuple[list[Case], list[Problem]]:
        """Check many cases at a time, with a progress bar; both lists in the order of the cases."""
        checked, problems = [], []
        pool = ThreadPoolExecutor(max(1, threads))  # threads do: reading releases the interpreter's lock
        try:
            results = pool.map(self.check, cases)
            for case, found in tqdm(results, "checking", len(cases), unit="case", disable=not progress, leave=False):
                checked.append(case)
                problems += found
        finally:
            pool.shutdown(cancel_futures=True)
        return checked, problems

    def _absent_but_not_zero(self, case: Case) -> list[str]:
        texts = []
        for name, available, scheme in zip(
            self.names, case.availability, self.normalization_schemes or (), strict=False
        ):
            if not available and scheme not in modalities.ZERO_KEEPING_NORMALIZATIONS:
                texts.append(f"{name} is absent, but {scheme} turns the zeros of an absent channel into other values")
        return texts


def split_good(cases: Sequence[Case], problems: Iterable[Problem]) -> list[Case]:
    """The cases without a problem of their own."""
    bad = {problem.case for problem in problems}
    return [case for case in cases if case.name not in bad]


def listed(problems: Sequence[Problem]) -> str:
    """All problems, one indented line each, those of one case together."""
    lines = sorted(f"{problem.case}: {problem.text}" if problem.case else problem.text for problem in problems)
    return "".join(f"\n  {line}" for line in lines)
