"""Base of the distilling trainers: a frozen full-modality teacher beside a student with missing modalities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.losses.dmld import teacher_advantage
from nnunetv2_mstkd.losses.ramp import ramp
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer, StepLoss, Target
from nnunetv2_mstkd.training.settings import Settings
from nnunetv2_mstkd.training.teacher import Teacher, find_teacher, load_teacher

Term = Callable[[Any, Any, Target], torch.Tensor]
"""``term(student, teacher, target) -> scalar``, with what the two networks returned."""


class DistillationTrainer(ModalityDropoutTrainer):
    """Segmentation loss on a random subset, plus weighted terms that compare the student with a frozen teacher.

    A method is a subclass that names its teacher's trainer and lists its terms. The teacher sees all modalities of the
    same augmented batch, under no_grad; it is held outside ``self.network``, so that the checkpoint is the student
    alone.
    """

    teacher_trainer: ClassVar[type]
    own_terms: ClassVar[tuple[str, ...]] = ()
    """Terms that read the student alone: they need no teacher, and neither ramp nor fade touches their weights."""
    teacher: Any = None
    """The frozen network, compiled where the student is; None where no term needs it."""
    _teacher_identity: dict[str, str] | None = None

    def distillation_weights(self) -> Mapping[str, float]:
        """Weights by term name; only the terms above 0."""
        raise NotImplementedError

    def distillation_terms(self) -> Mapping[str, Term]:
        """The terms by name. One of weight 0 is neither computed nor logged."""
        raise NotImplementedError

    @property
    def needs_teacher(self) -> bool:
        return any(name not in self.own_terms for name in self.weights)

    def forward_student(self, data: torch.Tensor) -> Any:
        """The student's output with what the active terms read; has ``logits``."""
        raise NotImplementedError

    def forward_teacher(self, data: torch.Tensor) -> Any:
        """The teacher's output with what the active terms read; has ``logits``."""
        raise NotImplementedError

    def adopt(self, settings: Settings) -> None:
        super().adopt(settings)
        self.weights = dict(self.distillation_weights())

    # ---- teacher -----------------------------------------------------------------------------------------------

    def prepare_training(self) -> None:
        super().prepare_training()
        if self.current_epoch >= self.num_epochs:
            return  # --c on a finished training only repeats the validation
        warm_start = self.settings.teacher.warm_start and self.initial_source is None and not self._resumed
        if not self.needs_teacher and not warm_start:
            return
        teacher = self._load_teacher()
        if warm_start:
            self._start_from(teacher.weights, "the teacher")
        if self.needs_teacher:  # an ablation without any term does not pay for a teacher
            self.teacher = torch.compile(teacher.network) if self._do_i_compile() else teacher.network

    def _load_teacher(self) -> Teacher:
        results = Path(self.output_folder_base).parent
        dataset = self.plans_manager.dataset_name
        path = find_teacher(
            results,
            trainer=self.teacher_trainer.__name__,
            plans=self.plans_manager.plans,
            configuration=self.configuration_name,
            fold=self.fold,
            wanted=self.settings.teacher.configuration,
            dataset=int(dataset[7:10]) if dataset[7:10].isdigit() else dataset,
        )
        teacher = load_teacher(
            path,
            results_root=results.parent,
            trainer=self.teacher_trainer,
            student_configuration=self.configuration_manager,
            student_plans=self.plans_manager,
            dataset_json=self.dataset_json,
            split=self._split or {},
            device=self.device,
        )
        stored = self._teacher_identity
        if self._resumed and stored is not None and stored["sha256"] != teacher.identity["sha256"]:
            raise InputError(
                f"the teacher was replaced since this training started: {teacher.identity['path']} has weights "
                f"{teacher.identity['sha256'][:12]}, the checkpoint was trained with {stored['path']} "
                f"{stored['sha256'][:12]}. Put the old teacher back, or start this training anew without --c"
            )
        self.check_teacher(teacher)
        self._teacher_identity = teacher.identity
        self.print_to_log_file(f"teacher: {teacher.identity['path']}, sha256 {teacher.identity['sha256'][:12]}")
        return teacher

    def check_teacher(self, teacher: Teacher) -> None:
        """Hook: refuse a teacher whose features do not have the shapes that active terms match."""

    def check_same_encoder(self, teacher: Teacher, active: list[str]) -> None:
        """Refuse a teacher whose encoder has other widths or strides, if there are ``active`` terms on features."""
        encoder: Any = self.plain_network.encoder
        other: Any = teacher.network.encoder
        for name, here, there in (
            ("channels per stage", list(encoder.output_channels), list(other.output_channels)),
            ("strides", list(map(tuple, encoder.strides)), list(map(tuple, other.strides))),
        ):
            if active and here != there:
                raise InputError(
                    f"teacher {teacher.identity['path']} has the {name} {there}, the student {here}; the terms "
                    f"{', '.join(active)} compare features of equal shape. Set their weights to 0 or use one network"
                )

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "teacher": self._teacher_identity}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self._teacher_identity = state.get("teacher")

    # ---- loss --------------------------------------------------------------------------------------------------

    def weight_factor(self) -> float:
        """Common factor of all term weights at this iteration: ramp at the start, linear fade at the end."""
        settings = self.settings.distillation
        factor = ramp(self.iteration, self.total_iterations, settings.ramp) if settings.ramp > 0 else 1.0
        left = 1 - self.iteration / self.total_iterations
        return factor * (min(1.0, left / settings.fade) if settings.fade > 0 else 1.0)

    def compute_loss(self, data: torch.Tensor, target: Any, availability: torch.Tensor) -> StepLoss:
        if not self.weights:
            return super().compute_loss(data, target, availability)
        teacher = None
        if self.needs_teacher:
            with torch.no_grad():
                teacher = self.forward_teacher(data)
        student = self.forward_student(modalities.mask_modalities(data, availability))
        segmentation = self.loss(student.logits, target)
        deep = isinstance(student.logits, (list, tuple))
        if deep:
            student = student._replace(logits=student.logits[0])
        label = self.read_target(target[0] if deep else target)
        values = {"segmentation": segmentation}
        total, factor = segmentation, self.weight_factor()
        terms = self.distillation_terms()
        with torch.autocast(self.device.type, enabled=False):
            if teacher is not None:
                label = label._replace(weight=self.voxel_weight(student, teacher, label))
            for name, weight in self.weights.items():
                values[name] = terms[name](student, teacher, label)
                total = total + (1.0 if name in self.own_terms else factor) * weight * values[name]
        self.keep_for_update(student, teacher)
        return StepLoss(total, values)

    def voxel_weight(self, student: Any, teacher: Any, target: Target) -> torch.Tensor | None:
        """1 where the teacher is more right than the student, if the settings ask to distil only there."""
        if self.settings.distillation.where == "everywhere":
            return None
        regions = self.label_manager.has_regions
        return teacher_advantage(student.logits, teacher.logits, target.label, regions=regions, valid=target.valid)

    def keep_for_update(self, student: Any, teacher: Any) -> None:
        """Hook: what a second optimiser's own step needs after the backward pass."""
