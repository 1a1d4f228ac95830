from __future__ import annotations

import functools
import math

import pytest
import torch

from nnunetv2_mstkd.losses.advantage import teacher_advantage
from nnunetv2_mstkd.methods.mstkd.losses import logit_discrepancy, standardized_kl

SPATIAL = {2: (5, 6), 3: (3, 4, 5)}
HEADS = [
    pytest.param(True, 3, id="regions"),
    pytest.param(True, 1, id="one-region"),
    pytest.param(False, 4, id="labels"),
    pytest.param(False, 2, id="two-classes"),
]
TERM_NAMES = ["discrepancy", "kl"]


def voxels(*values) -> torch.Tensor:
    """Logits (1, K, V) from one tuple of K logits per voxel."""
    return torch.tensor(values, dtype=torch.float32).T[None]


def mask(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)[None, None]


def draw(seed: int, channels: int, *, dimensions: int = 3, batch: int = 2) -> torch.Tensor:
    return 3 * torch.randn(batch, channels, *SPATIAL[dimensions], generator=torch.Generator().manual_seed(seed))


def draw_mask(seed: int, like: torch.Tensor, share: float) -> torch.Tensor:
    return torch.rand(like[:, :1].shape, generator=torch.Generator().manual_seed(seed)) < share


def term_of(name: str, regions: bool, like: torch.Tensor):
    if name == "discrepancy":
        return functools.partial(logit_discrepancy, regions=regions)
    return functools.partial(standardized_kl, regions=regions, target_foreground=draw_mask(9, like, 0.2))


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def test_discrepancy_of_regions_is_the_value_worked_out_by_hand():
    # Differences 2, -1: 5. Teacher's squares 1, elements 2: 5 / 2. With teacher 0, 3: 4 + 9 over 9.
    student = voxels((2,), (0,))
    assert logit_discrepancy(student, voxels((0,), (1,)), regions=True).item() == pytest.approx(5 / 2)
    assert logit_discrepancy(student, voxels((0,), (3,)), regions=True).item() == pytest.approx(13 / 9)
    # Two heads of one voxel are two elements: 1 + 9 over max(0 + 1, 2).
    assert logit_discrepancy(voxels((1, 4)), voxels((0, 1)), regions=True).item() == pytest.approx(10 / 2)


def test_discrepancy_of_classes_is_the_value_worked_out_by_hand():
    # Centred: student (1, -1), teacher (-2, 2). 9 + 9 over 8 (more than 2 elements).
    assert logit_discrepancy(voxels((2, 0)), voxels((0, 4)), regions=False).item() == pytest.approx(18 / 8)


def test_discrepancy_skips_ignored_voxels():
    student, teacher = voxels((2,), (0,), (100,)), voxels((0,), (1,), (50,))
    assert logit_discrepancy(student, teacher, regions=True, valid=mask(1, 1, 0)).item() == pytest.approx(5 / 2)


def test_logit_offset_cancels_for_classes_only():
    teacher = draw(0, 3)
    foreground = draw_mask(1, teacher, 0.3)
    assert logit_discrepancy(teacher + 5, teacher, regions=False).item() == pytest.approx(0, abs=1e-5)
    assert logit_discrepancy(teacher + 5, teacher, regions=True).item() > 1
    for regions, changes in ((False, False), (True, True)):
        loss = standardized_kl(teacher + 5, teacher, regions=regions, target_foreground=foreground).item()
        assert (loss > 0.01) == changes


def test_kl_of_two_classes_and_one_region_by_hand():
    # Student 1/2, 1/2. Teacher's logit difference 2 log 3 at tau = 2: 3/4, 1/4. One group only, factor tau^2 = 4.
    expected = 4 * kl([3 / 4, 1 / 4], [1 / 2, 1 / 2])
    logit = 2 * math.log(3)
    for sign in (1, -1):
        loss = standardized_kl(voxels((0, 0)), voxels((0, sign * logit)), regions=False, target_foreground=mask(0))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss = standardized_kl(voxels((0,)), voxels((sign * logit,)), regions=True, target_foreground=mask(0))
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_kl_of_three_classes_is_the_value_worked_out_by_hand():
    # Teacher (4, 2, 0): mean 2, population variance 8/3, Z = (2, 0, -2) / (2 sqrt(11/3)). Student uniform.
    z = 1 / math.sqrt(11 / 3)
    expected = 4 * kl(softmax([z, 0, -z]), [1 / 3] * 3)
    loss = standardized_kl(voxels((1, 1, 1)), voxels((4, 2, 0)), regions=False, target_foreground=mask(0))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_kl_of_two_regions_by_hand():
    # l = [0, 3, -3]: mean 0, variance 6, Z = (0, 3, -3) / (tau sqrt 7). Student [0, 0, 3]: mean 1, variance 2, sqrt 3.
    for tau in (1.0, 2.0, 7.0):
        teacher = [value / (tau * math.sqrt(7)) for value in (0, 3, -3)]
        student = [value / (tau * math.sqrt(3)) for value in (-1, -1, 2)]
        expected = tau**2 * kl(softmax(teacher), softmax(student))
        loss = standardized_kl(voxels((0, 3)), voxels((3, -3)), regions=True, target_foreground=mask(0), tau=tau)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_foreground_and_rest_weigh_the_same():
    unit = 4 * kl([3 / 4, 1 / 4], [1 / 2, 1 / 2])
    outside = -2 * math.log(3)
    # The only foreground voxel differs, three others agree: half of its divergence, not a quarter.
    student, teacher = voxels((0,), (-5,), (-5,), (-5,)), voxels((outside,), (-5,), (-5,), (-5,))
    loss = standardized_kl(student, teacher, regions=True, target_foreground=mask(1, 0, 0, 0))
    assert loss.item() == pytest.approx(unit / 2, rel=1e-5)
    # Without foreground in target and teacher there is one group of four.
    loss = standardized_kl(student, teacher, regions=True, target_foreground=mask(0, 0, 0, 0))
    assert loss.item() == pytest.approx(unit / 4, rel=1e-5)
    # All foreground: one group as well.
    loss = standardized_kl(student, teacher, regions=True, target_foreground=mask(1, 1, 1, 1))
    assert loss.item() == pytest.approx(unit / 4, rel=1e-5)


@pytest.mark.parametrize("regions", [True, False])
def test_teachers_foreground_counts_as_foreground(regions):
    inside, background = ((2 * math.log(3),), (-5,)) if regions else ((0, 2 * math.log(3)), (5, 0))
    undecided = (0,) if regions else (0, 0)
    teacher = voxels(inside, background, background, background)
    student = voxels(undecided, background, background, background)
    loss = standardized_kl(student, teacher, regions=regions, target_foreground=mask(0, 0, 0, 0))
    assert loss.item() == pytest.approx(2 * kl([3 / 4, 1 / 4], [1 / 2, 1 / 2]), rel=1e-5)


@pytest.mark.parametrize("regions", [True, False])
def test_two_entries_have_the_gradient_of_a_tempered_softmax(regions):
    # d(tau^2 KL)/dl = tau (q^m - q^f) = 2 (1/2 - sigmoid(8 / 2)) = -0.964 for the teacher's class.
    student = (voxels((0,)) if regions else voxels((0, 0))).requires_grad_()
    teacher = voxels((8,)) if regions else voxels((-4, 4))
    standardized_kl(student, teacher, regions=regions, target_foreground=mask(1)).backward()
    expected = 2 * (0.5 - 1 / (1 + math.exp(-4)))
    assert student.grad[0, -1, 0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_gradient_at_equal_logits_is_finite(regions, channels, offset):
    student = (offset * draw(0, channels)).requires_grad_()
    foreground = draw_mask(1, student, 0.5)
    loss = standardized_kl(student, draw(2, channels), regions=regions, target_foreground=foreground)
    loss.backward()
    assert loss.isfinite()
    # Each of the about 60 voxels of a group has at most tau / 60; the paper's 1e-7 gives 1e6 times as much.
    assert 0 < student.grad.abs().max() < 0.1


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_loss_grows_with_distance_from_zero(regions, channels, name, dimensions):
    teacher = draw(0, channels, dimensions=dimensions)
    noise = draw(1, channels, dimensions=dimensions)
    term = term_of(name, regions, teacher)
    losses = [term(teacher + part * noise, teacher).item() for part in (0, 0.05, 0.3, 2)]
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses == sorted(losses) and losses[1] > 1e-4


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_the_gradient_reaches_the_student_only(regions, channels, name):
    student, teacher = draw(0, channels).requires_grad_(), draw(1, channels).requires_grad_()
    weight = torch.ones_like(student[:, :1]).requires_grad_()
    term_of(name, regions, student)(student, teacher, voxel_weight=weight).backward()
    assert student.grad.isfinite().all() and (student.grad != 0).any(dim=1).all()
    assert teacher.grad is None and weight.grad is None


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_a_step_down_the_gradient_lowers_the_loss(regions, channels, name):
    student, teacher = draw(0, channels).requires_grad_(), draw(1, channels)
    term = term_of(name, regions, student)
    before = term(student, teacher)
    (gradient,) = torch.autograd.grad(before, student)
    after = term((student - 0.1 * gradient / gradient.abs().max()).detach(), teacher)
    assert after < before


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_ignored_voxels_have_no_influence(regions, channels, name, poison):
    student, teacher = draw(0, channels), draw(1, channels)
    valid, weight = draw_mask(2, student, 0.7), torch.rand(student[:, :1].shape)
    results = []
    for value in (0.0, poison):
        own = torch.where(valid, student, value).requires_grad_()
        loss = term_of(name, regions, student)(
            own,
            torch.where(valid, teacher, value),
            valid=valid,
            voxel_weight=torch.where(valid, weight, value),
        )
        loss.backward()
        results.append((loss.detach(), own.grad))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0] > 0
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][1].masked_select(~valid) == 0).all()


@pytest.mark.parametrize("regions", [True, False])
def test_the_foreground_flag_of_ignored_voxels_has_no_influence(regions):
    student, teacher = draw(0, 3), draw(1, 3)
    valid, foreground = draw_mask(2, student, 0.5), draw_mask(3, student, 0.3)
    losses = [
        standardized_kl(student, teacher, regions=regions, target_foreground=flags, valid=valid).item()
        for flags in (foreground & valid, foreground | ~valid)
    ]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_cutting_the_ignored_voxels_off_gives_the_same_loss(regions, channels, name):
    student, teacher = draw(0, channels), draw(1, channels)
    foreground = draw_mask(9, student, 0.2)
    valid = torch.zeros_like(foreground)
    valid[..., :3] = True
    options = {"regions": regions, **({"target_foreground": foreground} if name == "kl" else {})}
    term = standardized_kl if name == "kl" else logit_discrepancy
    masked = term(student, teacher, valid=valid, **options).item()
    options.update({"target_foreground": foreground[..., :3]} if name == "kl" else {})
    assert term(student[..., :3], teacher[..., :3], **options).item() == pytest.approx(masked, rel=1e-5)


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_without_a_valid_voxel_loss_and_gradient_are_zero(regions, channels, name):
    student = torch.full_like(draw(0, channels), float("nan")).requires_grad_()
    valid = torch.zeros_like(student[:, :1], dtype=torch.bool)
    loss = term_of(name, regions, student)(student, student.detach(), valid=valid)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_the_order_of_samples_does_not_matter(regions, channels, name):
    student, teacher = draw(0, channels, batch=3), draw(1, channels, batch=3)
    foreground, order = draw_mask(2, student, 0.2), [2, 0, 1]
    if name == "kl":
        losses = [
            standardized_kl(student[index], teacher[index], regions=regions, target_foreground=foreground[index]).item()
            for index in ([0, 1, 2], order)
        ]
    else:
        losses = [
            logit_discrepancy(student[index], teacher[index], regions=regions).item() for index in ([0, 1, 2], order)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_the_voxel_weight_multiplies_each_voxel(regions, channels, name):
    student, teacher = draw(0, channels), draw(1, channels)
    term = term_of(name, regions, student)
    weight = 2 * torch.rand(student[:, :1].shape, generator=torch.Generator().manual_seed(4))
    plain = term(student, teacher).item()
    assert term(student, teacher, voxel_weight=torch.ones_like(weight)).item() == pytest.approx(plain, rel=1e-6)
    assert term(student, teacher, voxel_weight=0.25 * torch.ones_like(weight)).item() == pytest.approx(
        plain / 4, rel=1e-5
    )
    assert term(student, teacher, voxel_weight=torch.zeros_like(weight)).item() == 0
    rest = term(student, teacher, voxel_weight=2 - weight).item()
    assert term(student, teacher, voxel_weight=weight).item() + rest == pytest.approx(2 * plain, rel=1e-5)


@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_half_precision_extremes_are_finite_in_float32(regions, channels, name):
    extreme = torch.where(draw(0, channels) > 0, 65504.0, -65504.0).half()
    student, teacher = extreme.clone().requires_grad_(), extreme.roll(1, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term_of(name, regions, extreme)(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 0
    assert student.grad.isfinite().all()


@pytest.mark.compiled
@pytest.mark.parametrize("name", TERM_NAMES)
@pytest.mark.parametrize(("regions", "channels"), HEADS)
def test_the_terms_compile_as_one_graph(regions, channels, name):
    student, teacher = draw(0, channels), draw(1, channels)
    term = term_of(name, regions, student)
    valid, weight = draw_mask(2, student, 0.7), torch.rand(student[:, :1].shape)

    def masked(student, teacher):
        return term(student, teacher, valid=valid, voxel_weight=weight)

    torch._dynamo.reset()
    compiled = torch.compile(masked, backend="aot_eager", fullgraph=True)
    assert compiled(student, teacher).item() == pytest.approx(masked(student, teacher).item(), rel=1e-5)


def test_the_teachers_advantage_in_regions_is_worked_out_by_hand():
    # Voxel by voxel, targets (1, 0): teacher better in both; student better in both; equal;
    # teacher right in one (log(1 + e^-4) = 0.02) and wrong in the other (log(1 + e^1) = 1.31), student 2 log 2 = 1.39.
    teacher = voxels((3, -3), (-3, 3), (1, 1), (4, 1))
    student = voxels((1, -1), (3, -3), (1, 1), (0, 0))
    target = voxels((1, 0), (1, 0), (1, 0), (1, 0))
    advantage = teacher_advantage(student, teacher, target, regions=True)
    assert torch.equal(advantage, torch.tensor([[[1.0, 0.0, 0.0, 1.0]]]))
    # 1.39 of the student against 0.02 + log(1 + e^2) = 2.14 of a surer teacher.
    assert teacher_advantage(voxels((0, 0)), voxels((4, 2)), voxels((1, 0)), regions=True).item() == 0


def test_the_teachers_advantage_in_classes_is_worked_out_by_hand():
    teacher, student = voxels((0, 2, 0), (0, 2, 0), (0, 0, 0)), voxels((0, 1, 0), (0, 1, 0), (0, 0, 0))
    target = torch.tensor([[[1, 2, 0]]])
    for dtype in (torch.int64, torch.int16, torch.float32):
        advantage = teacher_advantage(student, teacher, target.to(dtype), regions=False)
        assert torch.equal(advantage, torch.tensor([[[1.0, 0.0, 0.0]]]))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("regions", [True, False])
def test_advantage_skips_ignored_voxels(regions, dimensions):
    student, teacher = draw(0, 3, dimensions=dimensions).requires_grad_(), draw(1, 3, dimensions=dimensions)
    valid = draw_mask(2, student, 0.6)
    target = (teacher > 0).float() if regions else teacher.argmax(1, keepdim=True)
    expected = teacher_advantage(student, teacher, target, regions=regions)
    poisoned = teacher_advantage(
        torch.where(valid, student, float("nan")),
        torch.where(valid, teacher, float("inf")),
        torch.where(valid, target, -1 if not regions else float("nan")),
        regions=regions,
        valid=valid,
    )
    assert expected.shape == valid.shape and not expected.requires_grad and poisoned.dtype == torch.float32
    assert 0 < expected.mean() < 1
    assert torch.equal(poisoned, expected * valid)


@pytest.mark.compiled
def test_the_teachers_advantage_compiles_as_one_graph():
    student, teacher = draw(0, 3), draw(1, 3)
    compiled = torch.compile(teacher_advantage, backend="aot_eager", fullgraph=True)
    expected = teacher_advantage(student, teacher, (teacher > 0).float(), regions=True)
    assert torch.equal(compiled(student, teacher, (teacher > 0).float(), regions=True), expected)


def test_advantage_never_pulls_a_better_student():
    teacher, target = draw(1, 3), (draw(2, 3) > 0).float()
    student = draw(0, 3).requires_grad_()
    advantage = teacher_advantage(student, teacher, target, regions=True)
    standardized_kl(
        student, teacher, regions=True, target_foreground=target.amax(1, keepdim=True) > 0, voxel_weight=advantage
    ).backward()
    pulled = (student.grad != 0).any(1, keepdim=True)
    assert torch.equal(pulled, advantage == 1)


def test_arguments_that_do_not_fit_are_refused():
    logits, foreground = draw(0, 3), draw_mask(1, draw(0, 3), 0.5)
    with pytest.raises(ValueError, match="equal shapes"):
        logit_discrepancy(logits, logits[:, :2], regions=True)
    with pytest.raises(ValueError, match="regions=True"):
        logit_discrepancy(logits[:, :1], logits[:, :1], regions=False)
    with pytest.raises(ValueError, match=r"valid has .*torch\.bool"):
        logit_discrepancy(logits, logits, regions=True, valid=foreground.float())
    with pytest.raises(ValueError, match="voxel_weight has shape"):
        logit_discrepancy(logits, logits, regions=True, voxel_weight=torch.ones(2, 3, *SPATIAL[3]))
    with pytest.raises(ValueError, match="target_foreground has shape"):
        standardized_kl(logits, logits, regions=True, target_foreground=foreground[:, 0])
    with pytest.raises(ValueError, match="tau = 0"):
        standardized_kl(logits, logits, regions=True, target_foreground=foreground, tau=0)
    with pytest.raises(ValueError, match="target has shape"):
        teacher_advantage(logits, logits, logits[:, :1], regions=True)
    with pytest.raises(ValueError, match="target has shape"):
        teacher_advantage(logits, logits, logits, regions=False)
