"""The weight of distillation over the first part of a training."""

from __future__ import annotations

import math


def ramp(step: int, total_steps: int, fraction: float = 0.1) -> float:
    """Gaussian ramp-up from exp(-5), about 0.0067, to 1.

    ``exp(-5 (1 - t)^2)`` with ``t = min(1, step / max(1, fraction * total_steps))``. The released code of MST-KDNet
    (MICCAI 2025) ramps one term over 20 of its 100 (BraTS, FeTS) or 300 epochs; the paper prints no schedule. Changed:
    by iteration and as a fraction of the training, so that a short training reaches full weight too.

    ``step`` counts iterations over all epochs. A fraction of 0 switches the ramp off after the first iteration; a
    negative step or fraction raises ValueError.
    """
    if step < 0 or fraction < 0:
        raise ValueError(f"found step {step} and fraction {fraction}, expected both to be at least 0")
    t = min(1.0, step / max(1.0, fraction * total_steps))
    return math.exp(-5.0 * (1.0 - t) ** 2)
