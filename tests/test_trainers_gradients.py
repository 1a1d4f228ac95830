"""How strongly each term of the default weights pulls at a student that has trained for a while."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import REGIONS, batch

from nnunetv2_mstkd.methods import AdaMMTrainer, MSTKDTrainer
from nnunetv2_mstkd.methods.adamm.settings import TERMS as ADAMM_TERMS
from nnunetv2_mstkd.methods.mstkd.settings import TERMS

TEACHER_STEPS = 40
STUDENT_STEPS = 15
SCHEDULE = {"schedule": {"epochs": 10, "iterations": 4, "seed": 1}}
METHODS = {
    "MSTKD": (MSTKDTrainer, None),
    "MSTKD regions": (MSTKDTrainer, REGIONS),
    "AdaMM": (AdaMMTrainer, None),
    "AdaMM regions": (AdaMMTrainer, REGIONS),
}
BY_DEFAULT = {MSTKDTrainer: TERMS, AdaMMTrainer: tuple(name for name in ADAMM_TERMS if name != "adversarial")}


def norm(loss: torch.Tensor, network: torch.nn.Module) -> float:
    network.zero_grad()
    loss.backward(retain_graph=True)
    return torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm().item()


@pytest.fixture(scope="module", params=METHODS)
def ratios(request, tmp_path_factory):
    """By term: norm of its gradient, weight included, in units of the segmentation loss's, for several batches."""
    from conftest import Folders
    from tiny import make_trainer

    method, labels = METHODS[request.param]
    top = tmp_path_factory.mktemp("gradients")
    with pytest.MonkeyPatch.context() as patch:
        Folders(top / "raw", top / "preprocessed", top / "results").use(patch)
        options = {"labels": labels, "block": SCHEDULE}
        teacher = make_trainer(method.teacher_trainer, **options)
        for seed in range(TEACHER_STEPS):
            teacher.train_step(batch(teacher, seed=seed))
        student = make_trainer(method, **options)
        student.network.load_state_dict(teacher.network.state_dict(), strict=False)
        teacher.network.decoder.deep_supervision = False
        student.teacher = teacher.network.eval().requires_grad_(False)
        for seed in range(STUDENT_STEPS):
            student.train_step(batch(student, seed=seed))
        rows = []
        for seed in range(100, 106):
            content = batch(student, seed=seed)
            step = student.compute_losses(content["data"], content["target"])
            segmentation = norm(step.terms["segmentation"], student.network)
            rows.append(
                [norm(term.weight * step.terms[term.name], student.network) / segmentation for term in student.terms]
            )
    names = tuple(term.name for term in student.terms)
    assert names == BY_DEFAULT[method]
    return dict(zip(names, np.array(rows).T, strict=True))


def test_default_weights_balance_the_segmentation_loss(ratios):
    for term, found in ratios.items():
        assert 1e-3 < np.median(found) < 10, (term, found)
        assert found.max() < 10, (term, found)
