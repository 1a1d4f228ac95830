"""The checks for trainers of other packages notice what they are there for; check_no_leak is in test_leak.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from nnunetv2_mstkd.networks.decoding import finest
from nnunetv2_mstkd.testing import check_gradients, check_no_leak
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


@pytest.mark.parametrize("given", ["penalty.weight", ("penalty",), ("a.b.c",)], ids=str)
def test_reads_complete_of_another_form_is_refused(given, tmp_path):
    cls = type("OwnTrainer", (ModalityDropoutTrainer,), {"reads_complete": given})
    with pytest.raises(ValueError, match=r"OwnTrainer\.reads_complete is .*expected a tuple"):
        check_no_leak(cls, tmp_path, dimensions=2)


def test_a_term_that_reads_the_complete_batch_is_told_of_reads_complete(tmp_path):
    class Output(NamedTuple):
        logits: Any
        complete: torch.Tensor

    class OwnTrainer(ModalityDropoutTrainer):
        def make_terms(self):
            return (Term("own", 1.0, self.difference, needs_teacher=False),)

        def difference(self, student, teacher, target):
            return (finest(student.logits).mean() - student.complete.mean()).square()

        def forward_student(self, inputs, complete):
            return Output(self.run_network(inputs, complete), complete)

    with pytest.raises(AssertionError, match="name its weight in reads_complete"):
        check_no_leak(OwnTrainer, tmp_path, dimensions=2)
