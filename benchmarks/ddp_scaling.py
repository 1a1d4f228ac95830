"""Training throughput over the number of processes, with nnU-Net's way of torch's DistributedDataParallel.

    python benchmarks/ddp_scaling.py                                # 1 and 2 processes on a CPU, gloo, one thread each
    python benchmarks/ddp_scaling.py --plan brats --device cuda     # as many GPUs as there are, nccl

nnU-Net divides the plans' batch among the processes. Here each process keeps the plans' whole batch, so that the work
per process stays equal and the ideal is N times the samples per second ("weak scaling"). Data and teacher are random.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from step_cost import PLANS, make_batch, prepare, set_up
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


class OnCpu(DistributedDataParallel):
    """nnU-Net names a GPU; on a CPU there is none to name."""

    def __init__(self, module: torch.nn.Module, device_ids: Any = None) -> None:
        super().__init__(module)


def work(rank: int, ranks: int, args: argparse.Namespace, folder: str) -> None:
    """One process: steps of the trainer; the first writes the seconds of each."""
    cuda = args.device == "cuda"
    set_up(threads=1)
    if cuda:
        torch.cuda.set_device(rank)
    else:
        nnunet_module.DDP = OnCpu
    if ranks > 1:
        store = f"file://{folder}/store_{ranks}"
        dist.init_process_group("nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=ranks)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        options = {} if cuda else {"on_construction": put_on_cpu}
        size = ranks * PLANS[args.plan]["batch"]
        trainer = prepare(args.trainer, args.plan, device, folder, batch_size=size, **options)
    batch = make_batch(args.plan, device)
    seconds = []
    for turn in range(args.steps + args.warm_up):
        if ranks > 1:
            dist.barrier()
        begin = time.perf_counter()
        trainer.train_step(batch)
        if cuda:
            torch.cuda.synchronize()
        if turn >= args.warm_up:
            seconds.append(time.perf_counter() - begin)
    if rank == 0:
        Path(folder, f"{ranks}.json").write_text(json.dumps(seconds), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


def put_on_cpu(trainer: Any) -> None:
    """nnU-Net sends every process of a group to a GPU."""
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None


def main() -> int:
    """Print samples per second by number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=sorted(PLANS), default="small")
    parser.add_argument("--trainer", default="MSTKDTrainer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 and 2, or 1 to the number of GPUs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    there = torch.cuda.device_count() if args.device == "cuda" else os.cpu_count() or 1
    ranks = args.ranks or (sorted({1, *range(2, there + 1, 2), there}) if args.device == "cuda" else [1, 2])
    if max(ranks) > there:
        raise SystemExit(f"--ranks {max(ranks)}: there are {there} of {args.device}")

    batch = PLANS[args.plan]["batch"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in ranks:
            torch.multiprocessing.spawn(work, (number, args, folder), number)
            median = statistics.median(json.loads(Path(folder, f"{number}.json").read_text(encoding="utf-8")))
            rows.append({"ranks": number, "seconds": median, "samples_per_second": number * batch / median})
    print(f"{args.trainer}, plan {args.plan}, {args.device}, batch {batch} in each process")
    for row in rows:
        ratio = row["samples_per_second"] / rows[0]["samples_per_second"] * ranks[0]
        row["speed_up"] = ratio
        print(f"{row['ranks']:3d} processes {row['samples_per_second']:8.2f} samples/s, {ratio:5.2f} times one process")
    if args.out:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        content = {"plan": args.plan, "trainer": args.trainer, "device": args.device, "machine": machine, "rows": rows}
        args.out.write_text(json.dumps({**content, "date": str(date.today())}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
