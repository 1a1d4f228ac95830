"""Telling a network, for the time of one prediction, what it must know about the case.

A network with a method ``conditioned(availability, label_manager, student)``, a context manager, does this itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.inference.presence_gate import PresenceGate


@contextmanager
def conditioned(
    network: torch.nn.Module, availability: torch.Tensor, label_manager: Any, *, student: int | None = None
) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Tell a network which modalities the next prediction has.

    Parameters
    ----------
    network:
        Any network; the wrapper of torch.compile is removed.
    availability:
        bool, shape (S, C), on the device: a row per sample of the batches to come.
    label_manager:
        nnU-Net's label manager.
    student:
        Number, from 1, of the student that predicts; None: the network decides.

    Yields
    ------
    A function that finishes the logits of a case, shape (S, K, *spatial); the identity for most networks.
    """
    plain: Any = getattr(network, "_orig_mod", network)
    students = len(getattr(plain, "students", ()))
    if student is not None and not 1 <= student <= students:
        has = f"students 1 to {students}" if students else "one network and no students"
        raise InputError(f"--student is {student}, but the model has {has}")
    if hasattr(plain, "conditioned"):
        with plain.conditioned(availability, label_manager, student) as finish:
            yield finish
        return
    gate = PresenceGate(plain, label_manager)
    asks = hasattr(plain, "availability")
    if student is not None:
        plain.only = student - 1
    if asks:
        plain.availability = availability
    gate.start(availability.device)
    try:
        yield gate.apply
    finally:
        gate.stop()
        if asks:
            plain.availability = None
        if student is not None:
            plain.only = None
