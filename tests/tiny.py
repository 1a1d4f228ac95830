"""Plans, trainers and batches that are made by hand and small enough for a step in some milliseconds."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet.plans import BLOCK

DATASET = "Dataset901_Tiny"
LABELS = {"background": 0, "core": 1, "edema": 2}
LABELS_WITH_IGNORE = {**LABELS, "ignore": 3}
REGIONS = {"background": 0, "whole": [1, 2], "core": [1]}
REGIONS_WITH_IGNORE = {**REGIONS, "ignore": 3}

NO_TERMS: dict[str, dict[str, Any]] = {
    "mstkd": dict.fromkeys(TERMS, 0),
    "distillation": {"where": "everywhere"},
    "adamm": {"consistency": 0, "content": 0, "style": 0, "adversarial": 0},
    "medmap": {"weight": 0},
    "smml": {"pixel": 0, "feature": 0},
    "teacher": {"warm_start": False},
}
"""Settings with which the distilling trainers need no teacher."""


def dataset_json(channels: int = 4, labels: dict[str, Any] | None = None) -> dict[str, Any]:
    """A dataset.json with channels T0, T1, ..."""
    labels = copy.deepcopy(LABELS if labels is None else labels)
    content = {
        "channel_names": {str(number): f"T{number}" for number in range(channels)},
        "labels": labels,
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        content["regions_class_order"] = [2, 1][: len(regions)]
    return content


def plans(
    *,
    dimensions: int = 3,
    channels: int = 4,
    batch_size: int = 2,
    edge: int = 16,
    residual: bool = False,
    batch_dice: bool = False,
    block: dict[str, Any] | None = None,
    features: Sequence[int] = (8, 16, 24),
) -> dict[str, Any]:
    """Plans with one configuration, "tiny": three stages of 8, 16 and 24 channels on a patch of 16 voxels per axis."""
    stages = len(features)
    arch_kwargs = {
        "n_stages": stages,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[3] * dimensions] * stages,
        "strides": [[1] * dimensions, *[[2] * dimensions] * (stages - 1)],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "tiny_data",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": [edge] * dimensions,
        "median_image_size_in_voxels": [float(edge)] * dimensions,
        "spacing": [1.0] * dimensions,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [True] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
            "arch_kwargs": arch_kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": batch_dice,
    }
    if block is not None:
        configuration[BLOCK] = copy.deepcopy(block)
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": [edge] * 3,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "configurations": {"tiny": configuration},
    }


class TrainerFactory:
    """Builds trainers whose results go to a temporary folder; without preprocessed data, so they take steps only."""

    def __init__(self) -> None:
        # nnU-Net reads from the file names how the data are stored; there is nothing in this one
        folder = Path(os.environ["nnUNet_preprocessed"], DATASET, "tiny_data")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nothing.b2nd").touch()

    def __call__(
        self,
        cls: type,
        given_plans: dict[str, Any] | None = None,
        *,
        channels: int = 4,
        labels: dict[str, Any] | None = None,
        deep_supervision: bool = True,
        fold: int | str = 0,
        seed: int = 0,
        **options: Any,
    ):
        """A trainer after ``initialize``; ``options`` go to :func:`plans`."""
        content = plans(channels=channels, **options) if given_plans is None else copy.deepcopy(given_plans)
        content["continue_training"] = False  # nnU-Net's commands put it there
        trainer = cls(content, "tiny", fold, dataset_json(channels, labels), torch.device("cpu"))
        trainer.enable_deep_supervision = deep_supervision
        torch.manual_seed(seed)
        trainer.initialize()
        trainer.set_deep_supervision_enabled(deep_supervision)
        trainer.network.train()
        return trainer


def give_teacher(trainer: Any, seed: int = 1) -> Any:
    """Put a frozen teacher with weights of its own beside a student, as its training start does."""
    torch.manual_seed(seed)
    teacher = type(trainer).teacher_trainer.build_network_architecture(
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        enable_deep_supervision=False,
    )
    wake(teacher)
    trainer.teacher = teacher.eval().requires_grad_(False)
    return trainer


def wake(network: torch.nn.Module, scale: float = 0.1) -> None:
    """Give the zero-initialised parts of a network weights, as a few steps of training do; others have none."""
    with torch.no_grad():
        if hasattr(network, "transformer"):
            for parameter in network.transformer.projections.parameters():
                parameter.normal_(0, scale)
        if hasattr(network, "added_modules"):
            for module in network.added_modules():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * scale)


def batch(trainer: Any, *, batch_size: int | None = None, seed: int = 0) -> dict[str, Any]:
    """A batch as nnU-Net's loader gives it: noise, with labels that depend on two of the channels."""
    generator = torch.Generator().manual_seed(seed)
    size = trainer.configuration_manager.batch_size if batch_size is None else batch_size
    shape = tuple(trainer.configuration_manager.patch_size)
    data = torch.randn(size, trainer.num_input_channels, *shape, generator=generator)
    values = (data[:, :1] > 0.3).short() + (data[:, :1] + data[:, 1:2] > 1.2).short()
    manager = trainer.label_manager
    values = values.clamp(max=max(manager.all_labels))
    if manager.has_ignore_label:
        values[..., :4] = manager.ignore_label
    if manager.has_regions:
        regions = [*manager.foreground_regions, *([manager.ignore_label] if manager.has_ignore_label else [])]
        members = [torch.as_tensor(np.atleast_1d(region)) for region in regions]
        target = torch.cat([torch.isin(values, member) for member in members], 1)
    else:
        target = values
    if trainer.enable_deep_supervision:
        scales = trainer._get_deep_supervision_scales()
        target = [target[(..., *(slice(None, None, round(1 / step)) for step in scale))] for scale in scales]
    return {"data": data, "target": target, "keys": [f"case_{number}" for number in range(size)]}


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's weights."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def memory(trainer: Any) -> list[Any]:
    """What the optimiser remembers of past gradients."""
    content = trainer.optimizer.state_dict()
    return [member["state"] for member in content.get("members", [content])]


def same(first: Any, second: Any) -> bool:
    """Whether two contents of a checkpoint are equal, tensors bit for bit; NaN equals NaN."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)
