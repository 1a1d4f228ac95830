"""Training on several GPUs, with one process for each. With a single process, these functions do nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_mstkd.nnunet.model import plain_network


def several_processes() -> bool:
    """Whether this is one of several processes of a training."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if several_processes() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if several_processes() else 1


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    everyone = [value] * world_size()
    if several_processes():
        dist.all_gather_object(everyone, value)
    return everyone


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run the block, then the others, which find what it has made.

    They wait for hours if need be: NCCL, which trainings use, would give up after ten minutes. If the first one refuses
    something, the others meet it themselves.
    """
    if not several_processes():
        yield
        return
    patient: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        if rank() > 0:
            dist.barrier(patient)
        try:
            yield
        finally:
            if rank() == 0:
                dist.barrier(patient)
    finally:
        dist.destroy_process_group(patient)


@contextlib.contextmanager
def within_process(loss: Any) -> Iterator[None]:
    """Let nnU-Net's batch Dice in the block be that of this process's rows alone.

    Over all processes, as in ``2d`` configurations, it needs as many rows on each. Rows that are chosen by what their
    cases have differ in number.
    """
    modules = loss.modules() if isinstance(loss, torch.nn.Module) else ()
    gathering: list[Any] = [module for module in modules if getattr(module, "ddp", False)]
    try:
        for module in gathering:
            module.ddp = False
        yield
    finally:
        for module in gathering:
            module.ddp = True


def unwrapped(network: Any) -> Any:
    """Return a network without the wrappers of DDP and torch.compile."""
    return plain_network(network.module if isinstance(network, DistributedDataParallel) else network)


def wrapped_for_ddp(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Wrap a module that a trainer has beside nnU-Net's network for a training on several GPUs, as nnU-Net does.

    DDP refuses one without weights to train, which is returned as it is.
    """
    if not any(each.requires_grad for each in module.parameters()):
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
