"""Alignment of per-modality features to one anchor distribution (MedMAP, arXiv 2408.09465).

With q_m the distribution of modality m's features, P the anchor and w_m the modalities' weights, the sum over m of
w_m KL(q_m || P) equals JS_w({q_m}) + KL(sum_m w_m q_m || P): to align every modality bounds the divergence of every
subset's mixture at once, and over all anchors the sum is smallest for the mixture itself. That argument is this
package's reading of the paper's title; its own proof was not available. The losses here, like the released code, count
every modality alike: weighted by w_m, the sum would be smallest with all weight on one modality.
"""

from __future__ import annotations

import torch

_VARIANCE_FLOOR = 1e-5


def renormalized_weights(weights: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Weights of the available modalities of each sample, summing to 1: float32, (B, C), 0 for absent ones.

    ``weights`` are those of all modalities, (C,), not negative; ``available`` is bool, (B, C), without an empty row.
    """
    kept = torch.where(available, weights.float(), 0.0)
    return kept / kept.sum(1, keepdim=True)


def leave_one_out_weights(weights: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Anchor of each modality from the others: float32, (B, C, C), one convex mixture per row.

    Row m of a case with n modalities has its own share fixed at 1/n, and ``(n - 1)/n w_k / sum_{l != m} w_l`` for each
    other present modality k. With equal weights every row is the mean; with no other modality the anchor is z_m itself.

    Arguments are those of :func:`renormalized_weights`.
    """
    own = torch.eye(present.shape[1], dtype=torch.bool, device=present.device)
    others = torch.where(present[:, None] & ~own, weights.float(), 0.0)
    others = others / others.sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    share = 1 / present.sum(1).float()[:, None, None]
    return torch.where(own, share, (1 - share) * others)


def mixture_alignment(
    features: torch.Tensor,
    weights: torch.Tensor,
    present: torch.Tensor,
    *,
    normalize: bool = True,
    detach_anchor: bool = False,
) -> torch.Tensor:
    """Squared distance of every modality's features to a weighted mean of all.

    ``L = 1/2 mean over b and present m of MSE(z_m, sum_n w_mn z_n)``, MSE the mean over channels and positions. With
    the same weights w_n for all m this is the alignment to P*_mix of MedMAP (arXiv 2408.09465; its released code
    divides the sum of four MSEs by 8, which is the same); with weight 1 for one modality k it is the alignment to
    P^k_mix. The 1/2 makes it KL(N(z_m, I) || N(p, I)).

    Weights common to all m learn nothing from this loss: the plain mean minimises it. Those of
    :func:`leave_one_out_weights` do. It is then ``((n - 1)/n)^2`` times the error of imputing each modality from the
    others, so that weights move away from a modality that tells little about them; for independent errors of variance
    s_k^2 the minimum is the precision-weighted mean, w_k proportional to 1 / s_k^2. A modality's own share does not
    depend on the weights, so that no weight can win by predicting itself.

    Changed against the released code: z is standardised over space first (``normalize``), because otherwise shrinking
    all features minimises the loss; the mean goes over the modalities that a training case has. Distances come from the
    C x C inner products, (e_m - w_m)^T G (e_m - w_m), so that nothing of the features' size is kept but the features.

    Parameters
    ----------
    features
        F channels of each of C modalities, (B, C, F, *spatial).
    weights
        Weights of one anchor for all modalities, (B, C), or of one for each, (B, C, C); each row sums to 1.
    present
        Modalities that take part, bool (B, C); no row is all False.
    normalize
        Standardise each channel of each modality over space, (z - mean) / sqrt(var + 1e-5).
    detach_anchor
        The anchor's features get no gradient; its weights still do.

    Returns
    -------
    Tensor of float32, scalar, at least 0 up to rounding.
    """
    with torch.autocast(features.device.type, enabled=False):
        # (B, F, X, C, rest): one small product per slice, enough of them to keep a GPU busy
        z = features.float().flatten(4).permute(0, 2, 3, 1, 4)
        positions = z.shape[2] * z.shape[4]
        if normalize:
            z = z - z.mean((2, 4), keepdim=True)
        anchor = z.detach() if detach_anchor else z
        cross = (z @ anchor.transpose(3, 4)).sum(2) / positions
        if detach_anchor:
            own = z.square().sum((2, 4)) / positions
            inner = cross.detach()
        else:
            own, inner = cross.diagonal(dim1=2, dim2=3), cross
        if normalize:
            scale = torch.rsqrt(own + _VARIANCE_FLOOR)
            other = scale.detach() if detach_anchor else scale
            cross = cross * scale[..., None] * other[..., None, :]
            inner = inner * other[..., None] * other[..., None, :]
            own = own * scale.square()
        w = (weights[:, None] if weights.ndim == 2 else weights).float()[:, None]  # (B, 1, 1 or C, C)
        mixture = (w @ inner).mul(w).sum(-1)
        distance = own - 2 * cross.mul(w).sum(-1) + mixture
        return 0.5 * _mean_over_present(distance.mean(1), present)


def gaussian_alignment(
    features: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of every modality's features under one Gaussian anchor, without its constant.

    ``L = 1/2 mean over b, present m, channels and positions of (mu - z_m)^2 / sigma^2 + log sigma^2``. MedMAP's first
    draft adds sigma^2 instead of its logarithm, with a parameter that may be negative; that has no lower bound. Changed
    to the form of MIRO (Cha et al., ECCV 2022), from which it stems.

    ``features`` and ``present`` are as for :func:`mixture_alignment`; ``mean`` and ``variance`` (positive) of the
    anchor have the shape (F,).
    """
    with torch.autocast(features.device.type, enabled=False):
        z = features.float().flatten(3)
        distance = (z - mean.float()[:, None]).square().mean(3) / variance.float() + variance.float().log()
        return 0.5 * _mean_over_present(distance.mean(2), present)


def _mean_over_present(distance: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    kept = present.to(distance.dtype)
    return ((distance * kept).sum(1) / kept.sum(1)).mean()
