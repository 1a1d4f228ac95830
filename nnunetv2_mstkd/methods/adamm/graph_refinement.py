"""Refining a feature map through a small graph of learned nodes (AdaMM's GARM)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mstkd.networks.attention import TransformerBlock, default_heads

_EPSILON = 1e-6


class NodeProjection(nn.Module):
    """Soft assignment of positions to K nodes by a Gaussian kernel with learned anchors a and bandwidths s.

    ``P_ki = softmax over k of -1/(2 ch) sum_ch ((x_i - a_k) / s_k)^2`` and
    ``z_k = sum_i P_ki (x_i - a_k) / s_k``, scaled to a root mean square of 1.

    Changed against AdaMM's released code: the exponent is divided by the number of channels (assignments are near
    one-hot without that); nodes are not reshaped into channels; two matrix products instead of K copies of the map.
    """

    def __init__(self, width: int, nodes: int) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.randn(nodes, width))
        self.bandwidths = nn.Parameter(torch.zeros(nodes, width))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, ch, N) in float32 to assignments P (B, K, N), which sum to 1 over K, and nodes (B, K, ch)."""
        inverse = self.bandwidths.sigmoid().clamp_min(1e-3).reciprocal()
        squared = inverse.square()
        exponent = squared @ x.square() - 2 * (self.anchors * squared) @ x
        exponent = exponent + (self.anchors.square() * squared).sum(1)[:, None]
        assignment = (exponent * (-0.5 / x.shape[1])).softmax(1)
        share = assignment.sum(2)[..., None]
        nodes = (assignment @ x.transpose(1, 2) - self.anchors * share) * inverse / (share + _EPSILON)
        return assignment, nodes * torch.rsqrt(nodes.square().mean(2, keepdim=True) + _EPSILON)


class GraphRefinement(nn.Module):
    """General features g, refined by what an adapter made of them, c.

    Both maps become K nodes each. Every graph attends to the other one,
    ``Z_g = LN(Z_g + softmax(Z_g Z_c^T / sqrt(ch)) Z_c W_1)`` and the same for Z_c with W_2; one transformer block runs
    over the 2K nodes; the nodes go back to the positions through a linear layer B,
    ``delta = P_c^T B(Z_c') + P_g^T B(Z_g')``; and
    ``b = g + conv(LeakyReLU(norm(conv(c + delta))))`` whose last convolution starts at zero, so that b = g.

    Changed against AdaMM's released code, whose two graphs exchange nothing and whose nodes all become equal: cross
    terms, residuals, and instance norm instead of batch norm. The full set of modalities passes unchanged. With 0 nodes
    there is no graph and delta = 0 (dense fusion).
    """

    def __init__(self, width: int, nodes: int, dimensions: int) -> None:
        super().__init__()
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        norm = nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d
        self.nodes = nodes
        if nodes:
            self.project_specific, self.project_general = (NodeProjection(width, nodes) for _ in range(2))
            self.to_general, self.to_specific = (nn.Linear(width, width, bias=False) for _ in range(2))
            self.norm_general, self.norm_specific = nn.LayerNorm(width), nn.LayerNorm(width)
            self.block = TransformerBlock(width, default_heads(width), mlp_ratio=1.0)
            self.back = nn.Linear(width, width)
        self.mix = convolution(width, width, 1)
        self.norm = norm(width, affine=True)
        self.update = convolution(width, width, 1)
        for parameter in self.update.parameters():
            nn.init.zeros_(parameter)

    def forward(self, specific: torch.Tensor, general: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        """Refine c and g, (B, width, *grid); ``partial``: float, (B,), 0 for complete samples, which get g itself."""
        mixed = specific
        if self.nodes:
            with torch.autocast(general.device.type, enabled=False):
                delta = self.delta(specific.float().flatten(2), general.float().flatten(2))
            mixed = specific + delta.view_as(specific).to(specific.dtype)
        hidden = functional.leaky_relu(self.norm(self.mix(mixed)), 0.01)
        return general + self.update(hidden) * partial.reshape(-1, *[1] * (general.ndim - 1)).to(general.dtype)

    def delta(self, specific: torch.Tensor, general: torch.Tensor) -> torch.Tensor:
        """What the graph adds: from c and g, float32 of shape (B, width, N), to the same shape."""
        assigned_specific, z_specific = self.project_specific(specific)
        assigned_general, z_general = self.project_general(general)
        affinity = z_general @ z_specific.transpose(1, 2) / z_general.shape[2] ** 0.5
        to_general = affinity.softmax(2) @ self.to_general(z_specific)
        to_specific = affinity.transpose(1, 2).softmax(2) @ self.to_specific(z_general)
        both = [self.norm_specific(z_specific + to_specific), self.norm_general(z_general + to_general)]
        nodes, _ = self.block(torch.cat(both, 1))
        # a 1x1 convolution of the map is the same as a linear layer on its few nodes
        return self.back(nodes).transpose(1, 2) @ torch.cat([assigned_specific, assigned_general], 1)
