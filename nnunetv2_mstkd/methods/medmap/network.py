"""MedMAP on nnU-Net: per-modality features aligned to an anchor, absent ones imputed from the others.

Two placements (arXiv 2408.09465 and its two released fragments): a grouped stem in front of the unchanged plans'
network, or one encoder per modality. Both are a *front*, a module between the image and the network's encoder, so that
either fits in front of the plain U-Net and of the one with a multi-scale transformer.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_instancenorm
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn
from torch.nn import functional

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods.medmap.losses import (
    gaussian_alignment,
    leave_one_out_weights,
    mixture_alignment,
    renormalized_weights,
)
from nnunetv2_mstkd.methods.medmap.settings import MedMAPSettings
from nnunetv2_mstkd.methods.mstkd.network import Features, MultiScaleTransformerUNet, TransformerDesign
from nnunetv2_mstkd.methods.mstkd.settings import NetworkSettings
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.networks.modality_encoders import ModalityEncoders, build_modality_encoders, mask_features
from nnunetv2_mstkd.nnunet.unet import UNetPlan, UNetShape
from nnunetv2_mstkd.training.design import NetworkDesign, first_weights
from nnunetv2_mstkd.training.settings import Section, Settings

MAX_STEM_FEATURES = 4
"""Channels per modality of the stem at most, unless the settings say more."""

VARIANCE_START = 0.1
VARIANCE_FLOOR = 1e-5
"""Of the learned Gaussian anchor, as in MIRO (Cha et al., ECCV 2022)."""


class Aligned(NamedTuple):
    """What a training step reads from the plain network."""

    logits: torch.Tensor | list[torch.Tensor]
    """What the plans' network returns: (B, K, *spatial), or a list of these under deep supervision."""
    alignment: torch.Tensor
    """Scalar alignment loss, mean over the aligned stages."""


AlignedFeatures = namedtuple("AlignedFeatures", (*Features._fields, "alignment"))  # type: ignore[misc]
"""What a training step reads from MST-KDNet's network behind an aligning front."""


class ModalityAnchor(nn.Module):
    """Anchor of one stage of features (B, C, F, *grid): the modalities' weights, the alignment loss, and imputation.

    ``leave_one_out`` is a mixture for each modality whose weights learn from the others, ``star`` the weighted mean of
    all modalities (P*_mix), ``fixed`` one modality (P^k_mix), ``gaussian`` a learned Gaussian per channel, ``normal``
    the standard normal distribution. ``normalize`` and ``detach_anchor`` do not act on the last two, which would be
    constant for standardised features.
    """

    fixed: torch.Tensor

    def __init__(self, num_modalities: int, features: int, section: MedMAPSettings) -> None:
        super().__init__()
        self.anchor, self.normalize, self.detach_anchor = section.anchor, section.normalize, section.detach_anchor
        self.weight_logits = nn.Parameter(torch.zeros(num_modalities))
        if self.anchor == "gaussian":
            start = torch.full((features,), VARIANCE_START - VARIANCE_FLOOR)
            self.mean = nn.Parameter(torch.zeros(features))
            self.raw_variance = nn.Parameter(start.expm1().log())  # inverse of softplus
        one_hot = torch.arange(num_modalities) == (-1 if section.fixed_channel is None else section.fixed_channel)
        self.register_buffer("fixed", one_hot.float(), persistent=False)

    @property
    def weights(self) -> torch.Tensor:
        """Convex weights of the modalities, shape (C,)."""
        return self.weight_logits.float().softmax(0)

    def forward(self, z: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Replace what is absent in features (B, C, F, *grid) by the weighted mean of what is available.

        ``out_m = z_m`` where modality m is available, else ``sum_n w_n z_n`` over the available n, weights renormalised
        per sample; the same in training and in prediction.
        """
        keep = available.reshape(*available.shape, *[1] * (z.ndim - 2))
        kept = mask_features(z, available)
        weights = renormalized_weights(self.weights, available).to(z.dtype)
        mixture = (weights[:, None] @ kept.flatten(2)).unflatten(2, z.shape[2:])  # (B, 1, F, *grid)
        return torch.where(keep, z, mixture)

    def alignment(self, z: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """The alignment loss of features (B, C, F, *grid) of the modalities that each training case has."""
        if self.anchor in ("gaussian", "normal"):
            learned = self.anchor == "gaussian"
            mean = self.mean if learned else z.new_zeros(z.shape[2])
            variance = functional.softplus(self.raw_variance) + VARIANCE_FLOOR if learned else z.new_ones(z.shape[2])
            return gaussian_alignment(z, mean, variance, present)
        weights = self.fixed.expand(len(z), -1)
        if self.anchor == "star":
            weights = renormalized_weights(self.weights, present)
        elif self.anchor == "leave_one_out":
            weights = leave_one_out_weights(self.weights, present)
        return mixture_alignment(z, weights, present, normalize=self.normalize, detach_anchor=self.detach_anchor)


Aligning: TypeAlias = tuple[ModalityAnchor, torch.Tensor]
"""An anchor, and the features of its stage as they were before imputation."""


class AlignedStem(nn.Module):
    """Grouped convolutions that give every modality F full-resolution channels of its own, aligned and imputed.

    One as wide as the plans' first kernel and a pointwise one, each with instance normalisation and the plans'
    non-linearity. A second wide one costs as much as a convolution of the U-Net's finest stage.
    """

    def __init__(self, encoder: Any, num_modalities: int, section: MedMAPSettings) -> None:
        super().__init__()
        features = section.features or 1
        convolution, width = encoder.conv_op, num_modalities * features
        # whatever the plans normalise with: a batch's statistics would carry absent images into other samples
        norm = get_matching_instancenorm(convolution)
        layers: list[nn.Module] = []
        for incoming, kernel in ((num_modalities, encoder.kernel_sizes[0]), (width, 1)):
            layers += [
                convolution(incoming, width, kernel, padding="same", groups=num_modalities, bias=encoder.conv_bias),
                norm(width, affine=True),
                encoder.nonlin(**(encoder.nonlin_kwargs or {})),
            ]
        self.layers = nn.Sequential(*layers)
        self.num_modalities = num_modalities
        self.anchor = ModalityAnchor(num_modalities, features, section)
        self.apply(InitWeights_He(1e-2))

    def forward(self, x: torch.Tensor, available: torch.Tensor) -> tuple[torch.Tensor, list[Aligning]]:
        """Input of the network (B, C F, *spatial), and what is to be aligned."""
        z = self.layers(x).unflatten(1, (self.num_modalities, -1))
        return self.anchor(z, available).flatten(1, 2), [(self.anchor, z)]


class AlignedEncoders(nn.Module):
    """One encoder per modality; chosen stages are aligned and imputed, absent modalities of the others are zero.

    ``widths`` are the channels per stage of the encoders.
    """

    def __init__(self, encoders: ModalityEncoders, widths: Sequence[int], section: MedMAPSettings) -> None:
        super().__init__()
        self.encoders = encoders
        aligned = range(len(widths)) if section.stages == "all" else sorted({0, len(widths) - 1})
        self.anchors = nn.ModuleDict(
            {str(stage): ModalityAnchor(len(encoders), widths[stage], section) for stage in aligned}
        )

    def forward(self, x: torch.Tensor, available: torch.Tensor) -> tuple[list[torch.Tensor], list[Aligning]]:
        """Features per stage (B, C, F, *grid) for the fusion, and what is to be aligned."""
        fused: list[torch.Tensor] = []
        aligned: list[Aligning] = []
        for stage, z in enumerate(self.encoders(x)):
            if str(stage) in self.anchors:
                anchor: Any = self.anchors[str(stage)]
                aligned.append((anchor, z))
                fused.append(anchor(z, available))
            else:
                fused.append(mask_features(z, available))
        return fused, aligned


Front: TypeAlias = AlignedStem | AlignedEncoders


class _AlignedInput(AvailabilityAware):
    """What both networks share: which modalities there are, and the front's answer."""

    front: Front

    def enter(self, x: torch.Tensor, complete: torch.Tensor | None) -> tuple[Any, torch.Tensor | None]:
        """Input of the encoder, and the alignment loss if the complete batch is given."""
        available = self.available(x)
        if complete is None:
            return self.front(x, available)[0], None
        # a patch without any voxel counts as complete: its logits must not read what is in the others
        anything = x.flatten(1).any(1).reshape(-1, *[1] * (x.ndim - 1))
        complete = torch.where(anything, complete, x)
        y, aligned = self.front(complete, available)
        present = modalities.known_availability(complete)
        return y, torch.stack([anchor.alignment(z, present) for anchor, z in aligned]).mean()


class MedMAPUNet(_AlignedInput):
    """The plans' U-Net behind an aligning front; ``encoder`` may be the fusion of one encoder per modality."""

    def __init__(self, front: Front, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.front, self.encoder, self.decoder = front, encoder, decoder

    def forward(self, x: torch.Tensor, *, complete: torch.Tensor | None = None):
        """Segment a batch (B, C, *spatial) whose absent modalities are zero, as the plans' network does.

        With ``complete``, the same batch with all modalities, the result is an :class:`Aligned`. Its logits are those
        of ``x`` alone: what ``x`` lacks is encoded, but replaced by the imputation.
        """
        y, alignment = self.enter(x, complete)
        logits = self.decoder(self.encoder(y))
        return logits if alignment is None else Aligned(logits, alignment)


class MedMAPTransformerUNet(MultiScaleTransformerUNet, _AlignedInput):
    """MST-KDNet's network behind an aligning front."""

    def __init__(self, front: Front, encoder: Any, decoder: Any, shape: UNetShape, section: NetworkSettings) -> None:
        super().__init__(encoder, decoder, shape, section)
        self.front = front

    def forward(self, x: torch.Tensor, *, complete: torch.Tensor | None = None, **options: bool):
        """Segment as MST-KDNet's network does; features with ``complete`` are :data:`AlignedFeatures`."""
        y, alignment = self.enter(x, complete)
        output: Any = super().forward(y, **options)
        return output if alignment is None else AlignedFeatures._make((*output, alignment))


class AlignedDesign(NetworkDesign):
    """The plans' U-Net behind an aligning front."""

    sections: ClassVar[tuple[type[Section], ...]] = (MedMAPSettings,)

    def check(self, plan: UNetPlan, settings: Settings, names: Sequence[str]) -> None:
        super().check(plan, settings, names)
        section, last = settings[MedMAPSettings], len(names) - 1
        expected = f"a channel number of the data set: 0 ... {last} ({', '.join(names)})"
        section.require((section.fixed_channel or 0) <= last, "fixed_channel", expected)

    def resolve(self, settings: Settings, plan: UNetPlan, names: Sequence[str] | None = None) -> Settings:
        """``features``: half of the planned finest width for all modalities, so that the stem stays cheap beside it."""
        if settings[MedMAPSettings].features is not None:
            return settings
        features = plan.shape.widths[0] // (2 * plan.num_modalities)
        return settings.replace(MedMAPSettings, features=max(1, min(MAX_STEM_FEATURES, features)))

    def build(self, plan: UNetPlan, settings: Settings) -> Any:
        return MedMAPUNet(*self.parts(plan, settings[MedMAPSettings]))

    def parts(self, plan: UNetPlan, section: MedMAPSettings) -> tuple[Front, Any, Any]:
        """Build front, encoder and decoder."""
        if section.placement == "stem":
            unet = plan.replace(num_modalities=plan.num_modalities * (section.features or 1)).build()
            return AlignedStem(unet.encoder, plan.num_modalities, section), unet.encoder, unet.decoder
        encoders, fusion, decoder = build_modality_encoders(plan, section.width)
        first: Any = encoders[0]
        return AlignedEncoders(encoders, first.output_channels, section), fusion, decoder

    def input_weights(self, network: Any) -> list[torch.Tensor]:
        """Those of the U-Net's first convolution behind a stem that gives every modality one channel."""
        front, weights = network.front, first_weights(network)
        fits = isinstance(front, AlignedStem) and weights[0].shape[1] == front.num_modalities
        return weights if fits else []

    def modality_weights(self, network: Any) -> list[torch.Tensor]:
        """The front, and what reads its features: the U-Net's first convolution, or the fusion."""
        stem = isinstance(network.front, AlignedStem)
        return [*network.front.parameters(), *(first_weights(network) if stem else network.encoder.parameters())]


class AlignedTransformerDesign(AlignedDesign):
    """MST-KDNet's network behind an aligning front."""

    transformer = TransformerDesign()
    sections: ClassVar[tuple[type[Section], ...]] = (*TransformerDesign.sections, *AlignedDesign.sections)

    def resolve(self, settings: Settings, plan: UNetPlan, names: Sequence[str] | None = None) -> Settings:
        return self.transformer.resolve(super().resolve(settings, plan, names), plan, names)

    def build(self, plan: UNetPlan, settings: Settings) -> MedMAPTransformerUNet:
        parts = self.parts(plan, settings[MedMAPSettings])
        return MedMAPTransformerUNet(*parts, plan.shape, settings[NetworkSettings])

    def added_modules(self, network: Any) -> list[nn.Module]:
        return self.transformer.added_modules(network)
