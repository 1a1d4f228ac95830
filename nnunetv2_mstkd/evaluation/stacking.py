"""Several subsets of modalities in one forward pass, inside nnU-Net's own sliding window.

nnU-Net cuts the patches, mirrors them, and weights and adds the logits. Only its network is replaced: the replacement
takes a patch, makes a batch of it with one subset per row, and returns the logits of all rows as channels of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.inference.conditioning import conditioned, presence_of
from nnunetv2_mstkd.inference.members import StackedHeads
from nnunetv2_mstkd.nnunet.model import free_memory, plain_network

TRAINING_BATCHES_CPU, TRAINING_BATCHES_GPU = 1, 4
"""Default stack in training batches: on a GPU more fit without gradients, on a CPU larger ones are slower again
(benchmarks/evaluate_speed.py)."""


class StackedNetwork(nn.Module):
    """A network that sees one patch with several subsets of its modalities."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.subsets: torch.Tensor | None = None
        """bool, shape (S, C), on the device; set before each image."""
        self.outputs = 0
        """K."""
        self.error: RuntimeError | None = None
        """What the forward pass has raised, such as out of memory. It is kept, because nnU-Net's thread that cuts
        patches would outlive an exception and keep the image on the device; the passes that are left give zeros."""

    @property
    def plain_network(self) -> nn.Module:
        """The network without the wrapper of torch.compile."""
        return plain_network(self.network)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the weights of the inner network: nnU-Net does so for each fold before it predicts."""
        return self.plain_network.load_state_dict(state_dict, *args, **kwargs)

    def forward(self, patch: torch.Tensor) -> torch.Tensor:
        """Logits of all subsets, shape (1, S K, *spatial), of a patch of shape (1, C, *spatial)."""
        assert self.subsets is not None
        if self.error is None:
            batch = patch.expand(len(self.subsets), *patch.shape[1:])
            # contiguous: where() may inherit the order of axes from the expanded patch
            try:
                logits = self.network(modalities.mask_modalities(batch, self.subsets).contiguous())
            except RuntimeError as error:
                if len(self.subsets) == 1:  # nnU-Net tries once more, with the results in main memory
                    raise
                self.error = error.with_traceback(None)  # which would keep the tensors of the pass
            else:
                return logits.reshape(1, -1, *logits.shape[2:])
        return patch.new_zeros((1, len(self.subsets) * self.outputs, *patch.shape[2:]))


class SubsetPredictor:
    """Predicts preprocessed images with many subsets of their modalities.

    Parameters
    ----------
    predictor:
        nnU-Net's predictor, from :func:`~nnunetv2_mstkd.nnunet.model.load_predictor`. This object takes it over: do not
        predict with it any more.
    stack:
        Maximum number of subsets per forward pass; 1 gives the logits of nnU-Net's predictor bit for bit. It is halved
        if the device runs out of memory.
    """

    def __init__(self, predictor: Any, stack: int) -> None:
        self.stack = stack
        self._predictor = predictor
        self._labels = predictor.label_manager
        self._network = StackedNetwork(predictor.network)
        predictor.network = self._network

    def logits(self, data: torch.Tensor, subsets: torch.Tensor) -> Iterator[np.ndarray]:
        """The logits of each subset in turn; see :meth:`predict`."""
        return (logits for logits, _ in self.predict(data, subsets))

    def predict(self, data: torch.Tensor, subsets: torch.Tensor) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Of each subset in turn the logits, shape (K, *spatial) and type float16, and the probability that there is
        any voxel of each output channel, shape (K,); None without a presence head.

        The preprocessed image, float32 of shape (C, *spatial), has the modalities of all subsets: bool, shape (S, C),
        no row all False.
        """
        done = 0
        while done < len(subsets):
            left = len(subsets) - done
            # equal parts: 15 subsets are 8 + 7 rather than 8 + 4 + 3
            size = math.ceil(left / math.ceil(left / self.stack))
            try:
                stacked = self._predict(data, subsets[done : done + size])
            except RuntimeError:  # out of memory; some of cuDNN's errors do not say so
                if size == 1:
                    raise
                self.stack = size // 2
                free_memory(self._predictor.device)
                continue
            done += size
            yield from stacked

    def _predict(self, data: torch.Tensor, subsets: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """All subsets at once."""
        predictor = self._predictor
        rows = subsets.to(predictor.device)
        predictor.label_manager = StackedHeads(self._labels, len(subsets))
        self._network.subsets, self._network.outputs = rows, self._labels.num_segmentation_heads
        self._network.error = None
        try:
            with conditioned(self._network.plain_network, rows, self._labels) as finish:
                logits = predictor.predict_logits_from_preprocessed_data(data).cpu().numpy()
                if self._network.error is not None:
                    raise self._network.error
                finished, scores = finish(logits.reshape(len(subsets), -1, *logits.shape[1:])), presence_of(finish)
            return list(zip(finished, [None] * len(subsets) if scores is None else scores, strict=True))
        finally:
            predictor.label_manager = self._labels
            self._network.subsets = None

    def close(self) -> None:
        """Free the device's memory."""
        self._network.cpu()
        free_memory(self._predictor.device)


def default_stack(batch_size: int, num_subsets: int, device: torch.device) -> int:
    """The number of subsets per forward pass, from the patches per training batch, unless the user chooses one."""
    batches = TRAINING_BATCHES_CPU if device.type == "cpu" else TRAINING_BATCHES_GPU
    return max(1, min(num_subsets, batches * batch_size))
