"""Batches of unlabelled cases beside nnU-Net's own loader of labelled ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter


def unlabelled_loader(labelled: Any, dataset: Any, cases: Sequence[str], batch_size: int) -> Any:
    """Return a loader of other cases with the patches, the augmentation and the kind of workers of a given one.

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
    threaded = isinstance(labelled, NonDetMultiThreadedAugmenter)
    loader = copy.copy(labelled.generator if threaded else labelled.data_loader)
    share = batch_size / loader.batch_size
    loader._data, loader.indices, loader.batch_size = dataset, list(cases), batch_size
    loader.has_ignore, loader.get_do_oversample = False, _never
    if not threaded:
        return SingleThreadedAugmenter(loader, None)
    processes = max(1, round(labelled.num_processes * share))
    cached, pinned = max(3, processes // 2), labelled.pin_memory
    return NonDetMultiThreadedAugmenter(
        loader, None, processes, num_cached=cached, pin_memory=pinned, wait_time=labelled.wait_time
    )


def _never(sample: int) -> bool:
    """No sample is made to show foreground."""
    return False
