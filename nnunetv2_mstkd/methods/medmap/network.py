"""MedMAP on nnU-Net: per-modality features aligned to an anchor, absent ones imputed from the others.

Two placements (arXiv 2408.09465 and its two released fragments): a grouped stem in front of the unchanged network, or
one encoder per modality. Both are a *front*, a module between the image and the network's encoder.
:class:`AlignedDesign` puts one in front of the network of another design, :func:`align` in front of any network.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

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
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.networks.decoding import logits_of
from nnunetv2_mstkd.networks.modality_encoders import ModalityEncoders, build_modality_encoders, mask_features
from nnunetv2_mstkd.networks.multi_encoder import MultiEncoderUNet
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.design import NetworkDesign, first_weights
from nnunetv2_mstkd.training.multi_encoder import MultiEncoderDesign
from nnunetv2_mstkd.training.settings import Settings

STEM_FEATURES, MAX_STEM_WIDTH = 4, 32
"""Channels per modality of the stem, and of all modalities together, unless the settings say more."""

VARIANCE_START = 0.1
VARIANCE_FLOOR = 1e-5
"""Of the learned Gaussian anchor, as in MIRO (Cha et al., ECCV 2022)."""

Network = TypeVar("Network", bound=nn.Module)


class Aligned(NamedTuple):
    """What a network behind an aligning front returns if it is given the complete batch."""

    output: Any
    """What the network itself returns."""
    alignment: torch.Tensor
    """Scalar alignment loss, mean over the aligned stages."""

    @property
    def logits(self) -> Any:
        """Logits (B, K, *spatial), or a list of these under deep supervision."""
        return logits_of(self.output)


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


def stem_features(section: MedMAPSettings, num_modalities: int) -> int:
    """Channels of the stem for each modality."""
    return section.features or max(1, min(STEM_FEATURES, MAX_STEM_WIDTH // num_modalities))


class AlignedStem(nn.Module):
    """Grouped convolutions that give every modality F full-resolution channels of its own, aligned and imputed.

    One as wide as the plans' first kernel and a pointwise one, each with instance normalisation and the plans'
    non-linearity. A second wide one costs as much as a convolution of the U-Net's finest stage.
    """

    def __init__(self, encoder: Any, num_modalities: int, section: MedMAPSettings) -> None:
        super().__init__()
        features = stem_features(section, num_modalities)
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


class AlignedNetwork(AvailabilityAware):
    """Mixin: a network whose encoder reads an aligning front instead of the image; see :func:`align`."""

    front: Front
    takes_availability: bool

    def forward(
        self,
        x: torch.Tensor,
        availability: torch.Tensor | None = None,
        *,
        complete: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Segment a batch (B, C, *spatial) whose absent modalities are zero, as the network does without a front.

        Parameters
        ----------
        availability
            What is known of the cases; None: the attribute ``availability``.
        complete
            The same batch with all modalities. The result is then :class:`Aligned`. Its logits are those of ``x``
            alone: what ``x`` lacks is encoded, but replaced by the imputation.
        options
            Further arguments of the network.
        """
        available = modalities.known_availability(x, self.availability if availability is None else availability)
        if complete is not None:
            complete = modalities.complete_unless_empty(x, complete)
        y, aligned = self.front(x if complete is None else complete, available)
        if self.takes_availability:
            options["availability"] = available
        output = super().forward(y, **options)
        if complete is None:
            return output
        present = modalities.known_availability(complete)
        return Aligned(output, torch.stack([anchor.alignment(z, present) for anchor, z in aligned]).mean())


@functools.cache
def _aligned_class(cls: type[nn.Module]) -> type[nn.Module]:
    takes = "availability" in inspect.signature(cls.forward).parameters
    return type(f"Aligned{cls.__name__}", (AlignedNetwork, cls), {"takes_availability": takes})


def align(network: Network, front: Front) -> Network:
    """Put a front before a network and return it, as an :class:`AlignedNetwork` that is also of its own class.

    All attributes and names in the state dict stay, and the front is ``front``. As with PyTorch's ``fully_shard`` the
    object changes its class. ``forward`` takes the image first; if it has an argument ``availability``, it gets which
    modalities each sample has, bool (B, C), which cannot be seen in the front's output.
    """
    network.front = front
    network.__class__ = _aligned_class(type(network))  # type: ignore[assignment, arg-type]
    return network


class AlignedDesign(NetworkDesign):
    """The network of another design behind an aligning front.

    Parameters
    ----------
    inner
        Design of the network; default: the plans' U-Net.
    """

    def __init__(self, inner: NetworkDesign | None = None) -> None:
        self.inner = NetworkDesign() if inner is None else inner
        self.sections = (*self.inner.sections, MedMAPSettings)  # type: ignore[misc]

    def check(self, plan: UNetPlan, settings: Settings, names: Sequence[str]) -> None:
        self.inner.check(plan, settings, names)
        section, last = settings[MedMAPSettings], len(names) - 1
        expected = f"a channel number of the data set: 0 ... {last} ({', '.join(names)})"
        section.require((section.fixed_channel or 0) <= last, "fixed_channel", expected)

    def resolve(self, settings: Settings, plan: UNetPlan, names: Sequence[str] | None = None) -> Settings:
        """``placement``: a network with one encoder per modality has its own ones aligned."""
        settings = self.inner.resolve(settings, plan, names)
        if isinstance(self.inner, MultiEncoderDesign):
            settings = settings.replace(MedMAPSettings, placement="encoders")
        return settings.replace(MedMAPSettings, features=stem_features(settings[MedMAPSettings], plan.num_modalities))

    def build(self, plan: UNetPlan, settings: Settings) -> Any:
        section = settings[MedMAPSettings]
        front: Front
        if section.placement == "stem":
            network = self.inner.build(
                plan.replace(modality_features=stem_features(section, plan.num_modalities)), settings
            )
            front = AlignedStem(network.encoder, plan.num_modalities, section)
        else:
            network = self.inner.build(plan, settings)
            if isinstance(network, MultiEncoderUNet):
                encoders, network.modality_encoders = network.modality_encoders, None
            else:
                encoders, network.encoder, network.decoder = build_modality_encoders(plan, section.width)
            widths: Any = encoders[0].output_channels
            front = AlignedEncoders(encoders, widths, section)
        align(network, front)
        if type(self.inner) is NetworkDesign:  # front first: checkpoints keep the optimiser's state by position
            for name in ("encoder", "decoder"):
                module = getattr(network, name)
                delattr(network, name)
                setattr(network, name, module)
        return network

    def added_modules(self, network: Any) -> list[nn.Module]:
        return self.inner.added_modules(network)

    def translate(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.inner.translate(weights)

    def input_weights(self, network: Any) -> list[torch.Tensor]:
        """The inner network's; without its first convolution unless a stem gives that one channel per modality."""
        first, weights = first_weights(network), self.inner.input_weights(network)
        if isinstance(network.front, AlignedStem) and first[0].shape[1] == network.front.num_modalities:
            return weights
        return [weight for weight in weights if weight is not first[0]]

    def modality_weights(self, network: Any) -> list[torch.Tensor]:
        """The front, what reads its features (first convolution or fusion), and the inner network's."""
        stem = isinstance(network.front, AlignedStem)
        reading = first_weights(network) if stem else network.encoder.parameters()
        return [*network.front.parameters(), *reading, *self.inner.modality_weights(network)]
