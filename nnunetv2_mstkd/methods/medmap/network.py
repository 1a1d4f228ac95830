"""MedMAP on nnU-Net: per-modality features aligned to an anchor, absent ones imputed from the others.

Two placements (arXiv 2408.09465 and its two released fragments): a grouped stem in front of the unchanged plans'
network, or one encoder per modality. Both are a *front*, a module between the image and the network's encoder, so that
either fits in front of the plain U-Net and of the one with a multi-scale transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn
from torch.nn import functional

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods.medmap.losses import gaussian_alignment, mixture_alignment, renormalized_weights
from nnunetv2_mstkd.methods.mstkd.network import MultiScaleTransformerUNet
from nnunetv2_mstkd.networks.modality_encoders import ModalityEncoders, build_modality_encoders
from nnunetv2_mstkd.networks.plans_unet import Geometry, build_unet

MAX_STEM_FEATURES = 4
"""Channels per modality of the stem at most, unless the settings say more."""

VARIANCE_START = 0.1
VARIANCE_FLOOR = 1e-5
"""Of the learned Gaussian anchor, as in MIRO (Cha et al., ECCV 2022)."""


class Aligned(NamedTuple):
    """What a training step reads from the plain network.

    Attributes
    ----------
    logits:
        what the plans' network returns: (B, K, *spatial), or a list of these under deep supervision.
    alignment:
        scalar alignment loss, mean over the aligned stages.
    """

    logits: torch.Tensor | list[torch.Tensor]
    alignment: torch.Tensor


class ModalityAnchor(nn.Module):
    """Anchor of one stage: the modalities' weights, the alignment loss, and imputation.

    Parameters
    ----------
    num_modalities, features:
        C and F of the features (B, C, F, *grid).
    anchor:
        ``star``: the weighted mean of all modalities (P*_mix); ``fixed``: one modality (P^k_mix); ``gaussian``: a
        learned Gaussian per channel; ``normal``: the standard normal distribution.
    fixed_channel:
        k of ``fixed``.
    normalize, detach_anchor:
        see :func:`~nnunetv2_mstkd.methods.medmap.losses.mixture_alignment`; of ``star`` and ``fixed`` only, because for
        standardised features the other two would be constant.
    """

    fixed: torch.Tensor

    def __init__(
        self,
        num_modalities: int,
        features: int,
        *,
        anchor: str,
        fixed_channel: int | None,
        normalize: bool,
        detach_anchor: bool,
    ) -> None:
        super().__init__()
        self.anchor, self.normalize, self.detach_anchor = anchor, normalize, detach_anchor
        self.weight_logits = nn.Parameter(torch.zeros(num_modalities))
        if anchor == "gaussian":
            start = torch.full((features,), VARIANCE_START - VARIANCE_FLOOR)
            self.mean = nn.Parameter(torch.zeros(features))
            self.raw_variance = nn.Parameter(start.expm1().log())  # inverse of softplus
        one_hot = torch.arange(num_modalities) == (-1 if fixed_channel is None else fixed_channel)
        self.register_buffer("fixed", one_hot.float(), persistent=False)

    @property
    def weights(self) -> torch.Tensor:
        """Convex weights of the modalities, shape (C,)."""
        return self.weight_logits.float().softmax(0)

    def forward(self, z: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Replace what is absent by the weighted mean of what is available.

        ``out_m = z_m`` where modality m is available, else ``sum_n w_n z_n`` over the available n, weights renormalised
        per sample; the same in training and in prediction.

        Parameters
        ----------
        z:
            shape (B, C, F, *grid).
        available:
            bool, shape (B, C).
        """
        keep = available.reshape(*available.shape, *[1] * (z.ndim - 2))
        kept = torch.where(keep, z, z.new_zeros(()))
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
        return mixture_alignment(z, weights, present, normalize=self.normalize, detach_anchor=self.detach_anchor)


class AlignedStem(nn.Module):
    """Grouped convolutions that give every modality F full-resolution channels of its own, aligned and imputed.

    One as wide as the plans' first kernel and a pointwise one, each with instance normalisation and the plans'
    non-linearity. A second wide one costs as much as a convolution of the U-Net's finest stage.

    Parameters
    ----------
    encoder:
        the plans' encoder, for its convolutions' kind, first kernel size and non-linearity.
    num_modalities, features:
        C and F.
    anchor:
        arguments of :class:`ModalityAnchor`.
    """

    def __init__(self, encoder: Any, num_modalities: int, features: int, anchor: Mapping[str, Any]) -> None:
        super().__init__()
        convolution, kernel = encoder.conv_op, encoder.kernel_sizes[0]
        dimensions = 2 if issubclass(convolution, nn.Conv2d) else 3
        kernel = [kernel] * dimensions if isinstance(kernel, int) else list(kernel)
        width = num_modalities * features
        layers: list[nn.Module] = []
        for incoming, edges in ((num_modalities, kernel), (width, [1] * dimensions)):
            padding = [(edge - 1) // 2 for edge in edges]
            layers += [
                convolution(incoming, width, edges, padding=padding, groups=num_modalities, bias=encoder.conv_bias),
                # whatever the plans normalise with: a batch's statistics would carry absent images into other samples
                (nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d)(width, affine=True),
                encoder.nonlin(**(encoder.nonlin_kwargs or {})),
            ]
        self.layers = nn.Sequential(*layers)
        self.num_modalities = num_modalities
        self.anchor = ModalityAnchor(num_modalities, features, **anchor)
        self.apply(InitWeights_He(1e-2))

    def forward(self, x: torch.Tensor, available: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Input of the network (B, C F, *spatial), and the features that are to be aligned, one per stage."""
        z = self.layers(x).unflatten(1, (self.num_modalities, -1))
        return self.anchor(z, available).flatten(1, 2), [z]

    def alignment(self, features: Sequence[torch.Tensor], present: torch.Tensor) -> torch.Tensor:
        return self.anchor.alignment(features[0], present)


class AlignedEncoders(nn.Module):
    """One encoder per modality; chosen stages are aligned and imputed, absent modalities of the others are zero.

    Parameters
    ----------
    encoders:
        of all modalities.
    widths:
        channels per stage.
    stages:
        ``ends``: the first one and the bottleneck; ``all``.
    anchor:
        arguments of :class:`ModalityAnchor`.
    """

    def __init__(
        self, encoders: ModalityEncoders, widths: Sequence[int], stages: str, anchor: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.encoders = encoders
        aligned = range(len(widths)) if stages == "all" else sorted({0, len(widths) - 1})
        self.anchors = nn.ModuleDict(
            {str(stage): ModalityAnchor(len(encoders), widths[stage], **anchor) for stage in aligned}
        )

    def forward(self, x: torch.Tensor, available: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Features per stage (B, C, F, *grid) for the fusion, and those of the aligned stages as they were."""
        fused, aligned = [], []
        for stage, z in enumerate(self.encoders(x)):
            if str(stage) in self.anchors:
                aligned.append(z)
                fused.append(self.anchors[str(stage)](z, available))
            else:
                keep = available.reshape(*available.shape, *[1] * (z.ndim - 2))
                fused.append(torch.where(keep, z, z.new_zeros(())))
        return fused, aligned

    def alignment(self, features: Sequence[torch.Tensor], present: torch.Tensor) -> torch.Tensor:
        anchors: list[Any] = list(self.anchors.values())
        losses = [anchor.alignment(z, present) for anchor, z in zip(anchors, features, strict=True)]
        return torch.stack(losses).mean()


class _AlignedInput(nn.Module):
    """What both networks share: which modalities there are, and the front's answer."""

    front: AlignedStem | AlignedEncoders
    availability: torch.Tensor | None = None
    """bool, (1, C) or (B, C), on the device, set by prediction; None: channels that are zero are absent."""

    def enter(self, x: torch.Tensor, complete: torch.Tensor | None) -> tuple[Any, torch.Tensor | None]:
        """Input of the encoder, and the alignment loss if the complete batch is given."""
        available = modalities.known_availability(x, self.availability)
        if complete is None:
            return self.front(x, available)[0], None
        y, features = self.front(complete, available)
        return y, self.front.alignment(features, modalities.detect_availability(complete))


class MedMAPUNet(_AlignedInput):
    """The plans' U-Net behind an aligning front.

    Parameters
    ----------
    front:
        :class:`AlignedStem` or :class:`AlignedEncoders`.
    encoder, decoder:
        of the plans' network, or the fusion of one encoder per modality instead of the encoder; they keep their names
        in the state dict.
    """

    def __init__(self, front: AlignedStem | AlignedEncoders, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.front, self.encoder, self.decoder = front, encoder, decoder

    def forward(self, x: torch.Tensor, *, complete: torch.Tensor | None = None):
        """Segment a batch.

        Parameters
        ----------
        x:
            shape (B, C, *spatial); absent modalities are zero.
        complete:
            the same batch with all modalities, for the alignment. Logits are those of ``x`` alone: what ``x`` lacks is
            encoded, but replaced by the imputation.

        Returns
        -------
        Exactly what the plans' network returns; with ``complete`` an :class:`Aligned`.
        """
        y, alignment = self.enter(x, complete)
        logits = self.decoder(self.encoder(y))
        return logits if alignment is None else Aligned(logits, alignment)


class MedMAPTransformerUNet(MultiScaleTransformerUNet, _AlignedInput):
    """MST-KDNet's network behind an aligning front; parameters as for the two classes it combines."""

    def __init__(
        self,
        front: AlignedStem | AlignedEncoders,
        encoder: nn.Module,
        decoder: nn.Module,
        geometry: Geometry,
        network: dict[str, Any],
    ) -> None:
        super().__init__(_Halves(encoder, decoder), geometry, network)
        self.front = front

    def forward(self, x: torch.Tensor, *, complete: torch.Tensor | None = None, **options: bool):
        """As :class:`MultiScaleTransformerUNet`; features with ``complete`` also have the ``alignment``."""
        y, alignment = self.enter(x, complete)
        output: Any = super().forward(y, **options)
        return output if alignment is None else output._replace(alignment=alignment)


class _Halves(NamedTuple):
    encoder: nn.Module
    decoder: nn.Module


def resolve(medmap: Mapping[str, Any], architecture_kwargs: Mapping[str, Any], num_modalities: int) -> dict[str, Any]:
    """The ``medmap`` settings with ``features`` set: half of the planned finest width for all modalities, 1 ... 4 each.

    So the stem stays cheap beside the U-Net's finest stage, whatever the plans.
    """
    widths = architecture_kwargs["features_per_stage"]
    finest = widths if isinstance(widths, int) else widths[0]
    features = max(1, min(MAX_STEM_FEATURES, finest // (2 * num_modalities)))
    return {**medmap, "features": features if medmap["features"] is None else medmap["features"]}


def build(
    architecture_class: str,
    architecture_kwargs: dict[str, Any],
    requires_import: Sequence[str],
    patch_size: Sequence[int],
    medmap: Mapping[str, Any],
    num_modalities: int,
    num_output_channels: int,
    deep_supervision: bool,
    network: dict[str, Any] | None = None,
) -> MedMAPUNet | MedMAPTransformerUNet:
    """Build the network from the plans and the section ``medmap`` of the settings, see :func:`resolve`.

    With the resolved section ``network`` it gets a multi-scale transformer, too.

    Raises
    ------
    ValueError
        if the plans name a network that is neither PlainConvUNet nor ResidualEncoderUNet.
    """
    anchor = {key: medmap[key] for key in ("anchor", "fixed_channel", "normalize", "detach_anchor")}
    plans = (architecture_class, architecture_kwargs, requires_import)
    front: AlignedStem | AlignedEncoders
    encoder: Any
    if medmap["placement"] == "stem":
        width = num_modalities * medmap["features"]
        unet = build_unet(*plans, width, num_output_channels, deep_supervision)
        encoder, decoder = unet.encoder, unet.decoder
        front = AlignedStem(encoder, num_modalities, medmap["features"], anchor)
    else:
        encoders, encoder, decoder = build_modality_encoders(
            *plans, num_modalities, num_output_channels, deep_supervision, medmap["width"]
        )
        first: Any = encoders[0]
        front = AlignedEncoders(encoders, first.output_channels, medmap["stages"], anchor)
    if network is None:
        return MedMAPUNet(front, encoder, decoder)
    return MedMAPTransformerUNet(front, encoder, decoder, Geometry.of(architecture_kwargs, patch_size), network)
