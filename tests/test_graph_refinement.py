"""Graph refinement: assignment to nodes, exchange between two graphs, and the way back."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_mstkd.methods.adamm.graph_refinement import GraphRefinement, NodeProjection

WIDTH, NODES = 16, 5


def make(nodes: int = NODES, dimensions: int = 3, *, awake: bool = True) -> GraphRefinement:
    torch.manual_seed(0)
    module = GraphRefinement(WIDTH, nodes, dimensions)
    if awake:
        torch.nn.init.normal_(module.update.weight, std=0.3)
    return module


def maps(batch: int = 2, dimensions: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, WIDTH, *[4, 6, 5][:dimensions])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


PARTIAL = torch.tensor([1.0, 1.0])


def test_assignments_are_probabilities_over_the_nodes():
    torch.manual_seed(0)
    assignment, nodes = NodeProjection(WIDTH, NODES)(torch.randn(2, WIDTH, 30))
    assert assignment.shape == (2, NODES, 30) and nodes.shape == (2, NODES, WIDTH)
    torch.testing.assert_close(assignment.sum(1), torch.ones(2, 30))
    torch.testing.assert_close(nodes.square().mean(2), torch.ones(2, NODES), rtol=1e-3, atol=1e-3)


def test_assignment_and_nodes_follow_the_formula():
    torch.manual_seed(0)
    project = NodeProjection(WIDTH, NODES)
    torch.nn.init.normal_(project.bandwidths)
    x = torch.randn(1, WIDTH, 7)
    scaled = (x[:, None] - project.anchors[None, :, :, None]) / project.bandwidths.sigmoid()[None, :, :, None]
    wanted = (-0.5 * scaled.square().mean(2)).softmax(1)
    node = (wanted[:, :, None] * scaled).sum(3)
    assignment, nodes = project(x)
    torch.testing.assert_close(assignment, wanted)
    torch.testing.assert_close(
        torch.nn.functional.normalize(nodes, dim=2), torch.nn.functional.normalize(node, dim=2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("nodes", [NODES, 0], ids=["graph", "dense"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_new_refinement_returns_the_general_features(dimensions, nodes):
    specific, general = maps(dimensions=dimensions)
    assert torch.equal(make(nodes, dimensions, awake=False)(specific, general, PARTIAL), general)


@pytest.mark.parametrize("nodes", [NODES, 0], ids=["graph", "dense"])
def test_complete_samples_pass_unchanged(nodes):
    specific, general = maps()
    found = make(nodes)(specific, general, torch.tensor([0.0, 1.0]))
    assert torch.equal(found[0], general[0])
    assert not torch.allclose(found[1], general[1])


def test_the_order_of_the_nodes_does_not_matter():
    module = make()
    specific, general = maps()
    before = module(specific, general, PARTIAL)
    with torch.no_grad():
        for project, order in ((module.project_specific, [2, 0, 1, 4, 3]), (module.project_general, [4, 3, 2, 1, 0])):
            for parameter in (project.anchors, project.bandwidths):
                parameter.copy_(parameter[order])
    torch.testing.assert_close(module(specific, general, PARTIAL), before)


def nodes_before_the_block(module, specific, general) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes of c and g before and after the transformer block."""
    seen = []
    with torch.no_grad():
        handle = module.block.register_forward_hook(lambda block, inputs, outputs: seen.append((inputs[0], outputs[0])))
        module.delta(specific.flatten(2), general.flatten(2))
    handle.remove()
    return seen[0]


def test_the_two_graphs_exchange_information():
    """The released code multiplies each graph's nodes with its own only."""
    module = make()
    specific, general = maps()
    other = torch.randn(specific.shape, generator=torch.Generator().manual_seed(5))
    before, _ = nodes_before_the_block(module, specific, general)
    changed, _ = nodes_before_the_block(module, other, general)
    assert not torch.allclose(before[:, NODES:], changed[:, NODES:])
    changed, _ = nodes_before_the_block(module, specific, other)
    assert not torch.allclose(before[:, :NODES], changed[:, :NODES])


def test_nodes_do_not_become_equal():
    """The released code's nodes have a cosine of 1.0000 with one another after its two steps."""
    for nodes in nodes_before_the_block(make(), *maps()):
        directions = torch.nn.functional.normalize(nodes, dim=2)
        cosines = directions @ directions.transpose(1, 2)
        assert cosines[:, ~torch.eye(2 * NODES, dtype=torch.bool)].abs().mean() < 0.7


@pytest.mark.parametrize("nodes", [NODES, 0], ids=["graph", "dense"])
def test_every_parameter_gets_a_gradient(nodes):
    for partial in (PARTIAL, torch.zeros(2)):
        module = make(nodes)
        module(*maps(), partial).square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_dense_fusion_has_no_graph_parameters():
    assert {name.split(".")[0] for name, _ in make(0).named_parameters()} == {"mix", "norm", "update"}
