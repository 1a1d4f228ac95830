"""Optimisers: nnU-Net's for the U-Net, AdamW for what a method adds to it, one object for both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nnunetv2_mstkd.training.settings import ScheduleSettings

ADDED_WEIGHT_DECAY = 0.05
WARMUP = 0.02
"""Fraction of a training over which the rate of added modules rises from zero."""


class JointOptimizer(torch.optim.Optimizer):
    """Several optimisers behind the interface of one, so that nnU-Net saves, scales and steps them together.

    ``param_groups`` lists the groups of all members, the first member's first; they are the members' own, so a rate
    that is written there holds.
    """

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members
        super().__init__([group for member in members for group in member.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
        self.param_groups = [group for member in self.members for group in member.param_groups]


class WarmupPolyScheduler:
    """Poly schedule (1 - epoch / epochs)^0.9 per group, nnU-Net's; groups with ``warmup`` rise linearly first.

    nnU-Net's PolyLRScheduler writes one rate into every group; here each keeps its own ``initial_lr``. Within an
    epoch only the warm-up moves, so the U-Net's rate is exactly nnU-Net's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_steps: int) -> None:
        self.optimizer, self.max_steps = optimizer, max_steps

    def step(self, current_step: float) -> None:
        """Set the rates for ``current_step`` in epochs; a fraction counts within the epoch."""
        poly = max(0.0, 1 - int(current_step) / self.max_steps) ** 0.9
        for group in self.optimizer.param_groups:
            rise = min(1.0, (current_step + 1e-3) / (WARMUP * self.max_steps)) if group.get("warmup") else 1.0
            group["lr"] = group["initial_lr"] * poly * rise


def _unet_optimizer(
    parameters: Iterable[torch.nn.Parameter], schedule: ScheduleSettings, weight_decay: float, rate: float
) -> torch.optim.Optimizer:
    groups = [{"params": list(parameters), "initial_lr": rate}]
    decay = {"sgd": weight_decay, "adamw": 0.01, "adam": 0.0}[schedule.optimizer]
    decay = decay if schedule.weight_decay is None else schedule.weight_decay
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, weight_decay=decay, momentum=0.99, nesterov=True)
    if schedule.optimizer == "adam":
        return torch.optim.Adam(groups, rate, betas=(0.9, 0.99), weight_decay=decay)
    return torch.optim.AdamW(groups, rate, weight_decay=decay)


def build_optimizer(
    network: torch.nn.Module,
    schedule: ScheduleSettings,
    epochs: int,
    weight_decay: float,
    added_modules: Iterable[torch.nn.Module] = (),
    learning_rate: float | None = None,
) -> tuple[torch.optim.Optimizer, WarmupPolyScheduler]:
    """Optimiser and scheduler of a network, which may be compiled; ``weight_decay`` is nnU-Net's, for SGD.

    ``learning_rate`` is the U-Net's; None: the schedule's. ``added_modules`` are trained with AdamW at ``added_lr``
    (weight decay 0.05, none on norms, biases and positions) unless the schedule names ``adam``, with which the
    published recipe trains all weights.
    """
    added_modules, rate = list(added_modules), schedule.learning_rate if learning_rate is None else learning_rate
    added = {id(parameter): parameter for module in added_modules for parameter in module.parameters()}
    if not added or schedule.optimizer == "adam":
        optimizer = _unet_optimizer(network.parameters(), schedule, weight_decay, rate)
        return optimizer, WarmupPolyScheduler(optimizer, epochs)
    unet = [parameter for parameter in network.parameters() if id(parameter) not in added]
    weights = [getattr(layer, "weight", None) for module in added_modules for layer in module.modules()]
    decayed = {id(weight) for weight in weights if isinstance(weight, torch.nn.Parameter) and weight.ndim > 1}
    groups = [
        {
            "params": [parameter for key, parameter in added.items() if (key in decayed) == decays],
            "weight_decay": ADDED_WEIGHT_DECAY if decays else 0.0,
            "initial_lr": schedule.added_lr,
            "warmup": True,
        }
        for decays in (True, False)
    ]
    added_optimizer = torch.optim.AdamW(groups, schedule.added_lr)
    optimizer = JointOptimizer(_unet_optimizer(unet, schedule, weight_decay, rate), added_optimizer)
    return optimizer, WarmupPolyScheduler(optimizer, epochs)
