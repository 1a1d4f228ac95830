"""Cost of a training step and of inference, as ratios measured in one run.

    python benchmarks/step_cost.py                  # CPU, a small plan
    python benchmarks/step_cost.py --plan brats     # nnU-Net's own BraTS plan: 128^3, batch 2, 6 stages 32..320 (CUDA)
    python benchmarks/step_cost.py --plan brats --count-only     # parameters and multiply-adds, on any machine

Training: one step of each trainer on the same plans, patch and batch, over FullModalityTrainer's; time is the median of
interleaved repetitions, and the mean over a period where not every step asks the teacher. Memory: on CUDA the peak that
the allocator counts above what the other trainers hold, on a CPU the resident set of a process for each trainer.
Inference: forward pass of the student over that of the plans' plain network; multiply-adds are counted for one patch.
The data are random: nothing here depends on them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from queue import Empty

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

TRAINERS = (
    "FullModalityTrainer",
    "ModalityDropoutTrainer",
    "SelfDistillationTrainer",
    "MSTKDTeacherTrainer",
    "MSTKDTrainer",
    "AdaMMTrainer",
    "MedMAPTrainer",
    "SMMLTrainer",
    "MMFormerTrainer",
    "RFNetTrainer",
)
BASELINE = "FullModalityTrainer"

PLANS = {
    "small": {"patch": [40, 48, 40], "features": [16, 32, 64, 128], "batch": 2},
    "six_stages": {"patch": [64, 64, 64], "features": [16, 32, 64, 128, 160, 160], "batch": 2},
    "medium": {"patch": [64, 64, 64], "features": [32, 64, 128, 256], "batch": 2},
    "brats": {"patch": [128, 128, 128], "features": [32, 64, 128, 256, 320, 320], "batch": 2},
    # crop, levels and widths of the network that AdaMM and MST-KDNet were published with
    "published": {"patch": [160, 192, 128], "features": [16, 32, 64, 128], "batch": 1},
}


def make_plans(name: str) -> tuple[dict, dict]:
    """Plans and dataset.json of a four-channel, three-region data set with one 3d_fullres configuration."""
    size = PLANS[name]
    stages = len(size["features"])
    convolutions = {
        "n_stages": stages,
        "features_per_stage": size["features"],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "none",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": size["batch"],
        "patch_size": size["patch"],
        "median_image_size_in_voxels": size["patch"],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * 4,
        "use_mask_for_norm": [True] * 4,
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": convolutions,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    plans = {
        "dataset_name": "Dataset999_Benchmark",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "image_reader_writer": "SimpleITKIO",
        "configurations": {"3d_fullres": configuration},
    }
    dataset_json = {
        "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"},
        "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
        "regions_class_order": [1, 2, 3],
        "file_ending": ".nii.gz",
    }
    return plans, dataset_json


def prepare(
    trainer_name: str,
    plan: str,
    device: torch.device,
    folder: str,
    *,
    batch_size: int | None = None,
    on_construction: Callable = lambda trainer: None,
):
    """A trainer ready for ``train_step``, without data on disk; the teacher is a random network of its own kind.

    ``batch_size`` replaces the plans', ``on_construction`` sees the trainer before its networks are built.
    """
    os.environ.update(nnUNet_results=folder, nnUNet_preprocessed=folder, nnUNet_raw=folder)
    Path(folder, "Dataset999_Benchmark").mkdir(exist_ok=True)
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    from nnunetv2_mstkd import methods

    module.infer_dataset_class = lambda folder: nnUNetDatasetBlosc2
    plans, dataset_json = make_plans(plan)
    if batch_size is not None:
        plans["configurations"]["3d_fullres"]["batch_size"] = batch_size
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = getattr(methods, trainer_name)(plans, "3d_fullres", 0, dataset_json, device)
        on_construction(trainer)
        if os.environ.get("nnUNet_compile") == "t":
            trainer._do_i_compile = lambda: True  # nnU-Net takes that variable for no on a CPU
        trainer.initialize()
    if hasattr(trainer, "teacher_trainer") and trainer.needs_teacher:
        network = trainer.teacher_trainer.build_network_architecture(
            trainer.plans_manager, trainer.configuration_manager, 4, 3, enable_deep_supervision=False
        )
        network = network.to(trainer.device).eval().requires_grad_(False)
        trainer.teacher = torch.compile(network) if trainer._do_i_compile() else network
    trainer.network.train()
    trainer.current_epoch = trainer.num_epochs // 2  # past every warm-up
    return trainer


def make_batch(plan: str, device: torch.device) -> dict:
    """Random data and targets; in pinned memory beside a GPU, as nnU-Net's loaders give them."""
    size = PLANS[plan]
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(size["batch"], 4, *size["patch"], generator=generator)
    target, shape = [], list(size["patch"])
    for _ in range(len(size["features"]) - 1):
        target.append((torch.rand(size["batch"], 3, *shape, generator=generator) > 0.9).float())
        shape = [edge // 2 for edge in shape]
    if device.type == "cuda":
        data, target = data.pin_memory(), [level.pin_memory() for level in target]
    return {"data": data, "target": target, "keys": ["random"] * size["batch"]}


def set_up(threads: int) -> None:
    """What nnUNetv2_train sets for its process."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def memory_of(trainer_name: str, plan: str, threads: int, queue) -> None:
    """Peak memory of two steps above that of the imported libraries, in MiB; call it in a separate process."""
    set_up(threads)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        batch = make_batch(plan, device)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        trainer = prepare(trainer_name, plan, device, folder)
        for _ in range(2):
            trainer.train_step(batch)
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


def count(trainer, plan: str) -> dict[str, float]:
    """Parameters, and multiply-adds of one patch's forward pass in prediction; on tensors without content."""
    trainer.set_deep_supervision_enabled(False)
    network = copy.deepcopy(trainer.plain_network).cpu().eval()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 4, *PLANS[plan]["patch"]))
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.plain_network.parameters()),
        "gmac": counter.get_total_flops() / 2e9,
    }


def count_all(plan: str, trainer_names: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return {name: count(prepare(name, plan, torch.device("cpu"), folder), plan) for name in trainer_names}


def measure(
    plan: str,
    device: torch.device,
    repetitions: int,
    trainer_names: list[str],
    threads: int,
    clock: Callable[[], float],
) -> dict:
    rows: dict[str, dict[str, float]] = {name: {} for name in trainer_names}
    context = multiprocessing.get_context("spawn")
    for name in trainer_names if device.type == "cpu" else ():
        queue = context.Queue()
        process = context.Process(target=memory_of, args=(name, plan, threads, queue))
        process.start()
        rows[name]["memory_mib"] = _answer(process, queue, name)
        process.join()
    with tempfile.TemporaryDirectory() as folder:
        batch = make_batch(plan, device)
        prepared = {}
        for name in trainer_names:
            held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            trainer = prepared[name] = prepare(name, plan, device, folder)
            if device.type == "cpu":
                trainer.train_step(batch)
                continue
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                trainer.train_step(batch)
            rows[name]["memory_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
        times: dict[str, list[float]] = {name: [] for name in trainer_names}
        forward: dict[str, list[float]] = {name: [] for name in trainer_names}
        periods = {name: getattr(trainer, "teacher_period", 1) for name, trainer in prepared.items()}
        for repetition in range(max(repetitions, *periods.values())):
            for name, trainer in prepared.items():
                trainer._step_in_epoch = repetition
                times[name].append(timed(lambda trainer=trainer: trainer.train_step(batch), device, clock))
        data = batch["data"].to(device)
        for trainer in prepared.values():
            trainer.set_deep_supervision_enabled(False)
            trainer.network.eval()

        def infer(trainer) -> None:
            with torch.inference_mode(), trainer._autocast() if hasattr(trainer, "_autocast") else cast(device):
                trainer.network(data)

        for repetition in range(repetitions + 2):
            for name, trainer in prepared.items():
                seconds = timed(lambda trainer=trainer: infer(trainer), device, clock)
                if repetition >= 2:
                    forward[name].append(seconds)
        for name, trainer in prepared.items():
            each = (times[name][n :: periods[name]] for n in range(periods[name]))
            rows[name]["step_s"] = statistics.fmean(map(statistics.median, each))
            rows[name]["inference_s"] = statistics.median(forward[name])
            rows[name].update(count(trainer, plan))
    base = rows[BASELINE]
    for row in rows.values():
        for key in ("step_s", "inference_s", "memory_mib"):
            row[key.rsplit("_", 1)[0] + "_ratio"] = row[key] / base[key]
    return rows


def _answer(process: multiprocessing.Process, queue, name: str) -> float:
    while process.is_alive():
        with contextlib.suppress(Empty):
            return queue.get(timeout=1)
    try:
        return queue.get(timeout=1)
    except Empty:
        raise SystemExit(f"{name}: the process that measures memory ended with {process.exitcode}") from None


def cast(device: torch.device):
    return torch.autocast("cuda") if device.type == "cuda" else contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=sorted(PLANS), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: all cores on a CPU, 1 beside a GPU, as nnU-Net does")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS))
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile, as nnU-Net on CUDA; here on a CPU too"
    )
    parser.add_argument("--count-only", action="store_true", help="parameters and multiply-adds, nothing is timed")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a CPU that does other work too")
    parser.add_argument("--json", type=Path, help="write the result there")
    args = parser.parse_args()
    os.environ["nnUNet_compile"] = "t" if args.compile else "f"
    args.threads = args.threads or (1 if args.device == "cuda" else os.cpu_count() or 1)
    set_up(args.threads)
    names = [BASELINE, *[name for name in args.trainers if name != BASELINE]]
    device = torch.device(args.device)
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.count_only:
        rows = count_all(args.plan, names)
    else:
        rows = measure(args.plan, device, args.repetitions, names, args.threads, clock)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads"
    facts = {
        "plan": {args.plan: PLANS[args.plan]},
        "device": machine,
        "compile": args.compile,
        "clock": "time of the process" if args.cpu_time else "wall time",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "rows": rows,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    if args.count_only:
        for name, row in rows.items():
            print(f"{name:<26}{row['parameters'] / 1e6:8.2f}M parameters{row['gmac']:10.2f} GMAC per patch")
        return
    print(f"plan {args.plan} {PLANS[args.plan]}, {machine}, torch {torch.__version__}, compile {args.compile}")
    print(f"{'trainer':<26}{'step':>9}{'ratio':>7}{'memory':>11}{'ratio':>7}{'inference':>11}{'ratio':>7}{'params':>9}")
    for name, row in rows.items():
        print(
            f"{name:<26}{row['step_s']:8.3f}s{row['step_ratio']:7.2f}{row['memory_mib']:8.0f}MiB{row['memory_ratio']:7.2f}"
            f"{row['inference_s']:10.4f}s{row['inference_ratio']:7.2f}{row['parameters'] / 1e6:8.2f}M"
        )


if __name__ == "__main__":
    sys.exit(main())
