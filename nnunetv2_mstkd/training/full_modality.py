"""Trainers that see all modalities of a case: the plain baseline, and the base of teachers."""

from __future__ import annotations

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mstkd.nnunet.case_facts import CaseFacts
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.modality_dropout import check_subsets
from nnunetv2_mstkd.training.settings import SamplerSettings, Settings, TeacherSettings


class FullModalityTrainer(SettingsTrainer):
    """nnUNetTrainer with epochs, iterations, save interval and seed from the settings, and nothing else changed.

    The simplest baseline of every comparison: a model that has only ever seen complete input, given zeros. nnU-Net's
    own trainer has a fixed number of iterations, so it cannot be given a budget.
    """


class TeacherTrainer(FullModalityTrainer):
    """Trains a full-modality teacher, with its own number of epochs, on the cases that have all modalities.

    ``teacher.cases = "all"`` also trains it on incomplete ones, with zeros for what they lack. It refuses what its
    student would refuse, before time is spent on a teacher.
    """

    sections = (*FullModalityTrainer.sections, TeacherSettings, SamplerSettings)

    @classmethod
    def check_plans(cls, configuration_manager: ConfigurationManager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        check_subsets(configuration_manager, dataset_json, settings)

    def epochs(self, settings: Settings) -> int:
        return settings[TeacherSettings].epochs or super().epochs(settings)

    def trains_on(self, facts: CaseFacts) -> bool:
        return facts.complete or self.settings[TeacherSettings].cases == "all"
