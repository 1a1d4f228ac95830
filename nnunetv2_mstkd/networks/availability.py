"""Networks that are told which modalities a case has while it is predicted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunetv2_mstkd import modalities


class AvailabilityAware(nn.Module):
    """Base of networks that work with the available modalities of each sample."""

    availability: torch.Tensor | None = None
    """Bool, (1, C) or (B, C), on the device, set for the time of a prediction; None: channels that are zero in the
    patch are absent. Not part of the state dict."""
    student: int | None = None
    """Number, from 1, of the one student that predicts, in networks of several; None: all of them."""

    def available(self, x: torch.Tensor) -> torch.Tensor:
        """Return which modalities each sample of a batch (B, C, *spatial) has: bool, (B, C)."""
        return modalities.known_availability(x, self.availability)

    @contextlib.contextmanager
    def conditioned(
        self, availability: torch.Tensor, label_manager: Any, student: int | None = None
    ) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
        """Tell the network what a prediction is about; see :mod:`nnunetv2_mstkd.inference.conditioning`."""
        self.availability, self.student = availability, student
        try:
            yield lambda logits: logits
        finally:
            self.availability = self.student = None
