"""Wall time and memory of `mstkd evaluate`, against its lower bound and against one call per subset.

    python benchmarks/evaluate_wall_time.py --demo mstkd_demo     # model and test cases of a finished demo
    python benchmarks/evaluate_wall_time.py --plan brats          # nnU-Net's own BraTS plan, random weights and images

In one run, one after the other, mirroring off unless asked for:

* `mstkd evaluate` over all subsets of the modalities, with the default stack and with `--stack 1`;
* its lower bound: the forward passes of all subsets, one start (imports, loading), one preprocessing per case; and the
  same with a start that collects garbage as rarely as the command `mstkd` does, which is faster;
* `nnUNetv2_predict_from_modelfolder` once per subset for all cases, with absent channels as zero images and nnU-Net's
  default numbers of processes, and then the same metrics in as many processes as `mstkd evaluate` uses. Writing the
  zero images is not counted.

Memory is the resident set of the largest process. `nnUNet_def_n_proc=1` makes nnU-Net predict with one thread: leave it
unset here.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import SimpleITK as sitk
import torch
from evaluate_speed import SHAPES, make_predictor, write_case
from step_cost import PLANS

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.demo.pipeline import CONFIGURATION
from nnunetv2_mstkd.evaluation.cases import LabelledCase, folder_cases, prepare
from nnunetv2_mstkd.evaluation.scoring import Rules, rules_of
from nnunetv2_mstkd.evaluation.stacking import SubsetPredictor, default_stack
from nnunetv2_mstkd.evaluation.subsets import choose_subsets
from nnunetv2_mstkd.inference.zero_filling import fill_missing
from nnunetv2_mstkd.nnunet.model import load_predictor

METRIC_PROCESSES = 3
START = "from nnunetv2_mstkd.nnunet.model import load_predictor as f; import torch, sys; "
START += "f(__import__('pathlib').Path(sys.argv[1]), (0,), 'checkpoint_final.pth', device=torch.device(sys.argv[2]))"
AS_MSTKD = "from nnunetv2_mstkd.cli import collect_rarely; collect_rarely(); "
STARTS = {"start": START, "start as mstkd": AS_MSTKD + START}


def measure(command: Sequence[Any], log: Path) -> tuple[float, float]:
    """Run a command to its end: seconds, and MiB of its largest process."""
    begin = time.perf_counter()
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen([str(word) for word in command], stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


def script(name: str) -> str:
    """A console command of the environment that runs this."""
    return str(Path(sysconfig.get_path("scripts"), name))


def make_random_model(folder: Path, plan: str, shape: tuple[int, ...], cases: int) -> tuple[Path, Path, Path]:
    """A model folder with random weights, a folder of images and one of labels."""
    model, images, labels = folder / "nnUNetTrainer__nnUNetPlans__3d_fullres", folder / "images", folder / "labels"
    for each in (model / "fold_0", images, labels):
        each.mkdir(parents=True)
    predictor = make_predictor(plan, torch.device("cpu"), False)
    (model / "plans.json").write_text(json.dumps(predictor.plans_manager.plans), encoding="utf-8")
    (model / "dataset.json").write_text(json.dumps(predictor.dataset_json), encoding="utf-8")
    weights = {
        "network_weights": predictor.list_of_parameters[0],
        "init_args": {"configuration": "3d_fullres"},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(weights, model / "fold_0" / "checkpoint_final.pth")
    for number in range(cases):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = write_case(Path(temporary), shape)
            for channel, path in enumerate(made.images.files):
                path.rename(images / f"case{number}_{channel:04d}.nii.gz")
            made.label.rename(labels / f"case{number}.nii.gz")
    return model, images, labels


def demo_model(folder: Path, trainer: str) -> tuple[Path, Path, Path]:
    """Model, images and labels of a finished demo."""
    dataset = next(iter(sorted((folder / "raw").glob("Dataset*"))), None)
    model = folder / "results" / (dataset.name if dataset else "") / f"{trainer}__nnUNetPlans__{CONFIGURATION}"
    if dataset is None or not model.is_dir():
        raise SystemExit(f"{folder} is no finished demo: {model} does not exist; mstkd demo --out {folder}")
    return model, dataset / "imagesTs", dataset / "labelsTs"


def score_file(prediction: Path, label: Path, rules: Rules) -> dict:
    """The metrics that `mstkd evaluate` computes, of a pair of files."""
    image, reference = sitk.ReadImage(str(prediction)), sitk.ReadImage(str(label))
    arrays = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(reference)
    return rules.score(*arrays, tuple(reversed(image.GetSpacing())))


def lower_bound(
    model: Path, cases: Sequence[LabelledCase], subsets: torch.Tensor, device: torch.device, options: dict
) -> dict[str, float]:
    """Seconds of all forward passes at the default stack and of all preprocessing, without anything beside them."""
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = load_predictor(model, (0,), "checkpoint_final.pth", device=device, **options)
    parts = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    stack = default_stack(predictor.configuration_manager.batch_size, len(subsets), device)
    stacked = SubsetPredictor(predictor, stack)
    seconds = {"forward": 0.0, "preprocessing": 0.0}
    for number, case in enumerate([cases[0], *cases]):  # the first one warms up
        begin = time.perf_counter()
        data, _ = prepare(case, (), *parts)
        middle = time.perf_counter()
        for _ in stacked.logits(torch.from_numpy(data), subsets):  # each is on the CPU when it comes
            pass
        if number:
            seconds["preprocessing"] += middle - begin
            seconds["forward"] += time.perf_counter() - middle
    return seconds


def separately(
    model: Path, inputs: Path, output: Path, labels: Path, rules: Rules, device: str, options: list[str], log: Path
) -> dict[str, float]:
    """One call of stock prediction per subset, and the metrics of what came out."""
    predicting = 0.0
    for folder in sorted(inputs.iterdir()):
        command = [script("nnUNetv2_predict_from_modelfolder"), "-i", folder, "-o", output / folder.name, "-m", model]
        predicting += measure([*command, "-f", "0", "-device", device, *options], log)[0]
    files = sorted(output.glob("*/*.nii.gz"))
    of_files = [labels / path.name for path in files]
    begin = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(METRIC_PROCESSES) as pool:
        list(pool.map(functools.partial(score_file, rules=rules), files, of_files))
    return {"predict": predicting, "metrics": time.perf_counter() - begin, "files": len(files)}


def subset_folders(images: Path, folder: Path, model: Path, names: Sequence[str], subsets: torch.Tensor) -> None:
    """A folder of inputs for each subset, absent channels as zero images."""
    folder.mkdir()
    for row in subsets.tolist():
        absent = [name for name, there in zip(names, row, strict=True) if not there]
        target = folder / modalities.subset_name(row, names)
        fill_missing(images, target, model=model, drop=",".join(absent) or None, link=True)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements."""
    device = torch.device(args.device)
    if args.demo:
        model, images, labels = demo_model(args.demo, args.trainer)
    else:
        model, images, labels = make_random_model(folder, args.plan, tuple(args.shape or SHAPES[args.plan]), args.cases)
    dataset_json = json.loads((model / "dataset.json").read_text(encoding="utf-8"))
    names = modalities.modality_names(dataset_json)
    cases = folder_cases(images, labels, "0", dataset_json, names, range(len(names)))
    subsets = choose_subsets(names, subsets=args.subsets)
    tta = [] if args.mirroring else ["--disable_tta"]
    log = folder / "log.txt"

    evaluate = [
        script("mstkd"),
        "evaluate",
        "-m",
        model,
        "-f",
        "0",
        "-i",
        images,
        "-l",
        labels,
        "-device",
        device,
        *tta,
        *(["--subsets", *args.subsets] if args.subsets else []),
    ]
    stacks = {"default stack": [], "stack 1": ["--stack", "1"]}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*stacks, *STARTS, "one case")}
    bounds: list[dict[str, float]] = []
    one = folder / "one"
    one.mkdir()
    for channel, path in enumerate(cases[0].images.files):
        (one / f"one_{channel:04d}.nii.gz").symlink_to(path.resolve())
    for turn in range(args.rounds):
        for name, options in stacks.items():
            output = folder / f"{name.replace(' ', '_')}_{turn}"
            found[name].append(measure([*evaluate, "-o", output, *options], log))
        for name, code in STARTS.items():
            found[name].append(measure([sys.executable, "-c", code, model, device], log))
        command = [script("mstkd"), "predict", "-m", model, "-f", "0", "-i", one, "-o", folder / f"one_out_{turn}"]
        found["one case"].append(measure([*command, "-device", device, *tta], log))
        options = {"use_mirroring": args.mirroring, "allow_tqdm": False}
        bounds.append(lower_bound(model, cases, subsets, device, options))

    with contextlib.redirect_stdout(io.StringIO()):
        predictor = load_predictor(model, (0,), "checkpoint_final.pth", device=torch.device("cpu"))
    rules = rules_of(dataset_json, predictor.label_manager, metrics=("dice", "hd95"))
    subset_folders(images, folder / "inputs", model, names, subsets)
    apart = separately(model, folder / "inputs", folder / "outputs", labels, rules, args.device, tta, log)

    seconds = {name: statistics.median(each[0] for each in values) for name, values in found.items()}
    memory = {name: max(each[1] for each in values) for name, values in found.items()}
    bound = {name: statistics.median(each[name] for each in bounds) for name in bounds[0]}
    return {
        "cases": len(cases),
        "subsets": len(subsets),
        "image": list(sitk.ReadImage(str(cases[0].label)).GetSize()),
        "seconds": {**seconds, **bound, "predict per subset": apart["predict"], "their metrics": apart["metrics"]},
        "memory_mib": memory,
    }


def report(found: dict[str, Any]) -> dict[str, float]:
    """Print times and ratios; return the ratios."""
    seconds, memory = found["seconds"], found["memory_mib"]
    bounds = {name: seconds["forward"] + seconds[name] + seconds["preprocessing"] for name in STARTS}
    apart = seconds["predict per subset"] + seconds["their metrics"]
    print(f"{found['cases']} cases of {found['image']} voxels, {found['subsets']} subsets; seconds")
    for name, value in seconds.items():
        print(f"  {name:20s}{value:10.2f}")
    for name, bound in bounds.items():
        print(f"  {'lower bound':20s}{bound:10.2f}   forward + {name} + preprocessing")
    print(f"  {'one call per subset':20s}{apart:10.2f}   with metrics")
    ratios = {}
    for name in ("default stack", "stack 1"):
        ratios[f"{name} over lower bound"] = seconds[name] / bounds["start"]
        ratios[f"{name} over lower bound, start as mstkd"] = seconds[name] / bounds["start as mstkd"]
        ratios[f"one call per subset over {name}"] = apart / seconds[name]
        ratios[f"memory of {name} over one case"] = memory[name] / memory["one case"]
    for name, value in ratios.items():
        print(f"{name:45s}{value:8.2f}")
    return ratios


def main() -> int:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--demo", type=Path, help="folder of a finished `mstkd demo`")
    source.add_argument("--plan", choices=sorted(set(PLANS) & set(SHAPES)), default="small")
    parser.add_argument(
        "--trainer", default="ModalityDropoutTrainer", help="of the demo's model (default: %(default)s)"
    )
    parser.add_argument("--cases", type=int, default=2, help="random cases (default: %(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, help="voxels of a random case (default: by the plan)")
    parser.add_argument("--subsets", nargs="+", default=(), help="only these, for example T1 T1+FLAIR (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of all but the calls per subset")
    parser.add_argument("--mirroring", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    os.environ.setdefault("nnUNet_raw", "unused")
    os.environ.setdefault("nnUNet_preprocessed", "unused")
    os.environ.setdefault("nnUNet_results", "unused")
    torch.set_num_threads(os.cpu_count() or 1)  # as prediction on a CPU does
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    ratios = report(found)
    if args.out:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.device}, torch {torch.__version__}"
        what = "demo" if args.demo else args.plan
        text = {"plan": what, "mirroring": args.mirroring, "machine": machine, "date": str(date.today())}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**text, **found, "ratios": ratios}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
