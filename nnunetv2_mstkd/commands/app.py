"""`mstkd app`: a page in the browser for one model."""

from __future__ import annotations

import argparse
import re
import secrets
from pathlib import Path

from nnunetv2_mstkd.commands import demo as demo_command
from nnunetv2_mstkd.commands import model_options as options
from nnunetv2_mstkd.errors import DependencyError, InputError
from nnunetv2_mstkd.images.atomic import read_json
from nnunetv2_mstkd.nnunet.folders import FINAL

DEMO_FOLDER = Path("mstkd_demo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mstkd app`."""
    parser.description = (
        "Open a page in the browser, on which you drop a patient's sequences as NIfTI files or DICOM series. It shows "
        "the segmentation, the volumes, and what another missing sequence would change. Files stay on this machine and "
        "are removed when the page is closed."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="folder of a trained model")
    source.add_argument("--demo", action="store_true", help="use the demo's model; train it first if necessary")
    add = parser.add_argument
    add("-o", "--out", metavar="FOLDER", type=Path, default=DEMO_FOLDER, help="demo folder (default: ./%(default)s)")
    add("-f", "--folds", metavar="FOLD", nargs="+", help="folds (default: all trained folds)")
    add("-chk", metavar="FILE", default=FINAL, help="checkpoint file name (default: %(default)s)")
    add("-device", choices=("auto", *options.DEVICES), default="auto", help="default: CUDA if there is a GPU")
    add("-step_size", metavar="S", type=float, default=0.5, help="step of the sliding window (default: %(default)s)")
    add("--disable_tta", action="store_true", help="no mirroring: faster, a little less accurate")
    add("--trust", action="store_true", help="let nnU-Net load the model: this executes whatever its files contain")
    server = parser.add_argument_group("the server")
    add = server.add_argument
    add("--host", default="127.0.0.1", help="listen on this address; unless it is local, requests need the token")
    add("--port", type=int, default=0, help="port (default: a free one)")
    add("--token", help="token at the end of the page's address (default with --host: a random one)")
    add("--max-upload", metavar="MB", type=int, default=2048, help="limit for a page's images (default: %(default)s)")
    add("--no-browser", action="store_true", help="only print the address")


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    if args.max_upload < 1:
        raise InputError(f"--max-upload is {args.max_upload}, expected a number of megabytes")
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port is {args.port}, expected 0 to {2**16 - 1}")
    if args.token is not None and not re.fullmatch(r"[\w.~-]+", args.token, re.ASCII):
        raise InputError("--token is part of an address: expected letters, digits and any of . _ ~ -")
    try:
        from nnunetv2_mstkd.app.server import LOOPBACK, MEGABYTE, Settings
        from nnunetv2_mstkd.app.serving import serve
    except ImportError as error:
        if isinstance(error, DependencyError):
            raise
        raise DependencyError(f"the page needs {error.name}: pip install 'nnunetv2_mstkd[app]'") from error
    from nnunetv2_mstkd.inference.predictor import Predictor

    options.warn_if_trusted(args)
    folder, example = _demo(args) if args.demo else (args.model, "")
    device = options.torch_device(args.device)
    predictor = Predictor(
        folder,
        args.folds,
        checkpoint=args.chk,
        device=device,
        mirroring=not args.disable_tta,
        step_size=args.step_size,
        trust=args.trust,
    )
    token = args.token or (None if args.host in LOOPBACK else secrets.token_urlsafe(16))
    settings = Settings(args.host, token, args.max_upload * MEGABYTE, example=example)
    serve(predictor, settings, args.port, browser=not args.no_browser)
    return 0


def _demo(args: argparse.Namespace) -> tuple[Path, str]:
    """Return the folder of the demo's model, which is trained if it is not there, and where its test images are."""
    from nnunetv2_mstkd.demo.pipeline import RECOMMENDED, Demo, Model, Options

    record = args.out / "demo.json"
    if record.is_file():
        demo = Demo(args.out, Options.read(read_json(record)))
    else:
        parser = argparse.ArgumentParser()
        demo_command.add_arguments(parser)
        demo = demo_command.open_demo(parser.parse_args(["--out", str(args.out)]))
    model = Model(RECOMMENDED)
    if not demo.train(model).done():
        print(demo.announcement(), flush=True)
        demo.run()
    return demo.training(model).folder, str(demo.raw / "imagesTs")
