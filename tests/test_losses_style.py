from __future__ import annotations

import math

import pytest
import torch

from nnunetv2_mstkd.losses.style import (
    adversarial_student_term,
    cross_correlation,
    discriminator_loss,
    style_matching,
)


def features(seed: int, *, dimensions: int = 3, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spatial = (4, 5, 3)[:dimensions]
    return [torch.randn(batch, channels, *spatial, generator=generator) for channels in (4, 3, 2)]


def test_correlation_is_the_value_worked_out_by_hand():
    # a: (1, 2, 3, 6) - 3 = (-2, -1, 0, 3), length sqrt(14). b: (1, 1, 1, 5) - 2 = (-1, -1, -1, 3), length sqrt(12);
    # constant: 0. a b = 2 + 1 + 0 + 9 = 12.
    a = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    b = torch.tensor([[[[1.0, 1.0], [1.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]]])
    expected = torch.tensor([[[12 / math.sqrt(14 * 12), 0.0]]])
    torch.testing.assert_close(cross_correlation(a, b), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_correlation_agrees_with_pearsons_coefficient(dimensions):
    a, b, _ = features(0, dimensions=dimensions)
    matrix = cross_correlation(a, b)
    assert matrix.shape == (2, 4, 3)
    expected = torch.corrcoef(torch.cat([a[1].flatten(1), b[1].flatten(1)]))[:4, 4:]
    torch.testing.assert_close(matrix[1], expected, atol=1e-4, rtol=1e-3)


def test_correlation_is_bounded_and_transposes():
    a, b, _ = features(1)
    matrix = cross_correlation(1000 * a + 5, b)
    assert matrix.abs().max() <= 1
    torch.testing.assert_close(matrix, cross_correlation(a, b), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(cross_correlation(b, a), cross_correlation(a, b).transpose(1, 2))
    torch.testing.assert_close(cross_correlation(a, a).diagonal(dim1=1, dim2=2), torch.ones(2, 4), atol=1e-4, rtol=0)


def test_style_matching_is_the_value_worked_out_by_hand():
    # One channel each on four positions; u and v are orthogonal and centred, so correlations are 1, -1 or 0.
    u, v = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    u, v = u.reshape(1, 1, 2, 2), v.reshape(1, 1, 2, 2)
    # Teacher (u, u, u): M = 1, 1, 1. Student (u, u, v): M = 1, 0, 0. rel = 0, 1, 1: mean 2/3.
    assert style_matching((u, u, v), (u, u, u)).item() == pytest.approx(2 / 3, abs=1e-4)
    # Student (u, -u, u): M = -1, 1, -1. rel = 4/2, 0, 4/2: mean 4/3.
    assert style_matching((u, -u, u), (u, u, u)).item() == pytest.approx(4 / 3, abs=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_loss_grows_with_distance_from_zero(dimensions):
    teacher, noise = features(0, dimensions=dimensions), features(1, dimensions=dimensions)
    losses = [
        style_matching([own + part * other for own, other in zip(teacher, noise, strict=True)], teacher).item()
        for part in (0, 0.1, 0.5, 3)
    ]
    assert losses[0] == 0
    assert losses == sorted(losses) and losses[1] > 0


def test_invariant_to_scale_offset_and_permutation():
    teacher = features(0)
    student = [7 * feature.flip(2) - 3 for feature in teacher]
    assert style_matching(student, teacher).item() == pytest.approx(0, abs=1e-6)
    broken = [student[0], teacher[1], student[2]]
    assert style_matching(broken, teacher).item() > 0.1


def test_gradient_reaches_the_student_only():
    student = [feature.requires_grad_() for feature in features(0)]
    teacher = [feature.requires_grad_() for feature in features(1)]
    style_matching(student, teacher).backward()
    assert all(feature.grad.isfinite().all() and feature.grad.abs().max() > 1e-6 for feature in student)
    assert all(feature.grad is None for feature in teacher)


def test_the_loss_is_the_mean_over_samples_in_any_order():
    student, teacher = features(0, batch=3), features(1, batch=3)
    losses = [
        style_matching([feature[[index]] for feature in student], [feature[[index]] for feature in teacher]).item()
        for index in range(3)
    ]
    order = [1, 2, 0]
    permuted = style_matching([feature[order] for feature in student], [feature[order] for feature in teacher]).item()
    assert permuted == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert max(losses) - min(losses) > 1e-3


def test_half_precision_extremes_and_dead_channels_are_finite():
    extreme = torch.tensor([65504.0, -65504.0] * 8, dtype=torch.float16).reshape(1, 1, 4, 4)
    student = [extreme.clone().requires_grad_(), torch.zeros(1, 2, 4, 4, requires_grad=True), extreme.clone()]
    teacher = [extreme, extreme.expand(1, 2, 4, 4), -extreme]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = style_matching(student, teacher)
    loss.backward()
    # rel: dead channel 1, the sign of (enc, t) turned 2, dead channel 1: mean 4/3.
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(4 / 3, abs=1e-4)
    assert student[0].grad.isfinite().all() and student[1].grad.isfinite().all()


@pytest.mark.compiled
def test_style_matching_compiles_as_one_graph():
    compiled = torch.compile(style_matching, backend="aot_eager", fullgraph=True)
    expected = style_matching(features(0), features(1)).item()
    assert compiled(features(0), features(1)).item() == pytest.approx(expected, rel=1e-5)


def test_features_that_do_not_fit_are_refused():
    enc, dec, transformer = features(0)
    with pytest.raises(ValueError, match="three each"):
        style_matching((enc, dec), (enc, dec))
    with pytest.raises(ValueError, match="same B and spatial"):
        style_matching((enc, dec[..., :2], transformer), (enc, dec, transformer))
    with pytest.raises(ValueError, match="equal shapes"):
        style_matching((enc[:, :2], dec, transformer), (enc, dec, transformer))


def test_the_students_term_is_the_value_worked_out_by_hand():
    # Logits log 3 and 0 are probabilities 3/4 and 1/2 of being the teacher.
    logits = torch.tensor([math.log(3), 0.0])
    assert adversarial_student_term(logits).item() == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)


def test_fooling_the_discriminator_costs_less():
    logits = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    costs = [adversarial_student_term(logit).item() for logit in logits]
    assert costs[0] > costs[1] > costs[2] >= 0
    adversarial_student_term(logits).backward()
    # Saturating log(1 - D) would have 0 here; the mean over three logits makes it 1/3.
    assert logits.grad[0].item() == pytest.approx(-1 / 3, abs=1e-4)


def test_the_discriminators_loss_is_the_value_worked_out_by_hand():
    # Real 3/4 recognised: -log 3/4. Fake taken for real with 1/2: -log 1/2. Half each.
    loss = discriminator_loss(torch.tensor([[math.log(3)]]), torch.tensor([[0.0]]))
    assert loss.item() == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)
    assert discriminator_loss(torch.zeros(4), torch.zeros(4)).item() == pytest.approx(math.log(2))


def test_better_discriminator_has_lower_loss():
    high, low = torch.full((2,), 4.0), torch.full((2,), -4.0)
    assert discriminator_loss(high, low) < discriminator_loss(low, high)


def test_adversarial_terms_of_half_precision_extremes_are_finite():
    extreme = torch.tensor([65504.0, -65504.0], dtype=torch.float16)
    assert adversarial_student_term(extreme).item() == pytest.approx(65504 / 2)
    assert discriminator_loss(extreme, extreme).item() == pytest.approx(65504 / 2)
