"""Tests that every trainer has to pass, for trainers of other packages too.

Each check of :data:`CHECKS` takes a trainer class and an empty folder, builds the trainer on hand-made plans small
enough for steps of some milliseconds on a CPU, and raises AssertionError if the property does not hold::

    import pytest
    from nnunetv2_mstkd import testing
    from my_package.trainer import MyTrainer

    @pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
    def test_my_trainer(check, tmp_path):
        check(MyTrainer, tmp_path)

The options of :func:`make_trainer` go to every check: ``labels``, ``dimensions``, ``channels``, ``block`` ...
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import SkipTest, mock

import numpy as np
import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import DivergenceError
from nnunetv2_mstkd.networks.decoding import finest
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer

DATASET = "Dataset901_Tiny"
LABELS = {"background": 0, "core": 1, "edema": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": [1]}
FEATURES = (8, 16, 24)


# ---- tiny trainers -------------------------------------------------------------------------------------------------


def dataset_json(channels: int = 4, labels: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a dataset.json with channels T0, T1, ..."""
    labels = copy.deepcopy(dict(LABELS if labels is None else labels))
    content: dict[str, Any] = {
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
    block: Mapping[str, Any] | None = None,
    features: Sequence[int] = FEATURES,
) -> dict[str, Any]:
    """Return plans with one configuration, "tiny": three stages of 8, 16 and 24 channels on 16 voxels per axis.

    ``edge`` is the patch size per axis, ``residual`` asks for a ResidualEncoderUNet instead of a PlainConvUNet,
    ``block`` is the ``"mstkd"`` block of the configuration and ``features`` are the channels per stage.
    """
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


@contextlib.contextmanager
def nnunet_folders(folder: Path) -> Iterator[None]:
    """Set nnU-Net's three variables to folders below ``folder`` for the time of a block."""
    variables = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    with mock.patch.dict(os.environ, variables):
        yield


def write_empty_data() -> None:
    """Write the one file of the preprocessed data: nnU-Net reads from its name how they are stored."""
    folder = Path(os.environ["nnUNet_preprocessed"], DATASET, "tiny_data")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nothing.b2nd").touch()


def make_trainer(
    cls: type,
    given_plans: Mapping[str, Any] | None = None,
    *,
    channels: int = 4,
    labels: Mapping[str, Any] | None = None,
    deep_supervision: bool = True,
    fold: int | str = 0,
    seed: int = 0,
    device: torch.device | None = None,
    **options: Any,
) -> Any:
    """Return a trainer after ``initialize``, below nnU-Net's folders. It has no data, so it can only take steps.

    Its configuration is "tiny" of the given plans, or of :func:`plans` with ``options``; ``labels`` are those of
    :func:`dataset_json`, ``seed`` is that of the weights, and ``device`` the CPU by default.
    """
    write_empty_data()
    content: Any = plans(channels=channels, **options) if given_plans is None else copy.deepcopy(dict(given_plans))
    content["continue_training"] = False  # nnU-Net's commands put it there
    trainer = cls(content, "tiny", fold, dataset_json(channels, labels), device or torch.device("cpu"))
    trainer.enable_deep_supervision &= deep_supervision
    torch.manual_seed(seed)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.network.train()
    return trainer


def give_teacher(trainer: Any) -> Any:
    """Put a frozen teacher with random weights beside a student, as its training start does; return the student."""
    torch.manual_seed(1)
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


def wake(network: torch.nn.Module) -> None:
    """Move all parameters that are exactly zero, such as zero-initialised projections, as training does."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)


def batch(trainer: Any, *, batch_size: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Return a batch as nnU-Net's loader gives it: noise, with labels that depend on two of the channels."""
    generator = torch.Generator().manual_seed(seed)
    size = trainer.configuration_manager.batch_size if batch_size is None else batch_size
    shape = tuple(trainer.configuration_manager.patch_size)
    data = torch.randn(size, trainer.num_input_channels, *shape, generator=generator)
    values = (data[:, :1] > 0.3).short() + (data[:, :1] + data[:, 1:2] > 1.2).short()
    manager = trainer.label_manager
    values = values.clamp(max=max(manager.all_labels))
    if manager.has_ignore_label:
        values[..., :4] = manager.ignore_label
    target: Any = values
    if manager.has_regions:
        regions = [*manager.foreground_regions, *([manager.ignore_label] if manager.has_ignore_label else [])]
        members = [torch.as_tensor(np.atleast_1d(region)) for region in regions]
        target = torch.cat([torch.isin(values, member) for member in members], 1)
    if trainer.enable_deep_supervision:
        everywhere, target = target, []
        for scale in trainer._get_deep_supervision_scales():
            grid = (..., *(slice(None, None, round(1 / step)) for step in scale))
            target.append(everywhere[grid])
    return {"data": data, "target": target, "keys": [f"case_{number}" for number in range(size)]}


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a module's weights."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: Any, second: Any) -> bool:
    """Whether two contents of a checkpoint are equal, tensors bit for bit; NaN equals NaN."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


# ---- nothing of an absent modality reaches the student ---------------------------------------------------------------


class Observed(NamedTuple):
    """What a training step and a validation step let out."""

    logits: torch.Tensor
    """Full-resolution logits of the training step, one row per sample."""
    loss: float
    """The logged segmentation loss."""
    gradients: dict[str, torch.Tensor]
    counts: torch.Tensor
    """True and false positives and false negatives, and the loss, of online validation."""


def _logits_of(output: Any) -> torch.Tensor:
    """Full-resolution logits in what a network returns in training; of two students side by side, (B, 2 K, ...)."""
    if hasattr(output, "logits"):
        return finest(output.logits).detach()
    if isinstance(output, torch.Tensor) or isinstance(output[0], torch.Tensor):
        return finest(output).detach()
    return torch.cat([_logits_of(one) for one in output], 1)


def observe(trainer: Any, content: dict[str, Any]) -> Observed:
    """Take a training step and a validation step, every subset once, and put the trainer back to where it was.

    Layers that draw at random draw the same each time.
    """
    torch.manual_seed(0)
    before, optimizer = state(trainer.network), trainer.optimizer.state_dict()
    extra = copy.deepcopy(trainer.extra_state())
    subsets, logits = modalities.all_subsets(trainer.num_input_channels), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(trainer, "draw_availability", lambda size, present=None: subsets))
        if hasattr(trainer, "draw_partner"):  # the second student has the same subsets here: fewer would hide a leak
            stack.enter_context(
                mock.patch.object(trainer, "draw_partner", lambda availability, present=None: availability)
            )
        hook = trainer.network.register_forward_hook(lambda module, given, output: logits.append(_logits_of(output)))
        training = trainer.train_step(content)
        hook.remove()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.network.named_parameters()
        if parameter.grad is not None  # nnU-Net gives the coarsest output the weight 0
    }
    trainer.network.load_state_dict(before)
    trainer.optimizer.load_state_dict(optimizer)
    trainer.load_extra_state(extra)
    trainer._step_in_epoch = 0
    with torch.no_grad(), mock.patch.object(trainer, "validation_subsets", subsets):
        trainer.on_validation_epoch_start()
        validation = trainer.validation_step(content)
    trainer.network.train()
    counts = torch.cat([torch.as_tensor(validation["counts"]).flatten(), torch.as_tensor(validation["loss"])[None]])
    return Observed(torch.cat(logits, 1), float(training["loss"]), gradients, counts)


_MAY_READ = "; if a term is meant to read the complete batch, name its weight in reads_complete"


def assert_no_leak(trainer: Any, *, gradients: bool = True) -> None:
    """Assert that what absent channels hold changes no bit of logits, segmentation loss, gradients and validation.

    The batch has 2^C - 1 samples, each with another subset. Its channels are zero in a part of each patch, as beside a
    skull-stripped brain, and absent ones are replaced by what is neither a number nor zero, and by zeros alone. Without
    ``gradients``, which a term that reads the complete batch may change, the former is an ordinary number.
    """
    subsets = modalities.all_subsets(trainer.num_input_channels)
    content = batch(trainer, batch_size=len(subsets))
    content["data"][..., :2] = 0
    wanted = observe(trainer, content)
    assert torch.isfinite(wanted.logits).all()
    keep = subsets.reshape(*subsets.shape, *[1] * (content["data"].ndim - 2))
    for value in (float("nan"), 1e30, 0.0) if gradients else (1e3, 0.0):
        try:
            found = observe(trainer, {**content, "data": torch.where(keep, content["data"], value)})
        except DivergenceError as error:
            raise AssertionError(f"a loss is not finite where absent channels hold {value}{_MAY_READ}") from error
        for subset, one, other in zip(subsets.int().tolist(), wanted.logits, found.logits, strict=True):
            assert torch.equal(one, other), f"the logits of a sample with the channels {subset} change with {value}"
        assert wanted.loss == found.loss, "the segmentation loss changes"
        assert torch.equal(wanted.counts, found.counts), "online validation changes"
        if gradients:
            for name, gradient in wanted.gradients.items():
                assert torch.equal(gradient, found.gradients[name]), f"the gradient of {name} changes{_MAY_READ}"


# ---- checks --------------------------------------------------------------------------------------------------------


def _requires(cls: type, base: type) -> None:
    """Skip a check of what a trainer without that base does not do."""
    if not issubclass(cls, base):
        raise SkipTest(f"{cls.__name__} is no {base.__name__}")


def _make(cls: type, **options: Any) -> Any:
    """A trainer with its default terms, beside a teacher if it has one."""
    trainer = make_trainer(cls, **options)
    if isinstance(trainer, DistillationTrainer):
        give_teacher(trainer)
    wake(trainer.network)
    trainer.on_train_epoch_start()
    return trainer


def check_no_leak(cls: type, folder: Path, **options: Any) -> None:
    """Absent channels change nothing: neither through the network nor through loss and gradients.

    With what a teacher says held fixed, in the first epoch and half-way. The terms that the trainer names in
    ``reads_complete`` are switched off; half-way with them, logits, segmentation loss and validation are the same.
    """
    _requires(cls, ModalityDropoutTrainer)
    channels, given = options.pop("channels", 4), options.pop("block", {})
    # small patches, because the batch has a sample for each subset, of two voxels per axis at the bottleneck
    options = {"edge": 2 ** len(options.get("features", FEATURES)), **options}
    without = {**given}
    for base in cls.__mro__:
        names = vars(base).get("reads_complete", ())
        if isinstance(names, str) or any(name.count(".") != 1 for name in names):
            raise ValueError(
                f'{base.__name__}.reads_complete is {names!r}, expected a tuple such as ("medmap.weight",)'
            )
        for name in names:
            section, key = name.split(".")
            without[section] = {**without.get(section, {}), key: 0}
    with nnunet_folders(folder):
        for block, halfway in ((without, False), (without, True), *([(given, True)] if without != given else [])):
            trainer = _make(cls, batch_size=2**channels - 1, channels=channels, block=block, **options)
            trainer.current_epoch = trainer.num_epochs // 2 if halfway else 0
            if trainer.teacher is not None and trainer.terms:
                fixed = trainer.forward_teacher(batch(trainer)["data"])
                trainer.forward_teacher = lambda complete, fixed=fixed: fixed
            assert_no_leak(trainer, gradients=block is without)


def check_permutation(cls: type, folder: Path, **options: Any) -> None:
    """Permuting the samples of a batch permutes the predictions, and samples differ."""
    with nnunet_folders(folder):
        trainer = _make(cls, **options)
        trainer.set_deep_supervision_enabled(False)
        network, channels = trainer.network.eval(), trainer.num_input_channels
        subsets = modalities.all_subsets(channels)[[0, -2, channels - 1, -1]]
        data = modalities.mask_modalities(batch(trainer, batch_size=4)["data"], subsets)
        order = torch.tensor([2, 0, 3, 1])
        with torch.no_grad():
            together, permuted = network(data), network(data[order])
        told = "called with the image alone, as in nnU-Net's prediction, a network must return the logits alone"
        assert isinstance(together, torch.Tensor), told
        torch.testing.assert_close(permuted, together[order], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(together[0], together[1], atol=1e-3)


def check_full_subset(cls: type, folder: Path, **options: Any) -> None:
    """A step in which all modalities are available equals one without any masking."""
    _requires(cls, ModalityDropoutTrainer)
    found = []
    for masks in (True, False):
        with nnunet_folders(folder), contextlib.ExitStack() as stack:
            trainer = _make(cls, **options)
            complete = torch.ones(2, trainer.num_input_channels, dtype=torch.bool)
            trainer.draw_availability = lambda size, present=None, complete=complete: complete
            if hasattr(trainer, "draw_partner"):
                trainer.draw_partner = lambda availability, present=None: availability
            if not masks:
                stack.enter_context(mock.patch.object(modalities, "mask_modalities", lambda data, availability: data))
            found.append([trainer.train_step(batch(trainer))["terms"], state(trainer.network)])
    assert same(*found)


def check_gradients(cls: type, folder: Path, **options: Any) -> None:
    """Every term moves the student: in one of several batches at least, its gradient is not zero.

    A training cannot refuse a term without a gradient, because some have nothing to compare in some batches.
    """
    _requires(cls, ModalityDropoutTrainer)
    with nnunet_folders(folder):
        trainer = _make(cls, **options)
        parameters = [each for each in trainer.network.parameters() if each.requires_grad]
        idle = {term.name for term in trainer.terms}
        for seed in range(4):
            content = batch(trainer, seed=seed)
            values = trainer.compute_losses(content["data"], content["target"]).terms
            for name in [name for name in idle if values[name].requires_grad]:
                found = torch.autograd.grad(values[name], parameters, retain_graph=True, allow_unused=True)
                if any(each is not None and each.any() for each in found):
                    idle.remove(name)
        assert not idle, f"no gradient of these terms reaches the student: {', '.join(sorted(idle))}"


def check_frozen_teacher(cls: type, folder: Path, **options: Any) -> None:
    """Training steps move the student and not the teacher, which is no part of the student's weights."""
    _requires(cls, DistillationTrainer)
    with nnunet_folders(folder):
        trainer = _make(cls, **options)
        teacher, student = state(trainer.teacher), state(trainer.network)
        for seed in range(2):
            trainer.train_step(batch(trainer, seed=seed))
        assert same(teacher, state(trainer.teacher)) and not same(student, state(trainer.network))
        assert not trainer.teacher.training
        assert not any(name.startswith("teacher") for name in trainer.plain_network.state_dict())


def check_extreme_values(cls: type, folder: Path, **options: Any) -> None:
    """Losses and weights stay finite for inputs as large and as small as float16 goes, and for zeros."""
    with nnunet_folders(folder):
        for scale in (65504.0, 6e-8, 0.0):
            trainer = _make(cls, **options)
            content = batch(trainer)
            content["data"] = content["data"].sign() * scale
            result = trainer.train_step(content)  # stops by itself at a term that is not finite
            assert np.isfinite([result["loss"], *result["terms"].values()]).all()
            assert all(torch.isfinite(value).all() for value in trainer.network.state_dict().values())


def check_seed(cls: type, folder: Path, **options: Any) -> None:
    """With a seed in the settings, weights and steps repeat bit for bit; another seed gives others."""
    results = []
    for seed in (5, 5, 6):
        block = {**options.get("block", {}), "schedule": {"seed": seed}}
        with nnunet_folders(folder):
            trainer = _make(cls, **{**options, "block": block})
            trainer.on_epoch_start()
            losses = [float(trainer.train_step(batch(trainer, seed=number))["loss"]) for number in range(2)]
            results.append([losses, state(trainer.network)])
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def check_incomplete_cases(cls: type, folder: Path, **options: Any) -> None:
    """No sample is empty, and a modality that a case lacks is zero for the network, whatever augmentation has added."""
    _requires(cls, ModalityDropoutTrainer)
    with nnunet_folders(folder):
        trainer = _make(cls, **options)
        present = torch.ones(2, trainer.num_input_channels, dtype=torch.bool)
        present[1, 1:] = False
        trainer.case_facts = {
            f"case_{number}": CaseFacts(tuple(row), True) for number, row in enumerate(present.tolist())
        }
        seen: list[torch.Tensor] = []

        def look(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            values = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
            seen.extend(value for value in values if value.ndim > 2 and value.shape[1] == present.shape[1])

        hook = trainer.network.register_forward_pre_hook(look, with_kwargs=True)
        for seed in range(4):
            trainer.train_step(batch(trainer, seed=seed))  # noise in every channel, as augmentation leaves it
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.validation_step(batch(trainer))
        hook.remove()
        assert seen
        for data in seen:
            assert data.flatten(1).any(1).all(), "a sample has no modality"
            assert not data[:2][~present].any(), "the network sees a modality that the case lacks"


CHECKS: tuple[Callable[..., None], ...] = (
    check_no_leak, check_incomplete_cases, check_permutation, check_full_subset, check_gradients, check_frozen_teacher,
    check_extreme_values, check_seed,
)  # fmt: skip
"""All checks. Those that do not apply to a trainer, because it has no teacher or does not derive from
:class:`~nnunetv2_mstkd.training.modality_dropout.ModalityDropoutTrainer`, raise SkipTest, which pytest shows."""
