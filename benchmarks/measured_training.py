"""`nnUNetv2_train` with its cost noted in `cost.json` of the fold, for `accuracy.py`.

    python benchmarks/measured_training.py [--keep] nnUNetv2_train 226 3d_fullres 0 -tr MSTKDTrainer -device cpu

Time is that of the epochs, each counted once however often the training was stopped; memory the peak of the training
process (resident set on a CPU, torch's allocator on CUDA). `--keep` leaves the weights at 5 and 50 % of the training
beside nnU-Net's own checkpoints, for `gradient_ratio.py`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.whole_files import scratch_file

FRACTIONS = (0.05, 0.5)
COST = "cost.json"


def kept_name(fraction: float) -> str:
    """File name of the weights at a fraction of the training."""
    return f"checkpoint_at_{round(100 * fraction):03d}.pth"


def kept_epochs(epochs: int) -> dict[int, float]:
    """After which number of finished epochs the weights are kept, and for which fraction."""
    return {max(1, round(fraction * epochs)): fraction for fraction in FRACTIONS}


class Meter:
    """Notes the cost of each epoch of a trainer; a file that an earlier, stopped run left is continued.

    Parameters
    ----------
    keep:
        whether to keep the weights on the way.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._begin = (0.0, 0.0)

    def begin(self) -> None:
        """An epoch begins."""
        self._begin = (time.perf_counter(), time.process_time())

    def end(self, trainer: Any) -> None:
        """An epoch ends; nnU-Net has not counted it yet."""
        import torch

        folder = Path(trainer.output_folder)
        content = read_cost(folder) or {"epochs": {}, "memory_mib": 0.0}
        now = (time.perf_counter(), time.process_time())
        wall, cpu = (end - begin for end, begin in zip(now, self._begin, strict=True))
        cuda = trainer.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else _resident_mib()
        content["epochs"][str(trainer.current_epoch)] = {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}
        content["memory_mib"] = round(max(content["memory_mib"], peak), 1)
        content["parameters"] = sum(parameter.numel() for parameter in trainer.network.parameters())
        content["device"] = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
        if self.keep:
            fraction = kept_epochs(trainer.num_epochs).get(trainer.current_epoch + 1)
            if fraction is not None:
                trainer.save_checkpoint(str(folder / kept_name(fraction)))
        with scratch_file(folder / COST) as scratch:
            scratch.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_cost(folder: Path) -> dict[str, Any] | None:
    """What was noted in a fold's folder; None if nothing was."""
    file = folder / COST
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _resident_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def install(meter: Meter) -> None:
    """Let every trainer of this package report its epochs, in this process."""
    from nnunetv2_mstkd.trainers.base import SettingsTrainer

    begin, end = SettingsTrainer.on_epoch_start, SettingsTrainer.on_epoch_end

    def on_epoch_start(self) -> None:
        meter.begin()
        begin(self)

    def on_epoch_end(self) -> None:
        meter.end(self)
        end(self)

    SettingsTrainer.on_epoch_start, SettingsTrainer.on_epoch_end = on_epoch_start, on_epoch_end  # type: ignore[method-assign]


def main() -> None:
    """Run the training that the command line names."""
    words = sys.argv[1:]
    keep = words[:1] == ["--keep"]
    words = words[1:] if keep else words
    if words[:1] != ["nnUNetv2_train"]:
        raise SystemExit("expected: measured_training.py [--keep] nnUNetv2_train ...")
    if "cpu" in words:
        # nnU-Net reads them when it is imported; without workers a seed repeats a training exactly
        os.environ.update(nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1")
    from nnunetv2.run.run_training import run_training_entry

    install(Meter(keep))
    sys.argv = words
    run_training_entry()


if __name__ == "__main__":
    main()
