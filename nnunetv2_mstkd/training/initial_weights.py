"""Weights to start from whose input channels are matched by the names of the modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nnunetv2_mstkd.modalities import modality_names
from nnunetv2_mstkd.networks.modality_encoders import ModalityEncoders
from nnunetv2_mstkd.nnunet.checkpoints import load_matching
from nnunetv2_mstkd.nnunet.description import check_description
from nnunetv2_mstkd.training.design import NetworkDesign, first_convolution


def checkpoint_modalities(content: Mapping[str, Any], source: str) -> tuple[str, ...] | None:
    """Return the names of a checkpoint's modalities; None if it has no dataset.json, InputError for a damaged one."""
    arguments = content.get("init_args")
    description = arguments.get("dataset_json") if isinstance(arguments, Mapping) else None
    return modality_names(check_description(description, source)) if isinstance(description, dict) else None


class ChannelMatch(NamedTuple):
    """Which channel of a checkpoint each of the network's C channels starts from."""

    own: tuple[str, ...]
    """Names of the network's modalities."""
    given: tuple[str, ...]
    """Names of the checkpoint's modalities."""

    @property
    def inflated(self) -> bool:
        """Whether the checkpoint's only channel is spread over all of the network's."""
        return len(self.given) == 1 < len(self.own)

    @property
    def unchanged(self) -> bool:
        """Whether both have the same modalities in the same order."""
        return self.sources == list(range(len(self.given)))

    @property
    def sources(self) -> list[int | None]:
        """The checkpoint's channel for each own one, by name (case is ignored); None: it has none."""
        if self.inflated:
            return [0] * len(self.own)
        numbers = {name.casefold(): number for number, name in enumerate(self.given)}
        return [numbers.get(name.casefold()) for name in self.own]

    def apply(self, own: torch.Tensor, given: torch.Tensor) -> torch.Tensor | None:
        """The checkpoint's weights (N, channels, ...) for the network's, whose values (N, C, ...) fill what is absent.

        None if they do not fit or have no channel in common.
        """
        known = [(channel, source) for channel, source in enumerate(self.sources) if source is not None]
        fits = (
            own.ndim == given.ndim >= 2
            and own.shape[:1] + own.shape[2:] == given.shape[:1] + given.shape[2:]
            and own.shape[1] == len(self.own)
            and given.shape[1] >= len(self.given)  # a cascade's network reads labels too
        )
        if not known or not fits:
            return None
        matched = own.detach().clone()
        for channel, source in known:
            matched[:, channel] = given[:, source].to(own) / (len(self.own) if self.inflated else 1)
        return matched

    def __str__(self) -> str:
        if self.inflated:
            return f"all {len(self.own)} from {self.given[0]}, its weights divided by {len(self.own)}"
        sources = self.sources
        parts = [
            f"{name} from {self.given[source]}" if source is not None else f"{name} keeps its initial weights"
            for name, source in zip(self.own, sources, strict=True)
        ]
        unused = [name for number, name in enumerate(self.given) if number not in sources]
        return ", ".join(parts) + (f"; not used: {', '.join(unused)}" if unused else "")


def load_initial_weights(
    network: torch.nn.Module,
    design: NetworkDesign,
    weights: Mapping[str, torch.Tensor],
    own_names: tuple[str, ...],
    names: tuple[str, ...] | None,
) -> list[str]:
    """Load what fits of a checkpoint's weights into a network of a design, and describe in lines what that was.

    The input channels of the network are the modalities ``own_names``, those of the checkpoint ``names``; None: the
    same, in the same order.
    """
    weights = design.translate(weights)
    match = ChannelMatch(own_names, own_names if names is None else names)
    copies = copies_for_encoders(network, weights, match.sources)
    if names is not None:
        weights = match_channels(network, design, weights, match)
    loaded, kept = load_matching(network, {**weights, **copies})
    matched = [] if names is None else [f"modalities: {match}"]
    unknown = [f"not in it or of another shape: {name}" for name in kept]
    return [f"{len(loaded)} tensors loaded, {len(kept)} kept their initial value", *matched, *unknown]


def match_channels(
    network: torch.nn.Module, design: NetworkDesign, weights: Mapping[str, torch.Tensor], match: ChannelMatch
) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights with the input channels that the network has.

    Weights that depend on the order of the modalities in another way are left out if the order is another one.
    """
    own = network.state_dict()
    inputs = _names_of(design.input_weights(network), own)
    matched = {name: value for name, value in weights.items() if name not in inputs}
    for name in inputs & set(weights):
        value = match.apply(own[name], weights[name])
        if value is not None:
            matched[name] = value
    if not match.unchanged:
        for name in _names_of(design.modality_weights(network), own) - inputs:
            matched.pop(name, None)
    return matched


def copies_for_encoders(
    network: torch.nn.Module, weights: Mapping[str, torch.Tensor], sources: Sequence[int | None]
) -> dict[str, torch.Tensor]:
    """Return what the encoders of single modalities start from: the encoder of a plain U-Net, once for each of them.

    Parameters
    ----------
    network
        Any network; without :class:`~nnunetv2_mstkd.networks.modality_encoders.ModalityEncoders` there is nothing.
    weights
        A plain U-Net's, under the network's names. Weights of a network that has such encoders give nothing.
    sources
        For each of the C modalities, the channel of the first convolution that its encoder takes; None: it keeps its
        initial one.
    """
    own, copies = network.state_dict(), dict[str, torch.Tensor]()
    for place, encoders in network.named_modules():
        if not isinstance(encoders, ModalityEncoders) or any(name.startswith(f"{place}.") for name in weights):
            continue
        parents = place.split(".")[:-1]
        prefixes = [".".join([*parents[:depth], "encoder."]) for depth in range(len(parents), -1, -1)]
        prefix = next((each for each in prefixes if any(name.startswith(each) for name in weights)), None)
        for channel, (encoder, source) in enumerate(zip(encoders, sources, strict=True)):
            first = _names_of(first_convolution(encoder), own)
            for name, value in weights.items():
                if prefix is None or not name.startswith(prefix):
                    continue
                copy = f"{place}.{channel}.{name.removeprefix(prefix)}"
                if copy not in first:
                    copies[copy] = value
                elif source is not None and value.ndim > 1:
                    copies[copy] = value[:, source : source + 1]
    return copies


def _names_of(tensors: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor]) -> set[str]:
    """All names of these tensors: nnU-Net's networks hold some several times."""
    places = {tensor.data_ptr() for tensor in tensors if tensor.numel()}
    return {name for name, value in state.items() if value.data_ptr() in places}
