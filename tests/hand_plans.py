"""Plans of nnU-Net written by hand: networks of any geometry, and a whole plans file without a planning run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def architecture(
    features: Sequence[int],
    strides: Sequence[Sequence[int]] | None = None,
    *,
    dimensions: int = 3,
    residual: bool = False,
    kernels: Sequence[Sequence[int]] | None = None,
    convs: int = 2,
) -> dict[str, Any]:
    """The ``architecture`` of a configuration; by default every stage but the first halves each axis."""
    stages = len(features)
    strides = strides or [[1] * dimensions, *[[2] * dimensions] * (stages - 1)]
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet."
        + ("ResidualEncoderUNet" if residual else "PlainConvUNet"),
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [list(kernel) for kernel in kernels or [[3] * dimensions] * stages],
            "strides": [list(stride) for stride in strides],
            "n_blocks_per_stage" if residual else "n_conv_per_stage": [convs] * stages,
            "n_conv_per_stage_decoder": [1 if residual else convs] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def configuration(
    patch: Sequence[int], spacing: Sequence[float], network: dict[str, Any], name: str, **more: Any
) -> dict[str, Any]:
    return {
        "data_identifier": f"nnUNetPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [float(edge) for edge in patch],
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"] * 3,
        "use_mask_for_norm": [True] * 3,
        "architecture": network,
        "batch_dice": True,
        **more,
    }


def plans(*, residual: bool = False) -> dict[str, Any]:
    """nnU-Net's four configurations and a thin one, 3d_thin, of 6 slices with a spacing of 3 mm."""
    isotropic = architecture([32, 64, 128, 256, 320], residual=residual)
    flat = architecture([32, 64, 128, 256, 512], dimensions=2, residual=residual)
    thin = architecture(
        [32, 64, 128, 256],
        [[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2]],
        kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        residual=residual,
    )
    fullres = configuration([64, 64, 64], [1.0] * 3, isotropic, "3d_fullres")
    return {
        "dataset_name": "Dataset912_Hand",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": configuration([128, 112], [1.0] * 2, flat, "2d"),
            "3d_lowres": configuration(
                [64, 64, 64], [2.0] * 3, isotropic, "3d_lowres", next_stage="3d_cascade_fullres"
            ),
            "3d_fullres": fullres,
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "3d_thin": configuration([6, 64, 64], [3.0, 1.0, 1.0], thin, "3d_thin"),
        },
    }
