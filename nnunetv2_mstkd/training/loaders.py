"""Loaders of batches like nnU-Net's own, with other cases or other patches."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size

from nnunetv2_mstkd.training.patch_growth import Phase

REPEATED = "mstkd_repeated"
"""Key of a batch that was given before."""


class RepeatingLoader:
    """Gives each batch of a loader several times in a row; all but the first are marked with :data:`REPEATED`.

    Choi et al., "Faster Neural Network Training with Data Echoing" (arXiv 1907.05550).
    """

    def __init__(self, loader: Any, repeats: int) -> None:
        self.loader, self._repeats, self._left = loader, repeats, 0
        self._batch: dict[str, Any] = {}

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._left:
            self._left -= 1
            return {**self._batch, REPEATED: True}
        self._batch, self._left = next(self.loader), self._repeats - 1
        return self._batch


def repeating(loader: Any, repeats: int) -> Any:
    """Return a loader that gives each batch so many times; for 1 the given one."""
    return RepeatingLoader(loader, repeats) if repeats > 1 else loader


def without_repeats(loader: Any) -> Any:
    """Return nnU-Net's loader of a :func:`repeating` one."""
    return loader.loader if isinstance(loader, RepeatingLoader) else loader


def end_workers(loader: Any) -> None:
    """End the processes of a loader, if it has any."""
    loader = without_repeats(loader)
    if isinstance(loader, NonDetMultiThreadedAugmenter):
        loader._finish()


def loader_like(given: Any, share: float = 1.0, **changes: Any) -> Any:
    """Return a loader that works as a given one, with the same kind of workers.

    Parameters
    ----------
    given
        nnU-Net's loader of training cases.
    share
        Worker processes as a share of those of the given loader.
    changes
        Attributes of nnU-Net's data loader that differ.
    """
    given = without_repeats(given)
    original = _inner(given)
    loader = copy.copy(original)
    loader.get_do_oversample = types.MethodType(original.get_do_oversample.__func__, loader)
    for name, value in changes.items():
        if not hasattr(original, name):
            raise RuntimeError(f"nnU-Net's data loader has no {name!r} in this version; it would ignore the change")
        setattr(loader, name, value)
    if not isinstance(given, NonDetMultiThreadedAugmenter):
        return SingleThreadedAugmenter(loader, None)
    processes = max(1, round(given.num_processes * share))
    cached, pinned = max(3, processes // 2), given.pin_memory
    return NonDetMultiThreadedAugmenter(
        loader, None, processes, num_cached=cached, pin_memory=pinned, wait_time=given.wait_time
    )


def loader_with_patch(trainer: Any, given: Any, phase: Phase) -> Any:
    """Return a trainer's loader of training batches with the patch of a phase, and end the workers of the given one.

    ``trainer`` is an nnUNetTrainer, ``given`` its own loader. The augmentation is that of the planned patch: nnU-Net
    infers from the ratio of its edges whether voxels are anisotropic, which they are in all phases or in none.
    """
    manager, labels = trainer.configuration_manager, trainer.label_manager
    rotation, dummy_2d, _, mirrored = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    initial = get_patch_size(phase.patch, rotation, rotation, rotation, (0.85, 1.25))
    if dummy_2d:
        initial[0] = phase.patch[0]
    transforms = trainer.get_training_transforms(
        phase.patch,
        rotation,
        trainer._get_deep_supervision_scales(),
        mirrored,
        dummy_2d,
        use_mask_for_norm=manager.use_mask_for_norm,
        is_cascaded=trainer.is_cascaded,
        foreground_labels=labels.foreground_labels,
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )
    flat = (1,) * (3 - len(phase.patch))  # nnU-Net's loader takes slices for volumes
    patch, initial = np.array([*flat, *phase.patch]), np.array([*flat, *initial])
    loader = loader_like(
        given,
        patch_size=initial,
        final_patch_size=patch,
        need_to_pad=(initial - patch).astype(int),
        oversample_foreground_percent=min(1.0, trainer.oversample_foreground_percent * phase.foreground),
        transforms=transforms,
    )
    end_workers(given)
    next(loader)
    return loader


def foreground_samples(loader: Any) -> tuple[int, int]:
    """Return how many samples of a loader's batches must show foreground, and how many samples there are.

    nnU-Net rounds its share of samples to a whole number.
    """
    inner = _inner(loader)
    return sum(map(inner._oversample_last_XX_percent, range(inner.batch_size))), inner.batch_size


def unlabelled_loader(labelled: Any, dataset: Any, cases: Sequence[str], batch_size: int) -> Any:
    """Return a loader of other cases with the patches and the augmentation of a given one.

    Parameters
    ----------
    labelled
        nnU-Net's loader of the training cases.
    dataset
        nnU-Net's data set object of the unlabelled cases.
    cases
        Their names.
    batch_size
        Samples per batch; their position is random, because no voxel has a label.
    """
    return loader_like(
        labelled,
        batch_size / _inner(labelled).batch_size,
        _data=dataset,
        indices=list(cases),
        batch_size=batch_size,
        has_ignore=False,
        get_do_oversample=_never,
    )


def _inner(loader: Any) -> Any:
    """Return nnU-Net's own loader without the object that calls it, in worker processes or not."""
    loader = without_repeats(loader)
    return loader.generator if isinstance(loader, NonDetMultiThreadedAugmenter) else loader.data_loader


def _never(sample: int) -> bool:
    """No sample is made to show foreground."""
    return False
