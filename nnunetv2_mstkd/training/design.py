"""How a trainer's network is made from the plans; teacher and student of a method share one design."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.settings import Section, Settings


class NetworkDesign:
    """The plans' own U-Net, and the base of all designs that add something to it.

    Attributes
    ----------
    sections
        Sections of the settings that the network is built from.
    """

    sections: ClassVar[tuple[type[Section], ...]] = ()

    def check(self, plan: UNetPlan, settings: Settings, names: Sequence[str]) -> None:
        """Refuse, before anything is written, what this network cannot be built for.

        Parameters
        ----------
        plan
            The U-Net of the plans.
        settings
            As given, not resolved.
        names
            Names of the C modalities.

        Raises
        ------
        UserError
            Naming the setting or the plans' entry.
        """
        plan.check()

    def resolve(self, settings: Settings, plan: UNetPlan, names: Sequence[str] | None = None) -> Settings:
        """Fill in the settings that depend on the plans.

        Parameters
        ----------
        settings
            As given; resolving twice changes nothing.
        plan
            The U-Net of the plans.
        names
            Names of the C modalities; None at prediction, which builds the network without dataset.json.
        """
        return settings

    def build(self, plan: UNetPlan, settings: Settings) -> Any:
        """Build the network from resolved settings."""
        return plan.build()

    def added_modules(self, network: Any) -> list[torch.nn.Module]:
        """Return what the network has beyond the plans' U-Net: it is trained with AdamW at ``schedule.added_lr``."""
        return []
