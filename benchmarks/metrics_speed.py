"""HD95 here and in medpy, in turn, on whole-tumor pairs of the size of BraTS (240 x 240 x 155 voxels).

The masks are made here, as balls with rough surfaces. Both programs use one thread, so their CPU times are compared:
other programs on the machine disturb them less than the time on the clock. Values are checked to agree within 1e-9 mm.
Needs medpy:

    python benchmarks/metrics_speed.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import medpy.metric.binary
import numpy as np
from scipy import ndimage

from nnunetv2_mstkd.metrics.lesionwise import lesionwise
from nnunetv2_mstkd.metrics.overlap import score
from nnunetv2_mstkd.metrics.surface import hd95, surface_distances

SHAPE = (240, 240, 155)
RADII = (32.0, 40.0, 29.0)
CENTRE = (145.0, 110.0, 80.0)
AGREEMENT = 1e-9


def rough_ball(centre: tuple[float, ...], radii: tuple[float, ...], roughness: float, seed: int) -> np.ndarray:
    """A mask of about 150 ml at 1 mm: an ellipsoid whose distance from the centre is disturbed by smooth noise."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE, dtype=np.float32), 5)
    grid = np.ogrid[tuple(slice(size) for size in SHAPE)]
    distance = sum(((axis - middle) / radius) ** 2 for axis, middle, radius in zip(grid, centre, radii, strict=True))
    return np.sqrt(distance) + roughness * noise / noise.std() < 1


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray, tuple[float, ...]]]:
    """Prediction, reference and spacing by description."""
    reference = rough_ball(CENTRE, RADII, 0.12, 0)
    # the same tumor with other noise on its border, and one shifted by a few voxels
    close = reference ^ (ndimage.binary_dilation(reference) & ~reference & rough_ball(CENTRE, RADII, 3.0, 1))
    shifted = rough_ball((CENTRE[0] + 6, CENTRE[1] - 4, CENTRE[2] + 3), RADII, 0.12, 2)
    false = shifted | rough_ball((60.0, 170.0, 60.0), (5.0, 5.0, 5.0), 0.1, 3)
    return {
        "close, 1 mm": (close, reference, (1.0, 1.0, 1.0)),
        "shifted, 1 mm": (shifted, reference, (1.0, 1.0, 1.0)),
        "shifted, 1 x 1 x 3 mm": (shifted, reference, (1.0, 1.0, 3.0)),
        "shifted and a false lesion": (false, reference, (1.0, 1.0, 1.0)),
    }


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """The value of a call and its CPU time in milliseconds."""
    begin = time.process_time()
    value = call()
    return value, 1e3 * (time.process_time() - begin)


def main() -> int:
    """Print times and ratios; exit code 1 where the values differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timings of each (default: %(default)s)")
    rounds = parser.parse_args().rounds

    print(f"{'pair':28s}{'HD95':>9s}{'here':>9s}{'medpy':>10s}{'ratio (quartiles)':>24s}")
    agree = True
    for name, (prediction, reference, spacing) in pairs().items():
        own, other, ratios = [], [], []
        for _ in range(rounds):
            value, took = timed(lambda p=prediction, r=reference, s=spacing: hd95(surface_distances(p, r, s)))
            expected, took_other = timed(lambda p=prediction, r=reference, s=spacing: medpy.metric.binary.hd95(p, r, s))
            own.append(took)
            other.append(took_other)
            ratios.append(took_other / took)
            agree &= abs(value - expected) <= AGREEMENT
        low, median, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        print(
            f"{name:28s}{value:6.3f} mm{statistics.median(own):6.0f} ms{statistics.median(other):7.0f} ms"
            f"{median:9.0f} x ({low:.0f} to {high:.0f})"
        )
    print("values agree within 1e-9 mm" if agree else "VALUES DIFFER")

    prediction, reference, spacing = pairs()["shifted and a false lesion"]
    for name, call in (
        ("all eight metrics of a pair", lambda: score(prediction, reference, spacing)),
        ("lesion-wise, BraTS 2023", lambda: lesionwise(prediction, reference, spacing, "brats2023_gli")),
        ("lesion-wise, BraTS 2024", lambda: lesionwise(prediction, reference, spacing, "brats2024_gli")),
    ):
        print(f"{name:28s}{statistics.median(timed(call)[1] for _ in range(rounds)):15.0f} ms")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
