"""nnU-Net with random missing modalities: the control of every comparison, and the base of all methods."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.losses.pseudo_labels import pseudo_label_loss
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.networks.decoding import finest
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.distributed import gather, rank, within_process, world_size
from nnunetv2_mstkd.training.loaders import REPEATED, end_workers, repeating, unlabelled_loader
from nnunetv2_mstkd.training.settings import (
    SamplerSettings,
    ScheduleSettings,
    Settings,
    TeacherSettings,
    UnlabelledSettings,
)
from nnunetv2_mstkd.training.step import LOGGED, Losses, Target, Term, active_terms, add_terms, rows_of


class Segmentation(NamedTuple):
    """What a step reads from a network that returns logits and nothing else."""

    logits: torch.Tensor | list[torch.Tensor]
    """(B, K, *spatial), or a list of these, finest first, under deep supervision."""


def with_logits(output: Any) -> Any:
    """Return what a network returned, as a NamedTuple with ``logits``."""
    return output if hasattr(output, "logits") else Segmentation(output)


def check_subsets(configuration_manager: ConfigurationManager, dataset_json: dict, settings: Settings) -> None:
    """Check what every trainer that takes modalities away needs: at least two of them, and a zero that stays zero."""
    names = modalities.modality_names(dataset_json)
    modalities.check_count(len(names))
    modalities.check_normalization(configuration_manager.normalization_schemes)
    settings[SamplerSettings].build(names)


class ModalityDropoutTrainer(SettingsTrainer):
    """Each sample of a training batch keeps a random non-empty subset of its modalities; nothing else changes.

    Subsets are drawn after augmentation (which would make a zeroed channel non-zero), within what the case has, and
    applied on the device.
    Online validation goes through a fixed list of subsets, so that ``checkpoint_best`` is the best one for missing
    modalities; ``train_losses`` of nnU-Net's log is the segmentation loss alone.

    A method is a subclass with ``terms`` beside the segmentation loss; see :meth:`compute_losses`.
    """

    sections = (*SettingsTrainer.sections, SamplerSettings, UnlabelledSettings)
    logs_terms = True
    reads_complete: ClassVar[tuple[str, ...]] = ()
    """Weights, such as ``medmap.weight``, of terms that are meant to read the complete batch. The leak test sets them
    to 0; those of all bases count."""
    reserved_names: ClassVar[tuple[str, ...]] = LOGGED
    """Names that no term may have, because the trainer logs other losses under them."""
    teacher: Any = None
    """A network that sees complete input, or None."""
    teacher_learns: bool = False
    """Whether the teacher is trained in the same steps; else it is frozen."""
    teacher_period: int = 1
    """A teacher is asked in every step of this number, and its terms then count as many times."""
    unlabelled_batches: Any = None
    """Iterator over batches of unlabelled cases; None without any."""
    adversary: Any = None
    """A discriminator with an optimiser of its own; see :class:`nnunetv2_mstkd.training.adversary.Adversary`."""

    @classmethod
    def check_plans(cls, configuration_manager: ConfigurationManager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        check_subsets(configuration_manager, dataset_json, settings)

    def validation_iterations(self, settings: Settings) -> int:
        """At least so many that every subset has its turn."""
        every = math.ceil(len(self.validation_subsets) / self.configuration_manager.batch_size)
        return max(super().validation_iterations(settings), every)

    def apply_settings(self, settings: Settings) -> None:
        names = modalities.modality_names(self.dataset_json)
        self.validation_subsets = modalities.validation_subsets(len(names))
        super().apply_settings(settings)
        self.sampler = self.settings[SamplerSettings].build(names)
        self._subset_generator = torch.Generator()
        self._subset_generator.seed()
        self.terms = active_terms(*self.make_terms(), *self.common_terms(), reserved=self.reserved_names)

    @property
    def has_teacher_terms(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term.needs_teacher for term in self.terms)

    def make_terms(self) -> tuple[Term, ...]:
        """Return the method's terms beside the segmentation loss; here none. Those of weight 0 are left out later."""
        return ()

    def common_terms(self) -> tuple[Term, ...]:
        """Return the terms that every method of this base can have."""
        return ()

    def _seed_everything(self, epoch: int) -> None:
        super()._seed_everything(epoch)
        if self.settings[ScheduleSettings].seed is not None:
            self._subset_generator.manual_seed(int(torch.randint(2**31, ())))

    # ---- one training step -------------------------------------------------------------------------------------

    def draw_availability(self, batch_size: int, present: torch.Tensor | None = None) -> torch.Tensor:
        """Draw which of its modalities each sample keeps in this step: bool, (B, C), on the CPU."""
        draws = batch_size
        if self.settings[SamplerSettings].per_batch:
            common = None if present is None else present.all(0, keepdim=True)
            if common is None or bool(common.any()):  # else its cases have no modality in common
                draws, present = 1, common
        drawn = self.sampler.sample(draws, present=present, generator=self._subset_generator)
        return drawn.repeat(batch_size // draws, 1)

    @contextlib.contextmanager
    def conditioned_on(self, availability: torch.Tensor) -> Iterator[None]:
        """Tell a network that asks for them the subsets of a batch (B, C), for the time of a forward pass."""
        network = self.plain_network
        if not isinstance(network, AvailabilityAware):
            yield
            return
        network.availability = availability.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            network.availability = None

    def compute_losses(self, data: torch.Tensor, target: Any, present: torch.Tensor | None = None) -> Losses:
        """Segment a random subset of each sample; add the weighted terms. The whole of a step's forward pass."""
        labelled = slice(len(data))
        data, present = self.add_unlabelled(data, present)
        subsets = self.draw_availability(len(data), present)
        inputs = modalities.mask_modalities(data, subsets)
        asked = self.asks_teacher()
        rows = data if asked or self.teacher_learns else data[labelled.stop :]
        teacher: Any = None
        if self.teacher is not None and len(rows):
            with torch.set_grad_enabled(self.teacher_learns):
                teacher = with_logits(self.forward_teacher(rows))
        terms = any(asked or not term.needs_teacher for term in self.terms)
        with self.conditioned_on(subsets):
            student = self.forward_student(inputs, data) if terms else Segmentation(self.network(inputs))
        judged, share = self.judged_samples(present, labelled)
        total = self.loss(rows_of(student.logits, labelled), target)
        values = {"segmentation": total}
        if self.teacher_learns:
            values["teacher"] = self._loss_of_teacher(rows_of(teacher.logits, labelled), target, judged, share)
            weight = self.settings[TeacherSettings].joint_weight
            total = (1 - weight) * total + weight * values["teacher"]
            teacher = teacher._replace(logits=finest(teacher.logits))
        student = student._replace(logits=finest(student.logits))
        if self.unlabelled_batches is not None:
            values["unlabelled"] = self.unlabelled_loss(student, teacher, data[labelled.stop :])
            total = total + self.unlabelled_weight() * values["unlabelled"]
            student = rows_of(student, labelled)
            teacher = rows_of(teacher, labelled) if asked else None
        adversary = None
        with torch.autocast(self.device.type, enabled=False):
            label = self.read_target(finest(target))
            if asked:
                known = [rows_of(each, judged) for each in (student, teacher, label)]
                known[2] = known[2]._replace(weight=self.voxel_weight(*known))
                for term in (term for term in self.terms if term.needs_teacher):
                    values[term.name] = share * term.value(*known)
                    factor = self.teacher_period * (term.factor or self.teacher_factor)()
                    total = total + term.weight * factor * values[term.name]
            total = add_terms(total, values, (term for term in self.terms if not term.needs_teacher), student, label)
        if asked and self.adversary is not None:
            adversary = (self.adversary.remember(*known[:2]), share)
        return Losses(total, values, adversary)

    def _loss_of_teacher(self, logits: Any, target: Any, judged: slice | torch.Tensor, share: float) -> torch.Tensor:
        """The segmentation loss of a teacher that learns, of its samples (``teacher.cases``)."""
        if self.settings[TeacherSettings].cases == "all":
            return self.loss(logits, target)
        complete = all(facts.complete for facts in self.case_facts.values())
        with contextlib.nullcontext() if complete else within_process(self.loss):
            return share * self.loss(rows_of(logits, judged), rows_of(target, judged))

    def asks_teacher(self) -> bool:
        """Whether the terms that compare with a teacher are computed in this step."""
        return self.has_teacher_terms and self.iteration % self.teacher_period == 0

    def judged_samples(self, present: torch.Tensor | None, labelled: slice) -> tuple[slice | torch.Tensor, float]:
        """Return which labelled samples the teacher may judge, and their share: those with all modalities.

        Where none has, the first sample is used with a share of 0: in a training on several GPUs every process must
        run the same layers.
        """
        complete = None if present is None else present[labelled].all(1)
        if complete is None or bool(complete.all()):
            return slice(None), 1.0
        rows = complete.nonzero().ravel() if bool(complete.any()) else torch.zeros(1, dtype=torch.long)
        return rows.to(self.device), float(complete.float().mean())

    def after_step(self, losses: Losses) -> None:
        if losses.adversary_input is not None:
            self.adversary.step(*losses.adversary_input)

    def forward_student(self, inputs: torch.Tensor, complete: torch.Tensor) -> Any:
        """Run the network for a step with terms; the output is a NamedTuple with ``logits`` and what terms read.

        ``inputs`` is the batch (B, C, *spatial) with absent modalities zero; nothing of ``complete``, the same batch
        with all modalities, may reach the logits.
        """
        return with_logits(self.run_network(inputs, complete))

    def run_network(self, inputs: torch.Tensor, complete: torch.Tensor, **options: Any) -> Any:
        """Call the network in :meth:`forward_student`; a mixin may give it ``complete``, for terms that read it."""
        return self.network(inputs, **options)

    def forward_teacher(self, complete: torch.Tensor) -> Any:
        """Run the teacher on complete input, without a graph unless it learns."""
        raise NotImplementedError

    # ---- unlabelled cases ----------------------------------------------------------------------------------------

    @property
    def unlabelled_share(self) -> float:
        return self.settings[UnlabelledSettings].share or 0.0

    def make_loaders(self) -> tuple[Any, Any]:
        """nnU-Net's; and, with unlabelled cases, ``unlabelled_batches`` beside them."""
        train, validation = super().make_loaders()
        cases = [] if self.split is None else self.split["unlabelled"]
        if cases:
            dataset = self.dataset_class(self.preprocessed_dataset_folder, cases)
            batch_size = max(1, round(self.unlabelled_share * self.batch_size))
            unlabelled = unlabelled_loader(train, dataset, cases, batch_size)
            next(unlabelled)
            self.unlabelled_batches = repeating(unlabelled, self.settings[ScheduleSettings].batch_repeats)
            section = self.settings[UnlabelledSettings]
            self.print_to_log_file(
                f"each batch has {batch_size} unlabelled samples beside {self.batch_size} labelled ones: weight "
                f"{section.weight:g} after the first {section.ramp:.0%}, cross-entropy where the guide is more certain "
                f"than {section.confidence:g} at temperature {self.guide_temperature:.3g}, Dice {section.dice:g}"
            )
        return train, validation

    def finish_loaders(self) -> None:
        super().finish_loaders()
        end_workers(self.unlabelled_batches)

    def add_unlabelled(
        self, data: torch.Tensor, present: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a batch and what its cases have, with the step's unlabelled samples, whose cases are complete."""
        if self.unlabelled_batches is None:
            return data, present
        batch = next(self.unlabelled_batches)
        self.unlabelled_keys = tuple(map(str, batch.get("keys", ())))
        more = batch["data"].to(self.device, non_blocking=True)
        if batch.get(REPEATED):
            more, _ = self.flip(more, [])
        if present is not None:
            present = torch.cat([present, present.new_ones(len(more), present.shape[1])])
        return torch.cat([data, more]), present

    def unlabelled_loss(self, student: Any, teacher: Any, unlabelled: torch.Tensor) -> torch.Tensor:
        """The loss of the last samples, those without a label, against :meth:`guide`."""
        section, last = self.settings[UnlabelledSettings], slice(-len(unlabelled), None)
        return pseudo_label_loss(
            student.logits[last],
            self.guide(rows_of(teacher, last), unlabelled),
            regions=self.label_manager.has_regions,
            confidence=section.confidence,
            temperature=self.guide_temperature,
            dice=section.dice,
        )

    def guide(self, teacher: Any, complete: torch.Tensor) -> torch.Tensor:
        """Logits that take the place of a label: here the network's own, from all modalities."""
        return self.own_prediction(self.plain_network, complete)

    def own_prediction(self, network: torch.nn.Module, complete: torch.Tensor) -> torch.Tensor:
        """Return full-resolution logits of this training's network, or of its average, from all modalities."""
        network.eval()
        with torch.no_grad():
            logits = finest(network(complete))
        # autocast keeps the weights that it has cast; before torch 2.10 those without a graph too
        torch.clear_autocast_cache()
        self.network.train()
        return logits

    @cached_property
    def guide_temperature(self) -> float:
        """``unlabelled.temperature``."""
        temperature = self.settings[UnlabelledSettings].temperature
        if temperature is None:
            raise InputError("unlabelled.temperature is null, but this training has no trained teacher; give a number")
        return temperature

    def unlabelled_weight(self) -> float:
        """Weight of the loss of unlabelled samples: it rises at the start and does not fade."""
        section = self.settings[UnlabelledSettings]
        return section.weight * self.rise(section.ramp)

    # ---- terms ---------------------------------------------------------------------------------------------------

    def active(self, *names: str) -> list[str]:
        """Return those of the names that are terms with a weight above 0."""
        return [term.name for term in self.terms if term.name in names]

    def voxel_weight(self, student: Any, teacher: Any, target: Target) -> torch.Tensor | None:
        """Return how much each voxel counts in the logit terms, (B, 1, *spatial); None: all alike."""
        return None

    def rise(self, fraction: float) -> float:
        """How far a weight has risen, exp(-5 (1 - t)^2), that is full after this fraction of the training.

        MST-KDNet's released code lets one term rise like this, over 20 of 100 or 300 epochs; the paper gives no
        schedule.
        """
        t = min(1.0, self.iteration / max(1.0, fraction * self.total_iterations)) if fraction > 0 else 1.0
        return math.exp(-5.0 * (1.0 - t) ** 2)

    def teacher_factor(self) -> float:
        """Common factor of the weights of all terms that need the teacher, at this iteration."""
        return 1.0

    # ---- online validation --------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._validation_step = 0

    def _validation_rows(self, batch_size: int) -> torch.Tensor:
        """Entries of the fixed list for this step: sample n of an epoch gets entry n mod S, whatever the ranks."""
        whole, number, ranks = self.configuration_manager.batch_size, rank(), world_size()
        offset = number * (whole // ranks) + min(number, whole % ranks)
        first = self._validation_step * whole + offset
        return torch.arange(first, first + batch_size) % len(self.validation_subsets)

    def validation_step(self, batch: dict) -> dict:
        data, target, present = self._to_device(batch)
        rows = self._validation_rows(len(data))
        if present is not None:
            rows = modalities.rows_within(self.validation_subsets, rows, present)
        subsets = self.validation_subsets[rows]
        self._validation_step += 1
        with self._autocast(), self.conditioned_on(subsets):
            output = self.network(modalities.mask_modalities(data, subsets))
            loss = self.loss(output, target)
        counts = self._count(finest(output), finest(target))
        return {"loss": loss.detach().cpu().numpy(), "counts": counts, "rows": rows.numpy()}

    def _count(self, output: torch.Tensor, target: torch.Tensor) -> np.ndarray:
        """True positives, false positives and false negatives per sample and foreground head: (B, heads, 3)."""
        label, _, valid, _ = self.read_target(target)
        if self.label_manager.has_regions:
            predicted = (output > 0).long()
        else:
            predicted = torch.zeros_like(output, dtype=torch.long).scatter_(1, output.argmax(1, keepdim=True), 1)
        spatial = list(range(2, output.ndim))
        tp, fp, fn, _ = get_tp_fp_fn_tn(predicted, label, axes=spatial, mask=None if valid is None else valid.float())
        counts = torch.stack([tp, fp, fn], -1).cpu().numpy()
        return counts if self.label_manager.has_regions else counts[:, 1:]

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Dice per subset from that subset's pooled counts, then the mean over subsets."""
        collated = collate_outputs(val_outputs)
        counts, rows = collated["counts"], collated["rows"]
        counts, rows, loss = counts.reshape(-1, *counts.shape[2:]), rows.reshape(-1), np.mean(collated["loss"])
        everyone = gather((counts, rows, loss))
        loss = np.mean([entry[2] for entry in everyone])
        pooled = torch.zeros(len(self.validation_subsets), *counts.shape[1:], dtype=torch.float64)
        for counts, rows, _ in everyone:
            pooled.index_add_(0, torch.as_tensor(rows), torch.as_tensor(counts).double())
        tp, fp, fn = pooled.unbind(-1)
        dice = 2 * tp / (2 * tp + fp + fn)  # NaN, which means leave out, where there is nothing and nothing was found
        self.logger.log("mean_fg_dice", dice.nanmean(1).nanmean().nan_to_num().item(), self.current_epoch)
        self.logger.log("dice_per_class_or_region", dice.nanmean(0).tolist(), self.current_epoch)
        self.logger.log("val_losses", loss, self.current_epoch)
