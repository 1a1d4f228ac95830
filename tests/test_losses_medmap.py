"""MedMAP's alignment loss against the formula written out, and the argument that it stands on."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_mstkd.methods.medmap.losses import (
    gaussian_alignment,
    leave_one_out_weights,
    mixture_alignment,
    renormalized_weights,
)

GRIDS = {"2d": (6, 5), "3d": (4, 3, 5)}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
each_count = pytest.mark.parametrize("count", [2, 3, 6])


def features(count: int, grid: tuple[int, ...], *, batch: int = 2, width: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, width, *grid, generator=generator, dtype=torch.float64).float() * 2 + 1


def everyone(z: torch.Tensor) -> torch.Tensor:
    return torch.ones(z.shape[:2], dtype=torch.bool)


def uniform(z: torch.Tensor) -> torch.Tensor:
    return torch.full(z.shape[:2], 1 / z.shape[1])


def written_out(z, weights, *, normalize, detach_anchor):
    """1/2 mean of (z_m - sum_n w_n z_n)^2, term by term."""
    if normalize:
        space = tuple(range(3, z.ndim))
        z = z - z.mean(space, keepdim=True)
        z = z / (z.square().mean(space, keepdim=True) + 1e-5).sqrt()
    source = z.detach() if detach_anchor else z
    anchor = sum(weights[:, m].reshape(-1, *[1] * (z.ndim - 2)) * source[:, m] for m in range(z.shape[1]))
    return 0.5 * (z - anchor[:, None]).square().mean()


@each_grid
@each_count
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("detach_anchor", [True, False])
def test_value_and_gradient_match_the_formula(count, grid, normalize, detach_anchor):
    options = {"normalize": normalize, "detach_anchor": detach_anchor}
    results = []
    for function in (
        lambda z, w: mixture_alignment(z, w, everyone(z), **options),
        lambda z, w: written_out(z, w, **options),
    ):
        z = features(count, grid).requires_grad_()
        raw = torch.linspace(-1, 1, count).requires_grad_()
        loss = function(z, raw.softmax(0).expand(len(z), -1))
        loss.backward()
        results.append((loss, z.grad, raw.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert results[0][2].abs().max() > 0


@each_grid
def test_equal_modalities_are_aligned(grid):
    z = features(1, grid).expand(-1, 4, *[-1] * (len(grid) + 1))
    for normalize in (True, False):
        assert mixture_alignment(z, uniform(z), everyone(z), normalize=normalize) == pytest.approx(0, abs=1e-5)


def test_one_modality_is_the_anchor_when_it_has_all_the_weight():
    z = features(3, (4, 4))
    weights = torch.tensor([0.0, 1.0, 0.0]).expand(2, -1)
    expected = 0.5 * (z - z[:, 1:2]).square().mean()
    torch.testing.assert_close(mixture_alignment(z, weights, everyone(z), normalize=False), expected)


def test_shrinking_all_features_aligns_nothing():
    z = features(3, (6, 6))
    whole = mixture_alignment(z, uniform(z), everyone(z))
    assert mixture_alignment(0.1 * z, uniform(z), everyone(z)) == pytest.approx(float(whole), rel=1e-2)
    assert mixture_alignment(0.1 * z, uniform(z), everyone(z), normalize=False) < 0.02 * mixture_alignment(
        z, uniform(z), everyone(z), normalize=False
    )


@pytest.mark.parametrize("anchor", ["star", "gaussian"])
def test_a_modality_that_a_case_does_not_have_takes_no_part(anchor):
    z = features(3, (4, 5), batch=1)
    present = torch.tensor([[True, False, True]])

    def loss(z, present):
        if anchor == "star":
            return mixture_alignment(z, renormalized_weights(torch.ones(z.shape[1]), present), present)
        return gaussian_alignment(z, torch.zeros(3), torch.full((3,), 0.5), present)

    two = z[:, [0, 2]]
    torch.testing.assert_close(loss(z, present), loss(two, everyone(two)))
    assert loss(z, present) != loss(z, everyone(z))


@each_grid
def test_gaussian_anchor_has_a_minimum(grid):
    z = features(3, grid)
    mean, variance = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.5, 1.0, 4.0])
    shape = (1, 1, 3, *[1] * len(grid))
    squares = (z - mean.reshape(shape)).square()
    expected = 0.5 * (squares / variance.reshape(shape) + variance.reshape(shape).log()).mean()
    torch.testing.assert_close(gaussian_alignment(z, mean, variance, everyone(z)), expected)
    best = squares.mean(tuple(i for i in range(z.ndim) if i != 2))
    lowest = gaussian_alignment(z, mean, best, everyone(z))
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert gaussian_alignment(z, mean, factor * best, everyone(z)) > lowest


def test_mixed_precision_features_are_compared_in_float32():
    z = features(2, (8, 8)) * 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixture_alignment(z, uniform(z), everyone(z), normalize=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mixture_alignment(z, uniform(z), everyone(z), normalize=False))


def test_weights_are_convex_and_renormalised_for_each_sample():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    available = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0, 1 / 3, 0, 2 / 3], [1, 0, 0, 0]])
    torch.testing.assert_close(renormalized_weights(weights, available), expected)


# ---- weights that learn ----------------------------------------------------------------------------------------------

PRESENT = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]], dtype=torch.bool)


def test_own_share_is_fixed_and_the_others_are_renormalised():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = leave_one_out_weights(weights, PRESENT)
    for sample, row in enumerate(PRESENT.tolist()):
        there = [m for m in range(4) if row[m]]
        for m in there:
            others = {k: float(weights[k]) for k in there if k != m}
            expected = torch.zeros(4)
            expected[m] = 1 / len(there)
            for k, weight in others.items():
                expected[k] = (1 - 1 / len(there)) * weight / sum(others.values())
            torch.testing.assert_close(found[sample, m], expected)
            assert found[sample, m].sum() == pytest.approx(1)


@each_grid
@pytest.mark.parametrize("normalize", [True, False])
def test_leave_one_out_is_the_error_of_imputation(grid, normalize):
    """((n - 1) / n)^2 / 2 times the squared error of each modality's prediction from the others, value and gradient."""
    results = []
    for written in (False, True):
        z = features(4, grid, batch=4).requires_grad_()
        raw = torch.linspace(-1, 1, 4).requires_grad_()
        w = raw.softmax(0)
        if written:
            x, space = z, tuple(range(3, z.ndim))
            if normalize:
                x = (z - z.mean(space, keepdim=True)) / (z.var(space, keepdim=True, unbiased=False) + 1e-5).sqrt()
            loss = torch.zeros(())
            for sample, row in enumerate(PRESENT.tolist()):
                there = [m for m in range(4) if row[m]]
                for m in there if len(there) > 1 else []:
                    others = [k for k in there if k != m]
                    mean = sum(w[k] * x[sample, k] for k in others) / sum(w[k] for k in others)
                    error = (x[sample, m] - mean).square().mean()
                    loss = loss + 0.5 * (1 - 1 / len(there)) ** 2 * error / len(there) / 4
        else:
            loss = mixture_alignment(z, leave_one_out_weights(w, PRESENT), PRESENT, normalize=normalize)
        loss.backward()
        results.append((loss, z.grad, raw.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert results[0][2].abs().max() > 1e-3


@each_count
def test_with_equal_weights_the_anchor_is_the_mean(count):
    z = features(count, (5, 4))
    rows = leave_one_out_weights(torch.ones(count), everyone(z))
    torch.testing.assert_close(rows, torch.full_like(rows, 1 / count))
    torch.testing.assert_close(mixture_alignment(z, rows, everyone(z)), mixture_alignment(z, uniform(z), everyone(z)))


def learned(anchor: str, noise: list[float], *, normalize: bool, steps: int = 300) -> list[float]:
    """Weights after Adam on the alignment alone: one signal, and independent noise of these deviations."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(2, 1, 4, 12, 12, 12, generator=generator)
    z = signal + torch.stack([torch.randn(2, 4, 12, 12, 12, generator=generator) * sigma for sigma in noise], 1)
    raw = torch.zeros(len(noise), requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    choose = {"star": renormalized_weights, "leave_one_out": leave_one_out_weights}[anchor]
    for _ in range(steps):
        optimizer.zero_grad()
        mixture_alignment(z, choose(raw.softmax(0), everyone(z)), everyone(z), normalize=normalize).backward()
        optimizer.step()
    return raw.detach().softmax(0).tolist()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [3, 4])
def test_weights_leave_an_outlier_and_keep_the_others(count, normalize):
    *others, outlier = learned("leave_one_out", [*[0.5] * (count - 1), 3.0], normalize=normalize)
    assert outlier < 0.1
    assert min(others) > 0.8 / (count - 1) and max(others) < 1.2 / (count - 1)


def test_weights_of_like_modalities_stay_near_uniform():
    assert learned("leave_one_out", [0.5] * 4, normalize=True) == pytest.approx([0.25] * 4, abs=0.02)


def test_weights_become_the_precisions():
    noise = [0.5, 1.0, 0.5, 1.0]
    precisions = [1 / sigma**2 for sigma in noise]
    expected = [precision / sum(precisions) for precision in precisions]
    assert learned("leave_one_out", noise, normalize=False) == pytest.approx(expected, abs=0.02)


def test_weights_of_one_mixture_for_all_do_not_learn():
    """Why the released form's anchor is in effect the mean."""
    assert learned("star", [0.5, 0.5, 0.5, 3.0], normalize=True) == pytest.approx([0.25] * 4, abs=1e-4)


def test_modality_alignment_bounds_every_subset():
    """sum_m w_m KL(q_m || P) = JS_w({q_m}) + KL(sum_m w_m q_m || P), and P = the mixture makes the sum smallest."""
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(4, 7, generator=generator, dtype=torch.float64).softmax(1)
    anchor = torch.rand(7, generator=generator, dtype=torch.float64).softmax(0)
    weights = torch.rand(4, generator=generator, dtype=torch.float64).softmax(0)

    def divergence(a, b):
        return (a * (a / b).log()).sum(-1)

    for subset in range(1, 16):
        chosen = torch.tensor([bool(subset >> m & 1) for m in range(4)])
        w = weights[chosen] / weights[chosen].sum()
        mixture = w @ q[chosen]
        jensen_shannon = (w * divergence(q[chosen], mixture)).sum()
        aligned = (w * divergence(q[chosen], anchor)).sum()
        torch.testing.assert_close(aligned, jensen_shannon + divergence(mixture, anchor))
        assert divergence(mixture, anchor) <= aligned and jensen_shannon <= aligned
