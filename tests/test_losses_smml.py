"""SMML's constraints against formulas written out, and the cases in which they must stay silent."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_mstkd.methods.smml.losses import relational_consistency, reliable_exchange

GRIDS = {"2d": (6, 5), "3d": (4, 3, 5)}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
each_head = pytest.mark.parametrize("regions", [False, True], ids=["labels", "regions"])
HEADS = 3


def logits(grid, seed, *, batch=2, scale=2.0):
    return scale * torch.randn(batch, HEADS, *grid, generator=torch.Generator().manual_seed(seed))


def labels(grid, regions, *, batch=2, highest=HEADS, seed=9):
    generator = torch.Generator().manual_seed(seed)
    if regions:
        return torch.randint(0, 2, (batch, HEADS, *grid), generator=generator)
    return torch.randint(0, highest, (batch, 1, *grid), generator=generator)


def features(grid, seed, *, batch=2, width=7):
    return torch.randn(batch, width, *grid, generator=torch.Generator().manual_seed(seed))


# ---- pixel level ---------------------------------------------------------------------------------------------------


def exchange_written_out(student, teacher, label, *, regions, tau, balanced):
    """Voxel by voxel."""
    groups: dict[tuple, list[float]] = {}
    for b, *place in torch.cartesian_prod(*(torch.arange(n) for n in (len(student), *student.shape[2:]))).tolist():
        at = (b, slice(None), *place)
        s, t, y = student[at].double(), teacher[at].double(), label[at]
        if regions:
            pairs = [
                (torch.stack([-s[r], s[r]]) / 2, torch.stack([-t[r], t[r]]) / 2, int(y[r]), (r, int(y[r])))
                for r in range(HEADS)
            ]
        else:
            pairs = [(s, t, int(y[0]), (int(y[0]),))]
        for one, other, k, group in pairs:
            if other.log_softmax(0)[k] > one.log_softmax(0)[k]:
                p, q = (other / tau).softmax(0), (one / tau).softmax(0)
                groups.setdefault(group, []).append(float(tau**2 * (p * (p / q).log()).sum()))
    if not balanced:
        every = [value for values in groups.values() for value in values]
        return sum(every) / len(every)
    return sum(sum(values) / len(values) for values in groups.values()) / len(groups)


@each_grid
@each_head
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("balanced", [True, False])
def test_the_exchange_is_the_written_out_formula(grid, regions, tau, balanced):
    student, teacher, label = logits(grid, 0), logits(grid, 1), labels(grid, regions)
    found = reliable_exchange(student, teacher, label, regions=regions, tau=tau, balanced=balanced)
    expected = exchange_written_out(student, teacher, label, regions=regions, tau=tau, balanced=balanced)
    assert float(found) == pytest.approx(expected, rel=1e-4)


@each_grid
@each_head
def test_equal_students_have_nothing_to_say(grid, regions):
    z, label, f = logits(grid, 0), labels(grid, regions), features(grid, 0)
    assert reliable_exchange(z, z.clone(), label, regions=regions) == 0
    assert relational_consistency(f, f.clone(), z, label, regions=regions) == pytest.approx(0, abs=1e-8)


@each_head
def test_a_voxel_is_passed_on_in_one_direction_at_most(regions):
    grid = GRIDS["3d"]
    one, other, label = logits(grid, 0), logits(grid, 1), labels(grid, regions)
    taught = []
    for student, teacher in ((one, other), (other, one)):
        student = student.clone().requires_grad_()
        reliable_exchange(student, teacher, label, regions=regions).backward()
        taught.append(student.grad.abs() > 0 if regions else (student.grad.abs() > 0).any(1, keepdim=True))
    assert taught[0].any() and taught[1].any()
    assert not (taught[0] & taught[1]).any()


@each_head
def test_only_the_student_learns(regions):
    grid = GRIDS["2d"]
    label = labels(grid, regions)
    student, teacher = logits(grid, 0).requires_grad_(), logits(grid, 1).requires_grad_()
    f_student, f_teacher = features(grid, 0).requires_grad_(), features(grid, 1).requires_grad_()
    loss = reliable_exchange(student, teacher, label, regions=regions)
    loss = loss + relational_consistency(f_student, f_teacher, teacher, label, regions=regions)
    loss.backward()
    assert student.grad.abs().max() > 0 and f_student.grad.abs().max() > 0
    assert teacher.grad is None and f_teacher.grad is None


def test_a_peer_that_is_surer_but_wrong_can_be_kept_out():
    label = torch.ones(1, 1, 2, 2)
    # true class 1; the peer is nearer to it, yet says class 0
    student, teacher = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    student[:, 0], teacher[:, 0] = 4.0, 2.0
    assert reliable_exchange(student, teacher, label, regions=False) > 0
    assert reliable_exchange(student, teacher, label, regions=False, require_correct=True) == 0
    teacher[:, 0] = -2.0
    assert reliable_exchange(student, teacher, label, regions=False, require_correct=True) > 0


def test_a_small_class_counts_as_much_as_the_background():
    label = torch.zeros(1, 1, 10, 10)
    label[..., 0, 0] = 1
    teacher = torch.stack([5 * (1 - label[:, 0]), 5 * label[:, 0]], 1)
    student = torch.zeros_like(teacher)
    balanced = reliable_exchange(student, teacher, label, regions=False)
    student[:, :, 0, 0] = teacher[:, :, 0, 0]  # the small class is learnt
    half = reliable_exchange(student, teacher, label, regions=False)
    assert half == pytest.approx(float(balanced), rel=1e-5)  # its class has no selected voxel any more
    student = teacher.clone()
    student[:, :, 0, 0] = 0
    assert reliable_exchange(student, teacher, label, regions=False) == pytest.approx(float(balanced), rel=1e-5)
    assert reliable_exchange(student, teacher, label, regions=False, balanced=False) == pytest.approx(
        float(balanced), rel=1e-5
    )


@each_grid
@each_head
def test_absent_classes_change_nothing(grid, regions):
    label = torch.zeros_like(labels(grid, regions))
    student, f = logits(grid, 0).requires_grad_(), features(grid, 0).requires_grad_()
    loss = reliable_exchange(student, logits(grid, 1), label, regions=regions)
    loss = loss + relational_consistency(f, features(grid, 1), logits(grid, 1), label, regions=regions)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all() and torch.isfinite(f.grad).all()


@each_grid
@each_head
@pytest.mark.parametrize("content", [float("nan"), 1e4])
def test_what_stands_at_ignored_voxels_does_not_matter(grid, regions, content):
    valid = torch.ones(2, 1, *grid, dtype=torch.bool)
    valid[..., :2] = False
    label, f, g = labels(grid, regions), features(grid, 0), features(grid, 1)
    results = []
    for fill in (0.0, content):
        student = torch.where(valid, logits(grid, 0), fill).requires_grad_()
        teacher = torch.where(valid, logits(grid, 1), fill)
        options = {"regions": regions, "valid": valid}
        losses = [
            reliable_exchange(student, teacher, label, **options),
            relational_consistency(f, g, teacher, label, **options),
        ]
        sum(losses).backward()
        results.append([*losses, student.grad])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert (results[0][-1][(~valid).expand_as(results[0][-1])] == 0).all()


@each_head
def test_without_a_valid_voxel_there_is_no_loss(regions):
    grid = GRIDS["2d"]
    nothing = torch.zeros(2, 1, *grid, dtype=torch.bool)
    z, label = logits(grid, 0), labels(grid, regions)
    options = {"regions": regions, "valid": nothing}
    assert reliable_exchange(z, logits(grid, 1), label, **options) == 0
    assert relational_consistency(features(grid, 0), features(grid, 1), z, label, **options) == 0


# ---- feature level -------------------------------------------------------------------------------------------------


def test_relations_are_the_written_out_formula():
    grid = (2, 3)
    f_s, f_t, z, label = features(grid, 0), features(grid, 1), logits(grid, 2), labels(grid, False)
    found = relational_consistency(f_s, f_t, z, label, regions=False)
    p = z.softmax(1).movedim(1, -1).reshape(-1, HEADS).double()
    weight = -(p * p.log()).sum(1)
    weight = weight / weight.sum()
    y = label[:, 0].flatten()
    rows = [x.movedim(1, -1).reshape(-1, x.shape[1]).double() for x in (f_s, f_t)]
    grams, similarities = [], []
    for x in rows:
        n = x / x.norm(dim=1, keepdim=True)
        g = n @ n.T
        grams.append(g / g.norm(dim=1, keepdim=True))
        c = torch.stack([x[y == k].mean(0) for k in y.unique()])
        similarities.append(n @ (c / c.norm(dim=1, keepdim=True)).T)
    total = (weight * (grams[0] - grams[1]).square().sum(1)).sum()
    total = total + (weight * (similarities[0] - similarities[1]).square().mean(1)).sum()
    assert float(found) == pytest.approx(float(total), rel=1e-4)


def test_relations_know_no_scale_and_no_rotation_of_features():
    grid = (3, 4)
    f, g, z, label = features(grid, 0), features(grid, 1), logits(grid, 2), labels(grid, False)
    turn, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(3)))
    turned = torch.einsum("ij,bjxy->bixy", turn, 3 * f)
    one, other = (relational_consistency(x, g, z, label, regions=False) for x in (f, turned))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert relational_consistency(turned, f, z, label, regions=False) == pytest.approx(0, abs=1e-6)


@each_head
def test_large_bottlenecks_are_pooled_and_labels_with_them(regions):
    grid, image = (12, 9, 4), (24, 18, 8)
    label = labels(image, regions)
    found = relational_consistency(
        features(grid, 0).requires_grad_(), features(grid, 1), logits(image, 2), label, regions=regions
    )
    assert torch.isfinite(found) and found > 0


def test_a_peer_without_doubt_gives_no_weight_and_no_nan():
    z = torch.full((1, HEADS, 4, 4), -1e4)
    z[:, 0] = 1e4
    found = relational_consistency(
        features((4, 4), 0, batch=1), features((4, 4), 1, batch=1), z, labels((4, 4), False, batch=1), regions=False
    )
    assert found == 0


def test_mixed_precision_logits_are_compared_in_float32():
    z, other, label = logits((4, 4), 0), logits((4, 4), 1), labels((4, 4), False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reliable_exchange(z.bfloat16(), other.bfloat16(), label, regions=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reliable_exchange(z.bfloat16(), other.bfloat16(), label, regions=False))
