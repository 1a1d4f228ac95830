"""The U-Net that nnU-Net planned: its sizes, and building it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nnunetv2_mstkd.errors import InputError

FAMILIES = ("PlainConvUNet", "ResidualEncoderUNet")
"""Networks of dynamic_network_architectures that our networks are built around."""


class UNetShape(NamedTuple):
    """Sizes of a U-Net per stage, finest first."""

    widths: tuple[int, ...]
    """Channels."""
    strides: tuple[tuple[int, ...], ...]
    """Strides of the first convolution, per axis."""
    grids: tuple[tuple[int, ...], ...]
    """Spatial sizes of the feature maps of one patch."""


@dataclass(frozen=True)
class UNetPlan:
    """Everything that a network is built from: ``architecture`` of a plans configuration, and sizes."""

    architecture_class: str
    architecture_kwargs: Mapping[str, Any]
    requires_import: tuple[str, ...]
    patch_size: tuple[int, ...]
    """Voxels per axis, 2-D or 3-D."""
    num_modalities: int
    """Input channels C."""
    num_outputs: int = 1
    """Output channels K: segmentation heads."""
    deep_supervision: bool = False
    """Whether the decoder returns logits of every stage."""
    modality_features: int = 1
    """Channels per modality that the U-Net reads: more than 1 behind a stem."""

    @classmethod
    def of(
        cls,
        configuration: Any,
        *,
        num_modalities: int | None = None,
        num_outputs: int = 1,
        deep_supervision: bool = False,
    ) -> UNetPlan:
        """Read nnU-Net's ConfigurationManager; by default it has as many modalities as normalisation schemes."""
        return cls(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            tuple(configuration.network_arch_init_kwargs_req_import),
            tuple(configuration.patch_size),
            len(configuration.normalization_schemes) if num_modalities is None else num_modalities,
            num_outputs,
            deep_supervision,
        )

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    @property
    def shape(self) -> UNetShape:
        """Sizes per stage."""
        kwargs = self.architecture_kwargs
        stages, widths = int(kwargs["n_stages"]), kwargs["features_per_stage"]
        strides = [
            tuple(stride) if isinstance(stride, (list, tuple)) else (int(stride),) * self.dimensions
            for stride in kwargs["strides"]
        ]
        grid, grids = self.patch_size, []
        for stride in strides:
            grid = tuple(math.ceil(edge / step) for edge, step in zip(grid, stride, strict=True))
            grids.append(grid)
        return UNetShape(
            tuple(widths) if isinstance(widths, (list, tuple)) else (int(widths),) * stages,
            tuple(strides),
            tuple(grids),
        )

    def replace(self, *, widths: Sequence[int] | None = None, **changes: int) -> UNetPlan:
        """Return a copy with other channels per stage, ``num_modalities`` or ``modality_features``."""
        kwargs = dict(self.architecture_kwargs)
        if widths is not None:
            kwargs["features_per_stage"] = list(widths)
        return dataclasses.replace(self, architecture_kwargs=kwargs, **changes)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise InputError if the plans name neither a PlainConvUNet nor a ResidualEncoderUNet."""
        family = self.architecture_class.rsplit(".", 1)[-1]
        if family not in FAMILIES:
            raise InputError(
                f"the plans ask for the network {family}; this trainer's network is built on {' or '.join(FAMILIES)}. "
                f"Plan with nnU-Net's default or a ResEnc planner"
            )

    def build(self) -> Any:
        """Check the plans' own network and build it, initialised as nnU-Net does."""
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        self.check()
        return get_network_from_plans(
            self.architecture_class,
            dict(self.architecture_kwargs),
            self.requires_import,
            self.num_modalities * self.modality_features,
            self.num_outputs,
            allow_init=True,
            deep_supervision=self.deep_supervision,
        )
