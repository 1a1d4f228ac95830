"""The checks for trainers of other packages notice what they are there for; check_no_leak is in test_leak.py."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_mstkd.networks.decoding import finest
from nnunetv2_mstkd.testing import check_gradients
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.step import Term


def with_term(function) -> type[ModalityDropoutTrainer]:
    """A trainer with one term, of the student's full-resolution logits."""
    term = Term("own", 1.0, lambda student, teacher, target: function(finest(student.logits)), needs_teacher=False)
    return type("OwnTrainer", (ModalityDropoutTrainer,), {"make_terms": lambda self: (term,)})


@pytest.mark.parametrize(
    "function",
    [
        lambda logits: logits.detach().square().mean(),
        lambda logits: torch.tensor(logits.square().mean().item()),
        lambda logits: logits.argmax(1).float().mean(),
        lambda logits: (logits > 0).float().sum(),
        lambda logits: 0 * logits.sum(),
    ],
    ids=["detached", "item", "argmax", "compared", "zero"],
)
def test_a_term_without_a_gradient_is_found(function, tmp_path):
    with pytest.raises(AssertionError, match=r"no gradient .*: own"):
        check_gradients(with_term(function), tmp_path, dimensions=2)


def test_a_term_with_a_gradient_passes(tmp_path):
    check_gradients(with_term(lambda logits: logits.square().mean()), tmp_path, dimensions=2)
