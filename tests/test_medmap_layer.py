"""MedMAP's front before other networks, its loss in other trainers, and its distillation."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from tiny import NO_TERMS, batch, give_teacher, state, wake
from torch import nn

from nnunetv2_mstkd import methods, modalities, testing
from nnunetv2_mstkd.methods import MedMAPAdaMMTrainer, MedMAPKDTrainer, MedMAPSMMLTrainer, MedMAPTeacherTrainer
from nnunetv2_mstkd.methods.conditioned.trainer import ConditionedDesign, ModalityConditionedTrainer
from nnunetv2_mstkd.methods.configuration import configure
from nnunetv2_mstkd.methods.medmap.network import AlignedDesign, AlignedStem, align
from nnunetv2_mstkd.methods.medmap.settings import MedMAPSettings
from nnunetv2_mstkd.methods.medmap.trainer import AlignmentMixin, join
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.settings import SettingsError

SUBSETS = modalities.all_subsets(4)
ADAMM_OFF = {**NO_TERMS["adamm"], "presence": False}


class OutsideTrainer(AlignmentMixin, ModalityConditionedTrainer):
    """What somebody else writes to have MedMAP with a trainer."""

    design = AlignedDesign(ConditionedDesign())


TRAINERS = [MedMAPAdaMMTrainer, MedMAPSMMLTrainer, MedMAPKDTrainer, OutsideTrainer]
each_trainer = pytest.mark.parametrize("cls", TRAINERS, ids=lambda cls: cls.__name__)


def settings(**medmap: Any) -> dict[str, Any]:
    return {**NO_TERMS, "medmap": medmap}


def fronts(trainer: Any) -> list[Any]:
    return [module.front for module in trainer.plain_network.modules() if hasattr(module, "front")]


# ---- any network -----------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    logits: torch.Tensor
    scale: torch.Tensor


class Foreign(nn.Module):
    """A network that knows nothing of this package."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x, availability=None, *, scale=1.0, named=False):
        logits = scale * self.last(self.first(x))
        if availability is not None:
            logits = logits * availability.sum(1)[:, None, None, None]
        return Named(logits, torch.tensor(scale)) if named else logits


@pytest.fixture
def foreign():
    plan = UNetPlan.of(tiny_configuration(), num_modalities=4)
    torch.manual_seed(0)
    front = AlignedStem(plan.build().encoder, 4, MedMAPSettings(features=2))
    return Foreign(8), front


def tiny_configuration() -> Any:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(tiny.plans(dimensions=2)).get_configuration("tiny")


def test_any_network_can_be_aligned(foreign):
    network, front = foreign
    plain, names = copy.deepcopy(network), set(network.state_dict())
    network = align(network, front)
    assert isinstance(network, Foreign)
    assert {name for name in network.state_dict() if not name.startswith("front.")} == names
    data, subsets = torch.randn(15, 4, 16, 16), SUBSETS
    masked = modalities.mask_modalities(data, subsets)
    expected = plain(front(masked, subsets)[0], subsets, scale=2.0)
    assert torch.equal(network(masked, scale=2.0), expected)
    found = network(masked, complete=data, scale=2.0, named=True)
    assert torch.equal(found.logits, expected) and found.output.scale == 2
    z = front.layers(data).unflatten(1, (4, 2))
    torch.testing.assert_close(found.alignment, front.anchor.alignment(z, torch.ones_like(subsets)))
    joined = join(found)
    assert joined._fields == ("logits", "scale", "alignment") and joined.alignment is found.alignment
    assert join(network(masked, complete=data))._fields == ("logits", "alignment")


def test_what_is_known_wins_over_the_front(foreign):
    """All channels of the front are non-zero: the network must be told what the image lacks."""
    network = align(*foreign)
    data = torch.randn(1, 4, 16, 16)
    two = torch.tensor([[True, False, True, False]])
    network.availability = two
    known = network(data)
    network.availability = None
    assert torch.equal(network(modalities.mask_modalities(data, two)), known)
    assert torch.equal(network(data, two), known) and not torch.equal(network(data), known)


# ---- other trainers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_an_outside_trainer_has_all_properties(check, tmp_path):
    check(OutsideTrainer, tmp_path)


HOSTS = {MedMAPAdaMMTrainer: methods.AdaMMTrainer, MedMAPSMMLTrainer: methods.SMMLTrainer}


@pytest.mark.parametrize(("cls", "host"), HOSTS.items(), ids=lambda cls: cls.__name__)
def test_host_keeps_its_terms_and_gets_the_alignment(make_trainer, cls, host):
    found = []
    for trainer in (make_trainer(host), make_trainer(cls)):
        if hasattr(host, "teacher_trainer"):
            give_teacher(trainer)
        wake(trainer.network)
        found.append(trainer.train_step(batch(trainer))["terms"])
    assert found[1].keys() == {*found[0], "alignment"} and found[1]["alignment"] > 0
    assert np.isfinite(list(found[1].values())).all()


@each_trainer
@pytest.mark.parametrize("options", [{"residual": True}, {"channels": 2, "dimensions": 2}], ids=str)
def test_alignment_trains_the_front_alone(make_trainer, cls, options):
    """The alignment's gradient reaches every front and nothing behind it; its weight scales it."""
    trainer = make_trainer(cls, block={**settings(weight=0.3), "adamm": ADAMM_OFF}, **options)
    content = batch(trainer)
    step = trainer.compute_losses(content["data"], content["target"])
    step.terms["alignment"].backward(retain_graph=True)
    reached = {id(p) for p in trainer.network.parameters() if p.grad is not None and p.grad.any()}
    inside = [list(front.parameters()) for front in fronts(trainer)]
    assert len(inside) == (2 if cls is MedMAPSMMLTrainer else 1)
    assert all(reached & {id(p) for p in front} for front in inside)
    assert reached <= {id(p) for front in inside for p in front}
    students = len(inside)  # what is logged is the mean over them
    torch.testing.assert_close(step.total, students * (step.terms["segmentation"] + 0.3 * step.terms["alignment"]))


@each_trainer
def test_weight_zero_is_the_host_behind_a_front(make_trainer, cls):
    trainer = make_trainer(cls, block=settings(weight=0))
    assert "alignment" not in trainer.train_step(batch(trainer))["terms"]
    assert fronts(trainer)


@each_trainer
@torch.no_grad()
def test_training_and_prediction_use_one_network(make_trainer, cls):
    trainer = make_trainer(cls, batch_size=15, block=settings(features=2), deep_supervision=False)
    network = trainer.network.eval()
    wake(network)
    data = batch(trainer)["data"]
    masked = modalities.mask_modalities(data, SUBSETS)
    if cls is MedMAPSMMLTrainer:
        pair = network(masked, other=masked, complete=data)
        wanted = (pair[0].logits + pair[1].logits) / 2
    else:
        wanted = network(masked, complete=data).logits
    assert torch.equal(network(masked), wanted)
    with network.conditioned(SUBSETS, trainer.label_manager):
        assert torch.equal(network(masked), wanted)
    fresh = cls.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 4, 3, enable_deep_supervision=False
    ).eval()
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(masked), wanted)


@pytest.mark.compiled
@pytest.mark.parametrize("cls", [MedMAPAdaMMTrainer, MedMAPSMMLTrainer, MedMAPKDTrainer], ids=lambda cls: cls.__name__)
def test_network_compiles_into_one_graph(make_trainer, cls):
    trainer = make_trainer(cls, block=settings(), deep_supervision=False)
    torch._dynamo.reset()  # all aligned networks share one forward, which may be compiled eight times in a process
    compiled = torch.compile(trainer.network, backend="eager", fullgraph=True)
    data = batch(trainer)["data"]
    masked = modalities.mask_modalities(data, SUBSETS[3:5])
    options = {"student": 0} if cls is MedMAPSMMLTrainer else {}
    found, wanted = (each(masked, complete=data, **options) for each in (compiled, trainer.network))
    torch.testing.assert_close(found.alignment, wanted.alignment)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("anchor", [{}, {"anchor": "gaussian"}], ids=["leave one out", "gaussian"])
@each_trainer
def test_every_parameter_gets_a_gradient_in_one_step(make_trainer, cls, anchor):
    """DistributedDataParallel needs it; nnU-Net gives the coarsest output the weight 0."""
    trainer = make_trainer(cls, block=settings(**anchor))
    wake(trainer.network)
    content = batch(trainer)
    trainer.compute_losses(content["data"], content["target"]).total.backward()
    without = {name for name, parameter in trainer.network.named_parameters() if parameter.grad is None}
    assert all("decoder.seg_layers.0." in name for name in without)


# ---- AdaMM -----------------------------------------------------------------------------------------------------------


def test_adapters_are_chosen_by_what_the_image_has(make_trainer):
    trainer = make_trainer(MedMAPAdaMMTrainer, batch_size=15, block=settings(features=2))
    assert trainer.network.encoder.stages[0][0].convs[0].conv.in_channels == 8
    assert trainer.network.subsets is not None
    seen: list[torch.Tensor] = []
    trainer.network.subsets.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    data = batch(trainer)["data"]
    trainer.network(modalities.mask_modalities(data, SUBSETS), complete=data)
    assert torch.equal(seen[0], SUBSETS)


def test_student_starts_from_the_teacher_where_the_stem_keeps_the_channels(make_trainer):
    trainer = make_trainer(MedMAPAdaMMTrainer, block={"medmap": {"features": 1}})
    teacher = state(make_trainer(methods.AdaMMTeacherTrainer, seed=5).network)
    trainer._start_from(teacher, "the teacher")
    own = trainer.network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in teacher.items())


def test_encoders_are_refused_where_the_network_keeps_its_own(make_trainer):
    with pytest.raises(SettingsError, match=r"medmap\.placement is 'encoders', expected \"stem\""):
        make_trainer(MedMAPAdaMMTrainer, block={"medmap": {"placement": "encoders"}})


def test_a_configuration_with_encoders_can_be_made():
    """For the trainers that take it: what one of them refuses is refused when it starts."""
    plans, assignment = tiny.plans(), ("medmap", "placement", "encoders")
    entry = configure(plans, "tiny", "other", assignments=[assignment], modalities=["T0", "T1", "T2", "T3"])
    assert entry[BLOCK]["medmap"]["placement"] == "encoders"


# ---- SMML ------------------------------------------------------------------------------------------------------------


def test_students_have_fronts_of_their_own(make_trainer):
    trainer = make_trainer(MedMAPSMMLTrainer)
    first, second = fronts(trainer)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    before = [state(front) for front in (first, second)]
    trainer.train_step(batch(trainer))
    for front, old in zip((first, second), before, strict=True):
        assert not tiny.same(state(front), old)


@pytest.mark.parametrize("placement", ["stem", "encoders"])
def test_sequential_students_get_the_same_gradients(make_trainer, placement):
    results = []
    for sequential in (False, True):
        block = {"smml": {"sequential": sequential, "warmup": 0.0}, "medmap": {"placement": placement}}
        trainer = make_trainer(MedMAPSMMLTrainer, block=block)
        trainer._subset_generator.manual_seed(0)
        content = batch(trainer)
        step = trainer.compute_losses(content["data"], content["target"])
        trainer.backward(step.total)
        gradients = {name: p.grad for name, p in trainer.network.named_parameters() if p.grad is not None}
        results.append((step.terms, gradients))
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_prior_of_the_moving_average_works_behind_a_front(make_trainer):
    trainer = make_trainer(MedMAPSMMLTrainer, block={"smml": {"prior": "self", "warmup": 0.0}})
    found = trainer.train_step(batch(trainer))["terms"]
    assert {"alignment", "refinement", "guidance"} <= set(found) and np.isfinite(list(found.values())).all()


def test_one_encoder_per_modality_comes_from_medmap(make_trainer):
    with pytest.raises(SettingsError, match=r"smml\.light is False.*medmap\.placement"):
        make_trainer(MedMAPSMMLTrainer, block={"smml": {"light": False}})
    trainer = make_trainer(MedMAPSMMLTrainer, block={"medmap": {"placement": "encoders"}})
    assert [len(front.encoders) for front in fronts(trainer)] == [4, 4]


# ---- distillation ----------------------------------------------------------------------------------------------------


def test_teacher_is_trained_with_the_alignment_on_complete_input(make_trainer):
    trainer = make_trainer(MedMAPTeacherTrainer, block={"medmap": {"weight": 0.3}})
    assert trainer.logs_terms
    content = batch(trainer)
    step = trainer.compute_losses(content["data"], content["target"])
    torch.testing.assert_close(step.total, step.terms["segmentation"] + 0.3 * step.terms["alignment"])
    (front,) = fronts(trainer)
    z = front.layers(content["data"]).unflatten(1, (4, -1))
    torch.testing.assert_close(step.terms["alignment"], front.anchor.alignment(z, torch.ones(2, 4, dtype=torch.bool)))
    torch.testing.assert_close(
        step.terms["segmentation"], trainer.loss(trainer.network(content["data"]), content["target"])
    )
    without = make_trainer(MedMAPTeacherTrainer, block={"medmap": {"weight": 0}})
    assert not without.logs_terms
    assert set(without.train_step(content)["terms"]) == {"segmentation"}


def test_student_follows_the_teachers_probabilities(make_trainer):
    block = {
        "medmap": {"weight": 0.1},
        "distillation": {"ramp": 0, "soft_labels": 0.5, "every": 1},
    }
    trainer = give_teacher(make_trainer(MedMAPKDTrainer, block=block))
    trainer.on_train_epoch_start()
    content = batch(trainer)
    seen: list[Any] = []
    trainer.network.register_forward_hook(lambda module, given, output: seen.append(output))
    step = trainer.compute_losses(content["data"], content["target"])
    theirs, ours = trainer.teacher(content["data"]).log_softmax(1), seen[0].logits[0].log_softmax(1)
    expected = (theirs.exp() * (theirs - ours)).sum(1).mean()
    torch.testing.assert_close(step.terms["soft_labels"], expected)
    torch.testing.assert_close(step.total, step.terms["segmentation"] + 0.5 * expected + 0.1 * step.terms["alignment"])


def test_student_starts_from_the_aligned_teacher(make_trainer):
    trainer = make_trainer(MedMAPKDTrainer)
    teacher = state(make_trainer(MedMAPTeacherTrainer, seed=5).network)
    trainer._start_from(teacher, "the teacher")
    assert tiny.same(state(trainer.network), teacher)
    assert trainer.configuration_manager.configuration[BLOCK]["distillation"]["soft_labels"] == 1
