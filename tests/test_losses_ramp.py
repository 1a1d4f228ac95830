from __future__ import annotations

import math

import pytest

from nnunetv2_mstkd.losses.ramp import ramp


def test_ramp_takes_the_values_worked_out_by_hand():
    # 10 % of 1000 steps is 100; half way (1 - 0.5)^2 * 5 = 1.25.
    assert ramp(0, 1000) == pytest.approx(math.exp(-5))
    assert ramp(50, 1000) == pytest.approx(math.exp(-1.25))
    assert ramp(100, 1000) == 1
    assert ramp(999, 1000) == 1


def test_ramp_never_falls():
    values = [ramp(step, 300, fraction=0.5) for step in range(300)]
    assert values == sorted(values)
    assert values[149] < 1 and values[150] == 1


def test_shortest_ramp_takes_one_step():
    assert ramp(1, 3) == 1
    assert ramp(1, 1000, fraction=0) == 1
    assert ramp(0, 0) == pytest.approx(math.exp(-5))


@pytest.mark.parametrize("arguments", [(-1, 10, 0.1), (1, 10, -0.1)])
def test_negative_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 0"):
        ramp(*arguments)
