"""How a trainer's network is made from the plans; teacher and student of a method share one design."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.settings import Section, Settings


class NetworkDesign:
    """The plans' own U-Net, and the base of all designs that add something to it."""

    sections: ClassVar[tuple[type[Section], ...]] = ()
    """Sections of the settings that the network is built from."""

    def check(self, plan: UNetPlan, settings: Settings, names: Sequence[str]) -> None:
        """Refuse, before anything is written, what this network cannot be built for.

        ``settings`` are those given, not resolved; ``names`` those of the C modalities. A UserError names the setting
        or the plans' entry.
        """
        plan.check()

    def resolve(self, settings: Settings, plan: UNetPlan, names: Sequence[str] | None = None) -> Settings:
        """Fill in the settings that depend on the plans; resolving twice changes nothing.

        ``names`` of the C modalities are None at prediction, which builds the network without dataset.json.
        """
        return settings

    def build(self, plan: UNetPlan, settings: Settings) -> Any:
        """Build the network from resolved settings."""
        return plan.build()

    def added_modules(self, network: Any) -> list[torch.nn.Module]:
        """Return what the network has beyond the plans' U-Net: it is trained with AdamW at ``schedule.added_lr``."""
        return []

    # ---- weights to start from -------------------------------------------------------------------------------------

    def translate(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights of a plain U-Net, or of this network, under the names of this network."""
        return dict(weights)

    def input_weights(self, network: Any) -> list[torch.Tensor]:
        """Return the weights (N, C, ...) whose channels are the modalities: those of the convolution of the image."""
        return first_weights(network)

    def modality_weights(self, network: Any) -> list[torch.Tensor]:
        """Return other weights that depend on which modalities there are, and in which order."""
        return []


def first_weights(network: Any) -> list[torch.Tensor]:
    """Return the weights of the first convolution of a network's encoder, if there is one."""
    encoder = getattr(network, "encoder", None)
    return [] if encoder is None else first_convolution(encoder)


def first_convolution(encoder: torch.nn.Module) -> list[torch.Tensor]:
    """Return the weights of an encoder's first convolution, if there is one."""
    kinds = (torch.nn.Conv2d, torch.nn.Conv3d)
    return [module.weight for module in encoder.modules() if isinstance(module, kinds)][:1]
