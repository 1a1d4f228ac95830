"""What losses of logits share: checks of their arguments, probabilities, and soft Dice."""

from __future__ import annotations

import torch
from torch.nn import functional

_SMOOTH = 1e-5


def probabilities(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    """Sigmoid of region heads or softmax over classes, float32; of the shape of the logits, (B, K, *spatial)."""
    return logits.float().sigmoid() if regions else logits.float().softmax(1)


def foreground_probabilities(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    """Probabilities without those of the background, class 0: float32, (B, foreground heads, *spatial)."""
    return probabilities(logits, regions)[:, 0 if regions else 1 :]


def foreground_masks(label: torch.Tensor, classes: int) -> torch.Tensor:
    """Turn class numbers (B, 1, *spatial) into a mask per foreground class: bool, (B, classes - 1, *spatial)."""
    numbers = torch.arange(1, classes, device=label.device)
    return label == numbers.reshape(1, -1, *[1] * (label.ndim - 2))


def dice_sums(found: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlap and size for :func:`soft_dice`, (B, H), of probabilities and a bool mask, both (B, H, *spatial)."""
    overlap = torch.where(wanted, found, 0.0).flatten(2).sum(2)
    return overlap, found.flatten(2).sum(2) + wanted.flatten(2).sum(2)


def soft_dice(overlap: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return the soft Dice with nnU-Net's sums (no squares) and smoothing."""
    return (2 * overlap + _SMOOTH) / (size + _SMOOTH)


def check_logits(student: torch.Tensor, teacher: torch.Tensor, regions: bool) -> None:
    if student.shape != teacher.shape or student.ndim < 3:
        raise ValueError(
            f"found student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}, expected equal "
            "shapes (B, K, *spatial)"
        )
    if not regions and student.shape[1] < 2:
        raise ValueError("found one softmax channel, expected at least two; one overlapping region needs regions=True")


def check_map(name: str, voxel_map: torch.Tensor, logits: torch.Tensor, *, boolean: bool) -> None:
    expected = (logits.shape[0], 1, *logits.shape[2:])
    if tuple(voxel_map.shape) != expected or (boolean and voxel_map.dtype != torch.bool):
        raise ValueError(
            f"{name} has shape {tuple(voxel_map.shape)} and type {voxel_map.dtype}, expected {expected}"
            + (" and torch.bool" if boolean else "")
        )


def where_valid(logits: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Zeros where a voxel is not valid: NaN in logits or weights would reach gradients even through a later mask."""
    return logits if valid is None else torch.where(valid, logits, 0.0)


def valid_map(valid: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    if valid is None:
        return torch.ones_like(logits[:, :1], dtype=torch.bool)
    check_map("valid", valid, logits, boolean=True)
    return valid


def prepare(
    student: torch.Tensor, teacher: torch.Tensor, regions: bool, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the arguments of a loss; return both logits in float32, zero where a voxel is not valid, and that map."""
    check_logits(student, teacher, regions)
    valid = valid_map(valid, student)
    return where_valid(student.float(), valid), where_valid(teacher.float(), valid), valid


def divergence_map(student: torch.Tensor, teacher: torch.Tensor, regions: bool, tau: float = 1.0) -> torch.Tensor:
    """tau^2 KL(teacher || student) per voxel, (B, 1, *spatial), or per voxel and region, (B, R, *spatial)."""
    student, teacher = student / tau, teacher / tau
    if regions:
        p = teacher.sigmoid()
        inside = p * (functional.logsigmoid(teacher) - functional.logsigmoid(student))
        outside = (1 - p) * (functional.logsigmoid(-teacher) - functional.logsigmoid(-student))
        return tau**2 * (inside + outside)
    student, teacher = student.log_softmax(1), teacher.log_softmax(1)
    return tau**2 * (teacher.exp() * (teacher - student)).sum(1, keepdim=True)


def cross_entropy_map(logits: torch.Tensor, label: torch.Tensor, regions: bool) -> torch.Tensor:
    """Cross-entropy against the label, shaped as :func:`divergence_map`."""
    if regions:
        return functional.binary_cross_entropy_with_logits(logits, label.float(), reduction="none")
    return -logits.log_softmax(1).gather(1, label.long())


def mean_over_voxels(values: torch.Tensor, valid: torch.Tensor, voxel_weight: torch.Tensor | None) -> torch.Tensor:
    """Mean of (weighted) values (B, 1, *spatial) over the valid voxels; 0 without any."""
    return torch.where(valid, weigh(values, voxel_weight), 0.0).sum() / valid.sum().clamp_min(1)


def weigh(values: torch.Tensor, voxel_weight: torch.Tensor | None) -> torch.Tensor:
    if voxel_weight is None:
        return values
    check_map("voxel_weight", voxel_weight, values, boolean=False)
    return values * voxel_weight.detach().float()
