"""AdaMM's trainer: its terms, what needs a teacher, which parameters move how, and its settings."""

from __future__ import annotations

import math

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import LABELS_WITH_IGNORE, NO_TERMS, REGIONS, REGIONS_WITH_IGNORE, batch, give_teacher, plans, state, wake

from nnunetv2_mstkd.methods import AdaMMTeacherTrainer, AdaMMTrainer
from nnunetv2_mstkd.methods.adamm import losses
from nnunetv2_mstkd.methods.adamm.settings import TERMS, AdaMMSettings
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.training.model_identity import refuse_other_network
from nnunetv2_mstkd.training.settings import Settings, SettingsError
from nnunetv2_mstkd.training.teacher import Teacher

BBDM = ("consistency", "content", "style", "adversarial")


def block(**adamm):
    return {"adamm": adamm}


def complete(size, present=None):
    """All four modalities for every sample."""
    return torch.ones(size, 4, dtype=torch.bool)


def only(term, weight=1.0):
    """Settings with one of the teacher's terms and no other term."""
    return block(**{**dict.fromkeys(BBDM, 0), "presence": False, term: weight})


# ---- terms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", BBDM)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_each_teacher_term_alone_reaches_the_student(make_trainer, monkeypatch, term, dimensions):
    trainer = give_teacher(make_trainer(AdaMMTrainer, block=only(term), dimensions=dimensions))
    monkeypatch.setattr(trainer, "loss", lambda output, target: output[0].sum() * 0)
    result = trainer.train_step(batch(trainer))
    assert list(result["terms"]) == ["segmentation", term]
    assert result["terms"]["segmentation"] == 0 and result["terms"][term] > 0
    gradients = [parameter.grad for parameter in trainer.network.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    "labels", [None, REGIONS, LABELS_WITH_IGNORE, REGIONS_WITH_IGNORE], ids=lambda value: str(value)
)
def test_all_terms_together_are_finite(make_trainer, labels):
    trainer = give_teacher(make_trainer(AdaMMTrainer, block=block(adversarial=0.01), labels=labels))
    result = [trainer.train_step(batch(trainer, seed=seed)) for seed in range(2)][-1]
    assert tuple(result["terms"]) == ("segmentation", *TERMS)
    assert all(0 < result["terms"][name] < math.inf for name in TERMS)
    assert math.isfinite(result["terms"]["segmentation"])


def test_equal_networks_have_zero_distillation_loss(make_trainer, monkeypatch):
    settings = {"distillation": {"where": "everywhere"}}
    trainer = give_teacher(make_trainer(AdaMMTrainer, block=settings))
    wake(trainer.network)
    trainer.network.load_state_dict(trainer.teacher.state_dict(), strict=False)
    content = batch(trainer)
    monkeypatch.setattr(trainer, "draw_availability", complete)
    step = trainer.compute_losses(content["data"], content["target"])
    assert all(step.terms[name].item() == pytest.approx(0, abs=1e-6) for name in ("consistency", "content", "style"))
    assert step.terms["presence"] > 0


def test_ramp_and_fade_act_on_teacher_terms_only(make_trainer):
    settings = {"distillation": {"ramp": 0.0, "fade": 0.5}, "schedule": {"epochs": 4, "iterations": 2}}
    trainer = give_teacher(make_trainer(AdaMMTrainer, block=settings))
    content = batch(trainer)
    trainer.current_epoch, trainer._step_in_epoch = 3, 0
    step = trainer.compute_losses(content["data"], content["target"])
    assert trainer.teacher_factor() == pytest.approx(0.5)
    expected = step.terms["segmentation"]
    for term in trainer.terms:
        expected = expected + (0.5 if term.name in BBDM else 1.0) * term.weight * step.terms[term.name]
    assert step.total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("labels", [None, REGIONS], ids=["labels", "regions"])
def test_presence_is_about_the_foreground_heads(make_trainer, monkeypatch, labels):
    trainer = make_trainer(AdaMMTrainer, block=NO_TERMS, labels=labels)
    content = batch(trainer)
    target = trainer.read_target(content["target"][0])
    wanted = losses.presence_target(target.label, 2, regions=labels is not None).target
    assert wanted.all()
    with torch.no_grad():  # a head that is sure of the background and of all else
        trainer.network.presence.logits.weight.zero_()
        trainer.network.presence.logits.bias.fill_(20)
        trainer.network.presence.logits.bias[0] = 20 if labels else -20
    monkeypatch.setattr(trainer, "draw_availability", complete)
    step = trainer.compute_losses(content["data"], content["target"])
    assert step.terms["presence"].item() == pytest.approx(0, abs=1e-6)
    assert step.terms["reliability"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_reliability_uses_the_dice_of_the_plans(make_trainer, monkeypatch, batch_dice):
    real, asked = losses.reliability_dice, []
    monkeypatch.setattr(losses, "reliability_dice", lambda *a, **o: asked.append(o["batch_dice"]) or real(*a, **o))
    trainer = make_trainer(AdaMMTrainer, block=NO_TERMS, batch_dice=batch_dice)
    trainer.train_step(batch(trainer))
    assert asked == [batch_dice]


def test_the_presence_head_learns(make_trainer, monkeypatch):
    trainer = make_trainer(AdaMMTrainer, block={**NO_TERMS, "schedule": {"optimizer": "adamw", "initial_lr": 0.02}})
    content = batch(trainer)
    monkeypatch.setattr(trainer, "draw_availability", complete)
    content["target"][0][1] = 0  # nothing in the second sample, which is smooth
    content["data"][1] = torch.linspace(-1, 1, 16)
    values = []
    for _ in range(50):
        values.append(trainer.train_step(content)["terms"]["presence"])
    assert values[-1] < 0.5 * values[0]


# ---- teacher -------------------------------------------------------------------------------------------------------


def test_presence_and_reliability_need_no_teacher(make_trainer, monkeypatch):
    trainer = make_trainer(AdaMMTrainer, block=NO_TERMS)
    assert not trainer.needs_teacher
    monkeypatch.setattr(trainer, "_load_teacher", lambda: pytest.fail("no teacher is asked for"))
    trainer.prepare_training()
    assert list(trainer.train_step(batch(trainer))["terms"]) == ["segmentation", "presence", "reliability"]
    assert make_trainer(AdaMMTrainer).needs_teacher


def test_the_teacher_is_the_plans_own_network(make_trainer):
    teacher, plain = make_trainer(AdaMMTeacherTrainer), make_trainer(nnUNetTrainer)
    assert teacher.network.state_dict().keys() == plain.network.state_dict().keys()
    plain.network.load_state_dict(teacher.network.state_dict())
    x = batch(plain)["data"]
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(plain.network(x), teacher.network(x), strict=True))


@pytest.mark.parametrize("labels", [None, REGIONS_WITH_IGNORE], ids=["labels", "regions"])
def test_a_teacher_with_a_presence_head_has_the_students_two_terms(make_trainer, labels):
    teacher = make_trainer(AdaMMTeacherTrainer, block={"adamm_teacher": {"presence": True}}, labels=labels)
    content = batch(teacher)
    step = teacher.compute_losses(content["data"], content["target"])
    assert list(step.terms) == ["segmentation", "presence", "reliability"]
    expected = step.terms["segmentation"] + 0.1 * step.terms["presence"] + 0.5 * step.terms["reliability"]
    assert step.total.item() == pytest.approx(expected.item(), rel=1e-6)
    before = state(teacher.network)
    teacher.train_step(content)
    assert not torch.equal(before["presence.logits.weight"], teacher.network.presence.logits.weight)
    # the head changes nothing of what the network segments, and the student starts from it
    plain = make_trainer(AdaMMTeacherTrainer, labels=labels)
    plain.network.load_state_dict({k: v for k, v in before.items() if not k.startswith("presence.")})
    teacher.network.load_state_dict(before)
    with torch.no_grad():
        pairs = zip(plain.network(content["data"]), teacher.network(content["data"]), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    student = make_trainer(AdaMMTrainer, labels=labels)
    loaded, _ = checkpoints.load_matching(student.network, teacher.network.state_dict())
    assert "presence.logits.weight" in loaded


def test_the_teachers_terms_can_be_weighted(make_trainer):
    section = {"presence": True, "presence_weight": 0.3, "reliability": 0}
    teacher = make_trainer(AdaMMTeacherTrainer, block={"adamm_teacher": section})
    assert [(term.name, term.weight) for term in teacher.terms] == [("presence", 0.3)]
    with pytest.raises(SettingsError, match="presence_weight"):
        make_trainer(AdaMMTeacherTrainer, block={"adamm_teacher": {"presence_weight": 0}})
    assert not make_trainer(AdaMMTeacherTrainer).terms


def test_teacher_of_other_widths_is_refused(make_trainer):
    other = make_trainer(AdaMMTeacherTrainer, features=(8, 16, 32)).network
    teacher = Teacher(other, {}, {"path": "somewhere"}, Settings([]))
    with pytest.raises(
        ValueError, match=r"channels per stage = \[8, 16, 32\], the student \[8, 16, 24\]; the terms content"
    ):
        make_trainer(AdaMMTrainer).check_teacher(teacher)
    make_trainer(AdaMMTrainer, block=block(content=0, style=0)).check_teacher(teacher)


def test_warm_start_reproduces_the_teachers_output(make_trainer):
    trainer = make_trainer(AdaMMTrainer)
    teacher = make_trainer(AdaMMTeacherTrainer, seed=5).network
    loaded, kept = checkpoints.load_matching(trainer.network, teacher.state_dict())
    assert len(loaded) == len(teacher.state_dict())
    assert {name.split(".")[0] for name in kept} == {"encoder_adapters", "decoder_adapters", "refinement", "presence"}
    x = batch(trainer)["data"]
    x[0, 1:] = 0
    with torch.no_grad():
        assert torch.equal(trainer.network(x)[0], teacher(x)[0])


# ---- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adamm", [{}, {"refinement": "dense"}, {"presence": False}, {"bank": "factorised"}, {"subsets": ["T0"]}], ids=str
)
def test_every_parameter_takes_part_in_a_step(make_trainer, adamm):
    trainer = give_teacher(make_trainer(AdaMMTrainer, block=block(**adamm)))
    trainer.train_step(batch(trainer))
    without = [name for name, parameter in trainer.network.named_parameters() if parameter.grad is None]
    assert without == ["decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"]  # nnU-Net's weight 0


def test_adapters_are_trained_with_adamw_without_decay(make_trainer):
    trainer = make_trainer(AdaMMTrainer, block={"schedule": {"added_lr": 2e-3}})
    decay, rate, kind = {}, {}, {}
    names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
    for member in trainer.optimizer.members:
        for group in member.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                decay[name], rate[name], kind[name] = group["weight_decay"], group["initial_lr"], type(member).__name__
    assert decay.keys() == set(names.values())
    for name in decay:
        added = name.split(".")[0] in ("encoder_adapters", "decoder_adapters", "refinement")
        assert kind[name] == ("AdamW" if added else "SGD") and rate[name] == (2e-3 if added else 1e-2)
        if "adapters" in name:
            assert decay[name] == 0


def test_only_bank_rows_of_drawn_subsets_are_updated(make_trainer, monkeypatch):
    trainer = make_trainer(AdaMMTrainer, block=NO_TERMS)
    monkeypatch.setattr(
        trainer, "draw_availability", lambda size, present=None: torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]]).bool()
    )
    before = state(trainer.network)["decoder_adapters.0.up"]
    trainer.train_step(batch(trainer))
    moved = (trainer.network.decoder_adapters[0].up != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved == [0, 5]


# ---- settings ------------------------------------------------------------------------------------------------------


def test_bank_and_subsets_are_stored_resolved(make_trainer):
    trainer = make_trainer(AdaMMTrainer, block=block(subsets=["t3+T0", "#1"]))
    stored = trainer.plans_manager.plans["configurations"]["tiny"][BLOCK]["adamm"]
    assert stored["subsets"] == ["#0+#3", "#1"] and stored["bank"] == "factorised"
    again = AdaMMTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 4, 3, enable_deep_supervision=False
    )
    again.load_state_dict(trainer.network.state_dict())
    assert make_trainer(AdaMMTrainer).settings[AdaMMSettings].bank == "full"
    assert make_trainer(AdaMMTrainer, channels=6).settings[AdaMMSettings].bank == "factorised"


@pytest.mark.parametrize(
    ("adamm", "message"),
    [
        ({"subsets": ["T0+T9"]}, "unknown modality 'T9'"),
        ({"subsets": ["T0+T1", "#1+#0"]}, "appears twice in the list"),
        ({"subsets": ["T0"], "bank": "full"}, r"adamm\.subsets"),
        ({"bank": "large"}, "one of auto, full, factorised"),
        ({"refinement": "tree"}, "one of graph, dense, off"),
        ({"reduction": 0}, r"adamm\.reduction"),
        ({"nodes": 1}, r"adamm\.nodes"),
        ({"style": -1}, r"adamm\.style"),
        ({"presence_weight": 0}, r"adamm\.presence_weight is 0\.0, expected a number above 0"),
        ({"gate": 1.0}, r"adamm\.gate"),
        ({"gate": 0.2, "presence": False}, r"adamm\.gate"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(make_trainer, adamm, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(AdaMMTrainer, plans(block=block(**adamm)))


def test_weights_may_differ_from_the_checkpoint(make_trainer):
    trainer = make_trainer(AdaMMTrainer, block=block(style=0.3, nodes=4))
    stored = trainer.settings
    given, sections = block(style=0.3, nodes=4), AdaMMTrainer.design.sections
    changed = stored.replace(AdaMMSettings, style=0.5, gate=0.1)
    refuse_other_network(given, sections, stored, changed, "the checkpoint")
    with pytest.raises(SettingsError, match=r"adamm\.nodes = 4, the checkpoint was trained with 6"):
        refuse_other_network(given, sections, stored, stored.replace(AdaMMSettings, nodes=6), "the checkpoint")


def test_terms_of_weight_zero_are_not_listed(make_trainer):
    def active(**adamm):
        return tuple(term.name for term in make_trainer(AdaMMTrainer, block=block(**adamm)).terms)

    assert active() == ("consistency", "content", "style", "presence", "reliability")
    assert active(presence=False, adversarial=1) == BBDM
    assert "reliability" not in active(reliability=0)
