"""An adversary beside the student: a discriminator of features, its optimiser and its own step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnunetv2_mstkd.losses.style import adversarial_student_term, discriminator_loss
from nnunetv2_mstkd.networks.discriminator import PatchDiscriminator, mean_logit
from nnunetv2_mstkd.training.distributed import wrapped_for_ddp

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.99)


class Adversary:
    """Tells the teacher's features (real) from the student's (fake); the student is trained to be taken for real.

    ``style_of`` makes the discriminator's input, (B, channels, *grid) float32 on ``dimensions`` axes, of a network's
    output; the discriminator standardises the channels itself. ``distributed``: its gradients are averaged over the
    processes of a multi-GPU training.
    """

    def __init__(
        self,
        channels: int,
        dimensions: int,
        style_of: Callable[[Any], torch.Tensor],
        device: torch.device,
        *,
        distributed: bool = False,
    ) -> None:
        self._style_of = style_of
        self.discriminator = PatchDiscriminator(channels, dimensions=dimensions).to(device)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), LEARNING_RATE, betas=BETAS)
        self._trained: torch.nn.Module = self.discriminator
        if distributed:
            self._trained = wrapped_for_ddp(self.discriminator, device)

    def term(self, student: Any) -> torch.Tensor:
        """Return the student's loss for being told from the teacher; the discriminator gets no gradient."""
        self.discriminator.requires_grad_(False)
        loss = adversarial_student_term(mean_logit(self.discriminator(self._style_of(student))))
        self.discriminator.requires_grad_(True)
        return loss

    def remember(self, student: Any, teacher: Any) -> torch.Tensor:
        """Return what :meth:`step` needs of both outputs, without a graph: (2 B, channels, *grid), teacher first."""
        return torch.cat([self._style_of(teacher), self._style_of(student)]).detach()

    def step(self, remembered: torch.Tensor, weight: float = 1.0) -> None:
        """Take the discriminator's own optimiser step, with the share of the batch that it sees as weight."""
        self.optimizer.zero_grad(set_to_none=True)
        real, fake = mean_logit(self._trained(remembered)).chunk(2)
        (weight * discriminator_loss(real, fake)).backward()
        for parameter in self.discriminator.parameters():
            # an overflow in mixed precision costs the student a skipped step; Adam would keep the NaN forever
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser, for the checkpoint."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; a state without a discriminator changes nothing."""
        if "discriminator" in state:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["discriminator_optimizer"])
