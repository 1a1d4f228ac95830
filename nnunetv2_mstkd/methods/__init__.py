"""One folder per method. This module is the table of the trainers that ``-tr`` finds: a new one is a line here."""

from nnunetv2_mstkd.methods.adamm.trainer import AdaMMTeacherTrainer, AdaMMTrainer
from nnunetv2_mstkd.methods.conditioned.trainer import ModalityConditionedTrainer
from nnunetv2_mstkd.methods.kd.trainer import KDTeacherTrainer, KDTrainer
from nnunetv2_mstkd.methods.medmap.trainer import (
    MedMAPAdaMMTrainer,
    MedMAPKDTrainer,
    MedMAPMMFormerTrainer,
    MedMAPMSTKDTrainer,
    MedMAPRFNetTrainer,
    MedMAPSMMLTrainer,
    MedMAPTeacherTrainer,
    MedMAPTrainer,
)
from nnunetv2_mstkd.methods.mmformer.trainer import MMFormerTrainer
from nnunetv2_mstkd.methods.mstkd.trainer import MSTKDTeacherTrainer, MSTKDTrainer
from nnunetv2_mstkd.methods.rfnet.trainer import RFNetTrainer
from nnunetv2_mstkd.methods.self_distillation.trainer import SelfDistillationTrainer
from nnunetv2_mstkd.methods.smml.trainer import SMMLMMFormerTrainer, SMMLRFNetTrainer, SMMLTrainer
from nnunetv2_mstkd.training.full_modality import FullModalityTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer

__all__ = [
    "AdaMMTeacherTrainer",
    "AdaMMTrainer",
    "FullModalityTrainer",
    "KDTeacherTrainer",
    "KDTrainer",
    "MMFormerTrainer",
    "MSTKDTeacherTrainer",
    "MSTKDTrainer",
    "MedMAPAdaMMTrainer",
    "MedMAPKDTrainer",
    "MedMAPMMFormerTrainer",
    "MedMAPMSTKDTrainer",
    "MedMAPRFNetTrainer",
    "MedMAPSMMLTrainer",
    "MedMAPTeacherTrainer",
    "MedMAPTrainer",
    "ModalityConditionedTrainer",
    "ModalityDropoutTrainer",
    "RFNetTrainer",
    "SMMLMMFormerTrainer",
    "SMMLRFNetTrainer",
    "SMMLTrainer",
    "SelfDistillationTrainer",
]
