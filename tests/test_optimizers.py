from __future__ import annotations

import copy

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnunetv2_mstkd.networks.attention import TransformerBlock
from nnunetv2_mstkd.training.optimizers import (
    ADDED_WEIGHT_DECAY,
    build_optimizer,
)
from nnunetv2_mstkd.training.settings import ScheduleSettings

WEIGHT_DECAY = 3e-5


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 2, 2))
        self.block = TransformerBlock(4, 2, 2.0)
        self.up = nn.ConvTranspose2d(4, 3, 2, 2)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Sequential(nn.Conv2d(2, 4, 2, 2), nn.InstanceNorm2d(4, affine=True))
        self.transformer = Transformer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.unet(x)
        tokens = (x + self.transformer.position).flatten(2).transpose(1, 2)
        y, _ = self.transformer.block(tokens)
        return self.transformer.up(y.transpose(1, 2).unflatten(2, x.shape[2:]))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def build(net: Network, *, epochs: int = 100, **schedule):
    return build_optimizer(net, ScheduleSettings(**schedule), epochs, WEIGHT_DECAY, [net.transformer])


def train(net: Network, optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(2, 2, 4, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ---- who is in which group -----------------------------------------------------------------------------------------


def test_every_parameter_is_in_exactly_one_group():
    net = network()
    optimizer, _ = build(net)
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in net.parameters())


def test_unet_gets_sgd_and_transformer_adamw():
    net = network()
    optimizer, _ = build(net)
    unet, transformer = optimizer.members
    assert isinstance(unet, torch.optim.SGD)
    assert isinstance(transformer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert {id(p) for p in group["params"]} == {id(p) for p in net.unet.parameters()}
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.01, 0.99, True, 3e-5)
    assert [entry["lr"] for entry in transformer.param_groups] == [3e-4, 3e-4]


def test_norms_biases_and_positions_have_no_weight_decay():
    net = network()
    optimizer, _ = build(net)
    names = {id(parameter): name for name, parameter in net.transformer.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups[1:] for p in group["params"]}
    decayed = {name for name, value in decay.items() if value}
    assert {decay[name] for name in decayed} == {ADDED_WEIGHT_DECAY} == {0.05}
    assert decayed == {
        "block.attention.qkv.weight",
        "block.attention.out.weight",
        "block.mlp.0.weight",
        "block.mlp.2.weight",
        "up.weight",
    }
    assert {"position", "block.norm1.weight", "block.norm2.bias", "block.mlp.0.bias", "up.bias"} <= set(decay) - decayed


def test_the_added_modules_may_come_from_a_generator():
    net = network()
    optimizer, _ = build_optimizer(net, ScheduleSettings(), 10, WEIGHT_DECAY, (m for m in [net.transformer]))
    assert [len(group["params"]) for group in optimizer.param_groups[1:]] == [5, 10]


def test_adam_is_one_optimiser_for_everything_as_published():
    net = network()
    optimizer, _ = build(net, optimizer="adam")
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.99), 0)
    assert len(group["params"]) == len(list(net.parameters()))


def test_a_network_without_added_modules_gets_what_nnunet_builds():
    net = network()
    optimizer, _ = build_optimizer(net, ScheduleSettings(), 100, WEIGHT_DECAY)
    reference = torch.optim.SGD(net.parameters(), 1e-2, weight_decay=WEIGHT_DECAY, momentum=0.99, nesterov=True)
    assert type(optimizer) is torch.optim.SGD
    for key in ("lr", "momentum", "nesterov", "weight_decay", "dampening", "maximize"):
        assert optimizer.param_groups[0][key] == reference.param_groups[0][key]
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], net.parameters(), strict=True))


def test_adamw_may_be_chosen_for_the_unet():
    optimizer, _ = build(network(), optimizer="adamw", initial_lr=2e-3)
    assert [type(member) for member in optimizer.members] == [torch.optim.AdamW] * 2
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 3e-4, 3e-4]


# ---- one object for both -------------------------------------------------------------------------------------------


def test_a_step_is_the_step_of_both_members():
    joint, apart = network(), network()
    train(joint, build(joint)[0], 3)
    members = build(apart)[0].members
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        apart.zero_grad()
        apart(torch.randn(2, 2, 4, 4, generator=generator)).square().mean().backward()
        for member in members:
            member.step()
    assert same(joint, apart)
    assert not same(joint, network())


def test_a_resumed_training_repeats_an_uninterrupted_one():
    whole = network()
    optimizer, scheduler = build(whole)
    scheduler.step(0)
    train(whole, optimizer, 3, seed=1)
    state, half = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(whole.state_dict())
    scheduler.step(7)
    train(whole, optimizer, 3, seed=2)

    resumed = network()
    resumed.load_state_dict(half)
    optimizer, scheduler = build(resumed)
    optimizer.load_state_dict(state)
    # the scheduler must reach the members' groups after loading, which replaces them
    scheduler.step(7)
    train(resumed, optimizer, 3, seed=2)
    assert same(whole, resumed)

    forgetful = network()
    forgetful.load_state_dict(half)
    optimizer, scheduler = build(forgetful)
    scheduler.step(7)
    train(forgetful, optimizer, 3, seed=2)
    assert not same(whole, forgetful)


def test_the_state_is_read_back_without_executing_anything(tmp_path):
    net = network()
    optimizer, _ = build(net)
    train(net, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    optimizer.load_state_dict(state)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-2, 3e-4, 3e-4]
    assert [group.get("warmup", False) for group in optimizer.param_groups] == [False, True, True]


def test_the_state_of_another_number_of_members_is_refused():
    net = network()
    optimizer, _ = build(net)
    with pytest.raises(ValueError):
        optimizer.load_state_dict({"members": optimizer.state_dict()["members"][:1]})


def test_zero_grad_reaches_all_members():
    net = network()
    optimizer, _ = build(net)
    net(torch.ones(1, 2, 4, 4)).sum().backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("overflow", [False, True])
def test_the_gradient_scaler_scales_and_skips_both_members(overflow):
    net = network()
    optimizer, _ = build(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(net(torch.ones(1, 2, 4, 4)).square().mean()).backward()
    if overflow:
        net.transformer.position.grad[0, 0, 0, 0] = torch.inf
    scaled = [parameter.grad.clone() for parameter in net.parameters()]
    scaler.unscale_(optimizer)
    assert all(torch.equal(p.grad, grad / 8) for p, grad in zip(net.parameters(), scaled, strict=True))
    before = copy.deepcopy(net)
    scaler.step(optimizer)
    scaler.update()
    assert same(net.unet, before.unet) == overflow
    assert same(net.transformer, before.transformer) == overflow
    assert scaler.get_scale() == (4 if overflow else 8)


# ---- schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("epochs", [1, 7, 1000])
def test_the_rate_of_the_unet_is_that_of_nnunet_in_every_epoch(epochs, added):
    net = network()
    modules = [net.transformer] if added else []
    optimizer, scheduler = build_optimizer(net, ScheduleSettings(), epochs, WEIGHT_DECAY, modules)
    parameter = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], 1e-2)
    poly = PolyLRScheduler(reference, 1e-2, epochs)
    for epoch in range(epochs):
        poly.step(epoch)
        for within in (0, 0.25, 0.999):
            scheduler.step(epoch + within)
            assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


def test_transformer_warms_up_then_follows_schedule():
    epochs, iterations = 100, 20
    optimizer, scheduler = build(network(), epochs=epochs)
    rates = []
    for step in range(epochs * iterations):
        scheduler.step(step / iterations)
        first, second = optimizer.param_groups[1:]
        assert first["lr"] == second["lr"]
        rates.append(first["lr"])
    poly = [3e-4 * (1 - step // iterations / epochs) ** 0.9 for step in range(epochs * iterations)]
    warm = epochs * iterations // 50
    assert 0 < rates[0] < 0.01 * 3e-4
    within_first_epoch = rates[:iterations]
    assert within_first_epoch == sorted(set(within_first_epoch))
    assert all(rate < full for rate, full in zip(rates[:warm], poly[:warm], strict=True))
    assert rates[warm // 2] == pytest.approx(0.5 * poly[warm // 2], rel=0.01)
    assert rates[warm:] == poly[warm:]


def test_scheduler_changes_the_members():
    optimizer, scheduler = build(network(), epochs=10)
    scheduler.step(5)
    assert optimizer.members[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**0.9)
    assert optimizer.members[1].param_groups[1]["lr"] == pytest.approx(3e-4 * 0.5**0.9)
