"""What an evaluation is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.inference.evaluation_files import FOLDER
from nnunetv2_mstkd.metrics.conventions import DICE, LESION_RULES

DEFAULT_LESIONS = "brats2023_gli"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of :func:`nnunetv2_mstkd.reporting.evaluate.evaluate` that decide what is predicted and measured.

    Values that are impossible or do not go together are refused.
    """

    model_folder: Path
    folds: Sequence[int | str] | None
    checkpoint: str
    trust: bool
    name: str | None
    images: Path | None
    labels: Path | None
    output: Path | None
    subsets: Sequence[str]
    available: str | None
    mask_first: bool | None
    metrics: Sequence[str]
    convention: str
    lesion_convention: str | None
    tolerance: float
    min_voxels: Mapping[str, int]
    stack: int | None
    restart: bool
    step_size: float
    mirroring: bool
    device: Any
    on_device: bool
    preprocessing_processes: int
    scoring_processes: int
    progress: bool
    report: Callable[[str], None]

    def __post_init__(self) -> None:
        for name in ("model_folder", "images", "labels", "output"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else Path(path))
        if not self.model_folder.is_dir():
            raise MissingFileError(f"no model folder {self.model_folder}")
        if (self.images is None) != (self.labels is None):
            raise InputError("-i IMAGES and -l LABELS belong together; without both the validation cases are evaluated")
        if self.images is not None and self.output is None:
            raise InputError("-i IMAGES needs an output folder: -o OUT")
        if self.stack is not None and self.stack < 1:
            raise InputError(f"--stack is {self.stack}, expected at least 1")
        if self.mask_first and (self.stack or 1) > 1:
            raise InputError(
                f"--stack {self.stack} does not go with --mask-first: then images of different subsets differ in size"
            )
        if min(self.preprocessing_processes, self.scoring_processes) < 0:
            raise InputError(
                f"-npp {self.preprocessing_processes} -nps {self.scoring_processes}: expected numbers of processes, or "
                f"0 for none"
            )

    @property
    def output_folder(self) -> Path:
        return self.output or self.model_folder / FOLDER

    @property
    def all_metrics(self) -> tuple[str, ...]:
        """Dice, and the metrics asked for."""
        return tuple(dict.fromkeys([DICE, *self.metrics]))

    @property
    def lesions(self) -> str | None:
        """The lesion-wise convention; None if no lesion-wise metric is asked for."""
        wanted = any(name in LESION_RULES for name in self.metrics)
        return (self.lesion_convention or DEFAULT_LESIONS) if wanted else None
