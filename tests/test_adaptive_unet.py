"""The plans' U-Net with AdaMM's parts: identity at the start, what it returns, and which modalities it believes in."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import hand_plans
import numpy as np
import pytest
import torch
from hand_networks import plain_network, unet_plan

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods.adamm.network import (
    PARTS_OFF,
    AdaptiveDesign,
    AdaptiveUNet,
    PlainDesign,
    PresenceHead,
    distillation_stage,
    style_channels,
)
from nnunetv2_mstkd.methods.adamm.settings import AdaMMSettings, AdaMMTeacherSettings
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.settings import Settings, SettingsError

LABELS = SimpleNamespace(has_regions=False, num_segmentation_heads=3)
NOTHING: dict[str, Any] = {"adapters": False, "refinement": "off", "presence": False}
ABLATIONS = {
    "everything": {},
    "no adapters": {"adapters": False},
    "dense fusion": {"refinement": "dense"},
    "no refinement": {"refinement": "off"},
    "adapters alone": {"refinement": "off", "presence": False},
    "refinement alone": {"adapters": False, "presence": False},
    "nothing": NOTHING,
    "factorised": {"bank": "factorised"},
    "two listed": {"subsets": ["#0", "#0+#1"]},
}


def resolved(plan: UNetPlan, **adamm: Any) -> Settings:
    return AdaptiveDesign().resolve(Settings([AdaMMSettings(**adamm)]), plan)


class Case:
    def __init__(
        self, dimensions: int = 3, channels: int = 4, *, residual: bool = False, stages: int = 3, **adamm: Any
    ):
        architecture = hand_plans.architecture(
            [8, 12, 16, 20][:stages], dimensions=dimensions, residual=residual, convs=1
        )
        patch = [16] * 3 if dimensions == 3 else [48, 48]
        self.plan = unet_plan(architecture, patch, channels=channels)
        self.settings = resolved(self.plan, **adamm)

    def plain(self, *, deep_supervision: bool = False) -> Any:
        torch.manual_seed(0)
        return plain_network(self.plan, deep_supervision=deep_supervision)

    def full(self, *, deep_supervision: bool = False, awake: bool = False) -> AdaptiveUNet:
        """With the weights of :meth:`plain`; ``awake``: and with parts that do something."""
        torch.manual_seed(1)
        plan = dataclasses.replace(self.plan, deep_supervision=deep_supervision)
        network = AdaptiveDesign().build(plan, self.settings).eval()
        if awake:
            with torch.no_grad():
                for module in AdaptiveDesign().added_modules(network):
                    for parameter in module.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.2)
        network.load_state_dict(self.plain().state_dict(), strict=False)
        return network

    def batch(self, subsets: torch.Tensor) -> torch.Tensor:
        data = torch.randn(
            len(subsets), self.plan.num_modalities, *self.plan.patch_size, generator=torch.Generator().manual_seed(2)
        )
        return modalities.mask_modalities(data, subsets)


SHAPES = [
    {"dimensions": 3},
    {"dimensions": 2},
    {"dimensions": 3, "residual": True},
    {"dimensions": 2, "residual": True, "stages": 4},
    {"dimensions": 3, "stages": 2},
]
SHAPE_NAMES = ["3d", "2d", "3d residual", "2d residual, 4 stages", "2 stages"]


@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_a_new_network_equals_the_plans_unet(shape, ablation):
    case = Case(**shape, **ablation)
    x = case.batch(modalities.all_subsets(4)[[0, 5, 13, 14]])
    with torch.no_grad():
        for deep in (False, True):
            wanted = case.plain(deep_supervision=deep)(x)
            found = case.full(deep_supervision=deep)(x)
            for one, other in zip(wanted if deep else [wanted], found if deep else [found], strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [2, 3, 4, 6])
def test_complete_input_bypasses_the_trained_parts(channels):
    case = Case(channels=channels)
    subsets = modalities.all_subsets(channels)
    x = case.batch(subsets)
    with torch.no_grad():
        wanted, found = case.plain()(x), case.full(awake=True)(x)
    assert torch.equal(wanted[-1], found[-1])
    for one, other in zip(wanted[:-1], found[:-1], strict=True):
        assert not torch.allclose(one, other)


@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_samples_of_a_mixed_batch_are_independent(ablation):
    case = Case(channels=3, **ablation)
    subsets = modalities.all_subsets(3)
    x, network = case.batch(subsets), case.full(awake=True)
    with torch.no_grad():
        together = network(x)
        for row in range(len(subsets)):
            torch.testing.assert_close(network(x[row : row + 1]), together[row : row + 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bank", ["full", "factorised"])
def test_subsets_differ_in_more_than_their_input(bank):
    case = Case(channels=3, bank=bank)
    network = case.full(awake=True)
    x = case.batch(torch.tensor([[True, False, False]]))
    outputs = []
    with torch.no_grad():
        for said in ([True, False, False], [True, True, False], [False, True, True]):
            with network.conditioned(torch.tensor([said]), LABELS):
                outputs.append(network(x))
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])


# ---- which modalities there are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
def test_stated_and_seen_availability_agree(dimensions):
    case = Case(dimensions)
    network = case.full(awake=True)
    subsets = modalities.all_subsets(4)
    x = case.batch(subsets)
    with torch.no_grad():
        seen = network(x)
        with network.conditioned(subsets, LABELS):
            assert torch.equal(network(x), seen)
        empty = torch.zeros_like(x[:1])
        plain = case.plain()(empty)
        assert torch.equal(network(empty), plain)
        for said in (torch.tensor([[True, False, False, True]]), torch.ones(1, 4, dtype=torch.bool)):
            with network.conditioned(said, LABELS):
                assert torch.equal(network(empty), plain)


def test_stated_availability_wins():
    case = Case()
    network = case.full(awake=True)
    x = case.batch(torch.tensor([[True, True, False, False]]))
    with torch.no_grad():
        seen = network(x)
        with network.conditioned(torch.tensor([[True, True, True, False]]), LABELS):
            assert not torch.equal(network(x), seen)
        assert torch.equal(network(x), seen)


def test_an_error_ends_the_conditioning():
    network = Case(gate=0.5).full()
    with pytest.raises(RuntimeError, match="out of memory"), network.conditioned(torch.ones(1, 4).bool(), LABELS):
        raise RuntimeError("out of memory")
    assert network.availability is None and network._gate is None


def test_availability_gate_and_index_are_not_saved():
    network = Case(subsets=["#0"], gate=0.5).full()
    before = set(network.state_dict())
    with network.conditioned(torch.ones(1, 4, dtype=torch.bool), LABELS):
        assert set(network.state_dict()) == before
    plain = set(Case().plain().state_dict())
    assert plain < before
    assert {name.split(".")[0] for name in before - plain} == {
        "encoder_adapters",
        "decoder_adapters",
        "refinement",
        "presence",
    }


# ---- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_features_are_on_the_stage_with_512_positions(shape):
    case = Case(**shape)
    network = case.full(deep_supervision=True)
    x = case.batch(torch.ones(2, 4, dtype=torch.bool))
    features = network(x, return_features=True, return_style=True)
    assert isinstance(features.logits, list)
    grid = features.content.shape[2:]
    assert grid.numel() >= 512
    assert [tuple(entry.shape[2:]) for entry in features.style] == [tuple(grid)] * 3
    enter, joined, leave = features.style
    assert torch.equal(leave, features.content)
    assert joined.shape[1] == style_channels(case.plan.shape)
    assert torch.equal(joined[:, -leave.shape[1] :], leave)
    assert torch.equal(joined[:, -leave.shape[1] - enter.shape[1] : -leave.shape[1]], enter)
    assert features.presence.shape == (2, 3)
    assert network(x, return_features=True).style == ()


def test_style_map_is_pooled_from_the_stages_above():
    case = Case(dimensions=2)
    network = case.full()
    x = case.batch(torch.ones(1, 4, dtype=torch.bool))
    skips = case.plain().encoder(x)
    features = network(x, return_features=True, return_style=True)
    assert network.stage == 1
    torch.testing.assert_close(features.style[0], torch.nn.functional.max_pool2d(skips[0], 2))
    torch.testing.assert_close(features.content, skips[1])


def test_content_is_taken_before_the_adapter():
    case = Case()
    network = case.full(awake=True)
    x = case.batch(torch.tensor([[True, False, False, True]]))
    with torch.no_grad():
        skips = case.plain().encoder(x)
        assert torch.equal(network(x, return_features=True).content, skips[1])  # stage 0 has no adapter


def test_graph_refines_the_stage_by_its_adapter():
    case = Case()
    network = case.full(awake=True)
    seen = []
    network.refinement.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    decoded = []
    network.decoder.stages[0].register_forward_pre_hook(lambda module, inputs: decoded.append(inputs[0]))
    subsets = torch.tensor([[True, False, False, True], [True] * 4])
    x = case.batch(subsets)
    with torch.no_grad():
        network(x)
        stage = case.plain().encoder(x)[1]
    specific, general, partial, refined = seen[0]
    assert torch.equal(general, stage)  # stage 0 has no adapter
    assert torch.equal(specific, network.encoder_adapters[0](stage, network.subsets(subsets)))
    assert partial.tolist() == [1.0, 0.0]
    assert torch.equal(decoded[0][:, -refined.shape[1] :], refined)  # the decoder's skip


@pytest.mark.parametrize(
    ("patch", "strides", "wanted"),
    [
        ([128, 128, 128], [[1, 1, 1]] + [[2, 2, 2]] * 5, 4),  # 8^3
        ([112, 96, 80], [[1, 1, 1]] + [[2, 2, 2]] * 4, 3),
        ([128, 112], [[1, 1]] + [[2, 2]] * 4, 2),  # 32 x 28
        ([8, 8], [[1, 1]] + [[2, 2]] * 2, 0),
    ],
)
def test_the_distillation_stage(patch, strides, wanted):
    widths = [32] * len(strides)
    kwargs = {"n_stages": len(strides), "features_per_stage": widths, "strides": strides}
    assert distillation_stage(UNetPlan("PlainConvUNet", kwargs, (), tuple(patch), 4).shape) == wanted


@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS.keys())
@pytest.mark.parametrize("subsets", [[[True] * 4], [[True, False, False, False]]], ids=["full", "one"])
def test_every_parameter_takes_part_in_every_step(ablation, subsets):
    case = Case(**ablation)
    network = case.full(deep_supervision=True).train()
    features = network(case.batch(torch.tensor(subsets)), return_features=True)
    loss = sum(level.square().mean() for level in features.logits)
    if features.presence is not None:
        loss = loss + features.presence.sum()
    loss.backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_mixed_precision_is_close_and_finite(ablation):
    case = Case(dimensions=2, **ablation)
    network = case.full(awake=True)
    x = case.batch(modalities.all_subsets(4)[[0, 7, 14]])
    wanted = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, return_features=True, return_style=True)
    assert found.logits.dtype == torch.bfloat16
    assert (found.logits - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    found.logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


# ---- presence ------------------------------------------------------------------------------------------------------


def test_presence_head_sees_a_single_voxel():
    torch.manual_seed(0)
    head = PresenceHead(4, 1, 3)
    torch.nn.init.constant_(head.logits.weight, 1.0)
    x = torch.full((1, 4, 16, 16, 16), -5.0)
    absent = head(x)
    x[..., 3, 4, 5] = 5.0
    assert absent < -5 and head(x) > 5


def test_presence_is_recorded_only_when_asked():
    case = Case(gate=0.5)
    network, ungated = case.full(awake=True), Case().full(awake=True)
    full = torch.ones(1, 4, dtype=torch.bool)
    patches = [case.batch(full), case.batch(full).flip(2).cumsum(3)]
    with torch.no_grad():
        wanted = torch.stack([network(patch, return_features=True).presence for patch in patches]).amax(0)
        for order in (patches, patches[::-1]):
            with network.conditioned(full, LABELS):
                for patch in order:
                    network(patch)
                torch.testing.assert_close(network._gate.seen, wanted)
        with ungated.conditioned(full, LABELS) as finish:
            for patch in patches:
                ungated(patch)
            np.testing.assert_allclose(finish.presence(), wanted.sigmoid().numpy(), rtol=1e-5)
        for silent in (network, ungated):
            silent.presence.register_forward_hook(lambda *call: pytest.fail("nobody reads the presence"))
            silent(patches[0])


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "given", "wanted"),
    [(2, {}, "full"), (5, {}, "full"), (6, {}, "factorised"), (4, {"subsets": ["#0"]}, "factorised")],
)
def test_bank_follows_the_number_of_modalities(channels, given, wanted):
    plan = Case(channels=channels).plan
    assert resolved(plan, **given)[AdaMMSettings].bank == wanted


def test_a_full_bank_of_too_many_modalities_is_refused():
    assert resolved(Case(channels=8).plan, bank="full")[AdaMMSettings].bank == "full"
    with pytest.raises(SettingsError, match="510 adapters per stage; expected at most 8"):
        resolved(Case(channels=9).plan, bank="full")


def test_a_switched_off_part_has_no_parameters():
    def parts(network):
        return {name.split(".")[0] for name, _ in network.named_parameters()} - {"encoder", "decoder"}

    assert AdaMMSettings(**NOTHING) == PARTS_OFF
    for presence, wanted in ((False, set()), (True, {"presence"})):
        section = AdaMMTeacherSettings(presence=presence)
        assert parts(PlainDesign().build(Case().plan, Settings([section]))) == wanted
    assert parts(Case(adapters=False).full()) == {"refinement", "presence"}
    assert parts(Case(refinement="off").full()) == {"encoder_adapters", "decoder_adapters", "presence"}
    assert parts(Case(presence=False).full()) == {"encoder_adapters", "decoder_adapters", "refinement"}


@pytest.mark.compiled
def test_network_compiles_into_one_graph():
    """Nothing of the choice of weights branches on the data."""
    case = Case(dimensions=2, gate=0.5)
    network = case.full(awake=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x = case.batch(modalities.all_subsets(4))
    with torch.no_grad():
        for order in (slice(None), torch.arange(14, -1, -1)):
            torch.testing.assert_close(compiled(x[order]), network(x[order]))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        with network.conditioned(modalities.all_subsets(4), LABELS):
            torch.testing.assert_close(compiled(x), network(x))
            seen = network._gate.seen
        with network.conditioned(modalities.all_subsets(4), LABELS):
            compiled(x)
            torch.testing.assert_close(network._gate.seen, seen)
    torch._dynamo.reset()
