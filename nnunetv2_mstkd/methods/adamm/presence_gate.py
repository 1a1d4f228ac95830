"""What a network says, after a whole case, about which labels and regions there are, and deleting the others (AdaMM's
LGRM)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_BELOW = 20.0
"""A deleted region's logit, negative; a deleted label's distance below the smallest logit of the case."""


class PresenceGate:
    """Records what a network says about presence in all patches of a case, and finishes the case's logits with it.

    A case has a label or region with the largest probability that any patch, mirrored patch and fold gave to it: one
    patch that finds it is enough to keep it. What stays below the threshold is deleted; with 0 nothing is.
    """

    def __init__(self, threshold: float, label_manager: Any, device: torch.device) -> None:
        self.threshold, self._labels = threshold, label_manager
        self.seen = torch.full((1, label_manager.num_segmentation_heads), -torch.inf, device=device)

    def see(self, presence: torch.Tensor) -> None:
        """Record the presence logits of a patch, shape (S, K); all patches of a case have the same number of rows."""
        self.seen = torch.maximum(self.seen, presence)

    def presence(self) -> np.ndarray:
        """Probability that the case has any voxel of each output channel, shape (S, K)."""
        return self.seen.sigmoid().cpu().numpy()

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Delete what is not there from the logits of a case, shape (S, K, *spatial), in place."""
        if self.threshold == 0:
            return logits
        present = self.presence() >= self.threshold
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
