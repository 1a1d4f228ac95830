"""MST-KDNet's published terms against the equations, written a second time in NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_losses_mstkd_logits import HEADS, draw, draw_mask

from nnunetv2_mstkd.methods.mstkd import published
from nnunetv2_mstkd.methods.mstkd.losses import standardized_kl as relative_kl


def attention(seed: int, layers: int = 3, tokens: int = 9, spread: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = [spread * torch.randn(2, 4, tokens, tokens, generator=generator) for _ in range(layers)]
    return [each.softmax(-1) for each in scores]


def test_extreme_values_are_equations_2_to_4():
    student, teacher = attention(1), attention(2)
    found = published.extreme_values(student, teacher).item()
    expected = 0.0
    s, t = (np.stack([each.numpy().astype(np.float64) for each in maps]) for maps in (student, teacher))
    for extreme in (np.max, np.min, np.mean):
        for layer in range(3):
            ev_m, ev_f = extreme(s, axis=0) * s[layer], extreme(t, axis=0) * t[layer]
            expected += ((ev_f - ev_m) ** 2).mean()
    assert found == pytest.approx(expected, rel=1e-4)


def test_extreme_values_fall_with_the_fourth_power_of_the_tokens():
    few, many = (
        published.extreme_values(attention(1, tokens=n, spread=0.1), attention(2, tokens=n, spread=0.1)).item()
        for n in (16, 64)
    )
    assert few / many == pytest.approx(4**4, rel=0.2)


def test_maps_and_content_are_plain_squared_errors():
    student = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8)]
    teacher = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8)]
    errors = [((s - t).numpy() ** 2).mean() for s, t in zip(student, teacher, strict=True)]
    assert published.multiscale_maps(student, teacher).item() == pytest.approx(sum(errors), rel=1e-5)
    assert published.content(student[0], teacher[0]).item() == pytest.approx(errors[0], rel=1e-5)
    with pytest.raises(ValueError, match="expected equal shapes"):
        published.multiscale_maps(student, teacher[::-1])


@pytest.mark.parametrize(("regions", "heads"), HEADS)
def test_probability_error_is_equation_5_on_probabilities(regions, heads):
    student, teacher = draw(1, heads), draw(2, heads)
    valid = draw_mask(3, student, 0.7)
    found = published.probability_error(student, teacher, regions=regions, valid=valid).item()

    def outputs(logits):
        z = logits.numpy().astype(np.float64)
        return 1 / (1 + np.exp(-z)) if regions else np.exp(z) / np.exp(z).sum(1, keepdims=True)

    expected = 0.0
    for head in range(0 if regions else 1, heads):
        squared = (outputs(student)[:, head] - outputs(teacher)[:, head]) ** 2
        expected += squared[valid[:, 0].numpy()].mean()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("regions", "heads"), HEADS)
@pytest.mark.parametrize("tau", [1.0, 7.0])
def test_kl_is_equations_6_to_8(regions, heads, tau):
    student, teacher = draw(1, heads), draw(2, heads)
    valid = draw_mask(3, student, 0.7)
    found = published.standardized_kl(student, teacher, regions=regions, valid=valid, tau=tau).item()

    def standardized(logits, place):
        z = logits[(place[0], slice(None), *place[1:])].numpy().astype(np.float64)
        z = np.concatenate([[0.0], z]) if regions else z
        q = np.exp((z - z.mean()) / ((z.std(ddof=1) + 1e-7) * tau))
        return q / q.sum()

    divergences = []
    for place in zip(*valid[:, 0].numpy().nonzero(), strict=True):
        q_f, q_m = standardized(teacher, place), standardized(student, place)
        divergences.append((q_f * np.log(q_f / q_m)).sum() / len(q_f))
    assert found == pytest.approx(tau**2 * np.mean(divergences), rel=1e-3, abs=1e-6)


def test_two_classes_have_no_gradient_in_the_published_kl():
    student = draw(1, 2)
    apart = (student[:, :1] - student[:, 1:]).abs() > 0.5
    student.requires_grad_()
    published.standardized_kl(student, draw(2, 2), regions=False).backward()
    assert student.grad[apart.expand_as(student)].abs().max() < 1e-7


def test_equal_logits_have_a_finite_gradient():
    student = torch.zeros(1, 3, 4, 4, requires_grad=True)
    published.standardized_kl(student, draw(2, 3, dimensions=2)[:1, :, :4, :4], regions=True).backward()
    assert torch.isfinite(student.grad).all()


def test_style_is_equations_10_and_11():
    student = [torch.randn(2, n, 4, 5) for n in (3, 4, 6)]
    teacher = [torch.randn(2, n, 4, 5) for n in (3, 4, 6)]
    expected = 0.0
    for sample in range(2):
        for i, j in itertools.combinations(range(3), 2):  # enc dec, enc t, dec t
            m_f, m_m = (g[i][sample].numpy().reshape(len(g[i][sample]), -1) for g in (teacher, student))
            n_f, n_m = (g[j][sample].numpy().reshape(len(g[j][sample]), -1) for g in (teacher, student))
            difference = m_f @ n_f.T - m_m @ n_m.T
            expected += (difference**2).sum() / (4 * difference.size) / 2
    assert published.style(student, teacher).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("regions", "heads"), HEADS)
def test_dice_is_the_released_form_of_equation_12(regions, heads):
    logits = draw(1, heads)
    valid = draw_mask(3, logits, 0.7)
    generator = torch.Generator().manual_seed(5)
    if regions:
        label = torch.rand(logits.shape, generator=generator) < 0.3
        masks = label.numpy()
    else:
        label = torch.randint(0, heads, logits[:, :1].shape, generator=generator)
        masks = np.concatenate([(label == head).numpy() for head in range(heads)], 1)
    z = logits.numpy().astype(np.float64)
    p = 1 / (1 + np.exp(-z)) if regions else np.exp(z) / np.exp(z).sum(1, keepdims=True)
    inside, expected = valid[:, 0].numpy(), 0.0
    for head in range(heads):
        a, b = p[:, head][inside], masks[:, head][inside].astype(np.float64)
        expected += 1 - 2 * (a * b).sum() / ((a**2).sum() + (b**2).sum() + 1e-7)
    found = published.dice(logits, label.float() if regions else label, regions=regions, valid=valid)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_reaches_both_networks():
    maps = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
    published.content(*maps).backward()
    assert torch.allclose(maps[0].grad, -maps[1].grad) and maps[0].grad.abs().max() > 0


def test_invalid_voxels_do_not_matter():
    student, teacher = draw(1, 3), draw(2, 3)
    valid = draw_mask(3, student, 0.5)
    bad = [torch.where(valid, each, float("nan")) for each in (student, teacher)]
    for term in (published.probability_error, published.standardized_kl):
        assert torch.equal(term(*bad, regions=True, valid=valid), term(student, teacher, regions=True, valid=valid))
        assert term(student, teacher, regions=True, valid=torch.zeros_like(valid)) == 0
    own, label = bad[0].requires_grad_(), (teacher > 0).long()
    loss = published.dice(own, label, regions=True, valid=valid)
    loss.backward()
    assert torch.equal(loss, published.dice(student, label, regions=True, valid=valid))
    assert own.grad.isfinite().all() and (own.grad.masked_select(~valid) == 0).all()


# ---- separate regions ----------------------------------------------------------------------------------------------


def test_separate_regions_are_bernoulli_divergences():
    student, teacher = draw(1, 3), draw(2, 3)
    options = {"regions": True, "target_foreground": torch.ones_like(student[:, :1], dtype=torch.bool), "tau": 2.0}
    found = relative_kl(student, teacher, separate=True, **options).item()
    p, q = (1 / (1 + np.exp(-each.numpy().astype(np.float64) / 2)) for each in (teacher, student))
    expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1).mean()
    assert found == pytest.approx(expected, rel=1e-4)


def test_only_coupled_regions_push_down_what_is_right():
    teacher = torch.tensor([6.0, 6.0, 6.0]).reshape(1, 3, 1, 1)
    gradients = {}
    for separate in (False, True):
        student = torch.tensor([6.0, 6.0, 3.0]).reshape(1, 3, 1, 1).requires_grad_()
        foreground = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        relative_kl(student, teacher, regions=True, target_foreground=foreground, separate=separate).backward()
        gradients[separate] = student.grad.flatten().tolist()
    assert gradients[False][0] > 0.01 and gradients[False][2] < 0
    assert gradients[True][:2] == pytest.approx([0, 0], abs=1e-6) and gradients[True][2] < 0
