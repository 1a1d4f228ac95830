"""Networks with one encoder per modality whose features meet, and a decoder that each modality has for itself.

What RFNet (ICCV 2021) and mmFormer (MICCAI 2022) have in common: features of absent modalities are zeroed behind the
encoders, and in training a decoder with shared weights segments from each modality alone, so that no encoder is left
behind by the others. How the features meet is what a subclass adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.networks.modality_encoders import (
    StageFusion,
    build_modality_encoders,
    decoder_alone,
    mask_features,
    modality_plan,
)
from nnunetv2_mstkd.nnunet.unet import UNetPlan


class MultiEncoderOutput(NamedTuple):
    """What a training step reads from one forward pass; of it prediction computes the logits alone."""

    logits: torch.Tensor | list[torch.Tensor]
    """(B, K, *spatial), or a list of these, finest first, under deep supervision."""
    separate: torch.Tensor | None
    """Logits from each modality alone, (B, C, K, *spatial); None without the shared decoder."""
    encoded: torch.Tensor
    """Bool, (B, C): modalities that were encoded, not imputed or zero."""
    bottleneck: torch.Tensor
    """The deepest features of all modalities, fused, (B, D, *grid)."""
    maps: tuple[torch.Tensor, ...]
    """Logits (B, K, *grid) of intermediate maps, as far as the network makes any."""


class Fused(NamedTuple):
    """What comes of the fused modalities; fields as in :class:`MultiEncoderOutput`."""

    logits: torch.Tensor | list[torch.Tensor]
    bottleneck: torch.Tensor
    maps: tuple[torch.Tensor, ...] = ()


class MultiEncoderUNet(AvailabilityAware):
    """One encoder per modality, their fusion at every stage, the plans' decoder, and the decoder of single modalities.

    Parameters
    ----------
    plan
        The U-Net to build.
    width
        Channels of a one-modality encoder over the planned ones.
    separate
        Build the decoder of single modalities, which only training needs.
    make_fusion
        See :func:`~nnunetv2_mstkd.networks.modality_encoders.build_modality_encoders`.
    """

    def __init__(
        self, plan: UNetPlan, width: float, *, separate: bool, make_fusion: Callable[..., StageFusion] = StageFusion
    ) -> None:
        super().__init__()
        self.modality_encoders: Any
        self.modality_encoders, self.encoder, self.decoder = build_modality_encoders(plan, width, make_fusion)
        self.separate = None
        if separate:
            single = dataclasses.replace(modality_plan(plan, width), deep_supervision=False)
            self.separate = decoder_alone(single.build())
            self.separate.seg_layers[:-1].requires_grad_(False)  # heads without a loss

    def fuse(self, stages: Sequence[torch.Tensor], available: torch.Tensor) -> Fused:
        """Segment from features per stage, finest first, (B, C, F, *grid), zero where a modality is absent."""
        skips = self.encoder(stages)
        return Fused(self.decoder(skips), skips[-1])

    def forward(
        self,
        x: torch.Tensor | list[torch.Tensor],
        *,
        availability: torch.Tensor | None = None,
        auxiliary: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor] | MultiEncoderOutput:
        """Segment a batch (B, C, *spatial) whose absent modalities are zero, as the plans' network does.

        Parameters
        ----------
        x
            The batch; or, behind encoders that impute what is absent, features per stage (B, C, F, *grid).
        availability
            Bool, (B, C): what is known of the cases; see :func:`nnunetv2_mstkd.modalities.known_availability`.
        auxiliary
            The batch with all modalities of its cases. The result is then :class:`MultiEncoderOutput`, in which
            ``separate`` is of all of them (behind imputing encoders: of the available ones); the rest reads ``x``.
        """
        if isinstance(x, torch.Tensor):
            known = self.availability if availability is None else availability
            available = encoded = modalities.known_availability(x, known)
            if auxiliary is not None and self.separate is not None:
                x = modalities.complete_unless_empty(x, auxiliary)
                encoded = modalities.known_availability(x)
            features = self.modality_encoders(x)
            stages = [mask_features(stage, available) for stage in features]
        else:
            assert availability is not None
            features = stages = x
            encoded, available = availability, torch.ones_like(availability)
        fused = self.fuse(stages, available)
        if auxiliary is None:
            return fused.logits
        return MultiEncoderOutput(fused.logits, self._separate(features), encoded, fused.bottleneck, fused.maps)

    def _separate(self, features: Sequence[torch.Tensor]) -> torch.Tensor | None:
        if self.separate is None:
            return None
        logits = self.separate([stage.flatten(0, 1) for stage in features])
        return logits.unflatten(0, features[0].shape[:2])
