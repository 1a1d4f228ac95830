"""Sizes of the multi-scale transformer that follow from the plans, and what they cost."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hand_networks import Case
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.methods.mstkd.network import (
    FLOPS_SHARE,
    PARAMETER_SHARE,
    MultiScaleTransformer,
    MultiScaleTransformerUNet,
    TransformerDesign,
    resolve,
)
from nnunetv2_mstkd.methods.mstkd.settings import NetworkSettings
from nnunetv2_mstkd.networks.attention import default_heads
from nnunetv2_mstkd.nnunet.unet import UNetPlan, UNetShape
from nnunetv2_mstkd.training.settings import Settings, SettingsError

COSTS = {
    "3d 128 plain": Case([32, 64, 128, 256, 320, 320], [128] * 3, convs=2),
    "3d 128 residual": Case([32, 64, 128, 256, 320, 320], [128] * 3, residual=True, convs=4),
    "3d thick slices": Case(
        [32, 64, 128, 256, 320, 320],
        [20, 256, 224],
        [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
        convs=2,
    ),
    "3d many tokens": Case([32, 64, 128, 256], [128] * 3, convs=2),
    "2d 512": Case([32, 64, 128, 256, 512, 512, 512, 512], [512, 512], convs=2),
    "3d 40": Case([32, 64, 128, 256], [40] * 3, convs=2),
    # enough parameters for 8 blocks, not enough FLOPs
    "2d many blocks": Case([32, 64, 128, 256], [64, 64], residual=True, convs=10),
}
RESOLVED_DEPTH = {"3d 128 plain": 8, "3d 128 residual": 12, "3d thick slices": 8}
AT_THE_FLOOR = 4


def flops(network: torch.nn.Module, case: Case) -> int:
    """Counted by PyTorch from the operators that run; on the meta device nothing is computed."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, case.plan.num_modalities, *case.plan.patch_size))
    return counter.get_total_flops()


@functools.cache
def unet_and_flops(name: str) -> tuple[torch.nn.Module, int]:
    case = COSTS[name]
    with torch.device("meta"):
        unet = case.plain()
    return unet, flops(unet, case)


@functools.cache
def shares(name: str, depth: int) -> tuple[float, float]:
    """Parameters and FLOPs that a transformer of this depth adds, as shares of the plans' U-Net."""
    case, (unet, base) = COSTS[name], unet_and_flops(name)
    with torch.device("meta"):
        section = dataclasses.replace(case.network, depth=depth)
        network = MultiScaleTransformerUNet(unet.encoder, unet.decoder, case.shape, section)
    added = sum(parameter.numel() for module in network.transformer.modules() for parameter in module.parameters(False))
    own = sum(parameter.numel() for parameter in unet.parameters())
    return added / own, (flops(network, case) - base) / base


@pytest.mark.parametrize("name", COSTS)
def test_depth_is_the_largest_within_the_budget(name):
    depth = COSTS[name].network.depth
    assert depth == RESOLVED_DEPTH.get(name, AT_THE_FLOOR)
    # norms, biases and positions are not in the budget, hence a hundredth of room
    if depth > AT_THE_FLOOR:
        parameters, share = shares(name, depth)
        assert parameters <= PARAMETER_SHARE * 1.01
        assert share <= FLOPS_SHARE * 1.01
    if depth < 12:
        parameters, share = shares(name, depth + COSTS[name].network.taps)
        assert parameters > PARAMETER_SHARE * 0.99 or share > FLOPS_SHARE * 0.99


def test_usual_plan_costs_less_than_1_percent_of_flops():
    assert COSTS["3d 128 plain"].network == NetworkSettings(
        depth=8, heads=8, taps=4, patch=(1, 1, 1), max_tokens=1024, mlp_ratio=4.0
    )
    parameters, share = shares("3d 128 plain", 8)
    assert 0.4 < parameters < 0.5
    assert 0 < share < 0.01


def test_taps_are_evenly_spaced_up_to_the_last_block():
    assert COSTS["3d 128 plain"].shape.grids[-1] == (4, 4, 4)
    case = Case([6, 8, 12, 16], [16] * 3)
    for depth, taps, tapped in ((12, 4, (2, 5, 8, 11)), (4, 4, (0, 1, 2, 3)), (6, 2, (2, 5))):
        section = NetworkSettings(depth=depth, heads=1, taps=taps, patch=(1, 1, 1), mlp_ratio=1.0)
        module = MultiScaleTransformer(case.shape, section)
        assert module.tapped == tapped


@pytest.mark.parametrize(("stages", "taps", "depth"), [(2, 2, 4), (3, 3, 6), (4, 4, 4), (6, 4, 4)])
def test_small_unets_have_fewer_taps(stages, taps, depth):
    case = Case([8] * stages, [4 * 2 ** (stages - 1)] * 2)
    assert (case.network.taps, case.network.depth) == (taps, depth)


@pytest.mark.parametrize("width", [32, 48, 64, 66, 96, 128, 160, 204, 256, 320, 384, 512])
def test_heads_have_32_to_64_channels_if_possible(width):
    assert width % default_heads(width) == 0
    assert 32 <= width // default_heads(width) <= 64


@pytest.mark.parametrize(
    ("width", "heads"), [(320, 8), (256, 4), (512, 8), (24, 1), (4, 1), (66, 2), (74, 2), (131, 1)]
)
def test_default_number_of_heads(width, heads):
    assert default_heads(width) == heads


def test_resolving_keeps_given_numbers():
    case = Case([8, 12, 16], [16] * 3)
    given = NetworkSettings(depth=6, heads=4, taps=2, patch=(2, 2, 2), mlp_ratio=2.0)
    assert resolve(given, case.plan) == given
    assert resolve(case.network, case.plan) == case.network
    assert None not in case.network.to_dict().values()


def test_the_design_resolves_its_section_alone():
    case = Case([8, 12, 16], [16] * 3)
    settings = Settings.read({"network": {"taps": 2}, "smml": {"pixel": 1}}, TransformerDesign.sections)
    resolved = TransformerDesign().resolve(settings, case.plan)
    assert resolved[NetworkSettings] == resolve(NetworkSettings(taps=2), case.plan)
    assert resolved.to_block()["smml"] == {"pixel": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "network.heads is 5, expected a divisor of the bottleneck width 16"),
        ({"taps": 4}, "network.taps is 4, expected at most the 3 stages"),
        ({"depth": 4}, r"network.depth is 4, expected a multiple of taps \(3\)"),
        ({"patch": [2, 2]}, "expected 3 edges"),
        ({"patch": [5, 1, 1]}, "at most those of the bottleneck grid"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    case = Case([8, 12, 16], [16] * 3)
    with pytest.raises(SettingsError, match=message):
        resolve(NetworkSettings(**settings), case.plan)


def test_unsupported_plans_are_refused():
    with pytest.raises(InputError, match="needs at least 2"):
        Case([8], [8, 8, 8])
    case = Case([6, 8, 12, 16], [16, 24, 16])
    plan = dataclasses.replace(case.plan, architecture_class="some.where.PrimusM")
    settings = Settings([case.network])
    for refuse in (lambda: TransformerDesign().check(plan, settings, "ABCD"), plan.build):
        with pytest.raises(InputError, match="the plans ask for the network PrimusM"):
            refuse()


def test_a_shape_reads_numbers_and_lists():
    kwargs = {"n_stages": 3, "features_per_stage": 8, "strides": [1, 2, [2, 1]]}
    shape = UNetPlan("PlainConvUNet", kwargs, (), (16, 12), 4).shape
    assert shape == UNetShape(widths=(8, 8, 8), strides=((1, 1), (2, 2), (2, 1)), grids=((16, 12), (8, 6), (4, 6)))


@torch.no_grad()
def test_weights_of_two_heads_load_but_mislead_four():
    # the reason why resolved numbers are stored with a model
    two, four = Case([8, 12, 16], [16] * 2, heads=2), Case([8, 12, 16], [16] * 2, heads=4)
    trained, other = two.trained(), four.full()
    other.load_state_dict(trained.state_dict(), strict=True)
    x = two.batch()
    assert not torch.allclose(trained(x), other(x), atol=1e-4)
    again = two.full()
    again.load_state_dict(trained.state_dict())
    assert torch.equal(trained(x), again(x))
