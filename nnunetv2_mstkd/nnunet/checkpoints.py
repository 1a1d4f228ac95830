"""Reading, writing and identifying checkpoint files of nnU-Net and of this package."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nnunetv2_mstkd.errors import InputError, MissingFileError, WriteError
from nnunetv2_mstkd.images.atomic import atomic_write
from nnunetv2_mstkd.nnunet.plans import BLOCK


def _allowed_types() -> list[Any]:
    """Types beside tensors and plain Python that nnU-Net's checkpoints hold: the NumPy scalars of its log."""
    scalar = np.float64(0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*names, np.dtype, *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "u1", "?"))]


def read(path: str | os.PathLike, *, hint: str = "") -> dict[str, Any]:
    """Read a checkpoint without executing anything in it (``weights_only``).

    InputError if it is truncated, no checkpoint of nnU-Net, or holds anything but tensors, numbers and plain Python;
    ``hint`` says what can be done in this last case.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:  # here, so that a file without read permission is not called damaged
        try:
            with torch.serialization.safe_globals(_allowed_types()):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # damaged bytes can make an unpickler raise anything
            foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if foreign:
                raise InputError(
                    f"checkpoint {path} is refused: it asks to import {foreign[1]}, which no nnU-Net checkpoint needs; "
                    f"none of it was executed{hint}"
                ) from error
            raise InputError(
                f"checkpoint {path} is damaged, truncated or not a checkpoint ({type(error).__name__}, "
                f"{path.stat().st_size} bytes); train or copy it again"
            ) from error
    if not isinstance(content, Mapping) or "network_weights" not in content:
        raise InputError(f"{path} is not an nnU-Net checkpoint: it has no network_weights")
    weights = content["network_weights"]
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f"{path} is not an nnU-Net checkpoint: its network_weights are not a table of tensors")
    return dict(content)


def write(content: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint atomically; raises WriteError if that fails."""
    try:
        with atomic_write(Path(path)) as scratch, scratch.open("wb") as file:
            try:
                torch.save(dict(content), file)
            except RuntimeError as error:  # PyTorch's writer hides the reason behind a RuntimeError of its own
                raise OSError(error.__context__ if isinstance(error.__context__, OSError) else error) from error
            file.flush()
            os.fsync(file.fileno())
    except WriteError as error:
        raise WriteError(
            f"checkpoint {error}. Free some space or make the folder writable, then continue with --c"
        ) from error


class Notes(NamedTuple):
    """What a checkpoint says about its training; None: nothing."""

    split: dict[str, list[str]] | None
    """The cases, ``{"train": [...], "val": [...]}``."""
    hours: float | None
    """That its epochs took."""


def read_notes(path: str | os.PathLike) -> Notes:
    """Read what a checkpoint says about its training; raises what :func:`read` does."""
    content = read(path)
    noted, log, hours = content.get(BLOCK), content.get("logging"), None
    times = [log.get(f"epoch_{end}_timestamps") for end in ("start", "end")] if isinstance(log, Mapping) else [None]
    if all(isinstance(each, list) and each for each in times):
        hours = sum(end - start for start, end in zip(*times, strict=False)) / 3600
    return Notes(noted.get("split") if isinstance(noted, Mapping) else None, hours)


SHORT = 12
"""Digits of a fingerprint that records keep: enough to tell trainings apart."""


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the sorted tensor names and the tensors' bytes.

    The file itself has no such fingerprint: the archive inside a checkpoint changes with the file's name.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def load_matching(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Copy the tensors of equal name and shape into ``network``; InputError if there are none.

    Returns
    -------
    Names loaded, and names of the network that kept their own values. A tensor with two names (nnU-Net's decoder
    holds the encoder once more) is loaded if it is found under one of them.
    """
    own = network.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise InputError("no tensor of the checkpoint has the name and shape of one of the network; is it another one?")
    network.load_state_dict({**own, **fitting})
    loaded = {own[name].data_ptr() for name in fitting}
    return sorted(fitting), sorted(name for name in own if name not in fitting and own[name].data_ptr() not in loaded)
