"""How undecided a prediction is: the entropy of its probabilities, from 0 (certain) to 1 (all are equal)."""

from __future__ import annotations

import math

import numpy as np
import torch


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
    values = np.clip(np.asarray(probabilities, np.float32), 1e-7, 1)
    if regions:
        others = np.clip(1 - values, 1e-7, 1)
        return (-(values * np.log2(values) + others * np.log2(others))).max(axis=0)
    return -(values * np.log(values)).sum(axis=0) / math.log(max(len(values), 2))


def case_entropy(logits: np.ndarray, regions: bool) -> float | None:
    """Mean entropy of the voxels that are predicted as foreground, from logits (K, *spatial); None without any."""
    values = torch.as_tensor(logits)
    found = (values > 0).any(0) if regions else values.argmax(0) > 0
    if not found.any():
        return None
    chosen = values[:, found].float()  # (K, voxels): the foreground is a small part of the image
    probabilities = torch.sigmoid(chosen) if regions else torch.softmax(chosen, 0)
    return float(entropy_map(probabilities.numpy(), regions).mean())
