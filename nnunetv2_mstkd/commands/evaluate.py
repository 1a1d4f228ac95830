"""`mstkd evaluate`: measure a model on all subsets of its modalities in one pass."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.commands.predict import add_model, refuse_same_folder, torch_device, whole_number_from_environment
from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.evaluation.files import FOLDER, REPORT

DEFAULT_METRICS = ("dice", "hd95")
DEFAULT_LESIONS = "brats2023_gli"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd evaluate`: those of nnUNetv2_predict, and those for subsets and metrics."""
    parser.description = (
        "Measure a trained model, of any trainer, on all subsets of its modalities: on the validation cases of its "
        "folds, or on a folder of images and labels. A run that was stopped goes on where it was."
    )
    model = parser.add_argument_group("which model")
    add_model(parser)
    model.add_argument("-c", metavar="CONFIGURATION", help="configuration, for example 3d_fullres")
    model.add_argument(
        *("-f", "--folds"), metavar="FOLD", nargs="+", help="folds; several are pooled (default: all that are trained)"
    )
    model.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainer", help="trainer (default: %(default)s)")
    model.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    model.add_argument(
        "-chk", metavar="FILE", default="checkpoint_final.pth", help="checkpoint file name (default: %(default)s)"
    )
    model.add_argument(
        "--trust", action="store_true", help="let nnU-Net load the model: this executes whatever its files contain"
    )
    model.add_argument("--name", help="of the model in tables (default: the name of its folder)")
    data = parser.add_argument_group("which cases (default: the validation cases of each fold)")
    data.add_argument("-i", metavar="IMAGES", type=Path, help="folder of CASE_000k files; folds are then averaged")
    data.add_argument("-l", metavar="LABELS", type=Path, help="folder of their labels")
    data.add_argument("-o", metavar="OUT", type=Path, help=f"output folder (default: {FOLDER} in the model folder)")
    what = parser.add_argument_group("which subsets, and what is measured")
    what.add_argument(
        "--subsets", metavar="T1ce+FLAIR", nargs="+", default=(), help="only these; all: the full input (default: all)"
    )
    what.add_argument("--available", metavar="T1,FLAIR", help="only subsets of these modalities: those that you have")
    what.add_argument(
        "--mask-first", action="store_true", help="remove channels before preprocessing, as if they had never existed"
    )
    what.add_argument(
        "--metrics", metavar="METRIC", nargs="+", default=DEFAULT_METRICS, help="default: dice hd95; dice always"
    )
    what.add_argument("--convention", default="brats", help="rules for empty masks: brats or nnunet (default: brats)")
    what.add_argument("--lesion-convention", metavar="NAME", help=f"for lesion metrics (default: {DEFAULT_LESIONS})")
    what.add_argument("--tolerance", metavar="MM", type=float, default=1.0, help="of nsd (default: %(default)s)")
    run = parser.add_argument_group("how")
    run.add_argument("--stack", metavar="N", type=int, help="subsets per forward pass (default: by the batch size)")
    run.add_argument(
        "--strips", metavar="N", type=int, default=3, help=f"cases pictured in {REPORT} (default: worst, median, best)"
    )
    run.add_argument("--restart", action="store_true", help="forget the results that are there")
    run.add_argument("-step_size", metavar="S", type=float, default=0.5, help="of the window (default: %(default)s)")
    run.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, a little less accurate")
    for option, work in (("npp", "preprocessing"), ("nps", "resampling and metrics")):
        number = whole_number_from_environment(f"nnUNet_{option}", 3)
        text = f"processes for {work} (default: %(default)s)"
        run.add_argument(f"-{option}", metavar="N", type=int, default=number, help=text)
    run.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: %(default)s")
    run.add_argument("--not_on_device", action="store_true", help="collect results in main memory: for huge images")
    run.add_argument("--disable_progress_bar", action="store_true", help="for jobs without a terminal")


def run(args: argparse.Namespace) -> None:
    """Check everything, predict and measure what is not there yet, write and print the results."""
    _check_options(args)
    from nnunetv2_mstkd.inference.workers import start_server, workers

    if args.npp or args.nps:
        start_server()
    # after the checks: these import torch
    from tqdm import tqdm

    from nnunetv2_mstkd import modalities
    from nnunetv2_mstkd.evaluation.case_records import CaseRecords, table
    from nnunetv2_mstkd.evaluation.cases import check_cases
    from nnunetv2_mstkd.evaluation.stacking import default_stack
    from nnunetv2_mstkd.evaluation.subsets import check_zero_is_missing, choose_subsets, evaluate_cases
    from nnunetv2_mstkd.nnunet import checkpoints
    from nnunetv2_mstkd.nnunet.model_folder import find_model_folder
    from nnunetv2_mstkd.reporting.report import Strips
    from nnunetv2_mstkd.reporting.subset_report import write_report

    device = torch_device(args.device)
    folder = args.m or find_model_folder(args.d, args.tr, args.p, args.c)
    output = args.o or folder / FOLDER
    for other, what in ((args.i, "folder of images"), (args.l, "folder of labels"), (folder, "model folder")):
        if other is not None:
            refuse_same_folder(output, other, what)
    groups = _fold_groups(folder, args)
    predictors = _load(args, folder, groups, device)
    first = next(iter(predictors.values()))
    names = modalities.modality_names(first.dataset_json)
    subsets = choose_subsets(names, subsets=args.subsets, available=args.available)
    texts = [modalities.subset_name(row, names) for row in subsets.tolist()]
    check_zero_is_missing(subsets, names, first.configuration_manager.normalization_schemes)
    rules = _rules(args, first)
    # not only those in a subset: what preprocessing sees must not depend on which subsets one call asks for
    there = modalities.parse_subset(args.available or modalities.ALL, names).nonzero().ravel().tolist()
    cases = _cases(args, folder, groups, first, names, there)
    everything = [case for of_fold in cases.values() for case in of_fold]

    settings = _settings(args, folder, first, names, rules)
    if args.i is not None and not args.mask_first:
        settings["preprocessed_from"] = [names[channel] for channel in there]
    records = CaseRecords(output, settings, restart=args.restart)
    for text, predictor in predictors.items():
        weights = [checkpoints.fingerprint(tensors) for tensors in predictor.list_of_parameters]
        records.use_weights(text, "+".join(weights))
    still_open = [case for case in everything if not set(texts) <= set(records.load(case.fold, case.name))]
    progress = not args.disable_progress_bar
    views = check_cases(still_open, first.plans_manager, rules, names, threads=max(1, args.npp), progress=progress)
    records.begin()

    batch_size = first.configuration_manager.batch_size
    stack = 1 if args.mask_first else args.stack or default_stack(batch_size, len(subsets), device)
    print(
        f"{settings['folder']}: cases: {len(everything)}, already evaluated: {len(everything) - len(still_open)}; "
        f"subsets: {len(texts)}, {'one at a time' if stack == 1 else f'up to {stack} in one forward pass'}"
    )
    with (
        tqdm(total=len(everything) * len(texts), unit="subset", disable=not progress) as bar,
        workers(args.npp, len(still_open)) as preparing,
        workers(args.nps, len(still_open) * len(texts)) as scoring,
    ):
        for text, predictor in predictors.items():
            stack = evaluate_cases(
                predictor,
                cases[text],
                subsets,
                rules,
                records,
                views,
                stack=stack,
                mask_first=args.mask_first,
                preparing=preparing,
                scoring=scoring,
                scoring_processes=args.nps,
                bar=bar,
            )
    results, near = table(
        records,
        [(case.fold, case.name) for case in everything],
        texts,
        model=args.name or settings["folder"],
        trainer=first.trainer_name,
    )
    strips = Strips(args.strips, records.load_strip)
    print(f"\n{write_report(results, output, rules, settings, near if stack > 1 else None, strips)}\n")
    print(f"written to {output}; {REPORT} is the page to look at")


def _load(args: argparse.Namespace, folder: Path, groups: dict[str, tuple], device: Any) -> dict[str, Any]:
    """A predictor for each group of folds, on the CPU until it is used."""
    from nnunetv2_mstkd.nnunet.model import load_predictor

    return {
        text: load_predictor(
            folder,
            folds,
            args.chk,
            device=device,
            trust=args.trust,
            tile_step_size=args.step_size,
            use_mirroring=not args.disable_tta,
            perform_everything_on_device=not args.not_on_device,
            allow_tqdm=False,  # one bar, over cases and subsets
        )
        for text, folds in groups.items()
    }


def _rules(args: argparse.Namespace, predictor: Any) -> Any:
    from nnunetv2_mstkd.evaluation.scoring import rules_of

    metrics = tuple(dict.fromkeys(["dice", *args.metrics]))
    of_lesions = any(name.startswith("lesion") for name in metrics)
    return rules_of(
        predictor.dataset_json,
        predictor.label_manager,
        metrics=metrics,
        convention=args.convention,
        lesion_convention=(args.lesion_convention or DEFAULT_LESIONS) if of_lesions else None,
        tolerance=args.tolerance,
    )


def _cases(
    args: argparse.Namespace,
    folder: Path,
    groups: dict[str, tuple],
    predictor: Any,
    names: Sequence[str],
    needed: Sequence[int],
) -> dict[str, list]:
    """The cases of each group of folds."""
    from nnunetv2_mstkd.evaluation.cases import folder_cases, validation_cases

    dataset_json = predictor.dataset_json
    if args.i is not None:
        return {text: folder_cases(args.i, args.l, text, dataset_json, names, needed) for text in groups}
    if "all" in groups:
        print("warning: fold all was trained on the very cases that it is evaluated on here", file=sys.stderr)
    return {
        text: validation_cases(
            folder,
            fold,
            _split(folder / f"fold_{fold}" / args.chk, args.trust),
            predictor.plans_manager,
            predictor.configuration_manager,
            dataset_json,
            from_images=args.mask_first,
        )
        for text, (fold,) in groups.items()
    }


def _settings(
    args: argparse.Namespace, folder: Path, predictor: Any, names: Sequence[str], rules: Any
) -> dict[str, Any]:
    """What all results of one output folder have in common."""
    return {
        "folder": folder.resolve().name,
        "dataset": predictor.plans_manager.dataset_name,
        "source": "validation" if args.i is None else str(args.i.resolve()),
        "labels": None if args.l is None else str(args.l.resolve()),
        "checkpoint": args.chk,
        "mirroring": not args.disable_tta,
        "step_size": args.step_size,
        "mask_first": args.mask_first,
        "channels": list(names),
        "regions": {name: list(labels) for name, labels in rules.regions.items()},
        "metrics": list(rules.metrics),
        "convention": rules.convention,
        "lesion_convention": rules.lesion_convention,
        "tolerance": rules.tolerance,
    }


def _fold_groups(folder: Path, args: argparse.Namespace) -> dict[str, tuple[int | str, ...]]:
    """The folds whose weights work together, by their text: each alone, or all of them on a folder of images."""
    from nnunetv2_mstkd.nnunet.model_folder import find_checkpoints, parse_folds

    if args.folds is None:
        texts = [path.parent.name.removeprefix("fold_") for path in sorted(folder.glob(f"fold_*/{args.chk}"))]
        # "all" has seen every case, so it is only taken where it is asked for
        folds: tuple[int | str, ...] = tuple(sorted(int(text) for text in texts if text.isdigit()))
        if not folds:
            hint = "fold_all is: -f all" if "all" in texts else "train one, or take another checkpoint with -chk"
            raise MissingFileError(f"no fold of {folder} is finished (no fold_*/{args.chk}); {hint}")
    else:
        folds = parse_folds(list(dict.fromkeys(args.folds)))
        find_checkpoints(folder, folds, args.chk)
    if args.i is None:
        return {str(fold): (fold,) for fold in folds}
    return {"+".join(map(str, folds)): folds}


def _split(checkpoint: Path, trust: bool) -> dict[str, Sequence[str]] | None:
    """The split that a trainer of this package has noted in its checkpoint."""
    from nnunetv2_mstkd.nnunet import checkpoints
    from nnunetv2_mstkd.training.settings import BLOCK

    try:
        noted: Any = checkpoints.read(checkpoint).get(BLOCK)
    except ValueError:
        if trust:  # nnU-Net has loaded it
            return None
        raise
    return noted.get("split") if isinstance(noted, dict) else None


def _check_options(args: argparse.Namespace) -> None:
    if args.d is not None and args.c is None:
        raise InputError("-d needs -c CONFIGURATION, for example -c 3d_fullres")
    if args.m is not None and not args.m.is_dir():
        raise MissingFileError(f"no model folder {args.m}")
    if (args.i is None) != (args.l is None):
        raise InputError("-i IMAGES and -l LABELS belong together; without both the validation cases are evaluated")
    if args.i is not None and args.o is None:
        raise InputError("-i IMAGES needs an output folder: -o OUT")
    if args.stack is not None and args.stack < 1:
        raise InputError(f"--stack is {args.stack}, expected at least 1")
    if args.mask_first and (args.stack or 1) > 1:
        raise InputError(
            f"--stack {args.stack} does not go with --mask-first: each subset then has an image of its own size"
        )
    if not 0 < args.step_size <= 1:
        raise InputError(f"-step_size is {args.step_size}, expected above 0 and at most 1")
    if args.strips < 0:
        raise InputError(f"--strips is {args.strips}, expected a number of cases, or 0 for no pictures")
    if min(args.npp, args.nps) < 0:
        raise InputError(f"-npp {args.npp} -nps {args.nps}: expected numbers of processes, or 0 for none")
