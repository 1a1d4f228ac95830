"""`nnUNetv2_train` with its cost noted in `cost.json` of the fold, for `accuracy.py`.

    python benchmarks/measured_training.py [--keep] [--bfloat16] nnUNetv2_train 226 3d_fullres 0 -tr MSTKDTrainer

Time is that of the epochs, each counted once however often the training was stopped; memory the peak of the training
process (resident set on a CPU, torch's allocator on CUDA). `--keep` leaves the weights at 5 and 50 % of the training
beside nnU-Net's own checkpoints, for `gradient_ratio.py`. `--bfloat16` runs networks under autocast on a CPU too, where
nnU-Net only does so on CUDA, and keeps weights channels-last: half the time on processors with bfloat16 instructions.
Outputs are float32 again before any loss.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_mstkd.images.atomic import atomic_write

if TYPE_CHECKING:
    import torch

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
        with atomic_write(folder / COST) as scratch:
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
    from nnunetv2_mstkd.training.base import SettingsTrainer

    begin, end = SettingsTrainer.on_epoch_start, SettingsTrainer.on_epoch_end

    def on_epoch_start(self) -> None:
        meter.begin()
        begin(self)

    def on_epoch_end(self) -> None:
        meter.end(self)
        end(self)

    SettingsTrainer.on_epoch_start, SettingsTrainer.on_epoch_end = on_epoch_start, on_epoch_end  # type: ignore[method-assign]


def autocast_on_cpu() -> None:
    """Let every trainer of this package run its networks, the teacher too, in bfloat16 on a CPU, in this process."""
    from nnunetv2_mstkd.training import distillation
    from nnunetv2_mstkd.training.base import SettingsTrainer

    initialize, load_teacher = SettingsTrainer.initialize, distillation.load_teacher

    def initialized(self) -> None:
        initialize(self)
        lower(self.network)
        if getattr(self, "teacher_learns", False):  # it was built with the optimiser
            lower(self.teacher)

    def lowered_teacher(*arguments: Any, **options: Any) -> Any:
        teacher = load_teacher(*arguments, **options)
        lower(teacher.network)
        return teacher

    SettingsTrainer.initialize = initialized  # type: ignore[method-assign]
    distillation.load_teacher = lowered_teacher


def lower(network: torch.nn.Module) -> None:
    """Let a network compute in bfloat16, with weights channels-last, and answer in float32.

    Convolutions over two positions in depth stay in float32: torch 2.14.1 leaves a part of the gradient of their
    weights unwritten in bfloat16 on a CPU.
    """
    import torch

    def in_bfloat16(module: Any, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return as_float32(forward(module, *inputs, **options))

    def convolve(module: Any, forward: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        if x.shape[-3] != 2:
            return forward(module, x)
        with torch.autocast("cpu", enabled=False):
            return forward(module, x.float())

    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv3d)]
    network.to(memory_format=torch.channels_last_3d if convolutions else torch.channels_last)
    for module in convolutions:
        _wrap(module, convolve)
    _wrap(network, in_bfloat16)


def _wrap(module: torch.nn.Module, call: Callable[..., Any]) -> None:
    """Replace a module's forward pass by ``call(module, forward, *inputs)``, where ``forward`` is the one it had.

    Its class changes, not its ``forward``: otherwise a copy of the module, such as a moving average of the weights,
    would run the original's forward pass.
    """
    kind = type(module)

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        return call(self, kind.forward, *inputs, **options)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def as_float32(output: Any) -> Any:
    """A network's output with its floating-point tensors in float32; its lists and (named) tuples stay so."""
    if isinstance(output, (list, tuple)):
        entries = [as_float32(entry) for entry in output]
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)
    return output.float() if hasattr(output, "is_floating_point") and output.is_floating_point() else output


def main() -> None:
    """Run the training that the command line names."""
    words = sys.argv[1:]
    options = set()
    while words and words[0] in ("--keep", "--bfloat16"):
        options.add(words.pop(0))
    keep = "--keep" in options
    if words[:1] != ["nnUNetv2_train"]:
        raise SystemExit("expected: measured_training.py [--keep] [--bfloat16] nnUNetv2_train ...")
    if "cpu" in words:
        # nnU-Net reads them when it is imported; without workers a seed repeats a training exactly
        os.environ.update(nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1")
    if hasattr(os, "sched_getaffinity"):
        # nnU-Net takes a thread per core of the machine; of those that this process may not use it only waits for
        multiprocessing.cpu_count = lambda: len(os.sched_getaffinity(0))  # type: ignore[method-assign]
    from nnunetv2.run.run_training import run_training_entry

    install(Meter(keep))
    if "--bfloat16" in options:
        autocast_on_cpu()
    sys.argv = words
    run_training_entry()


if __name__ == "__main__":
    main()
