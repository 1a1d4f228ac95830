"""One open page: the images that it uploaded, which modality each is, and its segmentations."""

from __future__ import annotations

import gzip
import itertools
import math
import shutil
import threading
import time
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.app import dicom
from nnunetv2_mstkd.app.jobs import Job
from nnunetv2_mstkd.app.sequences import recognise
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.geometry import read_forms
from nnunetv2_mstkd.inference.predictor import Predictor

GZIP = b"\x1f\x8b"
NIFTI = ((344, b"n+1\0"), (4, b"n+2\0"))
"""Where in a NIfTI file its version says so."""

MEGABYTE = 2**20


@dataclass
class Image:
    """One image of the case."""

    number: int
    name: str
    """As the user knows it; never part of a path."""
    path: Path
    """A NIfTI file."""
    channel: int | None
    """Which modality it is; None if that is not known."""
    series: dicom.Series | None = None
    """What it was made from, if it came as DICOM."""
    left_out: bool = False


@dataclass
class Session:
    """Everything that belongs to one page. Files are in ``folder``, which :meth:`close` removes."""

    folder: Path
    predictor: Predictor
    limit: int
    """How many bytes may be uploaded in all, and how many one image may have."""
    images: list[Image] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """What became of the last upload's files that are no images."""
    problems: list[str] = field(default_factory=list)
    """Why the images cannot be segmented as they are."""
    remarks: list[str] = field(default_factory=list)
    """What the user should know of the images as they are now, though they can be segmented."""
    available: tuple[str, ...] = ()
    """Modalities of the images, if there is no problem."""
    version: int = 0
    """Counts the changes, so that whoever follows the session sees that there is one."""
    streams: int = 0
    """How many connections follow it: 0 if the page is closed."""
    last_used: float = field(default_factory=time.monotonic)
    closed: bool = False
    cleared: int = 0
    """How often the images were removed: an upload that was on its way then is not counted and not kept."""

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.uploads: list[tuple[Path, str]] = []
        self.received = 0
        # Requests that take long run in threads. The server's own thread never waits for this lock.
        self.lock = threading.RLock()
        self._numbers = itertools.count(1)

    # ---- files -----------------------------------------------------------------------------------------------------

    def new_file(self) -> Path:
        """Return the path of a file to be uploaded."""
        return self.folder / f"upload{next(self._numbers)}"

    def count_received(self, number: int) -> None:
        """Note that so many bytes arrived; InputError if the session now has more than its limit."""
        self.received += number
        if self.received > self.limit:
            raise InputError(
                f"The files have more than {self.limit // MEGABYTE} MB, the limit of this page "
                f"(mstkd app --max-upload); drop one image per sequence only."
            )

    def sort(self) -> None:
        """Turn what was uploaded since the last call into images, and guess the modality of each."""
        with self.lock:
            uploads, self.uploads = self.uploads, []
            self.notices = []
            if not uploads:
                self.notices.append("No file arrived; drop one NIfTI file per sequence, a folder, or DICOM series.")
                self.changed()
                return  # the images and their segmentations are what they were
            slices, before = [], len(self.images)
            for path, name in uploads:
                start = _start(path)
                if dicom.is_dicom(start):
                    slices.append((path, name))
                    continue
                size = path.stat().st_size
                try:
                    self._add(name, _as_nifti(path, start, self.limit), None)
                except InputError as error:
                    path.unlink(missing_ok=True)
                    self.received -= size
                    self.notices.append(f"{name} {error}.")
            series, problems = dicom.read_series(slices)
            self.notices += problems
            for each in series:
                path = self.new_file().with_suffix(".nii.gz")
                try:
                    _refuse_larger(each.size, self.limit)
                    dicom.write_volume(each, path)
                except InputError as error:
                    self.notices.append(f"The DICOM series {each.name} {error}.")
                else:
                    self._add(each.name, path, each)
            if len(self.images) == before:
                self.changed()
                return  # the images and their segmentations are what they were
            self._leave_out_surplus()
        self.assess()

    def discard(self) -> None:
        """Forget what was uploaded since the last call of :meth:`sort`: not all of it arrived."""
        with self.lock:
            uploads, self.uploads = self.uploads, []
            for path, _ in uploads:
                self.received -= path.stat().st_size
                path.unlink()

    def _add(self, name: str, path: Path, series: dicom.Series | None) -> None:
        channel = recognise(name, self.predictor.modalities, contrast=series is not None and series.contrast)
        self.images.append(Image(next(self._numbers), name, path, channel, series))

    def _leave_out_surplus(self) -> None:
        """Leave out images of unknown modality when every modality of the model has one."""
        names = self.predictor.modalities
        if len({image.channel for image in self.images} - {None}) < len(names):
            return
        for image in self.images:
            if image.channel is None and not image.left_out:
                image.left_out = True
                self.notices.append(
                    f"{image.name} is left out: the model knows {', '.join(names)}, all of which are here, and its "
                    f"name is that of none of them."
                )

    def assign(self, image: Image, channel: int | None) -> None:
        """Say which modality an image is; None leaves it out."""
        with self.lock:
            image.channel, image.left_out = channel, channel is None
        self.assess()

    def clear(self) -> None:
        """Forget images and segmentations, and remove their files."""
        with self.lock:
            self._cancel_all()
            self.cleared += 1
            self.images, self.jobs, self.uploads, self.notices, self.received = [], [], [], [], 0
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        self.assess()

    # ---- what the images are ---------------------------------------------------------------------------------------

    def used(self) -> dict[str, Image]:
        """The images that are segmented from, by modality."""
        names = self.predictor.modalities
        return {names[image.channel]: image for image in self.images if image.channel is not None}

    def assess(self) -> None:
        """Find out whether the images can be segmented as they are. Earlier segmentations are no longer theirs."""
        with self.lock:
            self._cancel_all()
            for job in self.jobs:
                shutil.rmtree(job.folder, ignore_errors=True)
            self.jobs = []
            self.problems, self.available, self.remarks = self._undecided(), (), []
            if self.images and not self.problems:
                self.available, self.problems = self._checked()
            self.changed()

    def _undecided(self) -> list[str]:
        """What the user has to decide."""
        names, found = self.predictor.modalities, []
        for channel, name in enumerate(names):
            same = [image.name for image in self.images if image.channel == channel]
            if len(same) > 1:
                found.append(f"{len(same)} images are {name}: {' and '.join(same)}; keep one and leave the other out.")
        found += [
            f"Which sequence is {image.name}? The name does not say; choose {', '.join(names)}, or leave it out."
            for image in self.images
            if image.channel is None and not image.left_out
        ]
        scanned = [(image.name, image.series) for image in self.used().values() if image.series is not None]
        for name, series in scanned[1:]:
            first, reference = scanned[0]
            if reference.is_of_other_patient(series):
                found.append(f"The headers of {first} and {name} name different patients; keep the images of one.")
        if self.images and all(image.channel is None for image in self.images) and not found:
            found.append("Every image is left out; choose the sequence of at least one.")
        return found

    def _checked(self) -> tuple[tuple[str, ...], list[str]]:
        """The checks of ``mstkd predict``: modalities that there are, and what is wrong with the images."""
        used = self.used()
        available, texts = self.predictor.check({name: image.path for name, image in used.items()})
        for image in used.values():
            texts = [text.replace(f"({image.path.name})", f"({image.name})") for text in texts]
        self.remarks = [
            f"{name} ({image.name}) is zero everywhere, so it counts as missing."
            for name, image in used.items()
            if not texts and name not in available
        ]
        texts += [
            f"{name} ({image.name}) {text}" for name, image in used.items() if (text := _orientation_problem(image))
        ]
        frames = {image.series.frame for image in used.values() if image.series is not None}
        if len(frames - {""}) > 1:
            self.remarks.append(
                "The DICOM series have different frames of reference, so they may not be registered to each other; "
                "check that they are aligned before you trust the segmentation."
            )
        return available, [f"The case {text}." if text.startswith("has ") else f"{text}." for text in texts]

    # ---- segmentations ---------------------------------------------------------------------------------------------

    def segment(self, drop: Collection[str] = ()) -> Job | None:
        """Return a job for the images without some modalities; None if that one is there already."""
        with self.lock:
            if not self.available or self.problems:
                raise InputError(" ".join(self.problems) or "There is no image yet; drop at least one sequence.")
            left = [name for name in self.available if name not in drop]
            if not left:
                raise InputError("Without that sequence there is no image left to segment.")
            subset = modalities.SEPARATOR.join(left)
            if any(job.subset == subset and not job.is_over_without_result for job in self.jobs):
                return None
            self.jobs = [job for job in self.jobs if job.subset != subset]
            used, number = self.used(), next(self._numbers)
            job = Job(
                number=number,
                subset=subset,
                files={name: used[name].path for name in left},
                folder=self.folder / f"job{number}",
                changed=self.changed,
                beside=lambda: next((job.segmentation for job in self.jobs if job.state == "done"), None),
                series=next((used[name].series for name in left if used[name].series is not None), None),
            )
            self.jobs.append(job)
            self.changed()
            return job

    def expected_dice(self, subset: Sequence[str]) -> dict[str, float] | None:
        """The Dice to expect of a subset, by label or region; None if the model's evaluation says nothing."""
        code = modalities.subset_code(name in subset for name in self.predictor.modalities)
        return self.predictor.expected_dice.get(code)

    # ---- the page --------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Count a change."""
        self.version += 1

    def state(self) -> dict[str, Any]:
        """What the page shows."""
        with self.lock:
            names = self.predictor.modalities
            return {
                "images": [
                    {
                        "number": image.number,
                        "name": image.name,
                        "file": f"images/{image.number}.nii{'.gz' if image.path.suffix == '.gz' else ''}",
                        "modality": None if image.channel is None else names[image.channel],
                        "leftOut": image.left_out,
                    }
                    for image in self.images
                ],
                "notices": [*self.notices, *self.remarks],
                "problems": self.problems,
                "available": self.available,
                "expected": self.expected_dice(self.available) if self.available else None,
                "ready": bool(self.available) and not self.problems,
                "jobs": [
                    job.state_for_page(self.expected_dice(job.subset.split(modalities.SEPARATOR))) for job in self.jobs
                ],
            }

    def close(self) -> None:
        """Cancel what runs and remove all files."""
        with self.lock:
            self.closed = True
            self._cancel_all()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.changed()

    def _cancel_all(self) -> None:
        for job in self.jobs:
            job.cancel()


def _orientation_problem(image: Image) -> str | None:
    """Why the viewer would show an image elsewhere than its segmentation, beginning with a verb."""
    forms = None if image.series is not None else read_forms(image.path)  # those of a DICOM series were just written
    if forms is None:
        return None
    if forms.preferred is None:
        return "has neither a qform nor an sform, so its position and orientation are not known"
    if forms.displaced(forms.qform, forms.sform):
        return "has a qform and an sform that differ; make them equal, for example with fslorient -copysform2qform"
    return None


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(352)


def _as_nifti(path: Path, start: bytes, limit: int) -> Path:
    """Give an uploaded file the ending of what it holds; InputError, with a verb, if that is no NIfTI image."""
    if not start:
        raise InputError("is empty")
    if start.startswith(GZIP):
        ending = ".nii.gz"
    elif any(start[place : place + len(magic)] == magic for place, magic in NIFTI):
        ending = ".nii"
    else:
        raise InputError("is neither a NIfTI nor a DICOM file, or it is damaged")
    renamed = path.replace(path.with_name(path.name + ending))
    try:
        _check_size(renamed, limit)
    except InputError:
        renamed.unlink()
        raise
    return renamed


def _check_size(path: Path, limit: int) -> None:
    """Refuse an image that fills the memory when it is read: as its header says, or as a gzip file of zeros can."""
    try:
        header: Any = nibabel.load(path)
        size = math.prod(max(1, length) for length in header.shape) * header.dataobj.dtype.itemsize
    except Exception as error:  # nibabel has errors of many kinds for a damaged header
        raise InputError("is damaged: it has no header of a NIfTI file") from error
    if path.name.endswith(".gz") and size <= limit:
        size = max(size, _unpacked_size(path, limit))
    _refuse_larger(size, limit)


def _refuse_larger(size: int, limit: int) -> None:
    if size > limit:
        raise InputError(f"has more than {limit // MEGABYTE} MB when it is unpacked, the limit of this page")


def _unpacked_size(path: Path, limit: int) -> int:
    """Return the number of bytes in a gzip file, or some number above ``limit``."""
    size = 0
    try:
        with gzip.open(path) as file:
            while size <= limit and (chunk := file.read(MEGABYTE)):
                size += len(chunk)
    except (OSError, EOFError, zlib.error):
        pass  # the checks of prediction say what is wrong
    return size
