"""AdaMM's terms: consistency of outputs, lesion presence and the reliability weight."""

from __future__ import annotations

import math

import pytest
import torch

from nnunetv2_mstkd.methods.adamm.losses import (
    Presence,
    presence_gap,
    presence_loss,
    presence_target,
    probability_consistency,
    reliability_dice,
)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- consistency ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 3)], ids=["2d", "3d"])
def test_equal_outputs_are_consistent_and_others_are_not(shape, regions):
    student, teacher = logits(*shape), logits(*shape, seed=1)
    assert probability_consistency(student, student, regions=regions) == 0
    assert 0 < probability_consistency(student, teacher, regions=regions) < 1


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_ignored_voxels_have_no_influence_on_values_and_gradients(regions, poison):
    student, teacher, weight = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1), logits(2, 1, 4, 5, seed=2).square()
    valid = logits(2, 1, 4, 5, seed=3) > 0
    label = (logits(2, 3 if regions else 1, 4, 5, seed=4) > 0).long()
    found = []
    for value in (0.0, poison):
        own = torch.where(valid, student, value).requires_grad_()
        other, weights = torch.where(valid, teacher, value), torch.where(valid, weight, value)
        loss = probability_consistency(own, other, regions=regions, valid=valid, voxel_weight=weights)
        gap = torch.ones(2, 3 if regions else 2)
        loss = loss + reliability_dice(own, label, gap, regions=regions, batch_dice=False, valid=valid)
        loss.backward()
        found.append((loss.detach(), own.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_consistency_by_hand():
    student, teacher = torch.zeros(1, 1, 2, 1), torch.full((1, 1, 2, 1), math.log(3.0))
    # p = 1/2 and 3/4 at both voxels
    wanted = 2 * (1 / 4) ** 2 / (2 * (1 / 4 + 9 / 16) + 2e-3)
    assert probability_consistency(student, teacher, regions=True).item() == pytest.approx(wanted, rel=1e-5)


def test_consistency_ignores_offset_and_background():
    student, teacher = logits(2, 3, 6, 6), logits(2, 3, 6, 6, seed=1)
    wanted = probability_consistency(student, teacher, regions=False)
    torch.testing.assert_close(probability_consistency(student + 5, teacher - 3, regions=False), wanted)


def test_a_lesion_counts_alike_in_a_patch_of_any_size():
    def value(edge):
        student, teacher = torch.full((1, 1, edge, edge), -20.0), torch.full((1, 1, edge, edge), -20.0)
        student[..., :4, :4] = 1.0
        teacher[..., :4, :4] = 20.0
        return probability_consistency(student, teacher, regions=True).item()

    assert value(16) == pytest.approx(value(32), rel=0.1)


def test_agreed_background_with_a_little_noise_is_not_amplified():
    student, teacher = logits(1, 2, 8, 8) * 0.5 - 9, logits(1, 2, 8, 8, seed=1) * 0.5 - 9
    assert probability_consistency(student, teacher, regions=True) < 1e-3


def test_ignored_voxels_and_the_weight_of_voxels():
    student, teacher = logits(2, 2, 6, 6), logits(2, 2, 6, 6, seed=1)
    valid = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    valid[..., :3] = False
    wanted = probability_consistency(student[..., 3:], teacher[..., 3:], regions=True)
    torch.testing.assert_close(probability_consistency(student, teacher, regions=True, valid=valid), wanted)
    assert probability_consistency(student, teacher, regions=True, valid=~(valid | ~valid)) == 0
    weight = torch.full((2, 1, 6, 6), 0.25)
    torch.testing.assert_close(
        probability_consistency(student, teacher, regions=True, voxel_weight=weight),
        0.25 * probability_consistency(student, teacher, regions=True),
    )


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(1, 2, 4, 4).requires_grad_(), logits(1, 2, 4, 4, seed=1).requires_grad_()
    probability_consistency(student, teacher, regions=True).backward()
    assert teacher.grad is None and student.grad.any()


def test_logits_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\).*\(1, 3, 4, 4\)"):
        probability_consistency(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4), regions=True)


# ---- presence ------------------------------------------------------------------------------------------------------


def test_what_a_patch_contains_by_labels_and_by_regions():
    label = torch.zeros(3, 1, 4, 4, dtype=torch.int16)
    label[0, 0, 0, 0], label[1, 0, 1, 1] = 2, 1
    label[1, 0, 3, 3] = 2
    found = presence_target(label, 2, regions=False)
    assert found.target.tolist() == [[0, 1], [1, 1], [0, 0]] and found.known.all()
    regions = torch.cat([label > 0, label == 1], 1).float()
    assert presence_target(regions, 2, regions=True).target.tolist() == [[1, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("regions", [True, False])
def test_fully_ignored_patch_is_unknown(regions):
    label = torch.ones(2, 1, 4, 4)
    valid = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    valid[0, 0, 0, 0] = True
    label[0, 0, 0, 0] = 0
    found = presence_target(label, 1, regions=regions, valid=valid)
    assert found.target.tolist() == [[0], [0]]
    assert found.known.tolist() == [True, False]
    prediction = torch.tensor([[2.0], [50.0]], requires_grad=True)
    loss = presence_loss(prediction, found)
    assert loss.item() == pytest.approx(math.log1p(math.exp(2.0)))
    loss.backward()
    assert prediction.grad[0] != 0 and prediction.grad[1] == 0
    gap = presence_gap(prediction, found)
    assert gap[1] == 0 and gap[0].item() == pytest.approx(1 / (1 + math.exp(-2.0)))


def test_nothing_known_costs_nothing():
    nothing = Presence(torch.zeros(2, 1), torch.zeros(2, dtype=torch.bool))
    assert presence_loss(torch.full((2, 1), 30.0), nothing) == 0


def test_a_better_presence_has_a_lower_loss_and_a_smaller_gap():
    truth = Presence(torch.tensor([[1.0, 0.0]]), torch.tensor([True]))
    good, bad = torch.tensor([[3.0, -3.0]]), torch.tensor([[-1.0, 1.0]])
    assert presence_loss(good, truth) < presence_loss(bad, truth)
    assert (presence_gap(good, truth) < presence_gap(bad, truth)).all()
    assert not presence_gap(good.requires_grad_(), truth).requires_grad


# ---- reliability ---------------------------------------------------------------------------------------------------


def sample(regions: bool) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits(2, 3, 6, 6)
    label = torch.randint(0, 3, (2, 1, 6, 6), generator=torch.Generator().manual_seed(3))
    return scores, torch.cat([label == number for number in range(3)], 1).float() if regions else label


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("regions", [True, False])
def test_reliability_is_gap_times_dice_loss(regions, batch_dice):
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.utilities.helpers import softmax_helper_dim1

    scores, label = sample(regions)
    heads = 3 if regions else 2
    ours = reliability_dice(scores, label, torch.full((2, heads), 0.5), regions=regions, batch_dice=batch_dice)
    theirs = MemoryEfficientSoftDiceLoss(
        torch.sigmoid if regions else softmax_helper_dim1, batch_dice=batch_dice, do_bg=regions, smooth=1e-5, ddp=False
    )
    torch.testing.assert_close(ours, 0.5 * (1 + theirs(scores, label)))


def test_each_sample_and_head_has_its_own_gap():
    scores, label = sample(True)
    single = []
    for row in range(2):
        for head in range(3):
            gap = torch.zeros(2, 3)
            gap[row, head] = 1
            single.append(reliability_dice(scores, label, gap, regions=True, batch_dice=False))
    together = reliability_dice(scores, label, torch.ones(2, 3), regions=True, batch_dice=False)
    torch.testing.assert_close(sum(single), together)
    assert len({round(value.item(), 6) for value in single}) == 6


def test_a_right_presence_adds_nothing():
    scores, label = sample(False)
    assert reliability_dice(scores, label, torch.zeros(2, 2), regions=False, batch_dice=False) == 0


@pytest.mark.parametrize("regions", [True, False])
def test_ignored_voxels_do_not_count_in_the_reliability_term(regions):
    scores, label = sample(regions)
    valid = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    valid[..., 4:] = False
    gap = torch.rand(2, 3 if regions else 2)
    options = {"regions": regions, "batch_dice": False}
    wanted = reliability_dice(scores[..., :4], label[..., :4], gap, **options)
    torch.testing.assert_close(reliability_dice(scores, label, gap, valid=valid, **options), wanted)
