"""The segmentations that pages ask for, one after the other, with the one model in memory."""

from __future__ import annotations

import queue
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import nibabel
import numpy as np

from nnunetv2_mstkd.errors import UserError, lacks_memory
from nnunetv2_mstkd.images.geometry import read_geometry, read_nifti_voxels
from nnunetv2_mstkd.inference.predictor import Predictor
from nnunetv2_mstkd.metrics.masks import MM3_PER_ML
from nnunetv2_mstkd.metrics.overlap import dice

if TYPE_CHECKING:
    from nnunetv2_mstkd.app.dicom import Series


class CancelledError(Exception):
    """The page does not want the segmentation any more."""


@dataclass
class Job:
    """One segmentation of a page's images."""

    number: int
    subset: str
    files: Mapping[str, Path]
    """Image of each modality."""
    folder: Path
    """For the results."""
    changed: Callable[[], None]
    """Called when there is something new to show."""
    beside: Callable[[], Path | None] = lambda: None
    """Called when this segmentation is done; returns another one of the case to compare it with, or None."""
    series: Series | None = None
    """DICOM series that a DICOM SEG can refer to."""
    state: Literal["waiting", "running", "done", "failed", "cancelled"] = "waiting"
    message: str = ""
    """What failed."""
    progress: float = 0.0
    """Part of the network's forward passes that are done."""
    seconds: float = 0.0
    volumes: dict[str, float] = field(default_factory=dict)
    """Of each label or region, in ml."""
    center: list[float] | None = None
    """Of the foreground: right, anterior, superior in mm, as in a NIfTI file; None without any."""
    agreement: dict[str, float] | None = None
    """Dice with ``beside``, by label or region: 1 where both are empty."""

    def __post_init__(self) -> None:
        self._cancelled = threading.Event()

    @property
    def segmentation(self) -> Path:
        return self.folder / "segmentation.nii.gz"

    @property
    def uncertainty(self) -> Path:
        return self.folder / "uncertainty.nii.gz"

    @property
    def is_over_without_result(self) -> bool:
        return self.state in ("failed", "cancelled")

    def cancel(self) -> None:
        """End the job, if it is not over, before the next forward pass of the network."""
        self._cancelled.set()
        if self.state == "waiting":
            self._become("cancelled")

    def state_for_page(self, expected: Mapping[str, float] | None) -> dict[str, Any]:
        """What the page shows; ``expected`` is the Dice to expect of the subset."""
        return {
            "number": self.number,
            "subset": self.subset,
            "state": self.state,
            "message": self.message,
            "progress": self.progress,
            "seconds": round(self.seconds, 1),
            "volumes": self.volumes,
            "center": self.center,
            "agreement": self.agreement,
            "expected": expected,
            "dicom": self.series is not None,
        }

    def run(self, predictor: Predictor) -> None:
        """Segment, and write what the page can show and download."""
        start = time.monotonic()
        try:
            self._check()
            self._become("running")
            result = predictor.predict(self.files, on_pass=self._passed)
            self._check()
            self.folder.mkdir()
            result.save(self.segmentation)
            self._check()
            result.save_uncertainty(self.uncertainty)
            self._measure(result.segmentation, predictor.labels)
            self._check()
            self.seconds = time.monotonic() - start
            self._become("done")
        except CancelledError:
            self._become("cancelled")
        except UserError as error:
            self._fail(f"{error}.")
        except Exception as error:
            if self._cancelled.is_set():  # the folder of a closed page is gone
                self._become("cancelled")
            elif lacks_memory(error):
                self._fail("There is not enough memory for an image of this size.")
            else:
                traceback.print_exc()
                self._fail("Internal error; the terminal in which mstkd app runs shows it.")

    def _passed(self, done: int, total: int) -> None:
        self._check()
        self.progress = min(1.0, done / total)  # out of memory on the device: nnU-Net begins again
        self.changed()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError

    def _become(self, state: Literal["running", "done", "cancelled"]) -> None:
        self.state = state
        self.changed()

    def _fail(self, message: str) -> None:
        self.state, self.message = "failed", message
        self.changed()

    def _measure(self, segmentation: np.ndarray, labels: Mapping[str, Sequence[int]]) -> None:
        voxel = float(np.prod(read_geometry(self.segmentation).spacing)) / MM3_PER_ML
        masks = {name: np.isin(segmentation, values) for name, values in labels.items()}
        self.volumes = {name: float(mask.sum()) * voxel for name, mask in masks.items()}
        places = np.argwhere(np.any(list(masks.values()), axis=0))
        if len(places):
            affine: Any = nibabel.load(self.segmentation).affine  # type: ignore[attr-defined]
            voxel_center = np.median(places, axis=0)[::-1]  # (x, y, z)
            self.center = (affine[:3, :3] @ voxel_center + affine[:3, 3]).tolist()
        beside = self.beside()
        if beside is not None:
            other = read_nifti_voxels(beside)
            self.agreement = {name: dice(mask, np.isin(other, labels[name])) for name, mask in masks.items()}


class Worker:
    """Runs jobs one after the other in a thread."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="segmentation", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        self._waiting.put(job)

    def close(self, timeout: float = 30) -> None:
        """End the thread after the running job, for which this waits so many seconds."""
        self._waiting.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            job.run(self._predictor)
            if job.state == "cancelled":
                shutil.rmtree(job.folder, ignore_errors=True)
