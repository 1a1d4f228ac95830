"""Does a GPU wait for nnU-Net's loader? Time of a training batch, reading and augmentation, on one core.

    python benchmarks/loader_rate.py --out FILE.json

nnU-Net prepares batches in 12 processes by default, so with as many idle cores it delivers one in a twelfth of this
time. The cases are of the size of a cropped BraTS case and of noise inside an ellipsoid, which compresses no better
than images. With growing patches (`schedule.patch_phases=4`) each phase has its own patch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from step_cost import prepare

from nnunetv2_mstkd.images.atomic import write_json
from nnunetv2_mstkd.training.loaders import loader_with_patch
from nnunetv2_mstkd.training.patch_growth import Phase, phase_of

SHAPE = (140, 171, 137)
CASES, CHANNELS = 4, 4
NNUNET_WORKERS = 12


def write_case(folder: Path, name: str, patch: tuple[int, ...], random: np.random.Generator) -> None:
    """A preprocessed case: noise inside an ellipsoid, and a small one of three nested labels."""
    grid = np.meshgrid(*(np.linspace(-1, 1, edge, dtype=np.float32) for edge in SHAPE), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in grid))
    data = random.standard_normal((CHANNELS, *SHAPE), dtype=np.float32) * (radius < 1)
    segmentation = np.digitize(-radius, [-0.3, -0.2, -0.1]).astype(np.int8)[None]
    places = {value: np.argwhere(segmentation >= value)[:10000] for value in (1, 2, 3)}
    properties = {"class_locations": {(1, 2, 3): places[1], (2, 3): places[2], (3,): places[3]}}
    blocks, chunks = comp_blosc2_params(data.shape, patch)
    nnUNetDatasetBlosc2.save_case(data, segmentation, properties, str(folder / name), chunks, blocks)


def milliseconds(trainer: Any, loader: Any, phase: Phase, batches: int) -> float:
    """Mean CPU time of a batch."""
    made = loader_with_patch(trainer, loader, phase)
    start = time.process_time()
    for _ in range(batches):
        next(made)
    return 1000 * (time.process_time() - start) / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="brats", help="of step_cost.py (default: brats)")
    parser.add_argument("--batches", type=int, default=20, help="per patch size (default: 20)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = prepare("ModalityDropoutTrainer", args.plan, torch.device("cpu"), folder)
        manager = trainer.configuration_manager
        for number in range(CASES):
            write_case(Path(folder), f"case{number}", tuple(manager.patch_size), random)
        patch, strides = manager.patch_size, np.prod(manager.pool_op_kernel_sizes, axis=0).tolist()
        loader = nnUNetDataLoader(
            nnUNetDatasetBlosc2(folder), manager.batch_size, patch, patch, trainer.label_manager,
            oversample_foreground_percent=0.33,
        )  # fmt: skip
        phases = [Phase(0, tuple(patch), 1.0), *(phase_of(epoch, 4, 4, patch, strides) for epoch in range(4))]
        found = {}
        for phase in phases:
            name = " x ".join(map(str, phase.patch))
            if name in found:
                continue
            one = milliseconds(trainer, SingleThreadedAugmenter(loader, None), phase, args.batches)
            found[name] = round(one, 1)
            print(
                f"patch {name}, batch {manager.batch_size}: {one:.0f} ms on one core; {NNUNET_WORKERS} processes on as "
                f"many cores deliver one per {one / NNUNET_WORKERS:.0f} ms",
                flush=True,
            )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    about = {"plan": args.plan, "image": SHAPE, "machine": machine, "date": date.today().isoformat()}
    write_json(args.out, {**about, "batch": manager.batch_size, "ms_per_batch": found})


if __name__ == "__main__":
    main()
