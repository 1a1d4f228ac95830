"""Self-distillation: the model sees a subset and follows its own prediction from all modalities."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nnunetv2_mstkd.methods.self_distillation.settings import SelfDistillationSettings
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.modality_dropout import Segmentation
from nnunetv2_mstkd.training.soft_labels import SoftLabelTrainer
from nnunetv2_mstkd.training.step import Losses


class SelfDistillationTrainer(SoftLabelTrainer):
    """Segmentation loss on a random subset, plus the divergence from the model's own prediction from all modalities.

    No teacher has to be trained beforehand. With ``self_distillation.decay`` above 0 the teacher is the moving average
    of the model's weights (mean teacher, Tarvainen and Valpola, arXiv 1703.01780); that paper's teacher sees the same
    input with different noise, this one sees more modalities. Prediction uses the model, not the average.
    """

    sections = (*SoftLabelTrainer.sections, SelfDistillationSettings)
    design = NetworkDesign()
    average: AveragedModel | None = None
    """The moving average of the weights, if that is the teacher."""

    def initialize(self) -> None:
        super().initialize()
        self.teacher = self.network
        decay = self.settings[SelfDistillationSettings].decay
        if decay > 0:
            self.average = AveragedModel(self.plain_network, multi_avg_fn=get_ema_multi_avg_fn(decay))
            network: Any = self.average.requires_grad_(False).module
            network.decoder.deep_supervision = False
            self.teacher = torch.compile(network) if self._do_i_compile() else network

    def prepare_training(self) -> None:
        super().prepare_training()
        if self.average is not None and not self._resumed:  # weights may have been loaded since it was built
            self.average.module.load_state_dict(self.plain_network.state_dict())

    def forward_teacher(self, complete: torch.Tensor) -> Any:
        return Segmentation(self.own_prediction(self.teacher, complete))

    def judged_samples(self, present: torch.Tensor | None, labelled: slice) -> tuple[slice | torch.Tensor, float]:
        """All samples: this teacher has learned from incomplete input too, so it may judge an incomplete case."""
        return slice(None), 1.0

    def after_step(self, losses: Losses) -> None:
        super().after_step(losses)
        if self.average is not None:
            self.average.update_parameters(self.plain_network)

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), **({"average": self.average.state_dict()} if self.average is not None else {})}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
