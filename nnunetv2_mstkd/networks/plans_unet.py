"""The U-Net that nnU-Net planned: its sizes, and building it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from nnunetv2_mstkd.errors import InputError


class Halves(Protocol):
    """What a U-Net is made of; both of dynamic_network_architectures, whose modules have no types."""

    @property
    def encoder(self) -> Any: ...

    @property
    def decoder(self) -> Any: ...


class Geometry(NamedTuple):
    """Sizes of a U-Net, read from the plans: per stage, finest first."""

    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    grids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, architecture_kwargs: dict, patch_size: Sequence[int]) -> Geometry:
        """From ``architecture.arch_kwargs`` and ``patch_size`` of a plans configuration."""
        stages = int(architecture_kwargs["n_stages"])
        widths = architecture_kwargs["features_per_stage"]
        widths = tuple(widths) if isinstance(widths, (list, tuple)) else (int(widths),) * stages
        strides = []
        for stride in architecture_kwargs["strides"]:
            strides.append(tuple(stride) if isinstance(stride, (list, tuple)) else (int(stride),) * len(patch_size))
        grid, grids = tuple(patch_size), []
        for stride in strides:
            grid = tuple(math.ceil(edge / step) for edge, step in zip(grid, stride, strict=True))
            grids.append(grid)
        return cls(widths, tuple(strides), tuple(grids))


def check_architecture(architecture_class: str) -> None:
    """Raise ValueError if the plans name a network that is neither PlainConvUNet nor ResidualEncoderUNet."""
    family = architecture_class.rsplit(".", 1)[-1]
    if family not in ("PlainConvUNet", "ResidualEncoderUNet"):
        raise InputError(
            f"the plans ask for the network {family}; this trainer's network is built on PlainConvUNet "
            f"or ResidualEncoderUNet. Plan with nnU-Net's default or a ResEnc planner"
        )


def build_unet(
    architecture_class: str,
    architecture_kwargs: dict,
    requires_import: Sequence[str],
    num_input_channels: int,
    num_output_channels: int,
    deep_supervision: bool,
) -> Halves:
    """The plans' own network.

    Raises
    ------
    ValueError
        if the plans name a network that is neither PlainConvUNet nor ResidualEncoderUNet.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    check_architecture(architecture_class)
    return get_network_from_plans(
        architecture_class,
        architecture_kwargs,
        requires_import,
        num_input_channels,
        num_output_channels,
        allow_init=True,
        deep_supervision=deep_supervision,
    )
