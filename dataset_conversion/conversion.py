"""From a description to a folder in nnUNet_raw: everything is checked first, and the folder appears in one step."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import SimpleITK as sitk
from tqdm import tqdm

from nnunetv2_mstkd.dataset_conversion import splits as folds
from nnunetv2_mstkd.dataset_conversion.cases import Case, check_case, find_cases, read_label
from nnunetv2_mstkd.dataset_conversion.description import Description
from nnunetv2_mstkd.dataset_conversion.geometry import Geometry, read_geometry, read_image
from nnunetv2_mstkd.nnunet_folders import nnunet_folder

FILE_ENDING = ".nii.gz"
DEFAULT_WORKERS = min(8, os.cpu_count() or 1)

Result = TypeVar("Result")


def convert(
    source: Path,
    description: Description,
    dataset: str,
    *,
    make_splits: Callable[[Sequence[str]], folds.Splits] | None = None,
    overwrite: bool = False,
    workers: int = DEFAULT_WORKERS,
) -> list[Case]:
    """Write a data set in nnU-Net's raw format, all or nothing.

    Parameters
    ----------
    source
        The folder of the data set. It is only read.
    description
        What it holds.
    dataset
        The name to write it under, from :func:`dataset_name`.
    make_splits
        Names of the training cases -> content of ``splits_final.json``, which is written to ``nnUNet_preprocessed``;
        None leaves the split to nnU-Net.
    overwrite
        Replace what is there.
    workers
        Cases handled at a time.

    Returns
    -------
    The cases written.

    Raises
    ------
    FileNotFoundError
        If `source` or a folder of nnU-Net is absent.
    FileExistsError
        If the data set, or its split, is already there.
    ValueError
        If something is wrong with the cases: one line for each problem of each case. Nothing was written.
    """
    target = nnunet_folder("nnUNet_raw") / dataset
    splits_file = nnunet_folder("nnUNet_preprocessed") / dataset / "splits_final.json" if make_splits else None
    _refuse_second_name(dataset)
    for path in (target, splits_file):
        if path is not None and path.exists() and not overwrite:
            raise FileExistsError(f"{path} is already there; --overwrite replaces it")

    cases, problems = find_cases(source, description)
    for found in _for_each(cases, lambda case: check_case(case, description), workers, "checking"):
        problems += found
    if problems:
        raise ValueError(f"{_count(problems, 'problem')}, nothing was written:\n  " + "\n  ".join(sorted(problems)))
    training = [case.name for case in cases if not case.is_test]
    splits = make_splits(training) if make_splits else None

    with _replacing(target) as unfinished:
        parts = ["imagesTr", "labelsTr"]
        if any(case.is_test for case in cases):
            parts.append("imagesTs")
        if any(case.is_test and case.label for case in cases):
            parts.append("labelsTs")
        for part in parts:
            (unfinished / part).mkdir()
        for _ in _for_each(cases, lambda case: _write_case(case, description, unfinished), workers, "writing"):
            pass
        content = {"name": dataset, **description.dataset_json(len(training))}
        (unfinished / "dataset.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    if splits is not None and splits_file is not None:
        folds.write_splits(splits, splits_file)
    return cases


def dataset_name(dataset_id: int, name: str) -> str:
    """Return nnU-Net's name of a data set, ``Dataset226_BraTS`` for 226 and ``BraTS``.

    Raises
    ------
    ValueError
        If nnU-Net could not read it back.
    """
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"the data set's number is {dataset_id}, expected 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or "__" in name:
        raise ValueError(
            f"the data set's name is {name!r}, expected letters, digits, '.', '_' and '-', without a double "
            "underscore, at which nnU-Net splits the names of its results"
        )
    return f"Dataset{dataset_id:03d}_{name}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every converter has."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the data set")
    parser.add_argument("-d", "--dataset-id", metavar="ID", type=int, required=True, help="number of the new data set")
    parser.add_argument("--name", required=True, help="its name: the folder is DatasetID_NAME")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set, and a split, of that name")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=DEFAULT_WORKERS, help="cases at a time (default: %(default)s)"
    )
    group = parser.add_argument_group("folds", "nnU-Net's own split has five folds and so needs five training cases.")
    group.add_argument("--splits", action="store_true", help="write splits_final.json into nnUNet_preprocessed")
    group.add_argument(
        "--folds",
        metavar="N",
        type=int,
        help="number of folds, implies --splits (default: 5, or one per case if fewer)",
    )
    group.add_argument(
        "--seed", type=int, default=folds.SEED, help="of the assignment to folds (default: %(default)s, as nnU-Net)"
    )
    group.add_argument(
        "--val-cases", metavar="CASE", nargs="+", help="one fold that validates on these cases, implies --splits"
    )


def run(args: argparse.Namespace, description: Description) -> None:
    """Convert as the options of :func:`add_arguments` say, and print what was written and what comes next.

    Raises
    ------
    ValueError, FileNotFoundError, FileExistsError
        As :func:`convert` does.
    """
    if args.folds is not None and args.val_cases:
        raise ValueError("found --folds and --val-cases, expected one of them: --val-cases makes a single fold")
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}, expected at least 1")

    def make_splits(cases: Sequence[str]) -> folds.Splits:
        if args.val_cases:
            return folds.hold_out(cases, args.val_cases)
        return folds.cross_validation(cases, args.folds, args.seed)

    wants_splits = args.splits or args.folds is not None or args.val_cases
    dataset = dataset_name(args.dataset_id, args.name)
    cases = convert(
        args.source,
        description,
        dataset,
        make_splits=make_splits if wants_splits else None,
        overwrite=args.overwrite,
        workers=args.workers,
    )
    training = sum(not case.is_test for case in cases)
    print(
        f"{nnunet_folder('nnUNet_raw') / dataset}: {_count(range(training), 'training case')}, "
        f"{_count(range(len(cases) - training), 'test case')}, channels {', '.join(description.modalities)}"
    )
    if wants_splits:
        print(f"{nnunet_folder('nnUNet_preprocessed') / dataset / 'splits_final.json'}: the folds")
    print(f"next: nnUNetv2_plan_and_preprocess -d {args.dataset_id} --verify_dataset_integrity")


def _refuse_second_name(dataset: str) -> None:
    """Refuse a number that another data set has: nnU-Net finds data sets by number."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = Path(os.environ.get(variable) or "")
        if not os.environ.get(variable) or not folder.is_dir():
            continue
        number = dataset[: len("Dataset000")]
        others = [path.name for path in folder.glob(f"{number}*") if path.is_dir() and path.name != dataset]
        if others:
            raise FileExistsError(
                f"{folder / others[0]} has the number of {dataset}, and nnU-Net finds data sets by number; "
                "take another one"
            )


def _for_each(cases: Sequence[Case], work: Callable[[Case], Result], workers: int, what: str) -> Iterator[Result]:
    """Yield ``work(case)`` of each case in order, with a progress bar where there is a terminal to see it."""
    pool = ThreadPoolExecutor(workers)  # threads do: SimpleITK and zlib release the interpreter's lock
    try:
        yield from tqdm(pool.map(work, cases), total=len(cases), desc=what, unit="case", disable=None, leave=False)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_case(case: Case, description: Description, folder: Path) -> None:
    """Write the files of one checked case into the data set `folder`."""
    part = "Ts" if case.is_test else "Tr"
    geometry = read_geometry(case.images[0])
    for channel, path in enumerate(case.images):
        target = folder / f"images{part}" / f"{case.name}_{channel:04d}{FILE_ENDING}"
        if path.name.endswith(FILE_ENDING) and read_geometry(path) == geometry:
            shutil.copyfile(path, target)
        else:
            _write_image(read_image(path), geometry, target)
    if case.label is not None:
        label = sitk.GetImageFromArray(read_label(case.label, description))
        _write_image(label, geometry, folder / f"labels{part}" / f"{case.name}{FILE_ENDING}")


def _write_image(image: sitk.Image, geometry: Geometry, target: Path) -> None:
    """Write an image with the case's own geometry: nnU-Net allows less rounding between files than this project."""
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    sitk.WriteImage(image, str(target), useCompression=True)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a new folder beside `target`, which takes its place when the block ends well and vanishes otherwise."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        # A folder inside: the scratch folder itself is readable by its owner only.
        unfinished, old = Path(scratch, "new"), Path(scratch, "old")
        unfinished.mkdir()
        yield unfinished
        if target.exists():
            target.rename(old)
        try:
            unfinished.rename(target)
        except BaseException:  # an interrupt too: what was there must not be lost
            if old.exists():
                old.rename(target)
            raise


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
