"""nnU-Net's decoder, stage by stage, for networks that look at or change its features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def decode(
    decoder: Any,
    skips: Sequence[torch.Tensor],
    visit: Callable[[int, torch.Tensor], torch.Tensor] = lambda stage, features: features,
    join: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] = lambda stage, upsampled, skip: skip,
) -> torch.Tensor | list[torch.Tensor]:
    """Run a ``UNetDecoder`` of dynamic_network_architectures on features per encoder stage, finest first.

    ``visit`` is called with each decoder stage's number (0: the deepest) and features and returns the features to
    continue with. ``join`` is called before it, with the number, the features that come up from below and the skip
    connection, and returns what takes the place of the skip connection. Returned is what the decoder itself returns:
    logits (B, K, *spatial), or a list of these, finest first, under deep supervision.
    """
    outputs = []
    features, last = skips[-1], len(decoder.stages) - 1
    for stage in range(len(decoder.stages)):
        upsampled = decoder.transpconvs[stage](features)
        features = torch.cat((upsampled, join(stage, upsampled, skips[-(stage + 2)])), 1)
        features = visit(stage, decoder.stages[stage](features))
        if decoder.deep_supervision or stage == last:
            outputs.append(decoder.seg_layers[stage](features))
    return outputs[::-1] if decoder.deep_supervision else outputs[0]


def logits_of(output: Any) -> Any:
    """Return the logits of a network's output, which may be nothing else."""
    return getattr(output, "logits", output)


def finest(logits: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the full-resolution logits of a network's output, with or without deep supervision."""
    return logits if isinstance(logits, torch.Tensor) else logits[0]
