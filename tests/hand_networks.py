"""A plans' network of any shape, with and without the multi-scale transformer."""

from __future__ import annotations

import dataclasses
from typing import Any

import hand_plans
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_mstkd.methods.mstkd.network import MultiScaleTransformerUNet, resolve
from nnunetv2_mstkd.methods.mstkd.settings import NetworkSettings
from nnunetv2_mstkd.nnunet.unet import UNetPlan


def unet_plan(architecture: dict[str, Any], patch: list[int], *, channels: int = 4, outputs: int = 3) -> UNetPlan:
    """The plan of an ``architecture`` of :mod:`hand_plans`."""
    return UNetPlan(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        tuple(architecture["_kw_requires_import"]),
        tuple(patch),
        channels,
        outputs,
    )


def plain_network(plan: UNetPlan, *, deep_supervision: bool = False) -> Any:
    """The network that nnU-Net itself builds."""
    return get_network_from_plans(
        plan.architecture_class,
        dict(plan.architecture_kwargs),
        plan.requires_import,
        plan.num_modalities,
        plan.num_outputs,
        deep_supervision=deep_supervision,
    ).eval()


class Case:
    """Plan and resolved ``network`` settings of one network; weights come from fixed seeds."""

    def __init__(
        self,
        features: list[int],
        patch: list[int],
        strides: list[list[int]] | None = None,
        *,
        residual: bool = False,
        convs: int = 1,
        channels: int = 4,
        **settings: Any,
    ) -> None:
        architecture = hand_plans.architecture(features, strides, dimensions=len(patch), residual=residual, convs=convs)
        self.plan = unet_plan(architecture, patch, channels=channels)
        self.shape = self.plan.shape
        self.network = resolve(NetworkSettings(**settings), self.plan)

    def plain(self, *, deep_supervision: bool = False) -> Any:
        torch.manual_seed(0)
        return plain_network(self.plan, deep_supervision=deep_supervision)

    def full(
        self, *, deep_supervision: bool = False, seed: int = 1, placement: Any = "branch"
    ) -> MultiScaleTransformerUNet:
        torch.manual_seed(seed)
        unet = dataclasses.replace(self.plan, deep_supervision=deep_supervision).build()
        section = dataclasses.replace(self.network, placement=placement)
        return MultiScaleTransformerUNet(unet.encoder, unet.decoder, self.shape, section).eval()

    def trained(self, **options: Any) -> MultiScaleTransformerUNet:
        """With projections away from zero, as after some training."""
        network = self.full(**options)
        for projection in network.transformer.projections:
            torch.nn.init.normal_(projection.weight, std=0.3)
        return network

    def batch(self, size: int = 2) -> torch.Tensor:
        shape = (size, self.plan.num_modalities, *self.plan.patch_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2))
