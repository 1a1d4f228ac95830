"""Self-attention with and without maps, and the transformer block around it."""

from __future__ import annotations

import math

import pytest
import torch

from nnunetv2_mstkd.networks.attention import Attention, TransformerBlock


def attention(width: int = 12, heads: int = 3) -> Attention:
    torch.manual_seed(0)
    return Attention(width, heads)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("count", [1, 8, 65])
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_fused_and_explicit_attention_agree(batch, count, spread):
    module, x = attention(), spread * tokens(batch, count, 12)
    fast, none = module(x)
    slow, maps = module(x, return_attention=True)
    assert none is None
    assert maps.shape == (batch, 3, count, count)
    assert (fast - slow).abs().max() <= 1e-5 * max(1.0, spread)


def test_fused_and_explicit_gradients_agree():
    gradients = []
    for explicit in (False, True):
        module = attention()
        module(tokens(2, 9, 12), return_attention=explicit)[0].square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    assert gradients[0].abs().max() > 0.1
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_map_rows_are_distributions(spread):
    _, maps = attention()(spread * tokens(2, 20, 12), return_attention=True)
    assert maps.min() >= 0
    assert torch.allclose(maps.sum(-1), torch.ones(2, 3, 20), atol=1e-6)


@torch.no_grad()
def test_map_follows_equation_1():
    module, x = attention(4, 2), tokens(1, 3, 4)
    _, maps = module(x, return_attention=True)
    projected = x[0] @ module.qkv.weight.T + module.qkv.bias
    q, k, v = projected[:, 0:4], projected[:, 4:8], projected[:, 8:12]
    heads = []
    for head in range(2):
        channels = slice(2 * head, 2 * head + 2)
        scores = [[float(q[i, channels] @ k[j, channels]) / math.sqrt(2) for j in range(3)] for i in range(3)]
        expected = torch.tensor([[math.exp(s) / sum(math.exp(t) for t in row) for s in row] for row in scores])
        assert torch.allclose(maps[0, head], expected, atol=1e-6)
        heads.append(expected @ v[:, channels])
    y = torch.cat(heads, 1) @ module.out.weight.T + module.out.bias
    assert torch.allclose(module(x)[0][0], y, atol=1e-6)


def test_permuting_tokens_permutes_output_and_map():
    module, x = attention(), tokens(1, 7, 12)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    y, maps = module(x, return_attention=True)
    permuted_y, permuted_maps = module(x[:, order], return_attention=True)
    assert torch.allclose(permuted_y, y[:, order], atol=1e-6)
    assert torch.allclose(permuted_maps, maps[:, :, order][..., order], atol=1e-6)


def test_samples_do_not_see_each_other():
    module, x = attention(), tokens(2, 7, 12)
    alone, _ = module(x[:1])
    assert torch.allclose(module(x)[0][:1], alone, atol=1e-6)


def test_maps_are_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, maps = attention()(tokens(1, 9, 12), return_attention=True)
        fast, _ = attention()(tokens(1, 9, 12))
    assert maps.dtype == torch.float32
    assert y.dtype == fast.dtype == torch.bfloat16
    assert torch.allclose(maps.sum(-1), torch.ones(1, 3, 9), atol=1e-6)
    assert torch.allclose(y.float(), fast.float(), atol=0.02)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide a width of 12"):
        Attention(12, 5)


def test_block_adds_attention_and_mlp_to_its_input():
    torch.manual_seed(0)
    block, x = TransformerBlock(12, 3, 2.0), tokens(2, 7, 12)
    middle = x + block.attention(block.norm1(x))[0]
    expected = middle + block.mlp(block.norm2(middle))
    y, maps = block(x, return_attention=True)
    assert torch.allclose(y, expected, atol=1e-5)
    assert maps.shape == (2, 3, 7, 7)
    assert block(x)[1] is None


def test_block_with_zero_branches_is_the_identity():
    block, x = TransformerBlock(12, 3, 4.0), tokens(2, 7, 12)
    for layer in (block.attention.out, block.mlp[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.equal(block(x)[0], x)


@pytest.mark.parametrize(("ratio", "hidden"), [(4.0, 48), (0.5, 6), (1.3, 15)])
def test_mlp_ratio_sets_the_hidden_width(ratio, hidden):
    assert TransformerBlock(12, 3, ratio).mlp[0].out_features == hidden
