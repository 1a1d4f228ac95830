"""`mstkd adapters`: how alike the adapters of an AdaMM model are, as a figure and as numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.nnunet.folders import FINAL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd adapters`."""
    parser.description = (
        "Draw the cosine similarity between the adapters that a trained AdaMM model has for different subsets of "
        "modalities, two panels per stage, and write the numbers to a CSV file with the same name."
    )
    add = parser.add_argument
    add("model", metavar="MODEL_FOLDER", type=Path, help="folder of a trained model, with plans.json")
    add("-o", dest="output", metavar="FIGURE", type=Path, required=True, help="figure to write: .png, .pdf or .svg")
    add("-f", "--fold", help="fold (default: the first trained one)")
    add("-chk", metavar="FILE", default=FINAL, help="checkpoint file name (default: %(default)s)")
    add("--subsets", metavar="T1ce+FLAIR", nargs="+", default=(), help="subsets (default: all but the full set)")


def run(args: argparse.Namespace) -> None:
    """Draw and write."""
    import torch

    from nnunetv2_mstkd.evaluation.subsets import choose_subsets
    from nnunetv2_mstkd.images.atomic import write_text
    from nnunetv2_mstkd.methods.adamm.similarity import adapter_similarity
    from nnunetv2_mstkd.modalities import modality_names
    from nnunetv2_mstkd.nnunet.folders import parse_folds, trained_folds
    from nnunetv2_mstkd.nnunet.model import load_predictor
    from nnunetv2_mstkd.reporting.figures import save_figure, similarity_maps

    if not args.model.is_dir():
        raise MissingFileError(f"no model folder {args.model}")
    numbers = args.output.with_suffix(".csv")
    if numbers == args.output:
        raise InputError(f"{args.output} is to be the figure; expected .png, .pdf or .svg, the numbers go to .csv")
    folds = trained_folds(args.model, args.chk)[:1] if args.fold is None else parse_folds([args.fold])
    predictor = load_predictor(args.model, folds, args.chk, device=torch.device("cpu"))
    names = modality_names(predictor.dataset_json)
    table = adapter_similarity(predictor.network, choose_subsets(names, subsets=args.subsets), names)
    save_figure(similarity_maps(table), args.output)
    write_text(numbers, table.to_csv(index=False, float_format="%.6f", lineterminator="\n"))
    print(f"fold {folds[0]}: {args.output}, numbers in {numbers}")
