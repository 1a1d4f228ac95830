"""What a trainer asks of the terms that a method lists."""

from __future__ import annotations

import pytest
import torch
from tiny import batch

from nnunetv2_mstkd.methods import SMMLTrainer
from nnunetv2_mstkd.networks.decoding import finest
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.step import Term


def size(student, teacher, target):
    return finest(student.logits).square().mean()


def with_terms(*terms: Term, base: type = ModalityDropoutTrainer) -> type:
    return type("OwnTrainer", (base,), {"make_terms": lambda self: terms})


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda *_: torch.ones(2), r"'own' returned Tensor of shape \(2,\)"),
        (lambda *_: torch.ones(1), r"'own' returned Tensor of shape \(1,\)"),
        (lambda *_: 1.0, "'own' returned float"),
        (lambda *_: None, "'own' returned NoneType"),
    ],
    ids=["vector", "one", "float", "none"],
)
def test_what_is_no_scalar_is_refused_by_name(make_trainer, function, found):
    trainer = make_trainer(with_terms(Term("own", 1.0, function, needs_teacher=False)), dimensions=2)
    with pytest.raises(TypeError, match=found):
        trainer.train_step(batch(trainer))


def test_terms_of_weight_0_are_not_computed(make_trainer):
    terms = Term("own", 1.0, size, needs_teacher=False), Term("off", 0.0, None, needs_teacher=False)
    trainer = make_trainer(with_terms(*terms), dimensions=2)
    assert [term.name for term in trainer.terms] == ["own"]
    assert list(trainer.train_step(batch(trainer))["terms"]) == ["segmentation", "own"]


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_negative_weights_are_refused(make_trainer, weight):
    with pytest.raises(ValueError, match="'own' has the weight"):
        make_trainer(with_terms(Term("own", weight, size)), dimensions=2)


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (ModalityDropoutTrainer, ["own", "own"]),
        *[(ModalityDropoutTrainer, [name]) for name in ("total", "segmentation", "teacher", "unlabelled")],
        (SMMLTrainer, ["pixel"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "+".join(value),
)
def test_names_in_use_are_refused(make_trainer, base, names):
    terms = (Term(name, 1.0, size, needs_teacher=False) for name in names)
    with pytest.raises(ValueError, match=f"'{names[0]}' is in use"):
        make_trainer(with_terms(*terms, base=base), dimensions=2)
