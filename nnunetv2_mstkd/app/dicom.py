"""DICOM series as images, and segmentations as DICOM SEG."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, generate_uid

import nnunetv2_mstkd
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import complete_image
from nnunetv2_mstkd.images.geometry import last_line

PREAMBLE, MAGIC = 128, b"DICM"

BYTES = 4
"""Of a voxel of a volume that is read: float32."""

SPACING_TOLERANCE = 0.02
"""Largest deviation of a distance between slices, or of a slice from the line along their normal, in mean distances."""


@dataclass(frozen=True)
class Series:
    """The slices of one DICOM series."""

    name: str
    """Its description."""
    contrast: bool
    """Whether its header names a contrast medium."""
    files: tuple[Path, ...]
    """In the order of their positions."""
    size: int
    """Bytes of the volume, as the headers say."""
    patient: tuple[str, str] = ("", "")
    """ID and name of the patient in the first header."""
    frame: str = ""
    """The frame of reference: images of equal ones are in the same space."""
    damaged: bool = False
    """Whether a slice has fewer pixels than its header says."""

    def is_of_other_patient(self, other: Series) -> bool:
        """Whether the headers name two patients: by their IDs if both have one, else by their names."""
        # names are spelled in many ways
        pairs = [(mine, theirs) for mine, theirs in zip(self.patient, other.patient, strict=True) if mine and theirs]
        return bool(pairs) and pairs[0][0] != pairs[0][1]


def is_dicom(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a DICOM file."""
    return start[PREAMBLE : PREAMBLE + len(MAGIC)] == MAGIC


def read_series(files: Iterable[tuple[Path, str]]) -> tuple[list[Series], list[str]]:
    """Sort files into series by their headers.

    Parameters
    ----------
    files
        Files and the names under which the user knows them.

    Returns
    -------
    Series of images that make up a volume, and one sentence for each file or series that does not.
    """
    headers: dict[str, list[tuple[Path, pydicom.Dataset]]] = {}
    series: list[Series] = []
    left: dict[Path, int] = {}  # bytes after the header
    problems = []
    for path, name in files:
        try:
            if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                problems.append(f"{name} is a deflated DICOM file; convert it to NIfTI (dcm2niix).")
                continue  # reading the header would unpack the whole file, whatever its size
            with path.open("rb") as file:
                header = pydicom.dcmread(file, stop_before_pixels=True)
                left[path] = path.stat().st_size - file.tell()
            headers.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
        except Exception as error:  # pydicom has errors of many kinds for a damaged header
            problems.append(f"{name} is a damaged DICOM file: {last_line(error)}.")
    for slices in headers.values():
        first = slices[0][1]
        name = " ".join(str(first.get("SeriesDescription") or first.get("ProtocolName") or "").split())
        name = name or f"series {first.get('SeriesNumber') or len(series) + 1}"
        try:
            contrast = bool(str(first.get("ContrastBolusAgent") or "").strip())
            size = sum(_number_of_pixels(header) for _, header in slices) * BYTES
            patient = (str(first.get("PatientID") or ""), str(first.get("PatientName") or ""))
            frame = str(first.get("FrameOfReferenceUID") or "")
            damaged = any(_lacks_pixels(header, left[path]) for path, header in slices)
            series.append(Series(name, contrast, _in_order(slices), size, patient, frame, damaged))
        except InputError as error:
            problems.append(f"The DICOM series {name} {error}.")
        except (TypeError, ValueError):
            problems.append(f"The DICOM series {name} has a damaged header.")
    return series, problems


def _number_of_pixels(header: Any) -> int:
    """Pixels of a slice, times its values per pixel."""
    return math.prod(int(header.get(keyword) or 1) for keyword in ("Rows", "Columns", "SamplesPerPixel"))


def _lacks_pixels(header: Any, left: int) -> bool:
    """Whether so many bytes after its header are too few for a slice; ITK counts the pixels of a compressed one."""
    needed = _number_of_pixels(header) * int(header.get("BitsAllocated") or 8) // 8
    needed += 8 if header.is_implicit_VR else 12  # tag and length come first
    syntax = header.file_meta.get("TransferSyntaxUID")
    return not (syntax is not None and syntax.is_compressed) and left < needed


def _in_order(slices: Sequence[tuple[Path, Any]]) -> tuple[Path, ...]:
    """The files by position; InputError, whose message begins with a verb, unless they make up one volume."""
    headers = [header for _, header in slices]
    if any(int(header.get("NumberOfFrames") or 1) > 1 for header in headers):
        raise InputError("has several slices in one file, which is not supported; convert it to NIfTI (dcm2niix)")
    if any(int(header.get("SamplesPerPixel") or 1) > 1 for header in headers):
        raise InputError("has images in color, expected those of an MRI sequence")
    if any(not header.get("ImagePositionPatient") or not header.get("ImageOrientationPatient") for header in headers):
        raise InputError("holds something other than slices with a position")
    try:
        directions = np.array([header.ImageOrientationPatient for header in headers], float)
        positions = np.array([header.ImagePositionPatient for header in headers], float)
        if directions.shape[1:] != (6,) or positions.shape[1:] != (3,) or not np.isfinite(positions).all():
            raise ValueError
    except ValueError as error:
        raise InputError("has slices without a usable position") from error
    if not np.allclose(directions, directions[0], atol=1e-3):
        raise InputError("has slices of different orientations")
    row, column = directions[0, :3], directions[0, 3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise InputError("has an invalid orientation: its axes are not perpendicular unit vectors")
    spacings = [[float(mm) for mm in header.get("PixelSpacing") or ()] for header in headers]
    if not all(len(spacing) == 2 and min(spacing) > 0 for spacing in spacings):
        raise InputError("has slices without a pixel spacing, so its size is not known")
    if not np.allclose(spacings, spacings[0]):
        raise InputError("has slices of different pixel spacings")
    normal = np.cross(row, column)
    along = positions @ normal
    order = np.argsort(along)
    steps = np.diff(along[order])
    if len(slices) < 2:
        raise InputError("has a single slice, expected a volume")
    if steps.min() < 1e-3:
        raise InputError("has several slices at one position, so it is more than one volume")
    if np.abs(steps - steps.mean()).max() > SPACING_TOLERANCE * steps.mean():
        raise InputError("lacks slices, or their distances differ")
    shifts = positions - positions[order[0]]
    shifts -= np.outer(shifts @ normal, normal)
    if np.linalg.norm(shifts, axis=1).max() > SPACING_TOLERANCE * steps.mean():
        raise InputError("has slices that are shifted sideways against each other, which is not supported")
    return tuple(slices[number][0] for number in order)


def write_volume(series: Series, path: Path) -> None:
    """Write a series as one NIfTI file; InputError, whose message begins with a verb, if it cannot be read."""
    if series.damaged:
        raise InputError("has a slice with fewer pixels than its header says, so it is damaged")  # ITK reads anything
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in series.files])
    # otherwise ITK casts all slices to the first one's type, although each may have its own scale factors
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"cannot be read: {last_line(error)}") from error
    with complete_image(path):
        sitk.WriteImage(image, str(path))


@contextlib.contextmanager
def _refused(series: Series) -> Iterator[None]:
    """Raise InputError for what highdicom misses in a series."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"The DICOM series {series.name} cannot be referred to by a DICOM SEG ({last_line(error)}); "
            f"download the segmentation as NIfTI."
        ) from error


def write_segmentation_object(
    segmentation: np.ndarray,
    labels: Mapping[str, Sequence[int]],
    colors: Mapping[str, Sequence[int]],
    series: Series,
    model: str,
    path: Path,
) -> None:
    """Write a segmentation as DICOM SEG, with one binary segment for each label or region.

    Parameters
    ----------
    segmentation
        Label map on the grid of the series, shape (z, y, x).
    labels
        Label values of each label or region; regions may overlap.
    colors
        Red, green and blue (0 to 255) of each label or region.
    series
        The series that it was made from, to which it refers; patient and study are copied from it.
    model
        Name of the model.

    Raises
    ------
    InputError
        If the series lacks what a DICOM SEG must repeat, such as the patient or the study.
    """
    import highdicom as hd
    from highdicom.color import CIELabColor
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    algorithm = hd.AlgorithmIdentificationSequence(
        name=model[:64], version=nnunetv2_mstkd.__version__, family=codes.DCM.ArtificialIntelligence
    )
    # what a label means is known to its data set only: a code of our own with the label's name
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=Code(f"LABEL{number}", "99MSTKD", name[:64]),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            display_color=CIELabColor.from_rgb(*(int(part) for part in colors[name])),
        )
        for number, name in enumerate(labels, start=1)
    ]
    masks = np.stack([np.isin(segmentation, list(values)) for values in labels.values()], axis=-1)
    slices = [pydicom.dcmread(file) for file in series.files]
    with _refused(series), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what pydicom finds unusual in the values that are copied
        written = hd.seg.Segmentation(
            source_images=slices,
            pixel_array=masks.astype(np.uint8),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=generate_uid(),
            series_number=int(slices[0].get("SeriesNumber") or 0) + 1000,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="nnunetv2_mstkd",
            manufacturer_model_name=model[:64],
            software_versions=nnunetv2_mstkd.__version__,
            device_serial_number="0",
            series_description=f"Segmentation of {series.name}"[:64],
            omit_empty_frames=bool(masks.any()),
        )
        written.save_as(path)
