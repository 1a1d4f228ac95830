"""`mstkd prior`: SMML's semantic prior, from a SAM."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mstkd.commands import model_options as options
from nnunetv2_mstkd.errors import InputError

FOLDER = "prior"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd prior`."""
    parser.description = (
        "Run a Segment Anything model (SAM) on the slices of every modality of a data set's training cases, prompted "
        "by boxes around their labels, and write the probabilities as CASE_000k.npz: the prior of SMMLTrainer with "
        "smml.prior=precomputed. Needs the package transformers (pip install nnunetv2_mstkd[sam])."
    )
    add = parser.add_argument
    add("-d", metavar="ID", required=True, help="number or name of the data set")
    add("--sam", metavar="MODEL", required=True, help="folder of a SAM in transformers' layout, such as SAM or MedSAM")
    add("-o", dest="output", metavar="OUT", type=Path, help=f"output folder (default: {FOLDER} in the raw data set)")
    add("--margin", metavar="PIXELS", type=int, default=3, help="margin of the boxes (default: %(default)s)")
    add("-device", choices=options.DEVICES, default=options.DEVICES[0], help="default: %(default)s")
    options.add_progress(parser)


def run(args: argparse.Namespace) -> None:
    """Write the prior."""
    from tqdm import tqdm

    from nnunetv2_mstkd.methods.smml.sam import Sam, write_prior
    from nnunetv2_mstkd.nnunet.description import find_format
    from nnunetv2_mstkd.nnunet.folders import dataset_argument, find_dataset_folder

    if args.margin < 0:
        raise InputError(f"--margin is {args.margin}, expected 0 or more pixels")
    raw = find_dataset_folder("nnUNet_raw", args.d)
    dataset_json, reader = find_format(args.d, None)
    output = args.output or raw / FOLDER
    sam = Sam(args.sam, options.torch_device(args.device))
    with tqdm(total=int(dataset_json.get("numTraining", 0)), unit="case", disable=args.disable_progress_bar) as bar:

        def begin(case: str) -> None:
            bar.set_description(case)
            bar.update()

        written = write_prior(
            raw, output, sam, dataset_json=dataset_json, reader=reader, margin=args.margin, on_case=begin
        )
    print(f"{written} new files in {output}")
    path = FOLDER if output == raw / FOLDER else output.resolve()
    print(
        f"use it: mstkd configure -d {dataset_argument(raw.name)} --name NAME --set smml.prior=precomputed "
        f"--set smml.prior_path={path}"
    )
