"""Deleting labels and regions of which a network says, after a whole case, that there is nothing (AdaMM's LGRM).

Only a network with an attribute ``gate`` above 0 takes part; see :class:`nnunetv2_mstkd.methods.adamm.network`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_BELOW = 20.0
"""A deleted region's logit, negative; a deleted label's distance below the smallest logit of the case."""


class PresenceGate:
    """Records what a network says about presence in all patches of a case, and applies it to the case's logits.

    A case has a label or region with the largest probability that any patch, mirrored patch and fold gave to it: one
    patch that finds it is enough to keep it.

    Parameters
    ----------
    network:
        without the wrapper of torch.compile.
    label_manager:
        nnU-Net's.
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
        """Record nothing any more."""
        if self.threshold > 0:
            self._network.presence_seen = None

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Delete what is not there.

        Parameters
        ----------
        logits:
            of all rows, shape (rows, K, *spatial); changed in place.
        """
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
        """Heads to delete: the absent ones, and regions that lie within an absent one; never the background."""
        absent = np.flatnonzero(~present).tolist()
        if not self._labels.has_regions:
            return [head for head in absent if head > 0]
        regions = [set(np.atleast_1d(region).tolist()) for region in self._labels.foreground_regions]
        return [head for head, region in enumerate(regions) if any(region <= regions[missing] for missing in absent)]
