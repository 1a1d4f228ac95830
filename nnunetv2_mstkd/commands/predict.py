"""`mstkd predict`: segment cases whose modalities are partly absent."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.errors import ExistingFileError, InputError, MissingFileError

DEVICES = ("cuda", "cpu", "mps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd predict`: those of nnUNetv2_predict, and those for absent modalities."""
    parser.description = (
        "Segment cases as nnUNetv2_predict does, but any CASE_000k file of the input may be absent, differently per "
        "case. All cases are checked before any network runs; predictions.json says what each one was predicted from."
    )
    add_input(parser)
    parser.add_argument("-o", metavar="OUT", type=Path, required=True, help="output folder, made if absent")
    add_model(parser)
    model = parser.add_argument_group("which model")
    model.add_argument("-c", metavar="CONFIGURATION", help="configuration, for example 3d_fullres")
    model.add_argument("-f", metavar="FOLD", nargs="+", default=(0, 1, 2, 3, 4), help="folds (default: 0 1 2 3 4)")
    model.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainer", help="trainer (default: %(default)s)")
    model.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    model.add_argument(
        "-chk", metavar="FILE", default="checkpoint_final.pth", help="checkpoint file name (default: %(default)s)"
    )
    model.add_argument(
        "--student", metavar="N", type=int, help="of a model of two students (SMML), predict with this one: 1 or 2"
    )
    model.add_argument(
        "--trust", action="store_true", help="let nnU-Net load the model: this executes whatever its files contain"
    )
    run = parser.add_argument_group("how, as in nnUNetv2_predict")
    run.add_argument("-step_size", metavar="S", type=float, default=0.5, help="of the window (default: %(default)s)")
    run.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, a little less accurate")
    run.add_argument("--save_probabilities", action="store_true", help="also write CASE.npz and CASE.pkl")
    run.add_argument(
        "--continue_prediction", action="store_true", help="keep the cases that are there, made of the same modalities"
    )
    run.add_argument(
        "-npp",
        metavar="N",
        type=int,
        default=whole_number_from_environment("nnUNet_npp", 3),
        help="processes for preprocessing (default: %(default)s)",
    )
    run.add_argument(
        "-nps",
        metavar="N",
        type=int,
        default=whole_number_from_environment("nnUNet_nps", 3),
        help="processes for export (default: %(default)s)",
    )
    run.add_argument("-device", choices=DEVICES, default="cuda", help="default: %(default)s")
    run.add_argument("-num_parts", metavar="N", type=int, default=1, help="calls that share the input folder")
    run.add_argument("-part_id", metavar="K", type=int, default=0, help="which of them this one is, 0 to N - 1")
    run.add_argument("--not_on_device", action="store_true", help="collect results in main memory: for huge images")
    run.add_argument("--disable_progress_bar", action="store_true", help="for jobs without a terminal")
    run.add_argument("--verbose", action="store_true", help="nnU-Net's own messages too")


def add_input(parser: argparse.ArgumentParser) -> None:
    """The options that `mstkd predict` and `mstkd fill-missing` share."""
    parser.add_argument("-i", metavar="IN", type=Path, required=True, help="folder of CASE_000k files; only read")
    parser.add_argument(
        "--drop", metavar="T1ce,FLAIR", help="act as if these modalities were absent; their files are not read"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="go on with the good cases; lists the others and exits with 1"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """``-d`` or ``-m``."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("-d", metavar="ID", help="data set, number or name")
    group.add_argument("-m", metavar="MODEL", type=Path, help="folder of a trained model, with plans.json")


def run(args: argparse.Namespace) -> int:
    """Check all cases, predict the good ones; exit code 1 if some were skipped."""
    _check_options(args)
    from nnunetv2_mstkd.inference.workers import start_server

    if args.npp or args.nps:
        start_server()
    # after the checks: these import torch
    from nnunetv2_mstkd import modalities
    from nnunetv2_mstkd.dataset_conversion.job import count
    from nnunetv2_mstkd.inference.checks import Checker
    from nnunetv2_mstkd.inference.expected_dice import read_expected_dice
    from nnunetv2_mstkd.inference.input_folder import Case
    from nnunetv2_mstkd.inference.prediction import is_written, predict_cases
    from nnunetv2_mstkd.inference.record import Record, record_name, write_json
    from nnunetv2_mstkd.inference.selection import select
    from nnunetv2_mstkd.nnunet.model import load_predictor, set_student
    from nnunetv2_mstkd.nnunet.model_folder import find_model_folder, parse_folds

    device = torch_device(args.device)
    folder = args.m or find_model_folder(args.d, args.tr, args.p, args.c)
    refuse_same_folder(args.o, args.i, "input folder")
    refuse_same_folder(args.o, folder, "model folder")
    if args.trust:
        print("warning: --trust unpickles the checkpoint, which executes whatever it contains", file=sys.stderr)
    folds = parse_folds(args.f)
    predictor = load_predictor(
        folder,
        folds,
        args.chk,
        device=device,
        trust=args.trust,
        tile_step_size=args.step_size,
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=not args.not_on_device,
        verbose=args.verbose,
        verbose_preprocessing=args.verbose,
        allow_tqdm=False,  # one bar, over the cases
    )
    if args.student is not None:
        set_student(predictor, args.student)
    dataset_json, plans = predictor.dataset_json, predictor.plans_manager
    names = modalities.modality_names(dataset_json)
    try:
        expected = read_expected_dice(folder, names)
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)
        expected = {}

    file_ending = dataset_json["file_ending"]
    record_file = args.o / record_name(args.part_id, args.num_parts)
    record = Record(
        record_file, _describe(args, folder, folds, predictor, names), names, expected, resume=args.continue_prediction
    )

    def is_done(case: Case) -> bool:
        known = record.is_of(case) or not record.resumed
        return (
            args.continue_prediction and known and is_written(case.name, args.o, file_ending, args.save_probabilities)
        )

    schemes = predictor.configuration_manager.normalization_schemes
    checker = Checker(names, plans.image_reader_writer_class, schemes)
    selection = select(
        args.i,
        file_ending,
        checker,
        drop=args.drop,
        part=slice(args.part_id, None, args.num_parts),
        is_done=is_done,
        skip_bad=args.skip_bad,
        threads=args.npp,
        progress=not args.disable_progress_bar,
        verb="predicted",
    )
    args.o.mkdir(parents=True, exist_ok=True)
    write_json(args.o / "dataset.json", dataset_json)  # nnU-Net's postprocessing and evaluation look for these two
    write_json(args.o / "plans.json", plans.plans)
    record.save()
    try:
        predict_cases(
            predictor,
            selection.cases,
            args.o,
            save_probabilities=args.save_probabilities,
            preprocessing_processes=args.npp,
            export_processes=args.nps,
            progress=not args.disable_progress_bar,
            on_written=record.add,
        )
    finally:
        record.save()
    kept = f", {selection.done} already there" if selection.done else ""
    print(f"{count(selection.cases, 'case')} predicted{kept}: {args.o} (what from: {record_file.name})")
    for line in record.by_subset():
        print(f"  {line}")
    return selection.report()


def refuse_same_folder(output: Path, other: Path, what: str) -> None:
    """Raise ValueError if ``output`` is another folder that must stay as it is, or FileExistsError if it is a file."""
    if output.exists() and not output.is_dir():
        raise ExistingFileError(f"the output folder {output} is a file; choose another one")
    if output.resolve() == other.resolve() or (output.exists() and other.exists() and output.samefile(other)):
        raise InputError(f"the output folder {output} is the {what}; choose another one")


def _describe(
    args: argparse.Namespace, folder: Path, folds: tuple[int | str, ...], predictor: Any, names: tuple[str, ...]
) -> dict[str, Any]:
    """What the predictions of one output folder have in common, and what a continued run must repeat."""
    from nnunetv2_mstkd import modalities

    dropped = modalities.parse_subset(args.drop, names).tolist() if args.drop else [False] * len(names)
    return {
        "model": folder.resolve().name,
        "dataset": predictor.plans_manager.dataset_name,
        "trainer": predictor.trainer_name,
        "checkpoint": args.chk,
        "folds": list(folds),
        "student": args.student,
        "mirroring": not args.disable_tta,
        "step_size": args.step_size,
        "channels": list(names),
        "dropped": [name for name, is_dropped in zip(names, dropped, strict=True) if is_dropped],
    }


def _check_options(args: argparse.Namespace) -> None:
    if args.d is not None and args.c is None:
        raise InputError("-d needs -c CONFIGURATION, for example -c 3d_fullres")
    if not 0 < args.step_size <= 1:
        raise InputError(f"-step_size is {args.step_size}, expected above 0 and at most 1")
    if min(args.npp, args.nps) < 0:
        raise InputError(f"-npp {args.npp} -nps {args.nps}: expected numbers of processes, or 0 for none")
    if not 0 <= args.part_id < args.num_parts:
        raise InputError(
            f"-part_id is {args.part_id}, expected 0 to {args.num_parts - 1} with -num_parts {args.num_parts}"
        )
    if args.m is not None and not args.m.is_dir():
        raise MissingFileError(f"no model folder {args.m}")


def torch_device(name: str) -> Any:
    """The torch device; as in nnUNetv2_predict, one thread beside a GPU and all cores without."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("-device is cuda (the default), but torch finds no CUDA GPU; use -device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("-device is mps, but torch finds no Apple GPU; use -device cpu")
    if name != "cpu":
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    return torch.device(name)


def whole_number_from_environment(variable: str, default: int) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else default
