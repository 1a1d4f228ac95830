"""MedMAP's networks and trainers: anchors, imputation, the two placements, and the combination with MST-KDNet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import LABELS_WITH_IGNORE, NO_TERMS, REGIONS_WITH_IGNORE, batch, give_teacher, plans, same, wake

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.methods import MedMAPMSTKDTrainer, MedMAPTrainer, MSTKDTeacherTrainer
from nnunetv2_mstkd.methods.medmap.network import ModalityAnchor
from nnunetv2_mstkd.methods.medmap.settings import MedMAPSettings
from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.training.settings import Settings, SettingsError

SUBSETS = modalities.all_subsets(4)
FRONTS = {
    "stem": {},
    "four features": {"features": 4},
    "encoders": {"placement": "encoders"},
    "encoders, all stages": {"placement": "encoders", "stages": "all", "width": 0.3},
}
ANCHORS = {
    "leave one out": {},
    "leave one out, as it is": {"normalize": False},
    "leave one out, detached": {"detach_anchor": True},
    "star": {"anchor": "star"},
    "star as it is": {"anchor": "star", "normalize": False},
    "star, detached": {"anchor": "star", "detach_anchor": True},
    "fixed": {"anchor": "fixed", "fixed_channel": 1},
    "gaussian": {"anchor": "gaussian"},
    "normal": {"anchor": "normal"},
}
each_front = pytest.mark.parametrize("front", FRONTS.values(), ids=FRONTS)
each_anchor = pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS)
each_trainer = pytest.mark.parametrize("cls", [MedMAPTrainer, MedMAPMSTKDTrainer], ids=lambda cls: cls.__name__)


def medmap(**settings):
    return {"medmap": settings}


def uneven(network: torch.nn.Module) -> torch.nn.Module:
    """Give the modalities unequal weights, and the transformer's projections some, as training does."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, ModalityAnchor):
                module.weight_logits.copy_(torch.linspace(-1, 1, len(module.weight_logits)))
    if hasattr(network, "transformer"):
        wake(network)
    return network


# ---- anchor --------------------------------------------------------------------------------------------------------


def anchor_of(count=3, width=2, **settings):
    return uneven(ModalityAnchor(count, width, MedMAPSettings(**settings)))


@pytest.mark.parametrize("grid", [(4, 3), (2, 3, 4)], ids=["2d", "3d"])
def test_absent_features_become_the_weighted_mean(grid):
    anchor, z = anchor_of(), torch.randn(4, 3, 2, *grid)
    available = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    found = anchor(z, available)
    weights = torch.tensor([-1.0, 0.0, 1.0]).softmax(0)
    for sample, row in enumerate(available):
        mean = sum(weights[m] * z[sample, m] for m in range(3) if row[m]) / weights[row].sum()
        for m in range(3):
            torch.testing.assert_close(found[sample, m], z[sample, m] if row[m] else mean)
    assert torch.equal(found[available], z[available])


def test_absent_features_are_not_in_the_imputation():
    anchor, z = anchor_of(), torch.randn(1, 3, 2, 4, 4)
    available = torch.tensor([[True, False, True]])
    wanted = anchor(z, available)
    for value in (float("nan"), 1e30):
        z[:, 1] = value
        assert torch.equal(anchor(z, available), wanted)


def test_star_is_one_mixture_for_all():
    z, present = torch.randn(2, 3, 2, 5, 5), torch.tensor([[1, 1, 1], [1, 0, 1]], dtype=torch.bool)
    weights, expected = torch.tensor([-1.0, 0.0, 1.0]).softmax(0), 0.0
    for sample, row in enumerate(present):
        mean = (weights[row, None, None, None] * z[sample, row]).sum(0) / weights[row].sum()
        expected += 0.25 * (z[sample, row] - mean).square().mean()
    torch.testing.assert_close(anchor_of(anchor="star", normalize=False).alignment(z, present), expected)
    assert anchor_of(normalize=False).alignment(z, present) != expected


def test_the_gaussian_starts_as_miro_does():
    anchor = anchor_of(anchor="gaussian")
    z = torch.randn(2, 3, 2, 5, 5)
    present = torch.ones(2, 3, dtype=torch.bool)
    expected = 0.5 * (z.square() / 0.1 + torch.tensor(0.1).log()).mean()
    torch.testing.assert_close(anchor.alignment(z, present), expected)
    standard = anchor_of(anchor="normal")
    torch.testing.assert_close(standard.alignment(z, present), 0.5 * z.square().mean())


# ---- training ------------------------------------------------------------------------------------------------------


@each_front
@each_anchor
def test_every_parameter_gets_a_gradient_in_one_step(make_trainer, monkeypatch, front, anchor):
    """DistributedDataParallel needs it; nnU-Net gives the coarsest output the weight 0."""
    trainer = make_trainer(MedMAPTrainer, block=medmap(**front, **anchor))
    content = batch(trainer)
    availability = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    monkeypatch.setattr(trainer, "draw_availability", lambda size, present=None: availability)
    step = trainer.compute_losses(content["data"], content["target"])
    assert set(step.terms) == {"segmentation", "alignment"}
    torch.testing.assert_close(step.total, step.terms["segmentation"] + 0.1 * step.terms["alignment"])
    step.total.backward()
    without = {name for name, parameter in trainer.network.named_parameters() if parameter.grad is None}
    assert without <= {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
    for name, parameter in trainer.network.named_parameters():
        if "weight_logits" in name:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 2},
        {"channels": 3, "dimensions": 2},
        {"channels": 6, "batch_size": 1},
        {"residual": True, "labels": REGIONS_WITH_IGNORE},
        {"labels": LABELS_WITH_IGNORE, "deep_supervision": False},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("front", [FRONTS["stem"], FRONTS["encoders"]], ids=["stem", "encoders"])
@each_trainer
def test_any_data_set_and_plans_can_be_trained(make_trainer, cls, front, options):
    block = {**NO_TERMS, **medmap(**front), "mstkd": {**NO_TERMS["mstkd"], "kl": 0.5}}
    trainer = make_trainer(cls, block=block, **options)
    if cls is MedMAPMSTKDTrainer:
        give_teacher(trainer)
    before = trainer.network.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    result = trainer.train_step(batch(trainer))
    assert np.isfinite(list(result["terms"].values())).all()
    changed = [name for name, value in trainer.network.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("front.") for name in changed)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(batch(trainer))])


@each_front
@pytest.mark.parametrize("value", [float("nan"), 1e30, 7.0])
@each_trainer
def test_absent_modalities_do_not_reach_the_logits(make_trainer, monkeypatch, cls, front, value):
    trainer = make_trainer(cls, batch_size=len(SUBSETS), block={**NO_TERMS, **medmap(**front)})
    uneven(trainer.network)
    monkeypatch.setattr(trainer, "draw_availability", lambda size, present=None: SUBSETS)
    content = batch(trainer)
    keep = SUBSETS.reshape(*SUBSETS.shape, 1, 1, 1)
    results, logits = [], []
    trainer.network.register_forward_hook(lambda network, given, output: logits.append(output.logits[0]))
    for data in (content["data"], torch.where(keep, content["data"], value)):
        step = trainer.compute_losses(data, content["target"])
        trainer.network.zero_grad()
        step.terms["segmentation"].backward()
        gradients = {name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None}
        results.append((logits[-1], step.terms["segmentation"], gradients))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    if value == 7.0:  # 0 * NaN is NaN: what is encoded for the alignment would have to be finite
        assert same(results[0][2], results[1][2])


@each_front
@each_trainer
@torch.no_grad()
def test_training_and_prediction_use_one_network(make_trainer, cls, front):
    """Complete batch and drawn subsets in training mode; zeros, or zeros and what is known, in evaluation mode."""
    trainer = make_trainer(cls, batch_size=len(SUBSETS), block={**NO_TERMS, **medmap(**front)}, deep_supervision=False)
    network = uneven(trainer.network)
    data = batch(trainer)["data"]
    masked = modalities.mask_modalities(data, SUBSETS)
    network.train()
    options = {} if cls is MedMAPTrainer else {"return_features": True}
    wanted = network(masked, complete=data, **options).logits
    network.eval()
    assert torch.equal(network(masked), wanted)
    with network.conditioned(SUBSETS, trainer.label_manager) as finish:
        assert torch.equal(network(masked), wanted)
        assert "availability" not in network.state_dict()
        assert finish(logits := np.ones((1, 3, 2))) is logits
    assert network.availability is None


@torch.no_grad()
def test_stated_availability_wins_if_patch_has_data(make_trainer):
    trainer = make_trainer(MedMAPTrainer, deep_supervision=False)
    network = uneven(trainer.network).eval()
    data = batch(trainer)["data"][:1]
    complete = network(data)
    with network.conditioned(torch.tensor([[True, True, False, False]]), trainer.label_manager):
        two = network(data)
    assert not torch.equal(two, complete)
    assert torch.equal(network(modalities.mask_modalities(data, SUBSETS[4:5])), two)
    empty = network(torch.zeros_like(data))
    with network.conditioned(torch.tensor([[True, False, False, False]]), trainer.label_manager):
        assert torch.equal(network(torch.zeros_like(data)), empty)


@pytest.mark.parametrize(
    ("channels", "width", "features"), [(4, 8, 4), (4, 32, 4), (2, 32, 4), (8, 8, 4), (9, 8, 3), (16, 8, 2)]
)
def test_stem_has_four_channels_for_each_of_at_most_eight_modalities(make_trainer, channels, width, features):
    trainer = make_trainer(MedMAPTrainer, channels=channels, features=(width, 16, 24))
    assert trainer.settings[MedMAPSettings].features == features
    assert trainer.configuration_manager.configuration[BLOCK]["medmap"]["features"] == features
    assert trainer.network.encoder.stages[0][0].convs[0].conv.in_channels == channels * features


@each_front
@each_trainer
def test_class_builds_the_network_for_prediction(make_trainer, cls, front):
    trainer = make_trainer(cls, block={**NO_TERMS, **medmap(**front)})
    network = cls.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 4, 3, enable_deep_supervision=False
    )
    network.load_state_dict(trainer.network.state_dict())
    assert not any(name.startswith("decoder.encoder") for name in network.state_dict()) or "placement" not in front
    assert network(torch.randn(1, 4, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


@pytest.mark.compiled
@pytest.mark.parametrize("front", [FRONTS["stem"], FRONTS["encoders"]], ids=["stem", "encoders"])
@each_trainer
def test_network_compiles_into_one_graph(make_trainer, cls, front):
    trainer = make_trainer(cls, block={**NO_TERMS, **medmap(**front)}, deep_supervision=False)
    torch._dynamo.reset()  # all aligned networks share one forward, which may be compiled eight times in a process
    compiled = torch.compile(trainer.network, backend="eager", fullgraph=True)
    data = batch(trainer)["data"]
    masked = modalities.mask_modalities(data, SUBSETS[3:5])
    options = {} if cls is MedMAPTrainer else {"return_features": True}
    for arguments in ({}, {"complete": data, **options}):
        found, wanted = compiled(masked, **arguments), trainer.network(masked, **arguments)
        if arguments:
            torch.testing.assert_close(found.alignment, wanted.alignment)
            found, wanted = found.logits, wanted.logits
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_without_alignment_only_the_subset_is_encoded(make_trainer, monkeypatch):
    trainer = make_trainer(MedMAPTrainer, block=medmap(weight=0))
    content = batch(trainer)
    content["data"][:, 2] = float("nan")
    monkeypatch.setattr(
        trainer, "draw_availability", lambda size, present=None: torch.tensor([[True, True, False, True]] * size)
    )
    assert list(trainer.train_step(content)["terms"]) == ["segmentation"]


def test_alignment_brings_modalities_together(make_trainer):
    trainer = make_trainer(
        MedMAPTrainer, block={**medmap(weight=10.0, features=4), "schedule": {"optimizer": "adamw", "initial_lr": 0.01}}
    )
    content = batch(trainer)
    content["data"] = content["data"][:, :1] * torch.tensor([1.0, -1.0, 2.0, -0.5]).reshape(4, 1, 1, 1)
    values = [trainer.train_step(content)["terms"]["alignment"] for _ in range(25)]
    assert values[-1] < 0.5 * values[0]


# ---- with MST-KDNet ------------------------------------------------------------------------------------------------


def test_the_combination_distils_and_aligns(make_trainer):
    trainer = give_teacher(make_trainer(MedMAPMSTKDTrainer))
    assert trainer.teacher_trainer is MSTKDTeacherTrainer
    result = trainer.train_step(batch(trainer))
    assert list(result["terms"]) == ["segmentation", *TERMS, "alignment"]
    assert all(value > 0 for value in result["terms"].values())


def test_alignment_alone_asks_for_no_teacher(make_trainer):
    trainer = make_trainer(MedMAPMSTKDTrainer, block={**NO_TERMS, **medmap(weight=0.1)})
    assert not trainer.needs_teacher
    assert list(trainer.train_step(batch(trainer))["terms"]) == ["segmentation", "alignment"]


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "middle"}, r"medmap\.placement .* one of stem, encoders"),
        ({"anchor": "fixed"}, r"medmap\.fixed_channel is None, expected a channel number"),
        ({"fixed_channel": 1}, r"medmap\.fixed_channel is 1, expected .* null"),
        ({"anchor": "gaussian", "weight": 0}, r"weight above 0 with anchor \"gaussian\""),
        ({"features": 0}, r"medmap\.features is 0"),
        ({"width": 0}, r"medmap\.width is 0"),
        ({"stages": "some"}, r"medmap\.stages .* one of ends, all"),
        ({"weight": -1}, r"medmap\.weight is -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        Settings.read(medmap(**settings), [MedMAPSettings])


def test_unknown_anchor_modality_is_refused(make_trainer):
    with pytest.raises(
        SettingsError, match=r"fixed_channel is 4, expected a channel number .* 0 \.\.\. 3 \(T0, T1, T2, T3"
    ):
        make_trainer(MedMAPTrainer, block=medmap(anchor="fixed", fixed_channel=4))


def test_other_networks_are_refused(make_trainer):
    given = plans()
    given["configurations"]["tiny"]["architecture"]["network_class_name"] = "somewhere.Primus"
    with pytest.raises(InputError, match="built on PlainConvUNet or ResidualEncoderUNet"):
        make_trainer(MedMAPTrainer, given)


@pytest.mark.parametrize("placement", ["stem", "encoders"])
def test_empty_patch_reads_nothing_of_the_complete_batch(make_trainer, placement):
    """Where what a sample keeps is zero in the patch, its logits must not depend on what it does not keep."""
    trainer = make_trainer(MedMAPTrainer, block={"medmap": {"placement": placement}}, deep_supervision=False)
    wake(trainer.network)
    empty = torch.zeros(1, 4, 16, 16, 16)
    first, second = (torch.randn(1, 4, 16, 16, 16) for _ in range(2))
    one, other = (trainer.network(empty, complete=complete).logits for complete in (first, second))
    assert torch.equal(one, other)
