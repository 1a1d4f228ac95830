"""A plans' network of any geometry, with and without the multi-scale transformer."""

from __future__ import annotations

from typing import Any

import hand_plans
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_mstkd.methods.mstkd.network import Geometry, MultiScaleTransformerUNet, build, resolve
from nnunetv2_mstkd.training.settings import Settings

DEFAULTS = Settings().to_block()["network"]


class Case:
    """Widths, patch and ``network`` settings of one network; weights come from fixed seeds."""

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
        dimensions = len(patch)
        self.architecture = hand_plans.architecture(
            features, strides, dimensions=dimensions, residual=residual, convs=convs
        )
        self.kwargs, self.patch, self.channels = self.architecture["arch_kwargs"], patch, channels
        self.geometry = Geometry.of(self.kwargs, patch)
        self.network = resolve({**DEFAULTS, **settings}, self.kwargs, patch)
        self.arguments = (
            self.architecture["network_class_name"],
            self.kwargs,
            self.architecture["_kw_requires_import"],
        )

    def plain(self, *, deep_supervision: bool = False) -> torch.nn.Module:
        torch.manual_seed(0)
        return get_network_from_plans(*self.arguments, self.channels, 3, deep_supervision=deep_supervision).eval()

    def full(self, *, deep_supervision: bool = False, seed: int = 1) -> MultiScaleTransformerUNet:
        torch.manual_seed(seed)
        return build(*self.arguments, self.patch, self.network, self.channels, 3, deep_supervision).eval()

    def trained(self, **options: Any) -> MultiScaleTransformerUNet:
        """With projections away from zero, as after some training."""
        network = self.full(**options)
        for projection in network.transformer.projections:
            torch.nn.init.normal_(projection.weight, std=0.3)
        return network

    def batch(self, size: int = 2) -> torch.Tensor:
        return torch.randn(size, self.channels, *self.patch, generator=torch.Generator().manual_seed(2))
