"""The refinement network of SMML: a student's logits and what a semantic prior says, refined. For training only."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from nnunetv2_mstkd.losses.logits import probabilities
from nnunetv2_mstkd.networks.modality_encoders import StageFusion

MAX_STAGES = 4
MIN_WIDTH = 8
HIDDEN = (64, 128, 64)
"""Hidden widths of the network that weights the modalities of one class, as in SMML's released code."""


class PriorWeighting(nn.Module):
    """How much each modality's prior counts for each class (SMML, its prior weighting).

    For class k a network of four layers reads the volume that each modality's prior gives to k over that of the student
    and the student's own, and answers a factor in [0, 1] per modality.

    Changed against the released code: the student's prediction instead of the ground truth gives the volume, which is
    at least one voxel.
    """

    def __init__(self, num_modalities: int, heads: int) -> None:
        super().__init__()
        sizes = (num_modalities + 1, *HIDDEN, num_modalities)
        self.classes = nn.ModuleList()
        for _ in range(heads):
            layers: list[nn.Module] = []
            for incoming, outgoing in itertools.pairwise(sizes):
                layers += [nn.Linear(incoming, outgoing), nn.LeakyReLU(0.2)]
            self.classes.append(nn.Sequential(*layers[:-1], nn.Sigmoid()))

    def forward(self, prior: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Weighted prior of the shape of ``prior``, (B, C, K, *spatial); ``found``: the student's probabilities."""
        volume = found.flatten(2).mean(2).clamp_min(1 / found[0, 0].numel())  # (B, K)
        share = prior.flatten(3).mean(3) / volume[:, None]  # (B, C, K)
        factors = [
            network(torch.cat([share[:, :, k], volume[:, k : k + 1]], 1)) for k, network in enumerate(self.classes)
        ]
        factor = torch.stack(factors, 2)
        return prior * factor.reshape(*factor.shape, *[1] * (prior.ndim - 3))


class RefinementNet(nn.Module):
    """A U-Net of at most four stages on the weighted prior and the student's logits, which get no gradient.

    Kinds of layers, kernels and strides are those of a planned encoder, and ``width`` times its channels.
    """

    def __init__(self, encoder: Any, num_modalities: int, heads: int, width: float) -> None:
        super().__init__()
        stages = min(MAX_STAGES, len(encoder.output_channels))
        self.weighting = PriorWeighting(num_modalities, heads)
        self.unet = PlainConvUNet(
            input_channels=(num_modalities + 1) * heads,
            n_stages=stages,
            features_per_stage=[max(MIN_WIDTH, round(width * planned)) for planned in encoder.output_channels[:stages]],
            conv_op=encoder.conv_op,
            kernel_sizes=encoder.kernel_sizes[:stages],
            strides=encoder.strides[:stages],
            n_conv_per_stage=1,
            num_classes=heads,
            n_conv_per_stage_decoder=1,
            **{name: getattr(encoder, name) for name in StageFusion.LAYERS},
        )
        self.unet.apply(InitWeights_He(1e-2))
        # the outputs of coarser stages are built but not asked for; DDP waits for the gradient of what it may train
        for layer in self.unet.decoder.seg_layers[:-1]:
            layer.requires_grad_(False)

    def forward(self, prior: torch.Tensor, logits: torch.Tensor, *, regions: bool) -> torch.Tensor:
        """Refine the student's logits (B, K, *spatial).

        ``prior`` is what each modality alone says, (B, C, K, *spatial), zero for absent ones.
        """
        logits = logits.detach()
        with torch.autocast(logits.device.type, enabled=False):
            # a prior's volume over one of a few voxels is beyond half precision
            weighted = self.weighting(prior.float(), probabilities(logits, regions))
        return self.unet(torch.cat([weighted.flatten(1, 2).to(logits.dtype), logits], 1))
