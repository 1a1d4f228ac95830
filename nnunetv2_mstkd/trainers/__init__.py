"""The trainers that ``-tr`` finds."""

from nnunetv2_mstkd.trainers.adamm import AdaMMTeacherTrainer, AdaMMTrainer
from nnunetv2_mstkd.trainers.base import FullModalityTrainer
from nnunetv2_mstkd.trainers.medmap import MedMAPMSTKDTrainer, MedMAPTrainer
from nnunetv2_mstkd.trainers.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.trainers.mstkd import MSTKDTeacherTrainer, MSTKDTrainer
from nnunetv2_mstkd.trainers.smml import SMMLTrainer

__all__ = [
    "AdaMMTeacherTrainer",
    "AdaMMTrainer",
    "FullModalityTrainer",
    "MSTKDTeacherTrainer",
    "MSTKDTrainer",
    "MedMAPMSTKDTrainer",
    "MedMAPTrainer",
    "ModalityDropoutTrainer",
    "SMMLTrainer",
]
