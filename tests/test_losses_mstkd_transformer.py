from __future__ import annotations

import pytest
import torch

from nnunetv2_mstkd.methods.mstkd.losses import extreme_value_distillation, multiscale_map_matching


def attention_maps(seed: int, *, layers: int = 3, batch: int = 2, heads: int = 2, tokens: int = 8, spread: float = 1.0):
    scores = torch.randn(layers, batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return list((spread * scores).softmax(-1))


def feature_maps(seed: int, *, dimensions: int = 3, batch: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, *(edge,) * dimensions, generator=generator) for channels, edge in ((3, 3), (2, 6))
    ]


def paper_extreme_values(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    products = []
    for own in maps:
        for reduce in (torch.max, torch.min):
            extreme = maps[0]
            for other in maps[1:]:
                extreme = reduce(extreme, other)
            products.append(extreme * own)
        products.append(sum(maps) / len(maps) * own)
    return products


def test_evd_of_two_tokens_by_hand():
    # One layer: max, min and mean are A itself, so every EV is A^2, and three equal EVs leave the ratio unchanged.
    # Student rows (1, 0): A^2 = (1, 0). Teacher rows (1/2, 1/2): A^2 = (1/4, 1/4).
    # Difference 9/16 + 1/16 = 10/16, size 1 + 2/16 = 18/16: 10/18.
    student = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    teacher = torch.full((1, 1, 2, 2), 0.5)
    assert extreme_value_distillation([student], [teacher]).item() == pytest.approx(10 / 18, abs=1e-5)


def test_evd_of_two_layers_by_hand():
    # Student layers (1, 0) and (0, 1) in each row: max (1, 1), min (0, 0), mean (1/2, 1/2).
    #   layer 1: EV (1, 0), (0, 0), (1/2, 0); layer 2: EV (0, 1), (0, 0), (0, 1/2). Squares: 2 * (1 + 1/4) = 5/2.
    # Teacher layers both (1/2, 1/2): every EV (1/4, 1/4), six of them. Squares: 12/16 = 3/4.
    # Products: sum of the student's EVs / 4 = 3 / 4. Difference 5/2 + 3/4 - 2 * 3/4 = 7/4, size 13/4: 7/13.
    student = [torch.tensor([[[[1.0, 0.0]] * 2]]), torch.tensor([[[[0.0, 1.0]] * 2]])]
    teacher = [torch.full((1, 1, 2, 2), 0.5)] * 2
    assert extreme_value_distillation(student, teacher).item() == pytest.approx(7 / 13, abs=1e-5)


def test_evd_matches_the_papers_formula():
    student, teacher = attention_maps(0, batch=1), attention_maps(1, batch=1)
    own, other = torch.stack(paper_extreme_values(student)), torch.stack(paper_extreme_values(teacher))
    expected = (own - other).square().sum() / (own.square().sum() + other.square().sum())
    assert extreme_value_distillation(student, teacher).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("tokens", [8, 64, 1024])
@pytest.mark.parametrize("spread", [0.02, 1.0, 10.0])
def test_evd_lies_between_0_and_1(tokens, spread):
    sizes = {"layers": 2, "batch": 1, "heads": 1, "tokens": tokens, "spread": spread}
    loss = extreme_value_distillation(attention_maps(0, **sizes), attention_maps(1, **sizes)).item()
    assert 0 < loss <= 1
    if spread == 10.0:
        assert loss > 0.8


def test_the_number_of_tokens_cancels():
    # In one head of 1024 tokens the squared products add up to some 1e-6, as much as what guards the division: the
    # loss is still the plain ratio. One layer has the three equal extreme values A^2.
    sizes = {"layers": 1, "batch": 1, "heads": 1, "tokens": 1024, "spread": 0.5}
    student, teacher = attention_maps(0, **sizes), attention_maps(1, **sizes)
    own, other = student[0].double().square(), teacher[0].double().square()
    expected = (own - other).square().sum() / (own.square().sum() + other.square().sum())
    assert extreme_value_distillation(student, teacher).item() == pytest.approx(expected.item(), rel=1e-3)
    # Repeating every key k times divides the rows by k and repeats every product: the same ratio.
    student, teacher = attention_maps(0, tokens=4), attention_maps(1, tokens=4)
    repeated = [[attention.repeat(1, 1, 16, 16) / 16 for attention in maps] for maps in (student, teacher)]
    expected = extreme_value_distillation(student, teacher).item()
    assert extreme_value_distillation(*repeated).item() == pytest.approx(expected, rel=1e-4)


TERMS = [
    pytest.param(extreme_value_distillation, attention_maps, id="attention"),
    pytest.param(multiscale_map_matching, feature_maps, id="maps"),
]


@pytest.mark.parametrize(("term", "draw"), TERMS)
def test_equal_networks_have_no_loss(term, draw):
    assert term(draw(0), draw(0)).item() == 0


@pytest.mark.parametrize(("term", "draw"), TERMS)
def test_a_closer_student_has_a_lower_loss(term, draw):
    teacher, noise = draw(0), draw(1)
    blends = [
        [part * other + (1 - part) * own for own, other in zip(teacher, noise, strict=True)] for part in (0.1, 0.4, 0.9)
    ]
    losses = [term(student, teacher).item() for student in blends]
    assert 0 < losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize(("term", "draw"), TERMS)
def test_gradient_reaches_student_maps_only(term, draw):
    student = [tensor.requires_grad_() for tensor in draw(0)]
    teacher = [tensor.requires_grad_() for tensor in draw(1)]
    term(student, teacher).backward()
    assert all(tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0 for tensor in student)
    assert all(tensor.grad is None for tensor in teacher)


@pytest.mark.parametrize(("term", "draw"), TERMS)
def test_the_loss_is_the_mean_over_samples_in_any_order(term, draw):
    student, teacher = draw(0, batch=3), draw(1, batch=3)
    losses = [
        term([tensor[[index]] for tensor in student], [tensor[[index]] for tensor in teacher]).item()
        for index in range(3)
    ]
    order = [2, 0, 1]
    permuted = term([tensor[order] for tensor in student], [tensor[order] for tensor in teacher]).item()
    assert permuted == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert max(losses) - min(losses) > 1e-4


@pytest.mark.parametrize(("term", "draw"), TERMS)
def test_half_precision_under_autocast_gives_the_float32_value(term, draw):
    student, teacher = ([tensor.half() for tensor in draw(seed)] for seed in (0, 1))
    expected = term([tensor.float() for tensor in student], [tensor.float() for tensor in teacher])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()


@pytest.mark.compiled
@pytest.mark.parametrize(("term", "draw"), TERMS)
def test_the_term_compiles_as_one_graph(term, draw):
    compiled = torch.compile(term, backend="aot_eager", fullgraph=True)
    assert compiled(draw(0), draw(1)).item() == pytest.approx(term(draw(0), draw(1)).item(), rel=1e-5)


@pytest.mark.parametrize(("term", "draw"), TERMS)
def test_lists_and_shapes_that_do_not_fit_are_refused(term, draw):
    maps = draw(0)
    with pytest.raises(ValueError, match="equal numbers"):
        term(maps, maps[:-1])
    with pytest.raises(ValueError, match="at least 1"):
        term([], [])
    with pytest.raises(ValueError, match="map 1 has shape"):
        term(maps[:2], [maps[0], maps[1][:, :1]])


def test_one_hot_attention_in_half_precision_is_finite():
    student = [torch.eye(64, dtype=torch.float16).expand(1, 2, 64, 64).clone().requires_grad_()]
    loss = extreme_value_distillation(student, [torch.eye(64, dtype=torch.float16).flip(0).expand(1, 2, 64, 64)])
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert student[0].grad.isfinite().all()


def test_map_matching_of_one_level_by_hand():
    # Standardised (up to 1e-5): student +1 in the first half and -1 in the second, teacher alternating +1, -1.
    # Half of the 8 positions agree (difference 0), half differ by 2: 4 * 4 = 16 over 8 + 8 = 1.
    student = torch.tensor([1.0] * 4 + [-1.0] * 4).reshape(1, 1, 2, 4) * 3 + 5
    teacher = torch.tensor([1.0, -1.0] * 4).reshape(1, 1, 2, 4)
    assert multiscale_map_matching([student], [teacher]).item() == pytest.approx(1.0, abs=1e-4)
    # A second level that agrees halves the mean.
    assert multiscale_map_matching([student, teacher], [teacher, teacher]).item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_scale_and_offset_of_a_channel_do_not_count(dimensions):
    teacher = feature_maps(0, dimensions=dimensions)
    student = [3 * tensor + 100 for tensor in teacher]
    assert multiscale_map_matching(student, teacher).item() == pytest.approx(0, abs=1e-6)


def test_levels_of_fewer_than_eight_positions_are_left_out():
    small, other_small = torch.randn(2, 1, 4, 7, 1, generator=torch.Generator().manual_seed(0)).unbind(0)
    student, teacher = feature_maps(0), feature_maps(1)
    expected = multiscale_map_matching(student, teacher).item()
    assert multiscale_map_matching([small, *student], [other_small, *teacher]).item() == expected
    nothing = multiscale_map_matching([small], [other_small])
    assert nothing.item() == 0 and nothing.dtype == torch.float32
    eight = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    assert multiscale_map_matching([eight], [-eight]).item() == pytest.approx(2, abs=1e-3)


def test_half_precision_extremes_and_constant_maps_are_finite():
    extreme = torch.tensor([65504.0, -65504.0] * 8, dtype=torch.float16).reshape(1, 1, 4, 4).requires_grad_()
    constant = torch.zeros(1, 1, 4, 4, requires_grad=True)
    for student in (extreme, constant):
        loss = multiscale_map_matching([student], [torch.full((1, 1, 4, 4), -65504.0, dtype=torch.float16)])
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()
