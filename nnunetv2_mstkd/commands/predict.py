"""`mstkd predict`: segment cases with any subset of the modalities."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_mstkd.commands import model_options as options
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.folders import parse_folds

if TYPE_CHECKING:
    from nnunetv2_mstkd.inference.predictor import Predictor

FOLDS = (0, 1, 2, 3, 4)
"""nnUNetv2_predict's default."""

FOLDER_ONLY = {
    "--drop": None, "--skip-bad": False, "--save_probabilities": False, "--save-uncertainty": False,
    "--calibrate": False, "--continue_prediction": False, "-num_parts": 1, "-part_id": 0,
}  # fmt: skip
"""Options that do not go with ``--image``, and their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd predict`: those of nnUNetv2_predict, and those for absent modalities."""
    parser.description = (
        "Segment cases as nnUNetv2_predict does, but each case may lack any of its CASE_000k files. All cases are "
        "checked before the network runs; predictions.json says which modalities each one was predicted from. "
        "Or segment one patient: --image T1=t1.nii.gz --image FLAIR=flair.nii.gz -o segmentation.nii.gz"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    options.add_input(source, required=False)
    add = source.add_argument
    add("--image", metavar="T1=FILE", action="append", help="one modality of one patient; repeat for each modality")
    options.add_case_selection(parser)
    add = parser.add_argument
    add("-o", metavar="OUT", type=Path, required=True, help="output folder or, with --image, file")
    model = parser.add_argument_group("which model")
    options.add_model(model, folds=FOLDS)
    add = model.add_argument
    add("--student", metavar="N", type=int, help="predict with one of the two students of an SMML model: 1 or 2")
    run = parser.add_argument_group("how, as in nnUNetv2_predict")
    options.add_run(run)
    add = run.add_argument
    add("--save_probabilities", action="store_true", help="also write CASE.npz and CASE.pkl")
    uncertainty = "also write uncertainty/ and, with several folds or students, disagreement/"
    add("--save-uncertainty", action="store_true", help=uncertainty)
    calibrate = "divide logits by the evaluation's temperature before probabilities and entropies are saved"
    add("--calibrate", action="store_true", help=calibrate)
    largest = (
        "keep only the largest component of the foreground, that is one lesion; mstkd evaluate says what this changes"
    )
    add("--largest-component", action="store_true", help=largest)
    add("--continue_prediction", action="store_true", help="skip cases that are already predicted from the same images")
    add("-num_parts", metavar="N", type=int, default=1, help="number of calls that share the input folder")
    add("-part_id", metavar="K", type=int, default=0, help="which of these calls this is, 0 to N - 1")
    add("--verbose", action="store_true", help="print nnU-Net's own messages, too")


def run(args: argparse.Namespace) -> int:
    """Predict a folder of cases, or one patient; exit code 1 if some cases were skipped."""
    model = options.model_folder(args)
    return _predict_folder(args, model) if args.image is None else _predict_images(args, model)


def _predict_folder(args: argparse.Namespace, model: Path) -> int:
    if args.npp or args.nps:
        from nnunetv2_mstkd.inference.workers import start_server

        start_server()
    result = _load(args, model).predict_folder(
        args.i,
        args.o,
        drop=args.drop,
        skip_bad=args.skip_bad,
        continue_prediction=args.continue_prediction,
        save_probabilities=args.save_probabilities,
        save_uncertainty=args.save_uncertainty,
        part_id=args.part_id,
        num_parts=args.num_parts,
        preprocessing_processes=args.npp,
        export_processes=args.nps,
        progress=not args.disable_progress_bar,
    )
    kept = f", {result.kept} already there" if result.kept else ""
    number = len(result.predicted)
    print(
        f"{number} case{'s' * (number != 1)} predicted{kept}: {args.o}; {result.record.name} lists the modalities used"
    )
    for line in result.subsets:
        print(f"  {line}")
    return options.report_left_out(result.problems)


def _predict_images(args: argparse.Namespace, model: Path) -> int:
    for option, default in FOLDER_ONLY.items():
        if getattr(args, option.lstrip("-").replace("-", "_")) != default:
            raise InputError(f"{option} is for a folder of cases (-i), not for --image")
    images = _read_images(args.image)
    if args.o.is_dir():
        raise InputError(f"{args.o} is a folder; with --image, -o is the file to write, such as segmentation.nii.gz")
    if args.o.resolve() in {file.resolve() for file in images.values()}:
        raise InputError(f"-o {args.o} is one of the images; name another file to write")
    predictor = _load(args, model)
    predictor.check_output(args.o)
    result = predictor.predict(images)
    result.save(args.o)
    from nnunetv2_mstkd.inference.expected_dice import format_dice

    print(f"predicted from {result.subset}: {args.o}{format_dice(result.expected_dice)}")
    return 0


def _read_images(texts: list[str]) -> dict[str, Path]:
    """``T1=FILE`` by modality."""
    images: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not name.strip() or not file:
            raise InputError(f"--image {text}: expected MODALITY=FILE, for example T1=t1.nii.gz")
        if name in images:
            raise InputError(f"--image names {name} twice")
        images[name] = Path(file)
    return images


def _load(args: argparse.Namespace, model: Path) -> Predictor:
    from nnunetv2_mstkd.inference.predictor import Predictor

    return Predictor(
        model,
        parse_folds(args.folds),
        checkpoint=args.chk,
        device=options.torch_device(args.device),
        mirroring=not args.disable_tta,
        step_size=args.step_size,
        student=args.student,
        trust=args.trust,
        on_device=not args.not_on_device,
        verbose=args.verbose,
        calibrate=args.calibrate,
        largest_component=args.largest_component,
    )
