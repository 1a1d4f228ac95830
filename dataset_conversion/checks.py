"""Checking one case: everything that nnU-Net would trip over, or silently misread, in one pass over its files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunetv2_mstkd.dataset_conversion.cases import LABEL, Case
from nnunetv2_mstkd.dataset_conversion.description import FILE_ENDING, Description
from nnunetv2_mstkd.dataset_conversion.releases import meaning_of_value
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.completeness import GZIP, NIFTI_ENDINGS, check_complete, count_not_finite, is_proven_whole
from nnunetv2_mstkd.images.geometry import TOLERANCE, Geometry, geometry_of, image_reader, read_image

FULL, HEADER = "full", "header"
LEVELS = (FULL, HEADER)
HEADER_BYTES = 348
"""Of NIfTI-1."""
PROBES = 10_000
"""So many voxels of a label tell how much of it lies outside."""
MAX_OUTSIDE = 0.1
"""Share of a label's voxels that may lie where every image is zero; masks cross the edge of the brain a little."""


@dataclass
class Checked:
    """What is known of a case after :func:`check_case`.

    Attributes
    ----------
    problems
        Lines; empty for a good case.
    notes
        What is unusual, but does no harm.
    geometry
        The grid of its first image, on which all its files are written; None if nothing could be read.
    absent
        For each channel: no file, or zero everywhere.
    as_is
        Files whose bytes can be used as they are: ``.nii.gz``, one volume, exactly on this grid, for a label also whole
        numbers that need no other values.
    label
        What to write where the label's file cannot be used as it is.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    geometry: Geometry | None = None
    absent: tuple[bool, ...] = ()
    as_is: frozenset[Path] = frozenset()
    label: Label | None = None


class Label(NamedTuple):
    """A label as the few voxels that are not zero in its file, which keeps memory free for the images."""

    shape: tuple[int, ...]
    background: int
    indices: np.ndarray
    values: np.ndarray

    def voxels(self) -> np.ndarray:
        """uint8, in SimpleITK's order (z, y, x)."""
        array = np.full(self.shape, self.background, np.uint8)
        array.reshape(-1)[self.indices] = self.values
        return array


class Forms(NamedTuple):
    """The two transformations of a NIfTI header, shape (4, 4), None where its code says that it is not set."""

    qform: np.ndarray | None
    sform: np.ndarray | None

    @property
    def preferred(self) -> np.ndarray | None:
        """As nibabel and most tools choose."""
        return self.qform if self.sform is None else self.sform


class Header(NamedTuple):
    """What the beginning of a NIfTI file says."""

    forms: Forms
    num_bytes: int
    """of the whole file, uncompressed"""
    geometry: Geometry
    is_float: bool


Headers = dict[bytes, Header]
"""Headers by the bytes that they are made of: in most cases all files have the same, which ITK then reads once."""


class _File(NamedTuple):
    """One file, read as far as the level asks."""

    geometry: Geometry
    forms: Forms | None
    is_float: bool
    checksum: bytes
    voxels: np.ndarray | None
    image: sitk.Image | None = None
    """The owner of the voxels' memory."""

    def without_voxels(self) -> _File:
        return self._replace(voxels=None, image=None)


def check_case(
    case: Case,
    description: Description,
    *,
    level: str = FULL,
    allow_missing: bool = False,
    max_outside: float = MAX_OUTSIDE,
    headers: Headers | None = None,
) -> Checked:
    """Check one case.

    Parameters
    ----------
    case
        Its files; all exist.
    description
        What they should hold.
    level
        ``"full"`` decompresses each file once; ``"header"`` reads the beginnings and ends of files only, and all of a
        label whose values must change.
    allow_missing
        Take an image that is zero everywhere for an absent modality.
    max_outside
        Share of a label's voxels that may lie where every image is zero.
    headers
        Those of cases checked before, to which this case's are added: ITK need not read them again.

    Returns
    -------
    Problems name the modality and the file. Nothing is raised for what a file holds.
    """
    checked = Checked()
    as_is: set[Path] = set()
    files: dict[str, _File] = {}
    headers = {} if headers is None else headers
    foreground: np.ndarray | None = None
    if case.label is not None:
        try:
            file = _read(case.label, FULL if level == FULL or _may_change(description) else HEADER, headers)
            if file.is_float and file.voxels is None:
                file = _read(case.label, FULL, headers)
            same = True
            if file.voxels is not None:
                foreground, values = _label_values(file.voxels, description)
                same = not file.is_float and all(description.value_map[value] == value for value in values)
            if same and case.label.name.endswith(FILE_ENDING):
                as_is.add(case.label)
            elif foreground is not None and file.voxels is not None:
                checked.label = _mapped(file.voxels, foreground, description)
            files[LABEL] = file.without_voxels()
            del file
        except ValueError as error:
            checked.problems.append(f"{LABEL} ({case.label.name}) {error}")

    absent: dict[str, bool] = {}
    probes = None if foreground is None or level != FULL else foreground[:: max(1, foreground.size // PROBES)]
    inside = None if probes is None else np.zeros(probes.size, bool)
    for name, path, voxels, file in _images(case, description, level, headers, checked):
        if file is None:
            absent[name] = True
            continue
        zero = False
        if voxels is not None:
            value = _only_value(voxels)
            zero = value == 0
            if value is not None and not zero:
                checked.problems.append(f"{name} ({path.name}) is constant, {value:g} everywhere")
            if zero and not allow_missing:
                checked.problems.append(f"{name} ({path.name}) is zero everywhere; --allow-missing keeps such a case")
            if not zero and inside is not None and inside.size and voxels.size > probes[-1]:
                inside |= voxels.reshape(-1)[probes] != 0
        absent[name] = zero
        files[name] = file
        del voxels
        if path.name.endswith(FILE_ENDING) and not description.stack:
            as_is.add(path)
    checked.absent = tuple(absent.get(name, False) for name in description.modalities)

    _compare(description, files, absent, checked)
    if checked.geometry is not None:
        exact = {name for name, file in files.items() if file.geometry == checked.geometry}
        paths = {**dict(zip(description.modalities, case.images, strict=True)), LABEL: case.label}
        as_is &= {path for name, path in paths.items() if name in exact and path is not None}
    checked.as_is = frozenset(as_is)
    if not checked.problems and all(checked.absent):
        checked.problems.append("has no modality, only images that are zero everywhere")
    if not checked.problems and inside is not None and inside.size:
        outside = 1 - np.count_nonzero(inside) / inside.size
        if outside > max_outside:
            checked.problems.append(
                f"{LABEL} ({case.label.name}) lies to {100 * outside:.0f} % where every image is zero: it is shifted, "
                f"or that of another case (--max-outside allows {100 * max_outside:.0f} %)"
            )
    return checked


def _images(case: Case, description: Description, level: str, headers: Headers, checked: Checked):
    """Yield modality, path, voxels (full level) and file of each channel; a file of several is read once."""
    stacked: _File | None = None
    for channel, (name, path) in enumerate(zip(description.modalities, case.images, strict=True)):
        if path is None:
            yield name, None, None, None
            continue
        if description.stack and channel and stacked is None:
            continue  # it could not be read, and that was said
        try:
            file = stacked or _read(path, level, headers, volumes=len(description.stack))
        except ValueError as error:
            checked.problems.append(f"{name if not description.stack else 'image'} ({path.name}) {error}")
            continue
        if description.stack:
            stacked = file
        voxels = file.voxels
        if voxels is not None and description.stack:
            voxels = voxels[description.stack.index(name)]
        yield name, path, voxels, file.without_voxels()
        del file, voxels  # so that the next image takes this one's memory: getting new memory costs as much as reading


def _only_value(voxels: np.ndarray) -> float | None:
    """The value of a constant image; None for all others, most of which a few voxels tell."""
    some = voxels.reshape(-1)[::PROBES]
    if some.min() != some.max() or voxels.min() != voxels.max():
        return None
    return float(some[0])


# ---- one file ------------------------------------------------------------------------------------------------------


def _read(path: Path, level: str, headers: Headers, *, volumes: int = 0) -> _File:
    """Read one file and refuse it if it is damaged, holds NaN or several images.

    Raises
    ------
    ValueError
        The message begins with a verb.
    """
    if level == HEADER:
        checksum, header = _ends(path, headers, volumes)
        if header is not None:
            return _File(header.geometry, header.forms, header.is_float, checksum, None)
        reader = image_reader(path)
        return _File(geometry_of(reader, volumes=volumes), None, _is_float(reader), b"", None)
    try:
        image = read_image(path)
    except ValueError:
        check_complete(path)  # has a better reason for most
        raise
    geometry = geometry_of(image, volumes=volumes)
    voxels = sitk.GetArrayViewFromImage(image)
    # ITK turns NaN into 0, so that the checksum of what it read proves that there was none
    if not is_proven_whole(path, voxels):
        bad = max(check_complete(path), count_not_finite(voxels) if voxels.dtype.kind == "f" else 0)
        if bad:
            raise InputError(f"has {bad} of {voxels.size} voxels that are NaN or infinite")
    checksum, header = _ends(path, headers, volumes)
    return _File(geometry, header.forms if header else None, _is_float(image), checksum, voxels, image)


def _is_float(image: sitk.Image | sitk.ImageFileReader) -> bool:
    return image.GetPixelID() in (sitk.sitkFloat32, sitk.sitkFloat64)


def _ends(path: Path, headers: Headers, volumes: int) -> tuple[bytes, Header | None]:
    """Checksum and length from the end of a ``.nii.gz`` file and the header of a NIfTI-1 file; None for other formats.

    A file whose end does not fit its beginning was cut off, or is made of several parts: all of it is read to find out.
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
        header = zlib.decompressobj(GZIP).decompress(start, HEADER_BYTES) if compressed else start[:HEADER_BYTES]
        # all but names, times and ranges of values
        key = header[40:124] + header[252:HEADER_BYTES]
        if key not in headers:
            fields = nibabel.Nifti1Header(header, check=False)
            if int(fields["sizeof_hdr"]) != HEADER_BYTES:
                return b"", None  # NIfTI-2: left to the readers
            voxels = int(np.prod(fields.get_data_shape(), dtype=np.int64))
            reader = image_reader(path)
            headers[key] = Header(
                Forms(
                    fields.get_qform() if fields["qform_code"] > 0 else None,
                    fields.get_sform() if fields["sform_code"] > 0 else None,
                ),
                int(fields["vox_offset"]) + voxels * fields.get_data_dtype().itemsize,
                geometry_of(reader, volumes=volumes),
                _is_float(reader),
            )
    except (OSError, zlib.error, nibabel.spatialimages.HeaderDataError) as error:
        raise InputError(f"cannot be read: {' '.join(str(error).split())}") from error
    found = headers[key]
    length = int.from_bytes(end[4:], "little") if compressed else size
    if (length != found.num_bytes % (1 << 32)) if compressed else (length < found.num_bytes):
        check_complete(path)
    return end if compressed else b"", found


# ---- labels --------------------------------------------------------------------------------------------------------


def label_values(voxels: np.ndarray, description: Description) -> np.ndarray:
    """Return the values to write, uint8, for a label as it was read.

    Raises
    ------
    ValueError
        If a value is no integer, or none of the release's.
    """
    foreground, _ = _label_values(voxels, description)
    return _mapped(voxels, foreground, description).voxels()


def _may_change(description: Description) -> bool:
    return any(own != written for own, written in description.value_map.items())


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
    allowed: Mapping[int, int] = description.value_map
    wrong = [value for value in found if value not in allowed]
    if wrong:
        of_release = f"{description.release} has" if description.release else "declared are"
        meanings = [meaning_of_value(value) for value in wrong] if description.release else []
        hint = "".join(f"; {meaning}" for meaning in meanings if meaning)
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


# ---- the files of a case together ----------------------------------------------------------------------------------


def _compare(
    description: Description, files: Mapping[str, _File], absent: Mapping[str, bool], checked: Checked
) -> None:
    """One grid for all, the release's own, said alike by both forms of the headers, and no image twice."""
    images = {name: file for name, file in files.items() if name != LABEL}
    if not images:
        return
    first, reference = next(iter(images.items()))
    checked.geometry = reference.geometry
    for name, file in files.items():
        differences = reference.geometry.differences(file.geometry)
        checked.problems += [f"{name} has {text} as in {first}; resample it to the same grid" for text in differences]
        if not differences and file.forms is not None and reference.forms is not None:
            mine, theirs = reference.forms.preferred, file.forms.preferred
            if mine is theirs:
                continue
            if mine is not None and theirs is not None and not np.allclose(mine, theirs, rtol=0, atol=TOLERANCE):
                checked.problems.append(
                    f"{name} lies elsewhere than {first} for readers that prefer the sform to the qform, though not "
                    "for ITK; write both forms alike"
                )
    by_checksum: dict[bytes, list[str]] = {}
    for name, file in images.items():
        if file.checksum and not description.stack and not absent[name]:
            by_checksum.setdefault(file.checksum, []).append(name)
    checked.problems += [f"{' and '.join(names)} hold the same image" for names in by_checksum.values() if names[1:]]

    forms = [file.forms for file in files.values() if file.forms is not None]
    if any(each.sform is None and each.qform is not None for each in forms):
        checked.notes.append("sform_code 0: only the qform says where a file lies")
    if any(
        each.sform is not None
        and each.qform is not None
        and not np.allclose(each.qform, each.sform, rtol=0, atol=TOLERANCE)
        for each in forms
    ):
        checked.notes.append("qform and sform of a file differ: programs may disagree on where it lies")
    grid = description.grid
    if grid is not None:
        size, spacing = reference.geometry.size, reference.geometry.spacing
        if size != grid.size or not np.allclose(spacing, grid.spacing, rtol=0, atol=TOLERANCE):
            found = " x ".join(map(str, size))
            checked.problems.append(
                f"has {found} voxels of {' x '.join(f'{mm:g}' for mm in spacing)} mm, expected "
                f"{' x '.join(map(str, grid.size))} of {' x '.join(f'{mm:g}' for mm in grid.spacing)} mm "
                f"({grid.name}): is it of another release than {description.release}? Resampled cases need the generic "
                "converter"
            )
        elif grid.origin and not (
            np.allclose(reference.geometry.origin, grid.origin, rtol=0, atol=TOLERANCE)
            and np.allclose(reference.geometry.direction, grid.direction, rtol=0, atol=TOLERANCE)
        ):
            checked.notes.append(f"origin or direction other than in {grid.name}")
