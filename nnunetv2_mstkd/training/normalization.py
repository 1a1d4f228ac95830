"""Data that are normalised as ``input.normalization`` says, and what to say about it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nnunetv2.configuration import default_num_processes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.inference.workers import workers
from nnunetv2_mstkd.nnunet import mask_differences, per_channel
from nnunetv2_mstkd.nnunet.folders import find_raw_folder
from nnunetv2_mstkd.nnunet.mask_differences import MaskDifferences
from nnunetv2_mstkd.nnunet.preprocessing import identifiers
from nnunetv2_mstkd.training.distributed import first_process_first


def find_mask_differences(trainer: nnUNetTrainer) -> MaskDifferences | None:
    """Return which modalities of a trainer's data set change when others are taken away; None if that is not known."""
    with first_process_first():
        return mask_differences.of_data_set(
            Path(trainer.preprocessed_dataset_folder_base),
            find_raw_folder(trainer.plans_manager.dataset_name),
            trainer.plans_manager,
            trainer.configuration_manager,
            modalities.modality_names(trainer.dataset_json),
            trainer.print_to_log_file,
        )


def complete_data(trainer: nnUNetTrainer) -> None:
    """Make the data of ``input.normalization = "per_channel"`` that are not there yet."""
    if per_channel.normalization(trainer.configuration_manager) == per_channel.PLANS:
        return
    preprocessed = Path(trainer.preprocessed_dataset_folder_base)
    processes = 0 if default_num_processes == 1 else default_num_processes
    with first_process_first():
        cases = identifiers(preprocessed / trainer.configuration_manager.data_identifier)
        per_channel.drop_removed(preprocessed, cases, trainer.configuration_manager, log=trainer.print_to_log_file)
        per_channel.complete_data(
            preprocessed,
            find_raw_folder(trainer.plans_manager.dataset_name),
            cases,
            trainer.plans_manager,
            trainer.configuration_manager,
            trainer.dataset_json,
            pool=partial(workers, processes),
            log=trainer.print_to_log_file,
        )


def describe_normalization(chosen: str, found: MaskDifferences | None) -> str | None:
    """Say whether modalities change when others are taken away, and what becomes of that; None if they do not.

    ``chosen`` is ``input.normalization``, ``found`` comes from :func:`find_mask_differences`.
    """
    if chosen == per_channel.PER_CHANNEL:
        reason = f", because {found}" if found else ""
        return f"input.normalization=per_channel: every modality is normalised as if it were the only one{reason}"
    if found is None:
        return "whether removing modalities changes the others is not known: nnUNet_raw does not have the images"
    if found:
        return (
            f"{found}. Training does not see that, prediction does: set input.normalization=per_channel, or evaluate "
            f"with --mask-first"
        )
    return None
