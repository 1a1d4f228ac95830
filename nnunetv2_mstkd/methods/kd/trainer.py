"""Plain knowledge distillation: the plans' own network, and a full-modality teacher's probabilities as soft labels."""

from __future__ import annotations

from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.full_modality import TeacherTrainer
from nnunetv2_mstkd.training.soft_labels import SOFT_LABELS_ALONE


class KDTeacherTrainer(TeacherTrainer):
    """The teacher: the plans' own network on complete input, trained before the student."""

    design = NetworkDesign()


class KDTrainer(DistillationTrainer):
    """Knowledge distillation (Hinton et al., arXiv 1503.02531) from a teacher that sees all modalities.

    Segmentation loss on a random subset, plus ``distillation.soft_labels`` times the divergence of the student's
    probabilities from the teacher's, at every voxel and to the end. There is no other term. Its weight rises over the
    first tenth of the training (``distillation.ramp``). The teacher is asked in every second step
    (``distillation.every``), with twice the weight.
    """

    design = NetworkDesign()
    teacher_trainer = KDTeacherTrainer
    distillation_defaults = SOFT_LABELS_ALONE
