"""How undecided a prediction is: the entropy of its probabilities, from 0 (certain) to 1 (all are equal)."""

from __future__ import annotations

import math

import numpy as np
import torch


def _entropies(probabilities: np.ndarray, regions: bool) -> np.ndarray:
    """Entropy of each region, (K, *spatial), or of the labels, (1, *spatial), as a fraction of its maximum."""
    values = np.clip(np.asarray(probabilities, np.float32), 1e-7, 1)
    if regions:
        others = np.clip(1 - values, 1e-7, 1)
        return -(values * np.log2(values) + others * np.log2(others))
    return -(values * np.log(values)).sum(axis=0, keepdims=True) / math.log(max(len(values), 2))


def entropy_map(probabilities: np.ndarray, regions: bool) -> np.ndarray:
    """Entropy of each voxel as a fraction of its maximum.

    Parameters
    ----------
    probabilities
        Shape (K, *spatial): of exclusive labels, or of regions, each of which is decided by itself.
    regions
        Whether they are of regions; the entropy is then that of the least certain one.

    Returns
    -------
    float32, shape (*spatial).
    """
    return _entropies(probabilities, regions).max(axis=0)


def _probabilities(logits: torch.Tensor, regions: bool) -> np.ndarray:
    values = logits.cpu().float()  # the device may be full of the logits of the whole image
    return (values.sigmoid() if regions else values.softmax(0)).numpy()


def logit_entropy(logits: torch.Tensor, regions: bool) -> np.ndarray:
    """Return :func:`entropy_map` of the probabilities that logits (K, *spatial) stand for."""
    return entropy_map(_probabilities(logits, regions), regions)


class Disagreement:
    """How far several networks disagree about a case: the mutual information of prediction and network.

    It is the entropy of their mean probability minus the mean of their entropies (Houlsby et al., arXiv 1112.5745): 0
    where all say the same, however uncertain they are, and at most log(networks) / log(labels), where each is certain
    of another label: 1 for two networks and the two outcomes of a region.

    Parameters
    ----------
    regions
        As for :func:`entropy_map`.
    """

    def __init__(self, regions: bool) -> None:
        self._regions, self._number = regions, 0
        self._probabilities: np.ndarray | float = 0.0
        self._entropies: np.ndarray | float = 0.0

    def add(self, logits: torch.Tensor) -> None:
        """Add a network's logits, shape (K, *spatial)."""
        probabilities = _probabilities(logits, self._regions)
        self._probabilities = self._probabilities + probabilities
        self._entropies = self._entropies + _entropies(probabilities, self._regions)
        self._number += 1

    def map(self) -> np.ndarray:
        """Return the disagreement of each voxel, float32 between 0 and 1, shape (*spatial)."""
        mean = np.asarray(self._probabilities) / self._number
        found = _entropies(mean, self._regions) - np.asarray(self._entropies) / self._number
        return np.clip(found.max(axis=0), 0, 1)


def case_entropy(logits: np.ndarray, regions: bool) -> float | None:
    """Mean entropy of the voxels that are predicted as foreground, from logits (K, *spatial); None without any."""
    values = torch.as_tensor(logits)
    found = (values > 0).any(0) if regions else values.argmax(0) > 0
    if not found.any():
        return None
    return float(logit_entropy(values[:, found], regions).mean())  # the foreground is a small part of the image
