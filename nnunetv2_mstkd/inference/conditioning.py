"""Telling a network what it must know about a case for the time of its prediction.

Nothing else in prediction and evaluation knows what a network asks for. A network offers it by a context manager
``conditioned(availability, label_manager, student)`` of the same meaning as :func:`conditioned` here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.model import plain_network

Finish: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Finishes the logits of a case, shape (S, K, *spatial)."""


@contextmanager
def conditioned(
    network: torch.nn.Module, availability: torch.Tensor, label_manager: Any, *, student: int | None = None
) -> Iterator[Finish]:
    """Tell a network which modalities a case has, while the block predicts it.

    Parameters
    ----------
    network
        The network that predicts, with or without the wrapper of torch.compile.
    availability
        Tensor of bool on the network's device, shape (S, C): one row for each subset that is predicted at once.
    label_manager
        nnU-Net's label manager of the model.
    student
        Which of the network's students predicts, counted from 1. None: all of them together.

    Yields
    ------
    A function that finishes the logits of the case, in place; for most networks it changes nothing.

    Raises
    ------
    InputError
        If the network has no such student.
    """
    plain: Any = plain_network(network)
    check_student(plain, student)
    if hasattr(plain, "conditioned"):
        with plain.conditioned(availability, label_manager, student) as finish:
            yield finish
    elif not hasattr(plain, "availability"):
        yield _unchanged
    else:
        with _attributes(plain, availability, student):
            gate = PresenceGate(plain, label_manager)
            gate.start(availability.device)
            try:
                yield gate.apply
            finally:
                gate.stop()


def check_student(network: torch.nn.Module, student: int | None) -> None:
    """Raise InputError unless the network has this student; None stands for all of them."""
    students = len(getattr(plain_network(network), "students", ()))
    if student is not None and not 1 <= student <= students:
        has = f"students 1 to {students}" if students else "one network and no students"
        raise InputError(f"--student is {student}, but the model has {has}")


def _unchanged(logits: np.ndarray) -> np.ndarray:
    return logits


@contextmanager
def _attributes(network: Any, availability: torch.Tensor, student: int | None) -> Iterator[None]:
    """Set the attributes of networks that offer no method ``conditioned`` yet."""
    network.availability = availability
    if student is not None:
        network.only = student - 1
    try:
        yield
    finally:
        network.availability = None
        if student is not None:
            network.only = None


_BELOW = 20.0
"""A deleted region's logit, negative; a deleted label's distance below the smallest logit of the case."""


class PresenceGate:
    """Deletes labels and regions that a network does not find anywhere in a case (AdaMM).

    Only a network with an attribute ``gate`` above 0 takes part. A label or region is present with the largest
    probability that any patch, mirrored patch and fold gives to it: one patch that finds it is enough to keep it.

    Parameters
    ----------
    network
        The network without the wrapper of torch.compile.
    label_manager
        nnU-Net's label manager of the model.
    """

    def __init__(self, network: Any, label_manager: Any) -> None:
        self._network, self._labels = network, label_manager
        self.threshold = float(getattr(network, "gate", 0.0))

    def start(self, device: torch.device) -> None:
        """Begin a case; all its forward passes have the same number of rows."""
        if self.threshold > 0:
            shape = (1, self._labels.num_segmentation_heads)
            self._network.presence_seen = torch.full(shape, -torch.inf, device=device)

    def stop(self) -> None:
        """End a case."""
        if self.threshold > 0:
            self._network.presence_seen = None

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Delete what is absent from the logits of all rows, shape (rows, K, *spatial), in place."""
        if self.threshold <= 0:
            return logits
        present = self._network.presence_seen.sigmoid().cpu().numpy() >= self.threshold
        for row, there in zip(logits, present, strict=True):
            low = float(row.min())
            for head in self._deleted(there):
                # finite: nnU-Net interpolates logits
                row[head] = -_BELOW if self._labels.has_regions else low - _BELOW
        return logits

    def _deleted(self, present: np.ndarray) -> list[int]:
        """Heads to delete: the absent ones, and regions within an absent one; never the background."""
        absent = np.flatnonzero(~present).tolist()
        if not self._labels.has_regions:
            return [head for head in absent if head > 0]
        regions = [set(np.atleast_1d(region).tolist()) for region in self._labels.foreground_regions]
        return [head for head, region in enumerate(regions) if any(region <= regions[missing] for missing in absent)]
