"""The networks whose logits a prediction averages, one by one: of each fold, and in it each student."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnunetv2_mstkd.inference.conditioning import num_students
from nnunetv2_mstkd.nnunet.model import nnUNetPredictor, plain_network


class StackedHeads:
    """nnU-Net's label manager with the segmentation heads of several predictions, whose logits lie side by side."""

    def __init__(self, manager: Any, stack: int) -> None:
        self._manager = manager
        self.num_segmentation_heads = stack * manager.num_segmentation_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def num_members(predictor: nnUNetPredictor, student: int | None = None) -> int:
    """Return how many networks predict: folds times students, of which ``student`` may choose one."""
    students = num_students(predictor.network) if student is None else 1
    return len(predictor.list_of_parameters) * max(1, students)


@contextlib.contextmanager
def each_member(
    predictor: nnUNetPredictor, add: Callable[[torch.Tensor], None] | None, student: int | None = None
) -> Iterator[None]:
    """In the block, call ``add`` (None: nothing) with the logits of each of :func:`num_members`, (K, *spatial).

    The prediction does not change, nor does the number of forward passes: logits of students lie beside their mean, as
    further channels.
    """
    if add is None:
        yield
        return
    network, predict, labels = (
        predictor.network,
        predictor.predict_sliding_window_return_logits,
        predictor.label_manager,
    )
    students = num_students(network) if student is None else 0
    heads = labels.num_segmentation_heads

    def one_fold(data: torch.Tensor) -> torch.Tensor:
        mean, *members = predict(data).split(heads)
        for logits in members or [mean]:
            add(logits)
        return mean.clone() if members else mean  # without the members' memory

    predictor.predict_sliding_window_return_logits = one_fold
    try:
        with _beside_mean(network, students) if students else contextlib.nullcontext():
            predictor.label_manager = StackedHeads(labels, 1 + students)
            yield
    finally:
        predictor.label_manager = labels
        del predictor.predict_sliding_window_return_logits


@contextlib.contextmanager
def _beside_mean(network: torch.nn.Module, students: int) -> Iterator[None]:
    """In the block, a network returns the mean of its students' logits and then theirs: (B, (1 + students) K, ...)."""
    forward, plain = network.forward, plain_network(network)
    own = vars(network).get("forward")  # that of a compiled network is no method

    def one_pass(patch: torch.Tensor) -> torch.Tensor:
        found = []
        for number in range(1, 1 + students):
            plain.student = number  # type: ignore[assignment]
            found.append(forward(patch))
        plain.student = None  # type: ignore[assignment]
        return torch.cat([sum(found) / students, *found], 1)

    network.forward = one_pass
    try:
        yield
    finally:
        del network.forward
        if own is not None:
            network.forward = own
