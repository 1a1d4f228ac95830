from __future__ import annotations

import pytest
import torch

from nnunetv2_mstkd.losses.relative import ratio_of_sums, relative_difference, squared_sums


def test_relative_difference_by_hand():
    # Sample 0: (1 - 3)^2 + (2 - 4)^2 = 8 over 1 + 4 + 9 + 16 = 30. Sample 1: equal, 0. Mean 4 / 30.
    a = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    b = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    assert relative_difference(a, b).item() == pytest.approx(4 / 30, abs=1e-6)


def test_relative_difference_to_zero_and_negative():
    a = torch.tensor([[3.0, -4.0]])
    assert relative_difference(a, torch.zeros_like(a)).item() == pytest.approx(1.0, abs=1e-6)
    assert relative_difference(a, -a).item() == pytest.approx(2.0, abs=1e-6)


def test_relative_difference_of_zeros():
    a = torch.zeros(2, 3, requires_grad=True)
    loss = relative_difference(a, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(a.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("scale", [1e-1, 1e3])
@pytest.mark.parametrize("size", [4, 4000])
def test_relative_difference_of_unrelated_tensors(scale, size):
    a, b = (scale * torch.randn(2, 500, size, generator=torch.Generator().manual_seed(0))).unbind(0)
    assert relative_difference(a, b).item() == pytest.approx(1.0, abs=0.05)


def test_relative_difference_is_symmetric_and_bounded():
    a, b = torch.rand(2, 4, 7, 5, generator=torch.Generator().manual_seed(1)).unbind(0)
    assert relative_difference(a, b).item() == pytest.approx(relative_difference(b, a).item())
    assert 0 < relative_difference(a, b).item() <= 1


def test_each_sample_has_its_own_ratio():
    small, large = torch.tensor([[1.0, 0.0]]), torch.tensor([[1000.0, 1000.0]])
    batch = torch.cat([small, large])
    other = torch.cat([torch.tensor([[0.0, 1.0]]), large])
    # Sample 0: 2 / 2 = 1, sample 1: 0; pooling the sums instead would give about 5e-7.
    assert relative_difference(batch, other).item() == pytest.approx(0.5, abs=1e-5)
    assert relative_difference(batch.flip(0), other.flip(0)).item() == pytest.approx(0.5, abs=1e-5)


def test_sums_of_parts_give_the_ratio_of_the_whole():
    a, b = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).unbind(0)
    parts = [squared_sums(a[:, :5], b[:, :5]), squared_sums(a[:, 5:], b[:, 5:])]
    difference, size = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    assert difference.shape == (3,)
    assert ratio_of_sums(difference, size).item() == pytest.approx(relative_difference(a, b).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes_stay_finite(dtype):
    a = torch.full((1, 3000), 65504.0).to(dtype)
    loss = relative_difference(a, -a)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2.0, abs=1e-5)


def test_different_shapes_are_refused_with_both_named():
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 3\)"):
        relative_difference(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="batch"):
        relative_difference(torch.zeros(()), torch.zeros(()))
