"""MedMAP on nnU-Net: modalities aligned to an anchor, absent ones imputed; alone and with other methods."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd.methods.adamm.network import AdaptiveDesign
from nnunetv2_mstkd.methods.adamm.trainer import AdaMMTrainer
from nnunetv2_mstkd.methods.medmap.network import Aligned, AlignedDesign
from nnunetv2_mstkd.methods.medmap.settings import MedMAPSettings
from nnunetv2_mstkd.methods.mmformer.network import MMFormerDesign
from nnunetv2_mstkd.methods.mmformer.trainer import MMFormerTrainer
from nnunetv2_mstkd.methods.mstkd.network import TransformerDesign
from nnunetv2_mstkd.methods.mstkd.trainer import MSTKDTrainer
from nnunetv2_mstkd.methods.rfnet.network import RFNetDesign
from nnunetv2_mstkd.methods.rfnet.trainer import RFNetTrainer
from nnunetv2_mstkd.methods.smml.network import MutualDesign, StudentDesign
from nnunetv2_mstkd.methods.smml.settings import SMMLSettings
from nnunetv2_mstkd.methods.smml.trainer import SMMLTrainer
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.full_modality import TeacherTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer, with_logits
from nnunetv2_mstkd.training.settings import Settings, TeacherSettings
from nnunetv2_mstkd.training.soft_labels import SOFT_LABELS_ALONE
from nnunetv2_mstkd.training.step import Losses, Term

_ALIGNMENT = "alignment"


@functools.cache
def _with_alignment(kind: Any) -> Any:
    return namedtuple(f"Aligned{kind.__name__}", (*kind._fields, _ALIGNMENT))  # type: ignore


def join(output: Any) -> Any:
    """One NamedTuple of what terms read: the fields of the network's output, and ``alignment``.

    ``output`` is an :class:`Aligned`, or a tuple of these, one per student.
    """
    if not isinstance(output, Aligned):
        return tuple(join(student) for student in output)
    fields = with_logits(output.output)
    kind: Any = type(fields)
    return _with_alignment(kind)._make((*fields, output.alignment))


class AlignmentMixin(ModalityDropoutTrainer):
    """Adds MedMAP's alignment loss to another trainer: name it before that trainer, among the bases.

    The class needs ``design = AlignedDesign(...)`` around the other trainer's design. The alignment reads the complete
    training batch; the logits read the subset alone.
    """

    reads_complete = ("medmap.weight",)
    encoders: ClassVar[bool] = False
    """Whether the front may also be one encoder per modality: the network then has ``encoder`` and ``decoder`` and
    calls ``encoder`` as a whole."""

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        section = settings[MedMAPSettings]
        expected = f'"stem" with {cls.__name__}, whose network keeps its encoder'
        section.require(section.placement == "stem" or cls.encoders, "placement", expected)

    def make_terms(self) -> tuple[Term, ...]:
        weight = self.settings[MedMAPSettings].weight
        term = Term(_ALIGNMENT, weight, lambda student, teacher, target: student.alignment, needs_teacher=False)
        return (*super().make_terms(), term)

    def run_network(self, inputs: torch.Tensor, complete: torch.Tensor, **options: Any) -> Any:
        if not self.active(_ALIGNMENT):
            return super().run_network(inputs, complete, **options)
        return join(self.network(inputs, complete=complete, **options))


class MedMAPTrainer(AlignmentMixin, ModalityDropoutTrainer):
    """MedMAP: "Promoting Incomplete Multi-modal Brain Tumor Segmentation with Alignment", arXiv 2408.09465.

    Segmentation loss on a random subset, plus ``medmap.weight`` times the distance of every modality's features to the
    anchor.
    """

    design = AlignedDesign()
    encoders = True


class MedMAPTeacherTrainer(TeacherTrainer):
    """The teacher of :class:`MedMAPKDTrainer`: the aligned network on complete input, with the alignment loss."""

    design = AlignedDesign()

    def apply_settings(self, settings: Settings) -> None:
        super().apply_settings(settings)
        self.logs_terms = self.settings[MedMAPSettings].weight > 0

    def compute_losses(self, data: torch.Tensor, target: Any, present: torch.Tensor | None = None) -> Losses:
        weight = self.settings[MedMAPSettings].weight
        if not weight:
            return super().compute_losses(data, target, present)
        output = self.network(data, complete=data)
        segmentation = self.loss(output.logits, target)
        terms = {"segmentation": segmentation, _ALIGNMENT: output.alignment}
        return Losses(segmentation + weight * output.alignment, terms)


class MedMAPKDTrainer(AlignmentMixin, DistillationTrainer):
    """MedMAP's distillation: a student that is aligned too, and follows the probabilities of an aligned teacher."""

    design = AlignedDesign()
    encoders = True
    teacher_trainer = MedMAPTeacherTrainer
    distillation_defaults = SOFT_LABELS_ALONE

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        section = settings[TeacherSettings]
        expected = (
            f"false with {cls.__name__}: a joint teacher has the segmentation loss alone, and would not be aligned"
            f"{settings.set_by(TeacherSettings.NAME, 'joint')}"
        )
        section.require(not section.joint, "joint", expected)


class MedMAPMSTKDTrainer(AlignmentMixin, MSTKDTrainer):
    """MST-KDNet whose student has an aligning front; the teacher is MST-KDNet's own."""

    design = AlignedDesign(TransformerDesign())
    encoders = True


class MedMAPMMFormerTrainer(AlignmentMixin, MMFormerTrainer):
    """mmFormer with the features of its encoders aligned and imputed."""

    design = AlignedDesign(MMFormerDesign())
    encoders = True


class MedMAPRFNetTrainer(AlignmentMixin, RFNetTrainer):
    """RFNet with the features of its encoders aligned and imputed."""

    design = AlignedDesign(RFNetDesign())
    encoders = True


class MedMAPAdaMMTrainer(AlignmentMixin, AdaMMTrainer):
    """AdaMM whose student has an aligning stem; the teacher is AdaMM's own."""

    design = AlignedDesign(AdaptiveDesign())


class MedMAPSMMLTrainer(AlignmentMixin, SMMLTrainer):
    """SMML whose students each have an aligning front."""

    design = MutualDesign(AlignedDesign(StudentDesign()))
    encoders = True

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        expected = 'true with this trainer; for one encoder per modality set medmap.placement to "encoders"'
        settings[SMMLSettings].require(settings[SMMLSettings].light, "light", expected)
