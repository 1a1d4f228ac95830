"""Modality conditioning: the plans' network with complete input, another one per subset."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, plans, wake

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.methods import ModalityConditionedTrainer, ModalityDropoutTrainer


@pytest.mark.parametrize("options", [{}, {"dimensions": 2}, {"residual": True}], ids=["3d", "2d", "residual"])
def test_complete_input_is_the_plans_network(make_trainer, options):
    conditioned = make_trainer(ModalityConditionedTrainer, **options)
    plain = make_trainer(ModalityDropoutTrainer, **options)
    for norm in conditioned.network.norms:
        torch.nn.init.normal_(norm.scale.weight)
        torch.nn.init.normal_(norm.shift.weight)
    missing, unexpected = conditioned.network.load_state_dict(plain.network.state_dict(), strict=False)
    assert not unexpected and all("scale" in name or "shift" in name for name in missing)
    data = batch(plain)["data"]
    dropped = modalities.mask_modalities(data, torch.tensor([[True, False, True, True]] * 2))
    with torch.no_grad():
        assert torch.equal(conditioned.network(data)[0], plain.network(data)[0])
        assert not torch.allclose(conditioned.network(dropped)[0], plain.network(dropped)[0], atol=1e-2)


def test_every_norm_of_the_encoder_and_no_other(make_trainer):
    network = make_trainer(ModalityConditionedTrainer).network
    plain = make_trainer(ModalityDropoutTrainer).network
    norms = [each for each in plain.encoder.modules() if isinstance(each, torch.nn.InstanceNorm3d)]
    assert len(network.norms) == len(norms) == 3
    assert not [each for each in network.encoder.modules() if isinstance(each, torch.nn.InstanceNorm3d)]
    assert [each for each in network.decoder.stages.modules() if isinstance(each, torch.nn.InstanceNorm3d)]


def test_formula_by_hand(make_trainer):
    norm = make_trainer(ModalityConditionedTrainer).network.norms[0]
    torch.nn.init.constant_(norm.scale.weight, 0.5)
    torch.nn.init.constant_(norm.shift.weight, -2.0)
    x = torch.randn(1, norm.weight.numel(), 4, 4, 4)
    norm.absence = torch.zeros(1, 4)
    plain = norm(x)
    norm.absence = torch.tensor([[-1.0, 0.0, -1.0, 0.0]])  # two absent: scale 1 - 2 * 0.5, shift 2 * 2
    torch.testing.assert_close(norm(x), torch.full_like(plain, 4.0))


def test_prediction_uses_what_is_said_about_the_case(make_trainer):
    trainer = make_trainer(ModalityConditionedTrainer)
    wake(trainer.network)
    data = batch(trainer)["data"][:1]
    with torch.no_grad():
        seen = trainer.network(data)[0]
        with trainer.network.conditioned(torch.tensor([[True, True, False, True]]), None):
            told = trainer.network(data)[0]
        assert not torch.equal(seen, told) and torch.equal(seen, trainer.network(data)[0])


def test_only_the_conditioning_is_added(make_trainer):
    trainer = make_trainer(ModalityConditionedTrainer)
    added = [parameter for module in trainer.design.added_modules(trainer.network) for parameter in module.parameters()]
    assert sum(parameter.numel() for parameter in added) == 2 * 4 * (8 + 16 + 24)


def test_batch_normalisation_is_refused(make_trainer):
    content = plans()
    kwargs = content["configurations"]["tiny"]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
    with pytest.raises(InputError, match="expected affine instance normalisation"):
        make_trainer(ModalityConditionedTrainer, content)
