"""SMML's networks and trainer: two students, what they see, what they learn from one another, and who predicts."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from tiny import LABELS_WITH_IGNORE, REGIONS, REGIONS_WITH_IGNORE, batch, plans, same, state

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods import SMMLTrainer
from nnunetv2_mstkd.methods.smml.refinement import PriorWeighting, RefinementNet
from nnunetv2_mstkd.methods.smml.settings import SMMLSettings
from nnunetv2_mstkd.training.settings import Settings, SettingsError

WARM = {"warmup": 0.0}
each_kind = pytest.mark.parametrize("light", [True, False], ids=["light", "encoders"])
each_prior = pytest.mark.parametrize("prior", ["none", "self"])


def smml(**settings):
    return {"smml": {**WARM, **settings}}


def complete(light, data):
    """What a student with one encoder per modality is given in training, to return its bottleneck as well."""
    return {} if light else {"auxiliary": data}


def losses_of(trainer, content, availability):
    """Losses of a step in which the first student has these modalities."""
    trainer.draw_availability = lambda size, present=None: availability
    return trainer.compute_losses(content["data"], content["target"])


# ---- subsets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 3, 5])
@pytest.mark.parametrize("kind", ["uniform", "by_size", "fixed", "weighted"])
def test_students_have_two_different_subsets(channels, kind):
    rows = tuple(map(tuple, modalities.all_subsets(channels)[:2].tolist()))
    options = {"fixed": {"subsets": rows}, "weighted": {"subsets": rows, "weights": (1.0, 5.0)}}.get(kind, {})
    sampler = modalities.SubsetSampler(channels, kind, **options)
    generator = torch.Generator().manual_seed(0)
    first = sampler.sample(400, generator=generator)
    second = sampler.sample_other(first, generator=generator)
    assert first.any(1).all() and second.any(1).all()
    assert not (first == second).all(1).any()
    pairs = {(modalities.subset_code(a), modalities.subset_code(b)) for a, b in zip(first, second, strict=True)}
    subsets = 2 if options else 2**channels - 1
    if channels < 5:
        assert len(pairs) == subsets * (subsets - 1)


@pytest.mark.parametrize(
    "sampler",
    [{"kind": "fixed", "subsets": ["T0+T1"]}, {"kind": "independent", "keep": ["T0", "T1", "T2", "T3"]}],
    ids=lambda sampler: sampler["kind"],
)
def test_one_subset_is_not_enough(make_trainer, sampler):
    with pytest.raises(SettingsError, match="need two different ones"):
        make_trainer(SMMLTrainer, block={"sampler": sampler})


def test_two_subsets_cannot_be_drawn_from_one():
    with pytest.raises(ValueError, match="one subset"):
        sampler = modalities.SubsetSampler(2, "fixed", subsets=((True, False),))
        sampler.sample_other(sampler.sample(1))


def test_one_modality_is_refused(make_trainer):
    with pytest.raises(ValueError, match="needs at least 2"):
        make_trainer(SMMLTrainer, channels=1)


def test_other_networks_are_refused(make_trainer):
    given = plans()
    given["configurations"]["tiny"]["architecture"]["network_class_name"] = "somewhere.Primus"
    with pytest.raises(ValueError, match="built on PlainConvUNet or ResidualEncoderUNet"):
        make_trainer(SMMLTrainer, given)


# ---- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 2, "labels": REGIONS},
        {"channels": 3, "dimensions": 2},
        {"channels": 5, "batch_size": 1, "dimensions": 2},
        {"residual": True, "labels": REGIONS_WITH_IGNORE},
        {"labels": LABELS_WITH_IGNORE, "deep_supervision": False},
    ],
    ids=lambda options: ", ".join(options) or "defaults",
)
@each_kind
@each_prior
def test_any_data_set_and_plans_can_be_trained(make_trainer, light, prior, options):
    trainer = make_trainer(SMMLTrainer, block=smml(light=light, prior=prior), **options)
    before = state(trainer.network)
    results = [trainer.train_step(batch(trainer, seed=seed)) for seed in range(2)]
    names = ["segmentation", "pixel", "feature", *(["refinement", "guidance"] if prior == "self" else [])]
    for result in results:
        assert list(result["terms"]) == names
        assert all(0 < value < math.inf for value in result["terms"].values())
    after = trainer.network.state_dict()
    assert all(
        not torch.equal(before[name], after[name])
        for name in after
        if name.endswith("encoder.stages.0.0.convs.0.conv.weight")
    )
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(batch(trainer))])


@each_kind
@each_prior
def test_every_parameter_gets_a_gradient_in_one_step(make_trainer, light, prior):
    trainer = make_trainer(SMMLTrainer, block=smml(light=light, prior=prior))
    content = batch(trainer)
    losses_of(trainer, content, trainer.draw_availability(2)).total.backward()
    without = [name for name, p in trainer.network.named_parameters() if p.grad is None]
    assert all("decoder.seg_layers.0" in name for name in without)  # nnU-Net gives it the weight 0
    for refiner in trainer.refiners or ():
        assert all(p.grad is not None for p in refiner.parameters() if p.requires_grad)


def test_students_start_with_different_weights(make_trainer):
    first, second = make_trainer(SMMLTrainer).network.students
    assert not same(first.state_dict(), second.state_dict())


@each_kind
def test_gradients_stay_with_their_student(make_trainer, light):
    trainer = make_trainer(SMMLTrainer, block=smml(light=light, prior="self"))
    content = batch(trainer)
    data = content["data"]
    other = modalities.mask_modalities(data, trainer.draw_availability(2))
    first, second = trainer.network(data, other=other, **complete(light, data))
    label = trainer.read_target(content["target"][0])
    prior = torch.rand(2, 4, 3, 16, 16, 16)
    loss, _ = trainer._student_loss(0, first, second, content["target"], label, prior)
    loss.backward()
    own, other = ([p.grad for p in student.parameters()] for student in trainer.network.students)
    assert any(grad is not None and grad.abs().max() > 0 for grad in own)
    assert all(grad is None for grad in other)
    assert all(p.grad is None for p in trainer.refiners[1].parameters())


def test_refinement_and_guidance_train_different_nets(make_trainer):
    trainer = make_trainer(SMMLTrainer, block=smml(prior="self"), deep_supervision=False)
    content = batch(trainer)
    output = trainer.network(content["data"], student=0)
    label = trainer.read_target(content["target"])
    prior = torch.rand(2, 4, 3, 16, 16, 16)
    _, terms = trainer._student_loss(0, output, output, content["target"], label, prior)
    student, refiner = trainer.network.students[0], trainer.refiners[0]
    terms["refinement"].backward(retain_graph=True)
    assert (
        all(p.grad is None for p in student.parameters())
        and refiner.unet.encoder.stages[0][0].convs[0].conv.weight.grad is not None
    )
    refiner.zero_grad()
    terms["guidance"].backward()
    assert all(p.grad is None for p in refiner.parameters())
    assert student.encoder.stages[0][0].convs[0].conv.weight.grad.abs().max() > 0


@each_kind
@each_prior
def test_sequential_students_get_the_same_gradients(make_trainer, light, prior):
    gradients = []
    for sequential in (False, True):
        trainer = make_trainer(SMMLTrainer, block=smml(light=light, prior=prior, sequential=sequential))
        content, availability = batch(trainer), torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
        trainer._subset_generator.manual_seed(3)
        step = losses_of(trainer, content, availability)
        trainer.backward(step.total)
        modules = [trainer.network, *(trainer.refiners or ())]
        gradients.append(
            [step.total.item(), step.terms, [p.grad for m in modules for p in m.parameters() if p.grad is not None]]
        )
    (total, terms, grads), (other_total, other_terms, other_grads) = gradients
    assert total == pytest.approx(other_total)
    assert len(grads) == len(other_grads)
    for one, other in zip([*terms.values(), *grads], [*other_terms.values(), *other_grads], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_for_each_network(make_trainer, monkeypatch):
    trainer = make_trainer(SMMLTrainer, block=smml(prior="self"))
    modules = trainer.clip_groups()
    assert len(modules) == 4
    for factor, module in enumerate(modules):
        for p in module.parameters():
            p.grad = torch.full_like(p, 10.0**factor)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    trainer._update_weights()
    for module in modules:
        norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
        assert norm == pytest.approx(12, rel=1e-3)


def test_exchange_and_guidance_wait_for_the_warm_up(make_trainer):
    block = {"schedule": {"epochs": 10, "iterations": 2}, "smml": {"prior": "self", "warmup": 0.1}}
    trainer = make_trainer(SMMLTrainer, block=block)
    steps = []
    for epoch in range(2):
        trainer.current_epoch, trainer._step_in_epoch = epoch, 0
        steps.append(trainer.train_step(batch(trainer))["terms"])
    assert steps[0]["pixel"] == steps[0]["guidance"] == 0 and steps[0]["feature"] > 0 and steps[0]["refinement"] > 0
    assert steps[1]["pixel"] > 0 and steps[1]["guidance"] > 0


@each_kind
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_absent_modalities_do_not_reach_a_student(make_trainer, light, value):
    """Neither its logits nor, through the prior, what guides it."""
    trainer = make_trainer(SMMLTrainer, block=smml(light=light))
    content = batch(trainer)
    subsets = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    filled = torch.where(subsets.reshape(2, 4, 1, 1, 1), content["data"], value)
    wanted, found = (
        trainer.network(modalities.mask_modalities(data, subsets), student=1, **complete(light, data))
        for data in (content["data"], filled)
    )
    assert all(torch.equal(one, other) for one, other in zip(wanted.logits, found.logits, strict=True))
    assert torch.equal(wanted.bottleneck, found.bottleneck)


def test_refinement_has_no_prior_of_absent_modalities(make_trainer, monkeypatch):
    trainer = make_trainer(SMMLTrainer, block=smml(prior="self"))
    content, seen = batch(trainer), []
    availability = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    partner = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    monkeypatch.setattr(trainer, "draw_partner", lambda first, present=None: partner)
    for refiner in trainer.refiners:
        refiner.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    losses_of(trainer, content, availability)
    for prior, subset in zip(seen, (availability, partner), strict=True):
        assert (prior.flatten(2).abs().sum(2) > 0).equal(subset)
        assert prior[subset].sum(1).allclose(torch.ones(()))  # probabilities of the classes


# ---- prediction ----------------------------------------------------------------------------------------------------


@each_kind
@torch.no_grad()
def test_prediction_is_the_mean_or_one_student(make_trainer, light):
    trainer = make_trainer(SMMLTrainer, block=smml(light=light))
    network, data = trainer.network, batch(trainer)["data"]
    pair = [student(data, **complete(light, data)).logits for student in network.students]
    found = network(data)
    assert isinstance(found, list) and len(found) == len(pair[0])
    for level, one, other in zip(found, *pair, strict=True):
        torch.testing.assert_close(level, (one + other) / 2)
    trainer.set_deep_supervision_enabled(False)
    assert torch.equal(network(data), found[0])
    mean = found[0]
    everything = torch.ones(2, 4, dtype=torch.bool)
    for student, wanted in ((1, pair[0][0]), (2, pair[1][0]), (None, mean)):
        with network.conditioned(everything, trainer.label_manager, student) as finish:
            assert torch.equal(network(data), wanted)
            assert finish(wanted) is wanted
            assert not {"only", "availability"} & set(network.state_dict())
    assert torch.equal(network(data), mean)


@each_prior
def test_prediction_needs_no_refinement_and_no_prior(make_trainer, prior):
    trainer = make_trainer(SMMLTrainer, block=smml(prior=prior))
    network = SMMLTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 4, 3, enable_deep_supervision=False
    )
    network.load_state_dict(trainer.network.state_dict())
    assert {name.split(".")[0] for name in network.state_dict()} == {"students"}
    assert network(torch.randn(1, 4, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


@torch.no_grad()
def test_students_with_encoders_use_the_availability(make_trainer):
    trainer = make_trainer(SMMLTrainer, block=smml(light=False), deep_supervision=False)
    network, data = trainer.network, batch(trainer)["data"]
    subsets = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    network.train()
    wanted = network(modalities.mask_modalities(data, subsets))
    network.eval()
    assert torch.equal(network(modalities.mask_modalities(data, subsets)), wanted)
    with network.conditioned(subsets, trainer.label_manager):
        assert torch.equal(network(data), wanted)  # the encoders' features of what is absent are dropped
    with network.conditioned(torch.tensor([[True, False, False, False]]), trainer.label_manager):
        empty = network(torch.zeros_like(data))
    assert torch.equal(network(torch.zeros_like(data)), empty)


@pytest.mark.compiled
@each_kind
def test_network_compiles_into_one_graph(make_trainer, light):
    trainer = make_trainer(SMMLTrainer, block=smml(light=light), deep_supervision=False)
    compiled = torch.compile(trainer.network, backend="eager", fullgraph=True)
    data = batch(trainer)["data"]
    if light:  # the other kind takes long
        torch.testing.assert_close(compiled(data), trainer.network(data), rtol=1e-3, atol=1e-4)
    more = complete(light, data)
    found, wanted = compiled(data, other=data, **more), trainer.network(data, other=data, **more)
    torch.testing.assert_close(found[1].logits, wanted[1].logits, rtol=1e-3, atol=1e-4)


# ---- refinement network --------------------------------------------------------------------------------------------


def test_prior_weights_are_between_0_and_1():
    weighting = PriorWeighting(4, 3)
    prior, p = torch.rand(2, 4, 3, 5, 6), torch.rand(2, 3, 5, 6).softmax(1)
    factor = weighting(prior, p) / prior
    assert ((factor > 0) & (factor < 1)).all()
    assert torch.allclose(factor, factor[..., :1, :1].expand_as(factor))
    absent = prior.clone()
    absent[:, 1] = 0
    assert (weighting(absent, p)[:, 1] == 0).all()
    # a class that the student does not see at all has the volume of one voxel, not of none
    p[:, 2] = 0
    assert torch.isfinite(weighting(prior, p)).all()


def test_prior_weighting_survives_half_precision(make_trainer):
    """The share of volumes that the weighting reads is 200 000 here, and float16 ends at 65504."""
    trainer = make_trainer(SMMLTrainer, dimensions=2, features=(16, 24, 32), edge=32)
    refiner = RefinementNet(trainer.network.students[0].encoder, 4, 3, 0.5)
    prior, logits = torch.full((1, 4, 3, 512, 512), 0.8), torch.full((1, 3, 512, 512), -15.0)
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        refined = refiner(prior.half(), logits.half(), regions=True)
    assert torch.isfinite(refined).all()


@pytest.mark.parametrize("regions", [True, False])
def test_the_refinement_network_follows_the_plans(make_trainer, regions):
    trainer = make_trainer(SMMLTrainer, dimensions=2, features=(16, 24, 32, 40, 48), edge=32)
    refiner = RefinementNet(trainer.network.students[0].encoder, 4, 3, 0.5)
    assert list(refiner.unet.encoder.output_channels) == [8, 12, 16, 20]
    assert refiner.unet.encoder.strides == trainer.network.students[0].encoder.strides[:4]
    logits = torch.randn(1, 3, 32, 32, requires_grad=True)
    refined = refiner(torch.rand(1, 4, 3, 32, 32), logits, regions=regions)
    assert refined.shape == logits.shape
    refined.sum().backward()
    assert logits.grad is None


# ---- settings and checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": "sam"}, r"smml\.prior .* one of none, self, precomputed, checkpoint"),
        ({"prior": "precomputed"}, r"smml\.prior_path is None, expected a path"),
        ({"prior_path": "maps"}, r"smml\.prior_path is 'maps', expected .* null"),
        ({"pixel": -1}, r"smml\.pixel is -1"),
        ({"warmup": 2}, r"smml\.warmup is 2"),
        ({"tau": 0}, r"smml\.tau is 0"),
        ({"ema": 1}, r"smml\.ema is 1"),
        ({"width": 0}, r"smml\.width is 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        Settings.read({"smml": settings}, [SMMLSettings])


def test_refinement_and_average_are_resumed(make_trainer):
    trainer = make_trainer(SMMLTrainer, block=smml(prior="self", ema=0.5))
    for seed in range(3):
        trainer.train_step(batch(trainer, seed=seed))
    kept = deepcopy(trainer.extra_state())
    assert int(kept["average"]["steps"]) == 3
    fresh = make_trainer(SMMLTrainer, block=smml(prior="self", ema=0.5), seed=5)
    fresh.load_extra_state(kept)
    fresh.network.load_state_dict(trainer.network.state_dict())
    fresh.optimizer.load_state_dict(deepcopy(trainer.optimizer.state_dict()))
    for one in (trainer, fresh):
        one._subset_generator.manual_seed(1)
        one._step_in_epoch = 3
    results = [one.train_step(batch(one, seed=9)) for one in (trainer, fresh)]
    assert results[0]["terms"] == results[1]["terms"]
    assert same(trainer.extra_state(), fresh.extra_state())
    assert same(trainer.network.state_dict(), fresh.network.state_dict())
