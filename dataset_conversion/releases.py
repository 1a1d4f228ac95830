"""All releases as one table: names of files and cases, label values, regions, grid. A new release is a new row.

Sources: the pages and official repositories of the challenges, and headers of cases of each grid; BraTS 2015: the label
values on the challenge's page, http://blog.smir.ch/BRATS/Start2014, the names in public code that reads it, and the
grid as in BRATS 2012 to 2018; BraTS 2018 to 2020:
https://www.med.upenn.edu/cbica/brats2020/data.html; BraTS 2023 and later: https://www.synapse.org/brats; the regions of
2024 and later as in the official evaluation (BraTS-2024-Metrics). LGG: its page,
https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation, and its files; the spacing is an assumption.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .description import BACKGROUND, Description, Grid, Slices
from .modality_names import BRATS_MODALITIES

SRI24 = Grid(
    "SRI24", (240, 240, 155), (1.0, 1.0, 1.0), (0.0, -239.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
)
MNI152 = Grid(
    "MNI152", (182, 218, 182), (1.0, 1.0, 1.0), (-90.0, 126.0, -72.0), (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
)
"""Left-anterior-superior voxels, origin (90, -126, -72) in NIfTI's own axes; only the qform says so in some files."""

WT, TC, ET, RC, CC = "whole tumor", "tumor core", "enhancing tumor", "resection cavity", "cystic component"


@dataclass(frozen=True)
class Release:
    """A row of the table. In patterns of files ``{case}`` is the name of the case."""

    title: str  # for messages and help
    case_names: str  # regular expression; its group "patient", if present, is the patient
    example: str  # a name that it matches
    modalities: Mapping[str, Sequence[str]]  # patterns of the file of each channel
    label: Sequence[str]  # patterns
    label_file: str  # name of a segmentation of this release
    classes: Mapping[str, int]  # the release's own values
    regions: Mapping[str, Sequence[str]]  # their classes, in the order of nnU-Net's output channels; may be none
    writes: Sequence[str]  # the class that each region writes into a segmentation, later ones over earlier ones
    grid: Grid | None  # of all images; None if each case has its own
    small_et_becomes: str  # the class that replaces an enhancing tumor too small to be plausible; empty without ET
    family: str  # name of the script that converts it, and of its page in the documentation
    stack: Sequence[str] = ()  # order of the channels if a case is one file of four dimensions, or of slices
    slices: Slices | None = None  # if a case is a folder of 2-D slices
    with_parent: bool = False  # a case is named after its folder and the one above, as PARENT_FOLDER
    name: str = ""

    def case_of(self, folder: Path) -> str:
        """Return the name of the case in a folder."""
        return f"{folder.parent.name}_{folder.name}" if self.with_parent else folder.name

    @property
    def written_values(self) -> dict[str, int]:
        """Maps each class to its value in the data set: the release's own, without gaps (4 becomes 3)."""
        names = sorted(self.classes, key=lambda name: self.classes[name])
        return {name: value for value, name in enumerate(names, start=1)}

    def description(self, *, plain_labels: bool = False) -> Description:
        """The release as the converter needs it: with overlapping regions, or with its classes as `plain_labels`."""
        written = self.written_values
        labels: dict[str, int | Sequence[int]] = {BACKGROUND: 0}
        plain_labels = plain_labels or not self.regions
        if plain_labels:
            labels |= written
        else:
            labels |= {name: sorted(written[part] for part in parts) for name, parts in self.regions.items()}
        moved = {own: written[name] for name, own in self.classes.items() if own != written[name]}
        return Description(
            modalities=self.modalities,
            label=self.label,
            labels=labels,
            regions_class_order=() if plain_labels else [written[name] for name in self.writes],
            remap=moved,
            patient=self.case_names if "(?P<patient>" in self.case_names else "",
            case_names=self.case_names,
            stack=self.stack,
            slices=self.slices,
            release=self.name,
            classes=written,
            label_file=self.label_file,
            grid=self.grid,
            small_et_becomes=written.get(self.small_et_becomes),
        )


def _files(separator: str, names: Sequence[str], *, also: str = "") -> dict[str, list[str]]:
    """Patterns of the four images; ``.nii*`` stands for both NIfTI endings."""
    stems = [f"{{case}}{separator}", *([f"{{case}}{also}"] if also else [])]
    return {
        modality: [f"{stem}{name}.nii*" for stem in stems]
        for modality, name in zip(BRATS_MODALITIES, names, strict=True)
    }


BEFORE_2023 = ("t1", "t1ce", "t2", "flair")
SINCE_2023 = ("t1n", "t1c", "t2w", "t2f")

_GLIOMA = {
    "regions": {WT: ("NCR", "ED", "ET"), TC: ("NCR", "ET"), ET: ("ET",)},
    "writes": ("ED", "NCR", "ET"),
    "small_et_becomes": "NCR",
}
_WITH_CAVITY = {
    "regions": {**_GLIOMA["regions"], RC: ("RC",)},  # the cavity is not part of the whole tumor
    "writes": (*_GLIOMA["writes"], "RC"),
    "small_et_becomes": "NCR",
}
_FOUR_IS_ET = {"NCR": 1, "ED": 2, "ET": 4}
_THREE_IS_ET = {"NCR": 1, "ED": 2, "ET": 3}


def _before_2023(title: str, case_names: str, example: str, family: str = "brats", **others) -> Release:
    values = {
        "modalities": _files("_", BEFORE_2023),
        "label": ("{case}_seg.nii*",),
        "label_file": "{case}_seg.nii.gz",
        "classes": _FOUR_IS_ET,
        "grid": SRI24,
        **_GLIOMA,
        **others,
    }
    return Release(title, case_names, example, family=family, **values)


def _since_2023(
    title: str, task: str, *, classes: Mapping[str, int] = _THREE_IS_ET, grid: Grid | None = SRI24, **others
):
    values = {
        "case_names": rf"(?P<patient>BraTS-{task}-\d{{5}})-\d{{3}}",
        "example": f"BraTS-{task}-00000-000",
        "modalities": _files("-", SINCE_2023),
        "label": ("{case}-seg.nii*",),
        "label_file": "{case}-seg.nii.gz",
        **(_WITH_CAVITY if "RC" in classes else _GLIOMA),
        **others,
    }
    return Release(title, classes=classes, grid=grid, family="brats", **values)


_FETS = {
    "case_names": r"FeTS2022_\d{5}",
    "example": "FeTS2022_00000",
    "family": "fets",
    # the second forms are used in the containers of task 2
    "modalities": _files("_", BEFORE_2023, also="_brain_"),
    "label": ("{case}_seg.nii*", "{case}_final_seg.nii*"),
}

_TABLE = {
    "brats2018": _before_2023("BraTS 2018", r"(?P<patient>Brats18_[A-Za-z0-9_]+)_\d+", "Brats18_2013_0_1"),
    "brats2019": _before_2023("BraTS 2019", r"(?P<patient>BraTS19_[A-Za-z0-9_]+)_\d+", "BraTS19_2013_0_1"),
    "brats2020": _before_2023(
        "BraTS 2020",
        r"BraTS20_(?:Training|Validation|Testing)_\d{3}",
        "BraTS20_Training_001",
        # in one copy in circulation the segmentation of case 355 is named after the rater
        label=("{case}_seg.nii*", "W39_1998.09.19_Segm.nii*"),
    ),
    "brats2021": _before_2023("BraTS 2021", r"BraTS2021_\d{5}", "BraTS2021_00000"),
    "brats2023_gli": _since_2023("BraTS 2023 GLI (adult glioma before treatment)", "GLI"),
    "brats2023_ssa": _since_2023("BraTS 2023 SSA (glioma, sub-Saharan Africa)", "SSA"),
    "brats2023_met": _since_2023("BraTS 2023 MET (metastases)", "MET"),
    "brats2023_ped": _since_2023("BraTS 2023 PED (paediatric)", "PED"),
    "brats2023_men": _since_2023("BraTS 2023 MEN (meningioma)", "MEN"),
    "brats2024_gli": _since_2023(
        "BraTS 2024 GLI (adult glioma after treatment)", "GLI", classes={**_THREE_IS_ET, "RC": 4}, grid=MNI152
    ),
    "brats2024_ped": _since_2023(
        "BraTS 2024 PED (paediatric)",
        "PED",
        classes={"ET": 1, "NET": 2, "CC": 3, "ED": 4},
        regions={WT: ("ET", "NET", "CC", "ED"), TC: ("ET", "NET", "CC"), ET: ("ET",), CC: ("CC",)},
        writes=("ED", "NET", "ET", "CC"),
        small_et_becomes="NET",
    ),
    "brats2025_met": _since_2023("BraTS 2025 MET (metastases)", "MET", classes={**_THREE_IS_ET, "RC": 4}, grid=None),
    "brats2015": Release(
        title="BraTS 2015",
        # HGG and LGG hold folders of the same names, which are other patients
        case_names=r"(?P<patient>[HL]GG_brats_(?:2013|tcia)_pat\d+)_\d+",
        example="HGG_brats_2013_pat0001_1",
        with_parent=True,
        # each file in a folder of its name, in some copies beside one another; the number is of the image, not the case
        modalities={
            modality: [f"VSD.*.MR_{name}.*/*.mha", f"VSD.*.MR_{name}.*.mha"]
            for modality, name in zip(BRATS_MODALITIES, ("T1", "T1c", "T2", "Flair"), strict=True)
        },
        label=("VSD.*.OT.*/*.mha", "VSD.*.OT.*.mha"),
        label_file="{case}.nii.gz",
        classes={"NCR": 1, "ED": 2, "NET": 3, "ET": 4},
        regions={WT: ("NCR", "ED", "NET", "ET"), TC: ("NCR", "NET", "ET"), ET: ("ET",)},
        writes=("ED", "NET", "ET"),
        grid=Grid("BraTS's", (240, 240, 155), (1.0, 1.0, 1.0)),
        small_et_becomes="NCR",
        family="brats",
    ),
    "fets2022": _before_2023("FeTS 2022", **_FETS),
    "fets2024": _before_2023("FeTS 2024", **_FETS),
    "msd_task01": Release(
        title="MSD Task01 BrainTumour",
        case_names=r"BRATS_\d{3}",
        example="BRATS_001",
        modalities={name: ("{case}.nii*",) for name in BRATS_MODALITIES},
        label=("{case}.nii*",),
        label_file="{case}.nii.gz",
        classes={"ED": 1, "NCR": 2, "ET": 3},
        grid=Grid("MSD's", (240, 240, 155), (1.0, 1.0, 1.0)),
        family="msd",
        stack=("FLAIR", "T1", "T1ce", "T2"),
        **_GLIOMA,
    ),
    "lgg": Release(
        title="LGG (MRI of TCGA-LGG, Buda et al. 2019)",
        case_names=r"(?P<patient>TCGA_[A-Z]{2}_[A-Z0-9]{4})_\d{8}",
        example="TCGA_CS_4941_19960909",
        modalities={name: ("{case}_{slice}.tif",) for name in BRATS_MODALITIES if name != "T2"},
        label=("{case}_{slice}_mask.tif",),
        label_file="{case}_{slice}_mask.tif",
        classes={"tumor": 255},
        regions={},
        writes=(),
        grid=None,
        small_et_becomes="",
        family="lgg",
        stack=("T1", "FLAIR", "T1ce"),
        slices=Slices(spacing=(1.0, 1.0, 5.0), substitute="FLAIR"),
    ),
}

RELEASES: Mapping[str, Release] = {name: replace(release, name=name) for name, release in _TABLE.items()}
"""The table; its keys are the names of the sub-commands."""


def releases_of_case(folder: Path) -> list[str]:
    """Return the releases in which a case may have such a folder."""
    return [
        name
        for name, release in RELEASES.items()
        if re.fullmatch(release.case_names, release.case_of(folder), re.ASCII)
    ]


def meaning_of_value(value: int) -> str:
    """The meaning of a label value: ``4 is ET in brats2018, RC in brats2024_gli``; empty if no release has it."""
    by_class: dict[str, list[str]] = {}
    for name, release in RELEASES.items():
        for label, own in release.classes.items():
            if own == value:
                by_class.setdefault(label, []).append(name)
    meanings = [
        f"{label} in {', '.join(names[:4])}{' and others' if names[4:] else ''}" for label, names in by_class.items()
    ]
    return f"{value} is {', '.join(meanings)}" if meanings else ""
