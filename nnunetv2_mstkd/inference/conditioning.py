"""Telling a network what it must know about a case for the time of its prediction.

nnU-Net gives a network patches and nothing else. A network that must know more offers a context manager
``conditioned(availability, label_manager, student)`` of the same meaning as :func:`conditioned` here; nothing in
prediction and evaluation knows what it does with it.
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
"""Finishes the logits of a case, shape (S, K, *spatial). It may have a method ``presence()``, which returns what the
network says after the case about the presence of each output channel: probabilities, shape (S, K)."""


@contextmanager
def conditioned(
    network: torch.nn.Module, availability: torch.Tensor, label_manager: Any, *, student: int | None = None
) -> Iterator[Finish]:
    """Tell a network which modalities a case has, while the block predicts it.

    Parameters
    ----------
    availability
        Tensor of bool on the network's device, shape (S, C): one row for each subset that is predicted at once.
    label_manager
        nnU-Net's label manager of the model.
    student
        Which of the network's students predicts, counted from 1. None: all of them together.

    Yields
    ------
    A function that finishes the logits of the case, in place; for most networks it changes nothing.
    """
    plain: Any = plain_network(network)
    check_student(plain, student)
    if hasattr(plain, "conditioned"):
        with plain.conditioned(availability, label_manager, student) as finish:
            yield finish
    else:
        yield lambda logits: logits


def presence_of(finish: Finish) -> np.ndarray | None:
    """Return what a network says about presence in a case, (S, K); None if it says nothing."""
    return finish.presence() if hasattr(finish, "presence") else None


def num_students(network: torch.nn.Module) -> int:
    """Return how many students a network has, whose mean it predicts; 0 for networks of another kind."""
    return len(getattr(plain_network(network), "students", ()))


def check_student(network: torch.nn.Module, student: int | None) -> None:
    """Raise InputError unless the network has this student; None stands for all of them."""
    students = num_students(network)
    if student is not None and not 1 <= student <= students:
        has = f"students 1 to {students}" if students else "one network and no students"
        raise InputError(f"--student is {student}, but the model has {has}")
