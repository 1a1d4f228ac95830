"""SMML on nnU-Net: two students under two subsets that teach one another, guided by a semantic prior."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import UnsupportedError
from nnunetv2_mstkd.losses.soft_labels import soft_label_divergence
from nnunetv2_mstkd.methods.mmformer.network import MMFormerDesign
from nnunetv2_mstkd.methods.mmformer.trainer import MMFormerTrainer
from nnunetv2_mstkd.methods.rfnet.network import RFNetDesign
from nnunetv2_mstkd.methods.rfnet.trainer import RFNetTrainer
from nnunetv2_mstkd.methods.smml import losses, semantic_prior
from nnunetv2_mstkd.methods.smml.network import MutualDesign, StudentOutput
from nnunetv2_mstkd.methods.smml.refinement import RefinementNet
from nnunetv2_mstkd.methods.smml.settings import SMMLSettings
from nnunetv2_mstkd.networks.decoding import finest
from nnunetv2_mstkd.nnunet.folders import nnunet_folder
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distributed import first_process_first, wrapped_for_ddp
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer
from nnunetv2_mstkd.training.settings import (
    SamplerSettings,
    Settings,
    SettingsError,
    UnlabelledSettings,
)
from nnunetv2_mstkd.training.step import Losses, Target, add_terms


class SMMLTrainer(ModalityDropoutTrainer):
    """SMML: "Semantic-guided masked mutual learning" (AAAI 2025, arXiv 2507.07592).

    Both students see the same patch under two different subsets. Each has its own segmentation loss, the pixel-level
    and the feature-level constraint with the other as teacher, and, with a prior, the guidance of its refinement
    network. The other's side of a constraint is detached, so that one backward pass serves both. Refinement networks
    and prior stay outside the network: a trained model predicts without them.

    With ``schedule.init_from`` a plain U-Net starts both students, and every modality's encoder of its width. Equal at
    first, they become different because every step shows them different subsets.
    """

    design: ClassVar[NetworkDesign] = MutualDesign()  # type: ignore[misc]
    sections = (*ModalityDropoutTrainer.sections, SMMLSettings)
    reserved_names = (*ModalityDropoutTrainer.reserved_names, "pixel", "feature", "refinement", "guidance")
    refiners: torch.nn.ModuleList | None = None
    average: semantic_prior.MovingAverage | None = None
    soft_prior: bool = False
    """Whether the precomputed prior holds probabilities, not labels; known once the training is prepared."""
    _file_network: semantic_prior.FileNetwork | None = None

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        if not settings[SamplerSettings].build(modalities.modality_names(dataset_json)).varies:
            raise SettingsError(
                "the sampler draws one subset only; the two students need two different ones. Name at least two in "
                "sampler.subsets or sampler.weights, or leave two possible with sampler.drop"
            )
        if settings[SamplerSettings].per_batch:
            by = settings.set_by(SamplerSettings.NAME, "per_batch")
            raise SettingsError(f"sampler.per_batch: SMML draws two subsets per sample; set it to false{by}")
        if settings[UnlabelledSettings].share:
            raise SettingsError("unlabelled.share: SMML does not use unlabelled cases; set it to 0")

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        for student in self.plain_network.students:
            student.decoder.deep_supervision = enabled

    # ---- refinement networks and prior -------------------------------------------------------------------------

    def configure_optimizers(self):
        """One optimiser over the students and their refinement networks, which are made here."""
        smml = self.smml
        network = self.plain_network
        trained = [network]
        self.refiners = self.average = None
        if smml.prior != "none":
            heads = self.label_manager.num_segmentation_heads
            self.refiners = torch.nn.ModuleList(
                RefinementNet(student.encoder, self.num_input_channels, heads, smml.refinement_width)
                for student in network.students
            ).to(self.device)
            trained.append(self.refiners)
        if smml.prior == "self":
            self.average = semantic_prior.MovingAverage(network.students[0], smml.ema)
        return self.optimizer_of(trained, self.design.added_modules(network))

    def initialize(self) -> None:
        super().initialize()
        if self.is_ddp and self.smml.sequential:
            raise UnsupportedError(
                "smml.sequential runs one student at a time, which training on several GPUs does not support; set it "
                "to false"
            )
        self.refine: list[torch.nn.Module] = list(self.refiners or ())
        if self.is_ddp:
            self.refine = [wrapped_for_ddp(refiner, self.device) for refiner in self.refine]

    @property
    def smml(self) -> SMMLSettings:
        """The method's own section."""
        return self.settings[SMMLSettings]

    def prepare_training(self) -> None:
        super().prepare_training()
        if self.finished:
            return
        if self.average is not None and not self._resumed:
            self.average.restart(self.plain_network.students[0])
        path = Path(self.smml.prior_path or "").expanduser()
        if self.smml.prior == "checkpoint":
            heads, patch_size = self.label_manager.num_segmentation_heads, self.configuration_manager.patch_size
            self._file_network = semantic_prior.FileNetwork(path, heads, patch_size, self.device)
        if self.smml.prior == "precomputed":
            source = (
                path if path.is_absolute() else nnunet_folder("nnUNet_raw") / self.plans_manager.dataset_name / path
            )
            self.soft_prior = semantic_prior.is_soft(source)
            self.print_to_log_file(
                f"semantic prior: {'probabilities' if self.soft_prior else 'label maps'} in {source}"
            )
            with first_process_first():
                semantic_prior.prepare_maps(
                    source,
                    self._prior_folder(),
                    super().get_tr_and_val_datasets()[0],
                    plans=self.plans_manager,
                    configuration=self.configuration_manager,
                    dataset_json=self.dataset_json,
                )

    def _prior_folder(self) -> Path:
        return Path(f"{self.preprocessed_dataset_folder}_prior")

    def get_tr_and_val_datasets(self):
        train, validation = super().get_tr_and_val_datasets()
        if self.smml.prior == "precomputed":
            train = semantic_prior.PriorDataset(train, self._prior_folder(), soft=self.soft_prior)
        return train, validation

    def get_training_transforms(self, *args: Any, **kwargs: Any):
        """nnU-Net's, which move the maps of the prior as the image and hand them over behind it."""
        pipeline = super().get_training_transforms(*args, **kwargs)
        if self.smml.prior == "precomputed":
            names = [type(transform).__name__ for transform in pipeline.transforms]
            ends = [names.index(name) for name in semantic_prior.TARGET_TRANSFORMS if name in names]
            hand_over = semantic_prior.ReturnPriorToImage() if self.soft_prior else semantic_prior.MovePriorToImage()
            pipeline.transforms.insert(min(ends, default=len(names)), hand_over)
            if self.soft_prior:
                pipeline.transforms.insert(0, semantic_prior.TakePriorFromImage(self.num_input_channels))
        return pipeline

    def _prior_maps(self, data: torch.Tensor, labels: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
        """What each modality says about each class, (B, C, K, *spatial)."""
        regions = self.label_manager.has_regions
        if self.average is not None:
            return self.average.maps(data, needed, regions)
        if self._file_network is not None:
            return self._file_network.maps(data, regions)
        if self.soft_prior:
            return labels.unflatten(1, (self.num_input_channels, -1))
        return semantic_prior.one_hot_maps(labels, self.label_manager)

    # ---- training ----------------------------------------------------------------------------------------------

    def draw_partner(self, availability: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
        """The second student's subsets, each different from the first's where the case allows it: bool, (B, C)."""
        return self.sampler.sample_other(availability, present=present, generator=self._subset_generator)

    def clip_groups(self) -> list[torch.nn.Module]:
        return [*self.plain_network.students, *(self.refiners or ())]

    def run_network(self, inputs: torch.Tensor, complete: torch.Tensor, **options: Any) -> Any:
        more = {} if self.smml.light else {"auxiliary": complete}  # networks with one encoder per modality
        return super().run_network(inputs, complete, **more, **options)

    @property
    def warm(self) -> bool:
        """Whether the pixel-level constraint and the guidance have begun."""
        return self.iteration >= self.smml.warmup * self.total_iterations

    def compute_losses(self, data: torch.Tensor, target: Any, present: torch.Tensor | None = None) -> Losses:
        data, labels = data[:, : self.num_input_channels], data[:, self.num_input_channels :]
        availability = self.draw_availability(len(data), present)
        subsets = (availability, self.draw_partner(availability, present))
        inputs = [modalities.mask_modalities(data, subset) for subset in subsets]
        label = self.read_target(finest(target))
        priors: list[torch.Tensor | None] = [None, None]
        if self.refiners is not None:
            maps = self._prior_maps(data, labels, (subsets[0] | subsets[1]).any(0).cpu())
            priors = [modalities.mask_modalities(maps, subset) for subset in subsets]

        if self.smml.sequential:
            with torch.no_grad(), self.conditioned_on(subsets[1]):
                peer = self.run_network(inputs[1], data, student=1)
            # autocast keeps the weights that it has cast; before torch 2.10 those without a graph too
            torch.clear_autocast_cache()
            with self.conditioned_on(subsets[0]):
                first = self.run_network(inputs[0], data, student=0)
            loss, terms = self._student_loss(0, first, peer, target, label, priors[0])
            with torch.autocast(self.device.type, enabled=False):
                self.backward(loss)
            # without its graph, whose memory is free then
            first = StudentOutput(finest(first.logits).detach(), first.bottleneck.detach())
            with self.conditioned_on(subsets[1]):
                second = self.run_network(inputs[1], data, student=1)
            other_loss, other_terms = self._student_loss(1, second, first, target, label, priors[1])
            total = loss.detach() + other_loss
        else:
            known = subsets[1].to(self.device, non_blocking=True)
            with self.conditioned_on(subsets[0]):
                first, second = self.run_network(inputs[0], data, other=inputs[1], other_availability=known)
            loss, terms = self._student_loss(0, first, second, target, label, priors[0])
            other_loss, other_terms = self._student_loss(1, second, first, target, label, priors[1])
            total = loss + other_loss
        means = {name: (value + other_terms[name]) / 2 for name, value in terms.items()}
        return Losses(total, means)

    def _student_loss(
        self, number: int, own: StudentOutput, peer: StudentOutput, target: Any, label: Target, prior: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one student and its refinement network, and the terms without their weights."""
        smml = self.smml
        heads = {"regions": self.label_manager.has_regions, "valid": label.valid}
        logits, peer_logits = finest(own.logits), finest(peer.logits).detach()
        zero = logits.new_zeros((), dtype=torch.float32)
        total = self.loss(own.logits, target)
        terms = {"segmentation": total}
        if smml.pixel:
            options = {"tau": smml.tau, "require_correct": smml.require_correct, "balanced": smml.balanced, **heads}
            exchange = losses.reliable_exchange
            terms["pixel"] = exchange(logits, peer_logits, label.label, **options) if self.warm else zero
            total = total + smml.pixel * terms["pixel"]
        if smml.feature:
            terms["feature"] = losses.relational_consistency(
                own.bottleneck, peer.bottleneck.detach(), peer_logits, label.label, **heads
            )
            total = total + smml.feature * terms["feature"]
        total = add_terms(total, terms, self.terms, own, label)
        if prior is not None:
            refined = self.refine[number](prior, logits, regions=self.label_manager.has_regions)
            terms["refinement"] = self.full_resolution_loss(refined, label)
            total = total + terms["refinement"]
            if smml.guidance:
                terms["guidance"] = soft_label_divergence(logits, refined, **heads) if self.warm else zero
                total = total + smml.guidance * terms["guidance"]
        return total, terms

    def after_step(self, losses: Losses) -> None:
        if self.average is not None:
            self.average.update(self.plain_network.students[0])

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        state = super().extra_state()
        if self.refiners is not None:
            state["refiners"] = self.refiners.state_dict()
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        if self.refiners is not None and "refiners" in state:
            self.refiners.load_state_dict(state["refiners"])
        if self.average is not None and "average" in state:
            self.average.load_state_dict(state["average"])


class MultiEncoderStudents(SMMLTrainer):
    """Mixin: SMML whose students are networks of another method with one encoder per modality, with its losses.

    Name it before that method's trainer, and give the class ``design = MutualDesign(...)`` around its design.
    """

    @classmethod
    def resolve(cls, settings: Settings, configuration_manager: ConfigurationManager, dataset_json: dict) -> Settings:
        """``light``: these students have one encoder per modality, whose width is the method's own setting."""
        settings = super().resolve(settings, configuration_manager, dataset_json)
        return settings.replace(SMMLSettings, light=False)


class SMMLMMFormerTrainer(MultiEncoderStudents, MMFormerTrainer):
    """SMML with two mmFormers as students, the backbone of its released code."""

    design = MutualDesign(MMFormerDesign())


class SMMLRFNetTrainer(MultiEncoderStudents, RFNetTrainer):
    """SMML with two RFNets as students."""

    design = MutualDesign(RFNetDesign())
