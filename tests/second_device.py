"""A second device for machines that have none: its tensors lie in the CPU's memory, and mixing both fails.

So tests find what would fail on CUDA: arithmetic between tensors of two devices, ``numpy()`` of a tensor that was not
copied, a generator of the CPU that draws on the device. Results are those of the CPU. The device is called "meta",
because the autograd engine asks for a driver of any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CPU = torch.device("cpu")

ops = torch.ops.aten
COPIES = {ops.copy_.default, ops._to_copy.default, *(getattr(ops.to, form) for form in ops.to.overloads())}
INDEXED = {ops.index.Tensor, ops.index_put.default, ops.index_put_.default, ops._index_put_impl_.default}
"""These take indices of the CPU, on CUDA too."""


class DeviceTensor(torch.Tensor):
    """A tensor on the second device, which holds one of the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        facts = {name: getattr(held, name) for name in ("dtype", "layout")}
        with torch.inference_mode(held.is_inference()):  # views of what inference mode did not make are not its own
            made = torch.Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), device=DEVICE, **facts
            )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"DeviceTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # checkpoints are read to the CPU

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


def run(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on what its tensors hold; the result is on the device of its tensors, or on the one it names."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    if op is ops._has_compatible_shallow_copy_type.default:  # whether a module may keep its parameter when it moves
        return len(there) in (0, len(tensors))
    if there and op not in COPIES:
        here = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.ndim]
        if op in INDEXED:
            here = [tensor for tensor in here if tensor.is_floating_point()]
        if here:
            raise RuntimeError(f"{op} mixes devices: {[tuple(tensor.shape) for tensor in here]} are on the CPU")
    named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if DEVICE in named and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{op}: a generator of the CPU cannot draw on another device")
    if named:
        to_device = DEVICE in named
    elif op in COPIES:
        to_device = isinstance(args[0], DeviceTensor)
    else:
        to_device = bool(there)
    held_args, held_kwargs = tree_map(_held, (tuple(args), dict(kwargs)))
    result = op(*held_args, **held_kwargs)
    if named and any(result is _held(tensor) for tensor in tensors):
        result = result.clone()  # a move between devices always copies
    if not to_device:
        return result
    known = {id(tensor.held): tensor for tensor in there}  # what an operation has changed in place stays itself
    return tree_map(lambda each: known[id(each)] if id(each) in known else _moved(each), result)


def _held(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.held
    return CPU if isinstance(value, torch.device) else value


def _moved(value: Any) -> Any:
    return DeviceTensor(value) if isinstance(value, torch.Tensor) else value


class Everywhere(TorchDispatchMode):
    """Lets factory functions and copies reach the second device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[None]:
    """Let :data:`DEVICE` be a device of this machine for the time of a block."""
    autocast, run_thread = torch.autocast, threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with Everywhere():
            run_thread(thread)

    def lowered(device_type: str, *args: Any, **options: Any) -> Any:
        return autocast("cpu" if device_type == DEVICE.type else device_type, *args, **options)

    with (
        mock.patch.object(torch, "autocast", lowered),
        mock.patch.object(threading.Thread, "run", run_there),  # dispatch modes are those of one thread
        mock.patch.object(torch, "tensor", _then_moved(torch.tensor)),  # these two never reach a dispatch mode
        mock.patch.object(torch, "as_tensor", _then_moved(torch.as_tensor)),
        Everywhere(),
    ):
        yield


def _then_moved(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        made = factory(*args, **options)
        return made if device is None else made.to(device)

    return make
