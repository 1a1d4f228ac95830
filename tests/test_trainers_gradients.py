"""How strongly each term of the default weights pulls at a student that has trained for a while."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import REGIONS, batch

from nnunetv2_mstkd.settings import TERMS
from nnunetv2_mstkd.trainers import MSTKDTeacherTrainer, MSTKDTrainer

TEACHER_STEPS = 40
STUDENT_STEPS = 15
SCHEDULE = {"schedule": {"epochs": 10, "iterations": 4, "seed": 1}}


def norm(loss: torch.Tensor, network: torch.nn.Module) -> float:
    network.zero_grad()
    loss.backward(retain_graph=True)
    return torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm().item()


@pytest.fixture(scope="module", params=[None, REGIONS], ids=["labels", "regions"])
def ratios(request, tmp_path_factory):
    """Norm of each term's gradient, weight included, in units of the segmentation loss's: (batches, terms)."""
    from conftest import Folders
    from tiny import TrainerFactory

    top = tmp_path_factory.mktemp("gradients")
    with pytest.MonkeyPatch.context() as patch:
        Folders(top / "raw", top / "preprocessed", top / "results").use(patch)
        make_trainer = TrainerFactory()
        options = {"labels": request.param, "block": SCHEDULE}
        teacher = make_trainer(MSTKDTeacherTrainer, **options)
        for seed in range(TEACHER_STEPS):
            teacher.train_step(batch(teacher, seed=seed))
        student = make_trainer(MSTKDTrainer, **options)
        student.network.load_state_dict(teacher.network.state_dict())
        teacher.network.decoder.deep_supervision = False
        student.teacher = teacher.network.eval().requires_grad_(False)
        for seed in range(STUDENT_STEPS):
            student.train_step(batch(student, seed=seed))
        rows = []
        for seed in range(100, 106):
            content = batch(student, seed=seed)
            step = student.compute_loss(content["data"], content["target"], student.draw_availability(2))
            segmentation = norm(step.terms["segmentation"], student.network)
            rows.append(
                [norm(student.weights[name] * step.terms[name], student.network) / segmentation for name in TERMS]
            )
    return np.array(rows)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_default_weight_neither_vanishes_beside_the_segmentation_loss_nor_drowns_it(ratios, term):
    found = ratios[:, TERMS.index(term)]
    assert 1e-3 < np.median(found) < 10, found
    assert found.max() < 10
