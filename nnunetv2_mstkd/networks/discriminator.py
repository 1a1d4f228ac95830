"""The adversary of global style matching (GSME)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_NEGATIVE_SLOPE = 0.2
_FEATURES = (32, 64)
"""Channels of the hidden convolutions."""


class PatchDiscriminator(nn.Module):
    """Fully convolutional discriminator that tells the teacher's features from the student's, position by position.

    D of equation (9) in MST-KDNet (MICCAI 2025), "Bridging the Gap in Missing Modalities: Leveraging Knowledge
    Distillation and Style Matching for Brain Tumor Segmentation". Input is f_enc and f_t joined along the channels. One
    convolution of stride 2, then convolutions of stride 1, all 3 wide with padding 1, so that any grid with edges of at
    least 1 works.

    Changed against the paper's code: no kernel tied to one patch size; each input channel is standardised over space,
    so that D cannot win by the features' scale and offset alone; no normalisation inside, which would fail on one
    position and make each position's answer depend on the whole grid; logits instead of probabilities. Weights and
    arithmetic are float32, also under autocast.

    Parameters
    ----------
    input_channels
        Channels of what is compared: for MST-KDNet those of f_enc and f_t together.
    dimensions
        Number of spatial axes, 2 or 3.
    """

    def __init__(self, input_channels: int, *, dimensions: int) -> None:
        super().__init__()
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        layers: list[nn.Module] = []
        width = input_channels
        for index, next_width in enumerate(_FEATURES):
            layer = convolution(width, next_width, kernel_size=3, stride=2 if index == 0 else 1, padding=1)
            nn.init.kaiming_normal_(layer.weight, a=_NEGATIVE_SLOPE)
            nn.init.zeros_(layer.get_parameter("bias"))
            layers += [layer, nn.LeakyReLU(_NEGATIVE_SLOPE)]
            width = next_width
        self.hidden = nn.Sequential(*layers)
        self.head = convolution(width, 1, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, positive where the input looks like the teacher's.

        ``x`` is (B, input_channels, *spatial), not standardised. A grid of one position standardises to zero: D then
        cannot tell. Returned are float32 logits (B, 1, *ceil(spatial / 2)).
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.head(self.hidden(functional.layer_norm(x.float(), x.shape[2:])))


def mean_logit(logits: torch.Tensor) -> torch.Tensor:
    """Mean over positions of the discriminator's logits (B, 1, *spatial): float32, (B,)."""
    with torch.autocast(device_type=logits.device.type, enabled=False):
        return logits.float().flatten(1).mean(1)
