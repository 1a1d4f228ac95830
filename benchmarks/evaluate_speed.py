"""All 15 subsets of four modalities: one pass with stacks of several sizes, against each subset on its own.

    python benchmarks/evaluate_speed.py                              # CPU, a small plan
    python benchmarks/evaluate_speed.py --plan brats --device cuda   # nnU-Net's own BraTS plan: 128^3

"On its own" is what nnUNetv2_predict does for each of 15 folders with zero images: reading is left out and so is the
start of its processes, but each subset is preprocessed. Everything runs in this process, one step after the other, so
that the times add up; `mstkd evaluate` lets preprocessing and metrics run beside the network. Images and weights are
random. Each repetition goes through all ways in turn; medians are printed. Labels of every stack are compared with
those of stack 1: a voxel may differ only where the margin to the decision is below 0.05 logit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from step_cost import PLANS, make_plans

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.evaluation.cases import LabelledCase, prepare
from nnunetv2_mstkd.evaluation.scoring import near_decision, rules_of, score_prediction
from nnunetv2_mstkd.evaluation.stacking import SubsetPredictor
from nnunetv2_mstkd.nnunet.input_folder import Case

CHANNELS = 4
SHAPES = {"small": (56, 72, 56), "medium": (96, 112, 96), "brats": (155, 240, 240)}
AIR = 8
"""Empty voxels at every border, which nnU-Net crops."""


def make_predictor(plan: str, device: torch.device, mirroring: bool) -> nnUNetPredictor:
    """nnU-Net's predictor with the plans' network and random weights."""
    plans, dataset_json = make_plans(plan)
    entry = plans["configurations"]["3d_fullres"]
    options = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    for kind in ("data", "seg", "probabilities"):
        entry[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        entry[f"resampling_fn_{kind}_kwargs"] = {**options, "is_seg": kind == "seg"}
    plans["foreground_intensity_properties_per_channel"] = {str(channel): {} for channel in range(CHANNELS)}
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    torch.manual_seed(0)
    network = nnUNetTrainer.build_network_architecture(manager, configuration, CHANNELS, 3, False)
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=device, use_mirroring=mirroring, allow_tqdm=False)
    weights = [network.state_dict()]
    predictor.manual_initialization(network, manager, configuration, weights, dataset_json, "nnUNetTrainer", (0, 1, 2))
    return predictor


def write_case(folder: Path, shape: tuple[int, ...]) -> LabelledCase:
    """Noise in air, and a block as label."""
    generator = np.random.default_rng(0)
    inner = tuple(slice(AIR, size - AIR) for size in shape)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(size // 3, size // 2) for size in shape)] = 3
    paths = []
    for channel in range(CHANNELS):
        image = np.zeros(shape, np.float32)
        image[inner] = generator.normal(100, 20, image[inner].shape)
        paths.append(folder / f"case_{channel:04d}.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(image), str(paths[-1]))
    sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "label.nii.gz"))
    return LabelledCase("case", "0", folder / "label.nii.gz", images=Case("case", tuple(paths)))


class Clock:
    """Adds up seconds by what they were spent on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, what: str):
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[what] += time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> int:
    """Print times and agreement; exit code 1 where a label differs away from the decision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 4, 8, 15])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mirroring", action="store_true", help="eight passes per patch, as nnU-Net predicts")
    args = parser.parse_args()

    device = torch.device(args.device)
    subsets = modalities.all_subsets(CHANNELS)
    ways = ["on its own", *(f"stack {stack}" for stack in args.stacks)]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    labels: dict[str, list[np.ndarray]] = {}
    near: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        case = write_case(Path(folder), SHAPES[args.plan])
        for turn in range(args.rounds + 1):  # the first one warms up
            for way in ways:
                predictor = make_predictor(args.plan, device, args.mirroring)
                plans, configuration = predictor.plans_manager, predictor.configuration_manager
                rules = rules_of(predictor.dataset_json, predictor.label_manager, metrics=("dice", "hd95"))
                arguments = plans, configuration, predictor.dataset_json
                clock = Clock(device)
                stack = 1 if way == "on its own" else int(way.split()[1])
                stacked = SubsetPredictor(predictor, stack)
                with clock.measure("preprocessing"):
                    data, properties = prepare(case, (), *arguments)
                if way == "on its own":
                    with clock.measure("preprocessing"):
                        for _ in subsets[1:]:
                            prepare(case, (), *arguments)
                with clock.measure("network"):
                    logits = list(stacked.logits(torch.from_numpy(data), subsets))
                with clock.measure("metrics"):
                    for each in logits:
                        score_prediction(each, properties, case.label, *arguments, rules)
                if turn:
                    found[way].append(clock.seconds)
                elif way != "on its own":
                    manager = predictor.label_manager
                    values = [np.float32(each) for each in logits]
                    labels[way] = [manager.convert_logits_to_segmentation(each) for each in values]
                    if stack == args.stacks[0]:
                        near = [near_decision(torch.from_numpy(each), manager.has_regions).numpy() for each in values]

    image = "x".join(map(str, SHAPES[args.plan]))
    print(f"{args.plan} plan, image {image}, {device}, {torch.get_num_threads()} threads, 15 subsets, seconds")
    print(f"{'':14s}{'preprocessing':>15s}{'network':>10s}{'metrics':>10s}{'all':>10s}{'ratio':>8s}")
    baseline = None
    for way in ways:
        parts = [statistics.median(run[part] for run in found[way]) for part in ("preprocessing", "network", "metrics")]
        total = statistics.median(sum(run.values()) for run in found[way])
        baseline = baseline or total
        print(f"{way:14s}{parts[0]:15.2f}{parts[1]:10.2f}{parts[2]:10.2f}{total:10.2f}{baseline / total:8.2f}")

    reference = f"stack {args.stacks[0]}"
    voxels = sum(each.size for each in near)
    print(f"{sum(int(each.sum()) for each in near)} of {voxels} voxels lie within 0.05 logit of the decision")
    good = True
    for way in labels:
        different = [one != other for one, other in zip(labels[way], labels[reference], strict=True)]
        far = sum(int((each & ~close).sum()) for each, close in zip(different, near, strict=True))
        good &= far == 0
        print(f"{way}: {sum(int(each.sum()) for each in different)} labels differ from {reference}, {far} not near it")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
