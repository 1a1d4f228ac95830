"""Check one case, in one pass over its files, for everything that nnU-Net would refuse or silently misread."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.completeness import (
    GZIP,
    NIFTI_ENDINGS,
    UNUSABLE,
    check_complete,
    count_unusable,
    is_proven_whole,
)
from nnunetv2_mstkd.images.geometry import Forms, Geometry, close, geometry_of, image_reader, read_image

from .cases import LABEL, Case
from .description import FILE_ENDING, IGNORE, Description, Grid
from .releases import meaning_of_value
from .slices import read_slices

FULL, HEADER = "full", "header"
LEVELS = (FULL, HEADER)
HEADER_BYTES = 348
"""Size of a NIfTI-1 header."""
ZERO_RATIO = 100
"""Images that compress more than that may be zero everywhere: gzip reduces zeros to between 1/200 and 1/1000."""
PROBES = 10_000
"""Number of label voxels that are looked at to tell how much of a label lies outside the images."""
MAX_OUTSIDE = 0.1
"""Share of a label's voxels that may lie where every image is zero; masks cross the edge of the brain a little."""


@dataclass
class Checked:
    """Result of :func:`check_case`."""

    problems: list[str] = field(default_factory=list)  # one line each; empty for a good case
    notes: list[str] = field(default_factory=list)  # harmless peculiarities, one line each
    geometry: Geometry | None = None  # of the first image, for all written files; None if no image could be read
    absent: tuple[bool, ...] = ()  # per channel: whether the file is missing or zero everywhere
    # files whose bytes can be used unchanged: .nii.gz, one volume, exactly on this grid; labels without remapping
    as_is: frozenset[Path] = frozenset()
    label: Label | None = None  # to write where the file cannot be used as it is
    unlabelled: bool = False  # a training case without a label, or whose label is 'ignore' where an image is not zero


class Label(NamedTuple):
    """A label as the few voxels that are not zero in its file, which leaves the memory to the images."""

    shape: tuple[int, ...]
    background: int
    indices: np.ndarray
    values: np.ndarray

    def voxels(self) -> np.ndarray:
        """The whole label: uint8, in SimpleITK's order (z, y, x)."""
        array = np.full(self.shape, self.background, np.uint8)
        array.reshape(-1)[self.indices] = self.values
        return array


class Header(NamedTuple):
    """What a NIfTI header says; `num_bytes` is the size of the whole file, uncompressed."""

    forms: Forms
    num_bytes: int
    geometry: Geometry
    is_float: bool


Headers = dict[bytes, Header]
"""Headers by their bytes: in most cases all files share one, which ITK then reads only once."""


class _File(NamedTuple):
    """What is kept of a file that was read, without its voxels."""

    path: Path
    geometry: Geometry
    forms: Forms | None
    is_float: bool
    checksum: bytes
    reusable: bool = False
    """Whether its bytes can be used unchanged if its geometry is that of the case."""


def check_case(
    case: Case,
    description: Description,
    *,
    level: str = FULL,
    allow_missing: bool = False,
    max_outside: float = MAX_OUTSIDE,
    headers: Headers | None = None,
) -> Checked:
    """Check one case. Nothing is raised for what a file holds; problems name the modality and the file.

    Parameters
    ----------
    case
        The files, all of which exist.
    description
        What they should hold.
    level
        ``"full"`` decompresses each file once; ``"header"`` reads only the beginning and end of each file, and all of
        those that must be written anew, and of images that may be zero everywhere.
    allow_missing
        Accept an image that is zero everywhere as an absent modality.
    max_outside
        Share of a label's voxels that may lie where every image is zero.
    headers
        Headers of cases checked before, to which those of this case are added: ITK need not read them again.
    """
    check = _CaseCheck(case, description, level, allow_missing, {} if headers is None else headers)
    if check.slices is not None and check.slices.problems:
        return Checked(problems=check.slices.problems)
    foreground = check.read_label()
    probes = foreground[:: max(1, foreground.size // PROBES)]
    covered = check.read_images(probes)
    check.compare_files()
    result = check.finish()
    if not result.problems and all(result.absent):
        result.problems.append("has no modality, only images that are zero everywhere")
    if not result.problems and level == FULL and probes.size:
        outside = 1 - np.count_nonzero(covered) / probes.size
        if outside > max_outside:
            result.problems.append(
                f"{LABEL} ({case.label.name}) lies to {100 * outside:.0f} % where every image is zero: it is shifted, "
                f"or belongs to another case (--max-outside allows {100 * max_outside:.0f} %)"
            )
    return result


class _CaseCheck:
    """The steps of :func:`check_case` and what they share."""

    def __init__(self, case: Case, description: Description, level: str, allow_missing: bool, headers: Headers) -> None:
        self.case = case
        self.description = description
        self.level = level
        self.allow_missing = allow_missing
        self.headers = headers
        self.result = Checked()
        self.label: _File | None = None
        self.images: dict[str, _File] = {}
        self.zero: set[str] = set()
        self.background: np.ndarray | None = None  # where the label is, if it has no foreground but 'ignore'
        folder = case.images[0]
        self.slices = read_slices(folder, description) if description.slices and folder else None

    def _read(self, path: Path, level: str, *, volumes: int = 0) -> tuple[_File, sitk.Image | None]:
        if self.slices is None:
            return _read(path, level, self.headers, volumes=volumes)
        image = self.slices.images if volumes else self.slices.masks
        assert image is not None
        return _File(path, geometry_of(image, volumes=volumes), None, False, b""), image

    def read_label(self) -> np.ndarray:
        """Read the label file; return the indices of the labelled foreground, none if they were not read."""
        path, description = self.case.label, self.description
        nothing = np.zeros(0, np.intp)
        self.result.unlabelled = self.case.unlabelled
        if path is None:
            return nothing
        ignored = [own for own, written in description.value_map.items() if written == description.labels.get(IGNORE)]
        try:
            must_map = any(own != written for own, written in description.value_map.items())
            file, image = self._read(path, FULL if must_map or ignored else self.level)
            if image is None and file.is_float:
                file, image = self._read(path, FULL)
            foreground, reusable = nothing, path.name.endswith(FILE_ENDING)
            if image is not None:
                voxels = sitk.GetArrayViewFromImage(image)
                foreground, values = _label_values(voxels, description)
                reusable &= not file.is_float and all(description.value_map[value] == value for value in values)
                if not reusable:
                    self.result.label = _mapped(voxels, foreground, description)
                if ignored:
                    foreground = foreground[~np.isin(voxels.reshape(-1)[foreground], ignored)]
                    self.result.unlabelled = not self.case.is_test and foreground.size == 0
                    if self.result.unlabelled:
                        self.background = ~np.isin(voxels, ignored)
        except ValueError as error:
            self.result.problems.append(f"{LABEL} ({path.name}) {error}")
            return nothing
        self.label = file._replace(reusable=reusable)
        return foreground

    def read_images(self, probes: np.ndarray) -> np.ndarray:
        """Read all images; return for each of the voxel indices `probes` whether any image is not zero there."""
        stack = self.description.stack
        covered = np.zeros(probes.size, bool)
        stacked: tuple[_File, sitk.Image | None] | None = None
        for name, path in zip(self.description.modalities, self.case.images, strict=True):
            if path is None:
                continue
            try:
                file, image = stacked or self._read(path, self._image_level(path), volumes=len(stack))
            except ValueError as error:
                self.result.problems.append(f"{'image' if stack else name} ({path.name}) {error}")
                if stack:
                    break  # all channels are in this one file
                continue
            if stack:
                stacked = file, image
            self.images[name] = file._replace(reusable=not stack and path.name.endswith(FILE_ENDING))
            if image is not None:
                array = sitk.GetArrayViewFromImage(image)
                array = array[stack.index(name)] if stack else array
                if self._is_zero(name, path, array):
                    self.zero.add(name)
                elif self._shows_background(array):
                    self.result.unlabelled = False
                elif probes.size and array.size > probes[-1]:
                    covered |= array.reshape(-1)[probes] != 0
                del array
            del image  # the next image takes this one's memory: getting new memory costs as much as reading
        return covered

    def _shows_background(self, voxels: np.ndarray) -> bool:
        """Whether an image is not zero in the background of a label: nnU-Net drops labels where all images are zero."""
        if self.background is None or self.background.shape != voxels.shape:
            return False
        return bool(voxels[self.background].any())

    def _image_level(self, path: Path) -> str:
        """The header is not enough where all voxels are written anew, or may be zero, which the data set records."""
        rewritten = bool(self.description.stack) or not path.name.endswith(FILE_ENDING)
        return FULL if rewritten or self.background is not None or _may_be_zero(path) else self.level

    def _is_zero(self, name: str, path: Path, voxels: np.ndarray) -> bool:
        """Whether an image is zero everywhere; being constant is a problem."""
        value = _only_value(voxels)
        if value is not None and value != 0:
            self.result.problems.append(f"{name} ({path.name}) is constant, {value:g} everywhere")
        if value == 0 and not self.allow_missing:
            reason = "is zero everywhere"
            if self.slices is not None and name in self.slices.copies:
                reason = f"is absent: a copy of {self.slices.copies[name]} in every slice"
            self.result.problems.append(f"{name} ({path.name}) {reason}; --allow-missing keeps such a case")
        return value == 0

    def compare_files(self) -> None:
        """Check that all files share one grid, which is the release's, and that no image occurs twice."""
        if not self.images:
            return
        first, reference = next(iter(self.images.items()))
        self.result.geometry = reference.geometry
        for name, file in self._files().items():
            self.result.problems += _misplaced(name, file, first, reference)
        if not self.description.stack:
            by_checksum: dict[bytes, list[str]] = {}
            for name, file in self.images.items():
                if file.checksum and name not in self.zero:
                    by_checksum.setdefault(file.checksum, []).append(name)
            same = [names for names in by_checksum.values() if len(names) > 1]
            self.result.problems += [f"{' and '.join(names)} hold the same image" for names in same]
        forms = [file.forms for file in self._files().values() if file.forms is not None]
        if any(each.sform is None and each.qform is not None for each in forms):
            self.result.notes.append(
                "sform_code 0: only the qform says where a file lies, as nnU-Net reads it; nothing to do"
            )
        if any(each.differ for each in forms):
            self.result.notes.append("qform and sform of a file differ: programs may disagree on where it lies")
        if self.description.grid is not None:
            self._compare_with_release(reference.geometry, self.description.grid)

    def _compare_with_release(self, geometry: Geometry, grid: Grid) -> None:
        if geometry.size != grid.size or not close(geometry.spacing, grid.spacing):
            self.result.problems.append(
                f"has {_grid_text(geometry.size, geometry.spacing)}, expected {_grid_text(grid.size, grid.spacing)} "
                f"({grid.name}): is it of another release than {self.description.release}? Resampled cases need the "
                "generic converter"
            )
        elif grid.origin and not (close(geometry.origin, grid.origin) and close(geometry.direction, grid.direction)):
            self.result.notes.append(f"origin or direction other than in {grid.name}")

    def finish(self) -> Checked:
        """Say which channels are absent and which files can be used unchanged."""
        self.result.absent = tuple(
            path is None or name in self.zero
            for name, path in zip(self.description.modalities, self.case.images, strict=True)
        )
        geometry = self.result.geometry
        self.result.as_is = frozenset(
            file.path for file in self._files().values() if file.reusable and file.geometry == geometry
        )
        return self.result

    def _files(self) -> dict[str, _File]:
        return self.images if self.label is None else {LABEL: self.label, **self.images}


def _misplaced(name: str, file: _File, first: str, reference: _File) -> list[str]:
    """One line for each way in which a file does not lie where the first image lies."""
    differences = reference.geometry.differences(file.geometry)
    if differences:
        return [f"{name} has {text} as in {first}; resample it to the same grid" for text in differences]
    if file.forms is None or reference.forms is None:
        return []
    expected, found = reference.forms.preferred, file.forms.preferred
    if expected is found or expected is None or found is None or close(expected, found):
        return []
    return [
        f"{name} lies elsewhere than {first} for readers that prefer the sform to the qform, though not for ITK; write "
        "both forms alike"
    ]


def _grid_text(size: tuple[int, ...], spacing: tuple[float, ...]) -> str:
    return f"{' x '.join(map(str, size))} voxels of {' x '.join(f'{mm:g}' for mm in spacing)} mm"


def _only_value(voxels: np.ndarray) -> float | None:
    """The value of a constant image; None for all others, most of which a few voxels tell."""
    some = voxels.reshape(-1)[::PROBES]
    if some.min() != some.max() or voxels.min() != voxels.max():
        return None
    return float(some[0])


# ---- one file ------------------------------------------------------------------------------------------------------


def _read(path: Path, level: str, headers: Headers, *, volumes: int = 0) -> tuple[_File, sitk.Image | None]:
    """Read one file and refuse it if it is damaged, holds NaN or several images; the message begins with a verb."""
    if level == HEADER:
        checksum, header = _read_ends(path, headers, volumes)
        if header is not None:
            return _File(path, header.geometry, header.forms, header.is_float, checksum), None
        reader = image_reader(path)
        return _File(path, geometry_of(reader, volumes=volumes), None, _is_float(reader), b""), None
    try:
        image = read_image(path)
    except ValueError:
        check_complete(path)  # knows a better reason for most files
        raise
    geometry = geometry_of(image, volumes=volumes)
    voxels = sitk.GetArrayViewFromImage(image)
    bad = count_unusable(voxels) if voxels.dtype.kind == "f" else 0
    # ITK turns NaN into 0, so if the checksum of what it read is that of the file, there was none
    if not is_proven_whole(path, voxels):
        bad = max(bad, check_complete(path))
    if bad:
        raise InputError(f"has {bad} of {voxels.size} voxels that are {UNUSABLE}")
    _, header = _read_ends(path, headers, volumes)
    forms = None if header is None else header.forms
    # not that of the file: a copy may have been saved with another header
    checksum = b"" if volumes else f"{voxels.dtype} {zlib.crc32(np.ascontiguousarray(voxels))}".encode()
    return _File(path, geometry, forms, _is_float(image), checksum), image


def _may_be_zero(path: Path) -> bool:
    """Whether a ``.nii.gz`` file is so small that all its voxels may be zero."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 4))
        return size * ZERO_RATIO < int.from_bytes(file.read(), "little")


def _is_float(image: sitk.Image | sitk.ImageFileReader) -> bool:
    return image.GetPixelID() in (sitk.sitkFloat32, sitk.sitkFloat64)


def _read_ends(path: Path, headers: Headers, volumes: int) -> tuple[bytes, Header | None]:
    """Checksum and length from the end of a ``.nii.gz`` file and the header of a NIfTI-1 file; None for other formats.

    A file whose end does not fit its beginning was truncated, or consists of several parts: all of it is read to find
    out.
    """
    name = path.name.lower()
    if not name.endswith(NIFTI_ENDINGS):
        return b"", None
    compressed = name.endswith(".gz")
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            size = file.seek(0, 2)
            file.seek(-8, 2)
            end = file.read()
        raw = zlib.decompressobj(GZIP).decompress(start, HEADER_BYTES) if compressed else start[:HEADER_BYTES]
        key = raw[40:124] + raw[252:HEADER_BYTES]  # all but names, times and ranges of values
        header = headers.get(key) or _parse_header(raw, path, volumes)
        if header is None:
            return b"", None
    except (OSError, zlib.error, nibabel.spatialimages.HeaderDataError) as error:
        raise InputError(f"cannot be read: {' '.join(str(error).split())}") from error
    headers[key] = header
    length = int.from_bytes(end[4:], "little") if compressed else size
    if (length != header.num_bytes % (1 << 32)) if compressed else (length < header.num_bytes):
        check_complete(path)
    return end if compressed else b"", header


def _parse_header(raw: bytes, path: Path, volumes: int) -> Header | None:
    """A NIfTI-1 header; None for NIfTI-2, which is left to the readers."""
    fields = nibabel.Nifti1Header(raw, check=False)
    if int(fields["sizeof_hdr"]) != HEADER_BYTES:
        return None
    voxels = int(np.prod(fields.get_data_shape(), dtype=np.int64))
    forms = Forms.of(fields)
    num_bytes = int(fields["vox_offset"]) + voxels * fields.get_data_dtype().itemsize
    reader = image_reader(path)
    return Header(forms, num_bytes, geometry_of(reader, volumes=volumes), _is_float(reader))


# ---- labels --------------------------------------------------------------------------------------------------------


def label_values(voxels: np.ndarray, description: Description) -> np.ndarray:
    """Return the values to write, uint8, for a label as it was read; all must be integers and declared."""
    foreground, _ = _label_values(voxels, description)
    return _mapped(voxels, foreground, description).voxels()


def _label_values(voxels: np.ndarray, description: Description) -> tuple[np.ndarray, list[int]]:
    """Indices of the voxels that are not zero, and all values."""
    flat = voxels.reshape(-1)
    foreground = _nonzero(flat)
    values = np.unique(flat[foreground])
    if values.dtype.kind == "f":
        whole = np.isfinite(values) & (values == np.rint(values))
        if not whole.all():
            raise InputError(f"holds {values[~whole][0]:g}, expected integers only")
    found = [int(value) for value in values]
    allowed = description.value_map
    wrong = [value for value in found if value not in allowed]
    if wrong:
        of_release = f"{description.release} has" if description.release else "declared are"
        meanings = [meaning_of_value(value) for value in wrong] if description.release else []
        hint = "".join(f"; {meaning}" for meaning in meanings if meaning)
        written = sorted(set(wrong) & set(allowed.values()))
        hint += (
            f'; to keep {written[0]} where files have it, add "{written[0]}": {written[0]} to remap' if written else ""
        )
        raise InputError(f"holds the undeclared values {wrong}, {of_release} {sorted(allowed)}{hint}")
    if foreground.size < flat.size:
        found = [0, *found]
    if 0 in found and 0 not in allowed:
        raise InputError(f"holds the undeclared value 0, declared are {sorted(allowed)}")
    return foreground, found


def _nonzero(flat: np.ndarray) -> np.ndarray:
    """``np.flatnonzero``, several times faster where most of the array is zero, as in a label."""
    words = flat.nbytes // 8
    per_word = 8 // flat.itemsize
    if not flat.flags.c_contiguous or per_word < 2:
        return np.flatnonzero(flat)
    candidates = np.flatnonzero(flat[: words * per_word].view(np.uint64))
    indices = (candidates[:, None] * per_word + np.arange(per_word)).reshape(-1)
    indices = np.concatenate([indices, np.arange(words * per_word, flat.size)])
    return indices[flat[indices] != 0]


def _mapped(voxels: np.ndarray, foreground: np.ndarray, description: Description) -> Label:
    own = voxels.reshape(-1)[foreground]
    values = np.zeros(foreground.size, np.uint8)
    for value, target in description.value_map.items():
        if value:
            values[own == value] = target
    return Label(voxels.shape, description.value_map.get(0, 0), foreground, values)
