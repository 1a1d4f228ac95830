"""The plans' U-Net with the multi-scale transformer: identity at the start, features, tokens, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hand_networks import Case

from nnunetv2_mstkd.methods.mstkd.network import (
    Features,
    MultiScaleTransformer,
    TransformerDesign,
    style_level,
    token_patch,
)
from nnunetv2_mstkd.methods.mstkd.settings import NetworkSettings
from nnunetv2_mstkd.networks.attention import positions_on
from nnunetv2_mstkd.nnunet.unet import UNetShape

ANISOTROPIC = [[1, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 2]]

CASES = {
    "2d plain": Case([8, 12, 16], [16, 24]),
    "2d residual": Case([8, 12, 16], [24, 16], residual=True),
    "3d plain": Case([6, 8, 12, 16], [16, 24, 16]),
    "3d residual": Case([6, 8, 12, 16], [16, 16, 24], residual=True),
    "3d anisotropic": Case([6, 8, 12, 16], [24, 16, 6], ANISOTROPIC),
    "two stages": Case([8, 12], [8, 6, 4]),
    "two channels": Case([8, 12, 16], [8, 8, 12], channels=2),
    "seven channels": Case([8, 12, 16], [16, 8], channels=7, residual=True),
    "patched tokens": Case([8, 12, 16], [20, 12, 24], max_tokens=8),
    "two taps": Case([6, 8, 12, 16], [16, 16, 16], taps=2, convs=2),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


# ---- the plans' network inside -------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("deep_supervision", [False, True], ids=["tensor", "list"])
@torch.no_grad()
def test_a_new_network_equals_the_plans_unet(case, deep_supervision):
    plain, full = case.plain(deep_supervision=deep_supervision), case.full(deep_supervision=deep_supervision)
    missing, unexpected = full.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"transformer"}
    x = case.batch()
    expected = plain(x)
    assert isinstance(expected, list) == deep_supervision
    assert equal(full(x), expected)
    features = full(x, return_features=True, return_attention=True)
    assert equal(features.logits, expected)


@each_case
@torch.no_grad()
def test_a_trained_transformer_changes_the_output(case):
    plain, full = case.plain(), case.trained()
    full.load_state_dict(plain.state_dict(), strict=False)
    x = case.batch()
    assert not torch.allclose(full(x), plain(x), atol=1e-4)


@each_case
def test_plain_weights_load_strictly(case):
    plain, full = case.plain(), case.full()
    own = {name: value for name, value in full.state_dict().items() if not name.startswith("transformer.")}
    assert list(own) == list(plain.state_dict())
    plain.load_state_dict(own)
    full.encoder.load_state_dict(plain.encoder.state_dict())
    full.decoder.load_state_dict(plain.decoder.state_dict())


@torch.no_grad()
def test_deep_supervision_can_be_switched():
    case = CASES["3d plain"]
    network, x = case.trained(deep_supervision=True), case.batch()
    outputs = network(x)
    assert [list(output.shape[2:]) for output in outputs] == [[16, 24, 16], [8, 12, 8], [4, 6, 4]]
    network.decoder.deep_supervision = False
    assert torch.equal(network(x), outputs[0])


def test_initial_weights_are_those_of_nnunet():
    case = CASES["3d plain"]
    plain, full = case.plain(), case.full(seed=0)
    for name, value in plain.state_dict().items():
        assert torch.equal(full.state_dict()[name], value)


@pytest.mark.parametrize("channels", [2, 7])
@torch.no_grad()
def test_a_batch_of_one_is_a_part_of_a_batch(channels):
    network = (case := CASES["two channels" if channels == 2 else "seven channels"]).trained()
    x = case.batch(2)
    assert torch.allclose(network(x[:1]), network(x)[:1], atol=1e-5)


# ---- features ------------------------------------------------------------------------------------------------------


@each_case
@torch.no_grad()
def test_features_have_the_shapes_of_their_stages(case):
    network, shape, settings = case.trained(), case.shape, case.network
    found = network(case.batch(), return_features=True, return_attention=True)
    assert isinstance(found, Features)
    tokens = math.prod(math.ceil(e / p) for e, p in zip(shape.grids[-1], settings.patch, strict=True))
    assert [tuple(a.shape) for a in found.attention] == [(2, settings.heads, tokens, tokens)] * settings.taps
    for attention in found.attention:
        assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5)
    expected = [(2, shape.widths[-1], *shape.grids[-1])]
    expected += [(2, shape.widths[-1 - level], *shape.grids[-1 - level]) for level in range(1, settings.taps)]
    assert [tuple(z.shape) for z in found.maps] == expected
    level = network.style_level
    assert 1 <= level < settings.taps
    for feature in (found.f_enc, found.f_t, found.f_dec):
        assert tuple(feature.shape) == expected[level]
    assert found.f_t is found.maps[level]


@torch.no_grad()
def test_order_of_attention_and_of_maps():
    case = Case([6, 8, 12, 16], [16, 16, 16], taps=2, depth=4)
    module = case.trained().transformer
    bottleneck = torch.randn(1, 16, *case.shape.grids[-1])
    finer = torch.randn(1, 12, *case.shape.grids[-2])
    skips, maps, attention = module([finer, bottleneck], return_attention=True)
    x = (module.embed(bottleneck) + module.position).flatten(2).transpose(1, 2)
    states, scores = [], []
    for block in module.blocks:
        x, score = block(x, return_attention=True)
        states.append(x.transpose(1, 2).unflatten(2, bottleneck.shape[2:]))
        scores.append(score)
    for found, index in zip(attention, (1, 3), strict=True):
        assert torch.allclose(found, scores[index], atol=1e-6)
        assert not torch.allclose(found, scores[4 - index], atol=1e-6)

    def normalised(state: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        return module.unpatch(norm(state.movedim(1, -1)).movedim(-1, 1))

    assert torch.allclose(maps[0], normalised(states[3], module.norms[0]), atol=1e-5)
    assert torch.allclose(maps[1], module.pyramids[0](normalised(states[1], module.norms[1])), atol=1e-5)
    for joined, skip, z, projection in zip(skips[::-1], (bottleneck, finer), maps, module.projections, strict=True):
        assert torch.equal(joined, skip + projection(z))


@each_case
@torch.no_grad()
def test_logits_do_not_depend_on_asking_for_features(case):
    network, x = case.trained(), case.batch()
    plain = network(x)
    assert torch.equal(network(x, return_features=True).logits, plain)
    explicit = network(x, return_features=True, return_attention=True)
    assert torch.allclose(explicit.logits, plain, atol=1e-4)
    assert network(x, return_features=True).attention == ()


@torch.no_grad()
def test_style_features_of_encoder_and_decoder():
    case = CASES["3d plain"]
    network, x = case.full(), case.batch()
    found = network(x, return_features=True)
    skips = network.encoder(x)
    level = network.style_level
    assert torch.equal(found.f_enc, skips[-1 - level])
    # f_enc is what the encoder gave, also where the transformer adds something to it
    assert torch.equal(case.trained()(x, return_features=True).f_enc, skips[-1 - level])
    low = skips[-1]
    for stage in range(level):
        low = network.decoder.stages[stage](
            torch.cat((network.decoder.transpconvs[stage](low), skips[-(stage + 2)]), 1)
        )
    assert torch.equal(found.f_dec, low)


@pytest.mark.parametrize("name", ["3d anisotropic", "2d plain"])
@torch.no_grad()
def test_pooled_encoder_feature_is_a_maximum(name):
    case = CASES[name]
    network, x = case.full(), case.batch()
    network.style_level = 1
    skips = network.encoder(x)
    pooled = network(x, return_features=True, pool_encoder=True).f_enc
    above, own = skips[-3], skips[-2]
    assert pooled.shape == (2, above.shape[1], *own.shape[2:])
    stride = case.shape.strides[-2]
    corner = tuple(slice(0, step) for step in stride)
    assert torch.equal(pooled[(..., *[0] * len(stride))], above[(..., *corner)].flatten(2).amax(2))


@torch.no_grad()
def test_finest_stage_is_not_pooled():
    case = CASES["two stages"]
    network, x = case.full(), case.batch()
    assert torch.equal(
        network(x, return_features=True, pool_encoder=True).f_enc, network(x, return_features=True).f_enc
    )


@pytest.mark.parametrize(
    ("grids", "taps", "level"),
    [
        ([(64,) * 3, (32,) * 3, (16,) * 3, (8,) * 3, (4,) * 3], 4, 1),
        ([(32,) * 3, (16,) * 3, (8,) * 3, (4,) * 3, (2,) * 3], 4, 2),
        ([(32,) * 3, (16,) * 3, (8,) * 3, (4,) * 3, (2,) * 3], 2, 1),
        ([(64, 64), (32, 32), (16, 16), (8, 8)], 3, 2),
        ([(64, 64), (32, 32), (16, 16), (8, 8)], 4, 2),
        ([(64, 64), (16, 16), (8, 8)], 2, 1),
        ([(16, 16, 16), (8, 8, 8)], 2, 1),
    ],
)
def test_style_level_has_512_positions(grids, taps, level):
    assert style_level(UNetShape((8,) * len(grids), (), tuple(grids)), taps) == level


# ---- the published placement ---------------------------------------------------------------------------------------


@each_case
@torch.no_grad()
def test_on_the_main_path_the_decoder_reads_a_convolution_of_both(case):
    network, x = case.full(placement="main").eval(), case.batch()
    encoded = network.encoder(x)
    maps, _ = network.transformer.tokens(encoded[-1])
    skips = list(encoded)
    for level, z in enumerate(maps):
        projection = network.transformer.projections[level]
        weight, width = projection.weight.flatten(1), z.shape[1]
        joined = torch.einsum("oi,bi...->bo...", weight[:, :width], encoded[-1 - level])
        joined = joined + torch.einsum("oi,bi...->bo...", weight[:, width:], z)
        skips[-1 - level] = joined + projection.bias.reshape(1, -1, *[1] * (z.ndim - 2))
    features = network(x, return_features=True)
    assert torch.allclose(features.logits, network.decoder(skips), atol=1e-4)
    assert torch.allclose(features.content, skips[-1], atol=1e-5)


def test_on_the_main_path_every_parameter_learns_from_the_first_step():
    case = CASES["3d plain"]
    network = case.full(placement="main").train()
    network(case.batch()).square().mean().backward()
    for name, parameter in network.transformer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_main_path_keeps_the_names_of_the_unet():
    case = CASES["3d plain"]
    missing, unexpected = case.full(placement="main").load_state_dict(case.plain().state_dict(), strict=False)
    assert unexpected == [] and all(name.startswith("transformer.") for name in missing)


# ---- tokens and positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "max_tokens", "patch"),
    [
        ((4, 4, 4), 1024, (1, 1, 1)),
        ((16, 16, 16), 1024, (2, 2, 2)),
        ((16, 16, 4), 1024, (1, 1, 1)),
        ((16, 16, 16), 8, (8, 8, 8)),
        ((5, 5, 5), 100, (2, 2, 2)),
        ((40, 40), 1024, (2, 2)),
        ((100, 3), 10, (10, 3)),
        ((7, 7, 7), 1, (7, 7, 7)),
    ],
)
def test_token_patch_is_the_smallest_that_fits(grid, max_tokens, patch):
    assert token_patch(grid, max_tokens) == patch
    assert math.prod(math.ceil(e / p) for e, p in zip(grid, patch, strict=True)) <= max_tokens


def transformer(grid: tuple[int, ...], patch: tuple[int, ...]) -> MultiScaleTransformer:
    dimensions = len(grid)
    shape = UNetShape(
        (6, 8),
        ((1,) * dimensions, (2,) * dimensions),
        (tuple(2 * edge for edge in grid), grid),
    )
    torch.manual_seed(0)
    return MultiScaleTransformer(shape, NetworkSettings(depth=2, heads=2, taps=2, patch=patch, mlp_ratio=2.0)).eval()


@pytest.mark.parametrize(("grid", "patch"), [((5, 4, 3), (2, 2, 2)), ((5, 3), (3, 3)), ((4, 4, 4), (2, 2, 2))])
@torch.no_grad()
def test_indivisible_grids_are_padded_and_cropped(grid, patch):
    module = transformer(grid, patch)
    x = torch.randn(2, 8, *grid)
    finer = torch.randn(2, 6, *(2 * edge for edge in grid))
    skips, maps, attention = module([finer, x], return_attention=True)
    tokens = math.prod(math.ceil(e / p) for e, p in zip(grid, patch, strict=True))
    assert attention[0].shape[-1] == tokens == module.position[0, 0].numel()
    assert [z.shape[2:] for z in maps] == [tuple(grid), tuple(2 * edge for edge in grid)]
    assert [skip.shape for skip in skips[::-1]] == [z.shape for z in maps]
    padded = torch.zeros(2, 8, *(math.ceil(e / p) * p for e, p in zip(grid, patch, strict=True)))
    padded[(..., *(slice(edge) for edge in grid))] = x
    assert torch.equal(module._pad(x), padded)


@torch.no_grad()
def test_positions_are_interpolated_to_other_grids():
    module = transformer((4, 4, 4), (1, 1, 1))
    x = torch.randn(1, 8, 6, 4, 2)
    maps, attention = module.tokens(x, return_attention=True)
    assert maps[0].shape == x.shape
    assert attention[0].shape[-1] == 48
    expected = torch.nn.functional.interpolate(module.position, size=(6, 4, 2), mode="trilinear", align_corners=False)
    assert torch.equal(positions_on(module.position, (6, 4, 2)), expected)
    assert positions_on(module.position, (4, 4, 4)) is module.position


@torch.no_grad()
def test_interpolated_positions_stay_linear():
    module = transformer((4, 4), (1, 1))
    module.position.copy_(torch.arange(4.0).view(1, 1, 4, 1).expand_as(module.position))
    fine = positions_on(module.position, (8, 4))[0, 0, :, 0]
    assert torch.allclose(fine[1:-1], torch.arange(0.25, 3, 0.5))


@torch.no_grad()
def test_other_image_sizes_are_accepted():
    case = CASES["3d plain"]
    assert case.trained()(torch.randn(1, 4, 32, 16, 24)).shape == (1, 3, 32, 16, 24)


def test_positions_tell_tokens_apart():
    module = transformer((4, 4), (1, 1))
    with torch.no_grad():
        maps, _ = module.tokens(torch.ones(1, 8, 4, 4))
        module.position.zero_()
        same, _ = module.tokens(torch.ones(1, 8, 4, 4))
    assert maps[0].flatten(2).std(2).max() > 1e-3
    assert same[0].flatten(2).std(2).max() < 1e-5


# ---- learning and compiling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2d residual", "3d anisotropic", "patched tokens", "two stages"])
def test_gradients_reach_projections_first(name):
    case = CASES[name]
    network, x = case.full().train(), case.batch()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)

    def backward() -> set[str]:
        optimizer.zero_grad()
        network(x).square().mean().backward()
        return {
            parameter_name
            for parameter_name, parameter in network.transformer.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().max() > 0
        }

    everything = {parameter_name for parameter_name, _ in network.transformer.named_parameters()}
    first = {parameter_name for parameter_name in everything if parameter_name.startswith("projections")}
    assert backward() == first
    optimizer.step()
    assert backward() == everything


def test_gradients_of_features_reach_the_transformer():
    case = CASES["3d plain"]
    network = case.full().train()
    found = network(case.batch(), return_features=True, return_attention=True)
    (sum(z.square().mean() for z in found.maps) + sum(a.square().mean() for a in found.attention)).backward()
    for name, parameter in network.transformer.named_parameters():
        reached = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert reached != name.startswith("projections"), name


def test_added_modules_are_what_the_plain_unet_lacks():
    case = CASES["3d plain"]
    network = case.full()
    modules = TransformerDesign().added_modules(network)
    added = {id(parameter) for module in modules for parameter in module.parameters()}
    plain = sum(parameter.numel() for parameter in case.plain().parameters())
    assert sum(p.numel() for p in network.parameters() if id(p) not in added) == plain


@pytest.mark.compiled
@torch.no_grad()
def test_forward_pass_compiles_into_one_graph():
    # two of four blocks are tapped, so both ways to compute the attention are in it
    case = CASES["two stages"]
    network, x = case.trained(), case.batch()
    options = {"return_features": True, "return_attention": True}
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x, **options), network(x, **options)
    assert isinstance(found, Features)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    for one, other in zip((*found.maps, *found.attention), (*expected.maps, *expected.attention), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    for name in ("f_enc", "f_t", "f_dec"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
