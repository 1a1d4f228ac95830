"""MST-KDNet on nnU-Net: multi-scale transformer distillation, dual-mode logit distillation, global style matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from nnunetv2_mstkd.losses.relative import relative_difference
from nnunetv2_mstkd.losses.style import style_matching
from nnunetv2_mstkd.methods.mstkd import losses, published
from nnunetv2_mstkd.methods.mstkd.network import Features, TransformerDesign
from nnunetv2_mstkd.methods.mstkd.settings import MSTKDSettings, NetworkSettings
from nnunetv2_mstkd.training.design import NetworkDesign
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.full_modality import TeacherTrainer
from nnunetv2_mstkd.training.settings import Settings
from nnunetv2_mstkd.training.step import Term


class Forms(NamedTuple):
    """The formulas of the terms."""

    evd: Callable[..., torch.Tensor]
    maps: Callable[..., torch.Tensor]
    discrepancy: Callable[..., torch.Tensor]
    kl: Callable[..., torch.Tensor]
    style: Callable[..., torch.Tensor]
    content: Callable[..., torch.Tensor]


RELATIVE = Forms(
    losses.extreme_value_distillation,
    losses.multiscale_map_matching,
    losses.logit_discrepancy,
    losses.standardized_kl,
    style_matching,
    lambda student, teacher: relative_difference(student, teacher.detach()),
)
PUBLISHED = Forms(
    published.extreme_values,
    published.multiscale_maps,
    published.probability_error,
    published.standardized_kl,
    published.style,
    published.content,
)


class MSTKDTeacherTrainer(TeacherTrainer):
    """The teacher: the network of :class:`MSTKDTrainer` on complete input, trained before the student and then frozen.

    MST-KDNet's paper draws a segmentation loss on both networks, and its released code trains them together and lets
    distillation pull the teacher down: that is ``teacher.joint``, which needs no training of this kind.
    """

    design = TransformerDesign()


class MSTKDTrainer(DistillationTrainer):
    """MST-KDNet: "Bridging the Gap in Missing Modalities: Leveraging Knowledge Distillation and Style Matching for
    Brain Tumor Segmentation", MICCAI 2025.

    Total loss (eq. 12): segmentation + MS-TKD (``evd``, ``maps``; eq. 2-4) + DMLD (``discrepancy``, ``kl``; eq. 5-8)
    + GSME (``style``, ``adversarial``; eq. 9-11) + the released code's ``content``. Every weight is a setting and may
    be 0. By default each term is relative to the size of what it compares, which is this package's form;
    ``mstkd.recipe = "paper"`` has the published formulas, weights, network and training.
    """

    sections = (*DistillationTrainer.sections, MSTKDSettings)
    design: ClassVar[NetworkDesign | None] = TransformerDesign()
    teacher_trainer = MSTKDTeacherTrainer
    logit_terms = ("discrepancy", "kl")
    feature_terms = ("evd", "maps", "style", "adversarial", "content")
    _switched_off = False
    """Whether ``mstkd.segmentation`` has switched deep supervision off."""

    def apply_settings(self, settings: Settings) -> None:
        super().apply_settings(settings)
        # may be undone: a checkpoint's settings are applied after those of the plans
        on = self.enable_deep_supervision or self._switched_off
        self._switched_off = on and self.settings[MSTKDSettings].segmentation == "dice"
        self.enable_deep_supervision: bool = on and not self._switched_off

    def make_terms(self) -> tuple[Term, ...]:
        weights = self.settings[MSTKDSettings]
        forms = PUBLISHED if weights.form == "published" else RELATIVE
        # as released, the discrepancy alone rises
        factor = self.fading if weights.form == "published" else None

        def style_maps(features: Features) -> tuple[torch.Tensor, ...]:
            return features.f_enc, features.f_dec, features.f_t

        def discrepancy(student: Any, teacher: Any, target: Any) -> torch.Tensor:
            return self.compare_logits(forms.discrepancy, student, teacher, target)

        def kl(student: Any, teacher: Any, target: Any) -> torch.Tensor:
            options = {"target_foreground": target.foreground, "separate": weights.regions == "separate"}
            options = {} if forms is PUBLISHED else options
            return self.compare_logits(forms.kl, student, teacher, target, tau=weights.tau, **options)

        return (
            Term("evd", weights.evd, lambda s, t, target: forms.evd(s.attention, t.attention), factor=factor),
            Term("maps", weights.maps, lambda s, t, target: forms.maps(s.maps, t.maps), factor=factor),
            Term("discrepancy", weights.discrepancy, discrepancy),
            Term("kl", weights.kl, kl, factor=factor),
            Term("style", weights.style, lambda s, t, target: forms.style(style_maps(s), style_maps(t)), factor=factor),
            Term("adversarial", weights.adversarial, self.adversarial, factor=factor),
            Term("content", weights.content, lambda s, t, target: forms.content(s.content, t.content), factor=factor),
        )

    def _build_loss(self) -> Any:
        if self.settings[MSTKDSettings].segmentation == "nnunet":
            return super()._build_loss()

        def dice(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            label, regions = self.read_target(target), self.label_manager.has_regions
            return published.dice(logits, label.label, regions=regions, valid=label.valid)

        return dice

    def forward_options(self) -> dict[str, Any]:
        return {
            "return_features": True,
            "return_attention": bool(self.active("evd")),
            "pool_encoder": self.settings[MSTKDSettings].style_encoder == "paper",
        }

    def feature_facts(self, network: Any, settings: Settings) -> dict[str, Any]:
        section = settings[NetworkSettings].to_dict()
        keys = ("placement", "taps", "patch", *(["heads"] if self.active("evd") else []))
        return {**super().feature_facts(network, settings), **{f"network.{key}": section[key] for key in keys}}

    # ---- adversary -----------------------------------------------------------------------------------------------

    def style_channels(self) -> int:
        """Channels of f_enc (of the stage above, where it is pooled from there) and f_t."""
        level, widths = self.plain_network.style_level, self.plain_network.encoder.output_channels
        pooled = self.settings[MSTKDSettings].style_encoder == "paper" and level + 2 <= len(widths)
        return widths[-2 - level if pooled else -1 - level] + widths[-1 - level]

    def style_of(self, features: Features) -> torch.Tensor:
        return torch.cat([features.f_enc.float(), features.f_t.float()], 1)
