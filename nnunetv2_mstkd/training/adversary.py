"""An adversary beside the student: a discriminator, its optimiser and its own step."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_mstkd.losses import gsme
from nnunetv2_mstkd.networks.discriminator import PatchDiscriminator, mean_logit
from nnunetv2_mstkd.training.distillation import DistillationTrainer, Target

DISCRIMINATOR_LR = 1e-4
DISCRIMINATOR_BETAS = (0.9, 0.99)


class AdversarialTrainer(DistillationTrainer):
    """Distillation whose term ``adversarial`` asks a discriminator of features; without that term it builds none."""

    discriminator: Any = None
    discriminator_optimizer: Any = None
    """With its optimiser; None without the term."""
    _discriminator_input: torch.Tensor | None = None

    def discriminator_channels(self) -> int:
        """Channels of :meth:`style_of`."""
        raise NotImplementedError

    def style_of(self, features: Any) -> torch.Tensor:
        """Input of the discriminator, (B, channels, *grid) float32; it standardises the channels itself."""
        raise NotImplementedError

    def initialize(self) -> None:
        super().initialize()
        self.discriminator = self.discriminator_optimizer = self._discriminator_input = None
        if "adversarial" not in self.weights:
            return
        dimensions = len(self.configuration_manager.patch_size)
        self.discriminator = PatchDiscriminator(self.discriminator_channels(), dimensions=dimensions)
        self.discriminator.to(self.device)
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), DISCRIMINATOR_LR, betas=DISCRIMINATOR_BETAS
        )
        self.discriminator_step = self.discriminator
        if self.is_ddp:
            device_ids = [self.local_rank] if self.device.type == "cuda" else None
            self.discriminator_step = DistributedDataParallel(self.discriminator, device_ids=device_ids)

    def adversarial_term(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        """What the student pays for being told from the teacher."""
        self.discriminator.requires_grad_(False)
        term = gsme.adversarial_student_term(mean_logit(self.discriminator(self.style_of(student))))
        self.discriminator.requires_grad_(True)
        return term

    def keep_for_update(self, student: Any, teacher: Any) -> None:
        if self.discriminator is not None:
            self._discriminator_input = torch.cat([self.style_of(teacher), self.style_of(student).detach()])

    def after_update(self, batch: dict) -> None:
        """The discriminator's own step: teacher features are real, the student's are fake."""
        super().after_update(batch)
        if self._discriminator_input is None:
            return
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        real, fake = mean_logit(self.discriminator_step(self._discriminator_input)).chunk(2)
        gsme.discriminator_loss(real, fake).backward()
        for parameter in self.discriminator.parameters():
            # an overflow in mixed precision costs the student a skipped step; Adam would keep the NaN for ever
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        self.discriminator_optimizer.step()
        self._discriminator_input = None

    def extra_state(self) -> dict[str, Any]:
        state = super().extra_state()
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if self.discriminator is not None and "discriminator" in state:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
