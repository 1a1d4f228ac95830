"""A page of ``mstkd app`` without a browser, and DICOM series to drop on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from starlette.testclient import TestClient

from nnunetv2_mstkd import Predictor
from nnunetv2_mstkd.app.server import Settings, make_app

NAMES = ("T1", "T1ce", "T2", "FLAIR")
SECONDS = 120
"""How long something may take on a busy machine."""

ADDRESS = "http://127.0.0.1:8000"


def case_of(trained) -> dict[str, Path]:
    """Images of a test case of the fixture ``trained``, by modality."""
    folder = trained.raw / trained.dataset / "imagesTs"
    case = min(folder.iterdir()).name.partition("_0000")[0]
    return {name: folder / f"{case}_{channel:04d}.nii.gz" for channel, name in enumerate(NAMES)}


class Page:
    """What the script of the page does."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.own = f"/api/sessions/{client.post('/api/sessions').json()['session']}"

    def upload(self, content: Path | bytes, name: str | None = None):
        body, name = (content, name) if isinstance(content, bytes) else (content.read_bytes(), name or content.name)
        return self.client.post(f"{self.own}/files", content=body, headers={"X-File-Name": quote(name)})

    def drop(self, *files: Path | tuple[Path | bytes, str]) -> dict:
        """Upload files, under other names if they are pairs, and return the state."""
        for file in files:
            answer = self.upload(*file) if isinstance(file, tuple) else self.upload(file)
            assert answer.status_code == 204, answer.text
        assert self.client.post(f"{self.own}/sort").status_code == 204
        return self.state()

    def state(self) -> dict:
        return self.client.get(self.own).json()

    def sentences(self) -> list[str]:
        """What the page says is wrong."""
        state = self.state()
        return [*state["problems"], *state["notices"]]

    def assign(self, name: str, modality: str | None) -> dict:
        number = next(image["number"] for image in self.state()["images"] if image["name"] == name)
        answer = self.client.post(f"{self.own}/images/{number}", json={"modality": modality})
        assert answer.status_code == 204, answer.text
        return self.state()

    def start(self, *drop: str):
        return self.client.post(f"{self.own}/jobs", json={"drop": list(drop)})

    def segment(self, *drop: str) -> dict:
        """Segment without some modalities, and return the job when it is over."""
        answer = self.start(*drop)
        assert answer.status_code == 204, answer.text
        return self.wait()

    def wait(self, *states: str) -> dict:
        """Wait until the last job has one of these states, or is over, and return it."""
        end = time.monotonic() + SECONDS
        while (job := self.state()["jobs"][-1])["state"] not in (states or ("done", "failed", "cancelled")):
            assert time.monotonic() < end, job
            time.sleep(0.01)
        return job

    def result(self, job: dict, file: str = "segmentation.nii.gz") -> bytes:
        answer = self.client.get(f"{self.own}/jobs/{job['number']}/{file}")
        assert answer.status_code == 200, answer.text
        return answer.content


@contextmanager
def served_page(predictor: Predictor, **settings) -> Iterator[Page]:
    with TestClient(make_app(predictor, Settings(**settings)), base_url=ADDRESS) as client:
        yield Page(client)


def stored_values(voxels: np.ndarray) -> np.ndarray:
    """What a DICOM series holds of an image."""
    return (voxels * (60000.0 / voxels.max())).clip(0).astype(np.uint16)


def write_series(folder: Path, image: Path, description: str, *, contrast: bool = False, study: str = "1.2.3") -> Path:
    """Write the slices of an image as a DICOM series, in an order of file names that is not theirs."""
    volume = sitk.ReadImage(str(image))
    voxels, direction = sitk.GetArrayFromImage(volume), np.array(volume.GetDirection()).reshape(3, 3)
    stored = stored_values(voxels)
    folder.mkdir(parents=True)
    series = generate_uid()
    for number, plane in enumerate(stored):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        each = pydicom.Dataset()
        each.file_meta = meta
        each.SOPClassUID, each.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        each.PatientID, each.PatientName, each.PatientBirthDate, each.PatientSex = "phantom", "Phantom", "", "O"
        each.StudyInstanceUID, each.SeriesInstanceUID, each.FrameOfReferenceUID = study, series, study + ".1"
        each.StudyID, each.StudyDate, each.StudyTime, each.AccessionNumber = "1", "20260101", "120000", ""
        each.Modality, each.SeriesNumber, each.InstanceNumber = "MR", 7, number + 1
        each.SeriesDescription, each.ReferringPhysicianName, each.Manufacturer = description, "", "phantom"
        if contrast:
            each.ContrastBolusAgent = "Gadolinium"
        each.ImageOrientationPatient = [*direction[:, 0], *direction[:, 1]]
        each.ImagePositionPatient = list(volume.TransformIndexToPhysicalPoint((0, 0, number)))
        each.PixelSpacing, each.SliceThickness = list(volume.GetSpacing()[1::-1]), volume.GetSpacing()[2]
        each.Rows, each.Columns = plane.shape
        each.SamplesPerPixel, each.PhotometricInterpretation = 1, "MONOCHROME2"
        each.BitsAllocated, each.BitsStored, each.HighBit, each.PixelRepresentation = 16, 16, 15, 0
        each.PixelData = plane.tobytes()
        each.save_as(folder / f"{(number * 7) % len(stored):03d}_{number}.dcm", enforce_file_format=True)
    return folder
