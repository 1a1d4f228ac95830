"""Find the files of every case, by their names alone."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.images.completeness import NIFTI_ENDINGS

from .description import LABEL, Description, alternatives
from .modality_names import canonical_modality
from .releases import RELEASES, releases_of_case
from .slices import SLICE_ENDINGS, find_slices, slice_files

IMAGE_ENDINGS = (*NIFTI_ENDINGS, ".mha", ".mhd", ".nrrd", ".nhdr", ".gipl")
DEPTH = 5
"""Levels below the source that are searched for case folders of a release: archives unpack into several levels."""

CASE_NAME = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)


@dataclass(frozen=True)
class Case:
    """The files of one case."""

    name: str  # without spaces; the files in the data set are named after it
    images: tuple[Path | None, ...]  # per channel; None if absent; several channels may be volumes of one file
    label: Path | None  # None for unlabelled cases and some test cases; with slices both are the folder
    is_test: bool

    @property
    def part(self) -> str:
        """``Tr`` or ``Ts``, as in the names of nnU-Net's folders."""
        return "Ts" if self.is_test else "Tr"

    @property
    def unlabelled(self) -> bool:
        """Whether it is a training case without a label file."""
        return self.label is None and not self.is_test

    @property
    def files(self) -> list[Path]:
        """All different files; those in it for a folder of slices."""
        paths = dict.fromkeys(path for path in (*self.images, self.label) if path is not None)
        return [file for path in paths for file in (slice_files(path) if path.is_dir() else [path])]


@dataclass
class Found:
    """Result of :func:`find_cases`: usable cases, lines about each of the others by name, and general remarks."""

    cases: list[Case] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The names of all cases, also those with problems."""
        return sorted([*(case.name for case in self.cases), *self.problems])

    def add(self, case: Case, problems: list[str]) -> None:
        """Add a case, or only its problems if there are any."""
        if problems:
            self.problems[case.name] = problems
        else:
            self.cases.append(case)


def find_cases(
    source: Path,
    description: Description,
    *,
    allow_missing: bool = False,
    unlabelled: bool = False,
    unlabelled_as_test: bool = False,
    follow_links: bool = False,
) -> Found:
    """Find the files of all cases.

    Parameters
    ----------
    source
        The folder of the data set.
    description
        What it should hold.
    allow_missing
        Keep cases that lack the files of some, but not all, modalities.
    unlabelled
        Keep training cases without a label file.
    unlabelled_as_test
        Make cases without a label file test cases.
    follow_links
        Accept links to files outside `source`.

    Raises
    ------
    MissingFileError, InputError
        If the folder does not exist; if it holds no cases, cases of another release, or none to train on; if names
        clash; if the channels of stacked files are in another order.
    """
    if not source.is_dir():
        raise MissingFileError(f"no folder {source}")
    search = _Search(source, description, allow_missing, unlabelled, unlabelled_as_test, follow_links)
    if description.stack and not description.slices:
        found = _find_stacked(search)
    else:
        folders, found = _release_folders(search) if description.case_names else _folders(search)
        release = RELEASES.get(description.release)
        for folder in folders:
            name = release.case_of(folder) if release else folder.name
            found.add(*(search.find_slices(folder) if description.slices else search.find(name, folder)))
    _refuse_clashes(source, found.names)
    names = found.names
    absent = [test for test in description.test_cases if not any(fnmatchcase(name, test) for name in names)]
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise InputError(f"no case in {source} matches the test case {absent[0]!r}{more}")
    if found.cases and all(case.is_test for case in found.cases):
        raise InputError(f"all {len(found.cases)} cases in {source} are test cases, expected at least one to train on")
    lacking = [case.name for case in found.cases if case.unlabelled]
    no_label = f"{LABEL}: no file"
    lacking += [name for name, lines in found.problems.items() if any(line.startswith(no_label) for line in lines)]
    training = len(found.names) - sum(case.is_test for case in found.cases)
    if len(lacking) == training and (found.cases or training > 1):
        raise InputError(
            f"none of the {len(lacking)} cases in {source} has a label file "
            f"({' or '.join(alternatives(description.label))}): is it a validation set? There is nothing to train on"
        )
    return found


def _refuse_clashes(source: Path, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"several cases in {source} are named {', '.join(twice)}, expected distinct names")
    by_folded = defaultdict(list)
    for name in names:
        by_folded[name.casefold()].append(name)
    for alike in by_folded.values():
        if len(alike) > 1:
            raise InputError(
                f"the cases {' and '.join(alike)} in {source} differ only in upper and lower case, and would overwrite "
                "each other on file systems that ignore case; rename one"
            )


# ---- folders of cases ----------------------------------------------------------------------------------------------


def _folders(search: _Search) -> tuple[list[Path], Found]:
    """The folders that the pattern of a description matches."""
    source, pattern = search.source, search.description.cases
    folders = [folder for folder in source.glob(pattern) if folder.is_dir() and not folder.name.startswith(".")]
    folders.sort(key=lambda folder: folder.name)
    if not folders:
        loose = next((path.name for path in source.iterdir() if path.name.lower().endswith(IMAGE_ENDINGS)), None)
        hint = "" if loose is None else f"; images such as {loose} that lie side by side must be moved into them first"
        raise InputError(f"no folder in {source} matches {pattern!r}, expected one folder per case{hint}")
    _refuse_clashes(source, [folder.name for folder in folders])
    problem = (
        "the name of the folder has a space or a sign other than ASCII letters, digits, '.', '_' and '-', which some "
        "programs cannot read in file names; rename it"
    )
    found = Found(problems={folder.name: [problem] for folder in folders if not CASE_NAME.fullmatch(folder.name)})
    return [folder for folder in folders if folder.name not in found.problems], found


def _release_folders(search: _Search) -> tuple[list[Path], Found]:
    """The case folders of a release at any depth, after a look at what else the source holds."""
    source, description = search.source, search.description
    release = RELEASES[description.release]
    endings = SLICE_ENDINGS if description.slices else NIFTI_ENDINGS
    ours, others, strange = [], defaultdict(list), []
    for folder, names in _walk(source):
        if re.fullmatch(description.case_names, release.case_of(folder), re.ASCII):
            ours.append(folder)
        elif releases := releases_of_case(folder):
            others[" or ".join(releases)].append(folder.name)
        elif any(name.lower().endswith(endings) for name in names):
            strange.append(folder)
    example = release.example
    listed = "; ".join(f"{len(names)} of {key} such as {names[0]}" for key, names in others.items())
    if not ours:
        raise InputError(
            f"no case folder of {description.release} in {source}, expected names such as {example}"
            + (f"; it holds cases of another release: {listed}" if others else "")
        )
    if others:
        raise InputError(
            f"{source} mixes {len(ours)} cases of {description.release} with {listed}; convert them separately"
        )
    problem = (
        f"this folder holds images, but its name is not as in {description.release} ({example}); rename or remove it"
    )
    ours.sort(key=release.case_of)
    twice = [pair for pair in pairwise(ours) if release.case_of(pair[0]) == release.case_of(pair[1])]
    if twice:
        raise InputError(
            f"{source} holds {len(twice)} cases more than once, such as {twice[0][0].name} in "
            f"{' and '.join(str(folder.parent) for folder in twice[0])}; name one of these folders"
        )
    _refuse_clashes(source, [release.case_of(folder) for folder in ours])
    found = Found(problems={str(folder.relative_to(source)): [problem] for folder in strange})
    if description.slices:
        spacing = " x ".join(f"{mm:g}" for mm in description.slices.spacing)
        found.notes.append(f"the files have no spacing: {spacing} mm is assumed, --spacing changes it")
    return ours, found


def _walk(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """All folders below `source` with the names of their files; case folders of any release are not entered."""
    for top, folders, files in os.walk(source):
        here = Path(top)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if here != source:
            yield here, files
        if len(here.relative_to(source).parts) >= DEPTH or releases_of_case(here):
            folders.clear()
        for name in folders:
            if (here / name).is_symlink():  # os.walk lists it, but does not enter it
                yield here / name, os.listdir(here / name)


@dataclass(frozen=True)
class _Search:
    """Where to look, and what counts as a complete case."""

    source: Path
    description: Description
    allow_missing: bool
    unlabelled: bool
    unlabelled_as_test: bool
    follow_links: bool

    def find(self, name: str, folder: Path) -> tuple[Case, list[str]]:
        """The case in `folder`, and a line for each of its files that is missing, ambiguous or elsewhere."""
        description = self.description
        entries = sorted(os.listdir(folder)) if folder.is_dir() else []
        found: dict[str, Path] = {}
        missing: dict[str, str] = {}
        problems = []
        for role, patterns in {**description.modalities, LABEL: description.label}.items():
            wanted = [pattern.replace("{case}", glob.escape(name)) for pattern in alternatives(patterns)]
            files = list(dict.fromkeys(path for pattern in wanted for path in _matching(folder, entries, pattern)))
            if len(files) == 1:
                found[role] = files[0]
            elif files:
                listed = ", ".join(path.name for path in files)
                problems.append(f"{role}: {listed} match {' or '.join(map(repr, wanted))}, expected one file")
            else:
                missing[role] = " or ".join(map(repr, wanted))
        problems += _shared(found)
        is_test = self.is_test(name, labelled=LABEL not in missing)
        present = [role for role in description.modalities if role in found]
        used = {path.name for path in found.values()}
        spare = [entry for entry in entries if entry.lower().endswith(IMAGE_ENDINGS) and entry not in used]
        if not found.keys() - {LABEL} and not problems:
            wanted_files = ", ".join(pattern for role, pattern in missing.items() if role != LABEL)
            problems.append(f"it has no image: no file matches {wanted_files}")
            missing.clear()
        for role, patterns in missing.items():
            tolerated = is_test or self.unlabelled if role == LABEL else self.allow_missing and present
            if tolerated:
                continue
            hint = f"; not used: {', '.join(spare)}" if spare else ""
            if role != LABEL and present and not problems:
                hint += "; --allow-missing fills an absent modality with zeros"
            problems.append(f"{role}: no file matches {patterns}{hint}")
        for role, path in found.items():
            problems += [f"{role}: {line}" for line in self.check_place(path)]
        images = tuple(found.get(role) for role in description.modalities)
        return Case(name, images, found.get(LABEL), is_test), problems

    def find_slices(self, folder: Path) -> tuple[Case, list[str]]:
        """The case whose slices are in `folder`, and a line for each thing that is wrong with its files."""
        files = find_slices(folder, self.description)
        problems = files.problems
        is_test = self.is_test(folder.name, labelled=bool(files.masks))
        if files.images and not files.masks and not (is_test or self.unlabelled):
            wanted = alternatives(self.description.label)[0].replace("{case}", folder.name)
            problems.append(f"{LABEL}: no file matches {wanted!r}")
        places = (self.check_place(path) for path in (*files.images.values(), *files.masks.values()))
        problems += next((lines for lines in places if lines), [])  # if the folder is a link, they all are alike
        images = (folder,) * len(self.description.modalities)
        return Case(folder.name, images, folder if files.masks else None, is_test), problems

    def is_test(self, name: str, *, labelled: bool) -> bool:
        """Whether nnU-Net shall not train on a case."""
        return self.description.is_test_case(name) or (self.unlabelled_as_test and not labelled)

    def check_place(self, path: Path) -> list[str]:
        """A line if a link is broken, or leads out of the source."""
        real = Path(os.path.realpath(path))
        if not real.is_file():
            return [f"{path.name} is a link to {real}, which is not a file"]
        if not self.follow_links and not real.is_relative_to(os.path.realpath(self.source)):
            return [f"{path.name} is a link to {real}, outside {self.source}; --follow-links accepts it"]
        return []


def _matching(folder: Path, entries: Sequence[str], pattern: str) -> list[Path]:
    if "/" in pattern or os.sep in pattern:
        return sorted(path for path in folder.glob(pattern) if not path.is_dir())
    matching = (folder / entry for entry in entries if not entry.startswith(".") and fnmatchcase(entry, pattern))
    return [path for path in matching if not path.is_dir()]


def _shared(found: dict[str, Path]) -> list[str]:
    """A line for each file that several patterns match."""
    by_file = defaultdict(list)
    for role, path in found.items():
        by_file[path].append(role)
    return [f"{' and '.join(roles)} are the same file {path.name}" for path, roles in by_file.items() if roles[1:]]


# ---- one file of four dimensions per case --------------------------------------------------------------------------


def _find_stacked(search: _Search) -> Found:
    """The cases of the Medical Segmentation Decathlon: ``imagesTr/CASE.nii.gz`` and ``labelsTr/CASE.nii.gz``."""
    source, description = search.source, search.description
    release = RELEASES[description.release]
    tops = [top for top in (source, *sorted(source.iterdir())) if (top / "imagesTr").is_dir()]
    if len(tops) != 1:
        raise InputError(
            f"{len(tops)} folders imagesTr in {source}, expected one: give the folder that holds imagesTr and "
            f"labelsTr, as {description.release} unpacks"
        )
    top = tops[0]
    _check_order(top / "dataset.json", description)
    found = Found()
    # the archive also has "._" files, which macOS adds
    files = [path for path in sorted((top / "imagesTr").glob("[!.]*")) if path.name.lower().endswith(NIFTI_ENDINGS)]
    names = [path.name.removesuffix(".gz").removesuffix(".nii") for path in files]
    _refuse_clashes(top, names)
    if not any(re.fullmatch(release.case_names, name, re.ASCII) for name in names):
        raise InputError(f"no case of {description.release} in {top / 'imagesTr'}, expected {release.example}.nii.gz")
    for name, image in zip(names, files, strict=True):
        if not re.fullmatch(release.case_names, name, re.ASCII):
            found.problems[name] = [
                f"its name is not as in {description.release} ({release.example}); rename or remove it"
            ]
            continue
        labels = [path for path in (top / "labelsTr" / f"{name}{end}" for end in NIFTI_ENDINGS) if path.exists()]
        is_test = search.is_test(name, labelled=bool(labels))
        problems = [f"image: {line}" for line in search.check_place(image)]
        if len(labels) == 1:
            problems += [f"{LABEL}: {line}" for line in search.check_place(labels[0])]
        elif labels or not (is_test or search.unlabelled):
            problems.append(f"{LABEL}: {len(labels)} files {name}.nii.gz or {name}.nii in labelsTr, expected one")
        images = (image,) * len(description.modalities)
        found.add(Case(name, images, labels[0] if labels else None, is_test), problems)
    unlabelled = list((top / "imagesTs").glob("[!.]*.nii*"))
    if unlabelled:
        found.notes.append(f"{len(unlabelled)} images in {top / 'imagesTs'} have no labels and were left out")
    return found


def _check_order(file: Path, description: Description) -> None:
    """Refuse files whose own table of channels contradicts the release."""
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        channels = content.get("modality", content.get("channel_names", {}))
        order = [canonical_modality(str(channels[key])) for key in sorted(channels, key=int)]
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"cannot read the order of the channels in {file}: {' '.join(str(error).split())}") from error
    if order and order != list(description.stack):
        raise InputError(
            f"{file} says that the channels are {', '.join(order)}, but in {description.release} they are "
            f"{', '.join(description.stack)}"
        )
