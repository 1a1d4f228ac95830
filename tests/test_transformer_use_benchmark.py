"""benchmarks/transformer_use.py: cutting the transformer out of trained weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hand_networks import Case

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from transformer_use import without_transformer


@pytest.mark.parametrize("placement", ["branch", "main"])
@torch.no_grad()
def test_nothing_reads_the_maps_any_more(placement):
    case = Case([6, 8, 12, 16], [16, 24, 16])
    network, x = case.full(placement=placement), case.batch()
    for projection in network.transformer.projections:
        torch.nn.init.normal_(projection.weight, std=0.3)
        torch.nn.init.normal_(projection.bias)
    whole = network(x)
    skips = list(network.encoder(x))
    network.load_state_dict(without_transformer(network.state_dict()))
    cut = network(x)
    assert not torch.allclose(cut, whole, atol=1e-3)
    network.transformer.tokens = lambda bottleneck, **options: (
        [torch.full_like(skip, 7.0) for skip in skips[::-1][: len(network.transformer.projections)]],
        [],
    )
    assert torch.equal(network(x), cut)


@torch.no_grad()
def test_a_branch_without_its_maps_is_the_plans_network():
    case = Case([6, 8, 12], [16, 24, 16])
    network, plain, x = case.trained(), case.plain(), case.batch()
    plain.load_state_dict({n: v for n, v in network.state_dict().items() if not n.startswith("transformer")})
    network.load_state_dict(without_transformer(network.state_dict()))
    assert torch.allclose(network(x), plain(x), atol=1e-6)


def test_weights_without_a_transformer_are_refused():
    with pytest.raises(ValueError, match="have no transformer"):
        without_transformer(Case([6, 8], [8, 8]).plain().state_dict())
