"""mmFormer and RFNet: one encoder per modality, fused, with a decoder that each modality has for itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    LABELS,
    LABELS_WITH_IGNORE,
    NO_TERMS,
    REGIONS,
    REGIONS_WITH_IGNORE,
    batch,
    plans,
    wake,
)

from nnunetv2_mstkd import methods, modalities, testing
from nnunetv2_mstkd.methods import (
    MedMAPMMFormerTrainer,
    MedMAPRFNetTrainer,
    MMFormerTrainer,
    RFNetTrainer,
    SMMLMMFormerTrainer,
    SMMLRFNetTrainer,
)
from nnunetv2_mstkd.methods.mmformer.network import ModalityTransformer
from nnunetv2_mstkd.methods.rfnet.network import RegionFusion, RegionWeights
from nnunetv2_mstkd.networks.attention import Attention
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts

TRAINERS = [MMFormerTrainer, RFNetTrainer]
ALIGNED = [MedMAPMMFormerTrainer, MedMAPRFNetTrainer]
MUTUAL = [SMMLMMFormerTrainer, SMMLRFNetTrainer]
each_trainer = pytest.mark.parametrize("cls", TRAINERS, ids=lambda cls: cls.__name__)
every_trainer = pytest.mark.parametrize("cls", TRAINERS + ALIGNED + MUTUAL, ids=lambda cls: cls.__name__)

PLANS = {
    "two channels, 2d": {"channels": 2, "dimensions": 2},
    "sixteen channels": {"channels": 16, "dimensions": 2, "edge": 8},
    "residual, regions": {"residual": True, "labels": REGIONS},
    "regions, ignore label, 2d": {"dimensions": 2, "labels": REGIONS_WITH_IGNORE},
    "ignore label": {"labels": LABELS_WITH_IGNORE},
    "without deep supervision": {"deep_supervision": False},
}


def anisotropic() -> dict[str, Any]:
    content = plans(edge=16)
    configuration = content["configurations"]["tiny"]
    configuration["patch_size"] = [4, 16, 24]
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs["kernel_sizes"] = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    kwargs["strides"] = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    return content


def losses(trainer: Any, content: dict[str, Any]) -> Any:
    return trainer.compute_losses(content["data"], content["target"])


@every_trainer
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_trains_on_every_kind_of_plan(make_trainer, cls, options):
    trainer = make_trainer(cls, **options)
    wake(trainer.network)
    terms = losses(trainer, batch(trainer)).terms
    assert "separate" in terms and ("maps" in terms) == ("RFNet" in cls.__name__)
    losses(trainer, batch(trainer)).total.backward()
    without = {name for name, each in trainer.network.named_parameters() if each.requires_grad and each.grad is None}
    assert all("decoder.seg_layers.0." in name for name in without)  # nnU-Net gives the coarsest output the weight 0
    assert all(torch.isfinite(each.grad).all() for each in trainer.network.parameters() if each.grad is not None)


@each_trainer
def test_anisotropic_plans(make_trainer, cls):
    trainer = make_trainer(cls, anisotropic())
    convolutions = [module for module in trainer.network.encoder.modules() if isinstance(module, torch.nn.Conv3d)]
    kernels = {module.kernel_size for module in convolutions}
    assert (1, 3, 3) in kernels and (3, 3, 3) in kernels
    before = losses(trainer, batch(trainer)).total.item()
    for seed in range(3):
        trainer.train_step(batch(trainer, seed=seed))
    assert np.isfinite(before) and losses(trainer, batch(trainer)).total.item() < before


@every_trainer
@pytest.mark.parametrize(
    "options",
    [{"channels": 2, "dimensions": 2, "labels": REGIONS}, {"channels": 5, "dimensions": 2}, {"residual": True}],
    ids=["two channels", "five channels", "residual"],
)
def test_nothing_of_an_absent_modality_leaks(cls, tmp_path, options):
    testing.check_no_leak(cls, tmp_path, **options)


@each_trainer
def test_logits_do_not_read_the_complete_batch(make_trainer, cls):
    trainer = make_trainer(cls, batch_size=15)
    wake(trainer.network)
    subsets = modalities.all_subsets(4)
    data = batch(trainer)["data"]
    data[0, :1] = 0  # the only modality of the first sample is blank: nothing of the others may take its place
    masked = modalities.mask_modalities(data, subsets)
    with torch.no_grad():
        plain = trainer.network(masked)[0]
        found = trainer.network(masked, auxiliary=data)
    torch.testing.assert_close(found.logits[0], plain)
    assert found.encoded.all() and found.separate.shape == (15, 4, *plain.shape[1:])


@each_trainer
def test_leak_test_finds_the_term_that_reads_the_complete_batch(monkeypatch, cls, tmp_path):
    monkeypatch.setattr(cls, "reads_complete", ())
    with pytest.raises((AssertionError, FloatingPointError)):
        testing.check_no_leak(cls, tmp_path)


@pytest.mark.compiled
@each_trainer
def test_network_compiles_into_one_graph(make_trainer, cls):
    network = make_trainer(cls, deep_supervision=False).network
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    data = torch.randn(2, 4, 16, 16, 16)
    masked = modalities.mask_modalities(data, modalities.all_subsets(4)[3:5])
    found, wanted = (each(masked, auxiliary=data) for each in (compiled, network))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.separate, wanted.separate, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled(masked), wanted.logits, rtol=1e-3, atol=1e-4)


# ---- the decoder of single modalities --------------------------------------------------------------------------------


@each_trainer
def test_separate_decoder_has_shared_weights_and_one_modality(make_trainer, cls):
    trainer = make_trainer(cls)
    network, data = trainer.network.eval(), batch(trainer)["data"]
    network.modality_encoders[1].load_state_dict(network.modality_encoders[0].state_dict())
    data[:, 1] = data[:, 0]
    with torch.no_grad():
        first = network(data, auxiliary=data).separate
        data[:, 2:] = 7.0
        second = network(data, auxiliary=data).separate
    torch.testing.assert_close(first[:, 0], first[:, 1])
    assert torch.equal(first[:, :2], second[:, :2]) and not torch.allclose(first[:, 2:], second[:, 2:])


@each_trainer
@pytest.mark.parametrize("labels", [LABELS, REGIONS, LABELS_WITH_IGNORE, REGIONS_WITH_IGNORE])
def test_separate_loss_is_the_sum_over_modalities(make_trainer, cls, labels):
    trainer = make_trainer(cls, labels=labels, deep_supervision=False)
    content = batch(trainer)
    with torch.no_grad():
        found = losses(trainer, content).terms["separate"]
        separate = trainer.network(content["data"], auxiliary=content["data"]).separate
        wanted = sum(trainer.loss(separate[:, number], content["target"]) for number in range(4))
    torch.testing.assert_close(found, wanted)


@each_trainer
def test_modalities_that_a_case_lacks_are_left_out(make_trainer, cls):
    trainer = make_trainer(cls, deep_supervision=False)
    content = batch(trainer)
    present = torch.tensor([[True] * 4, [True, False, True, False]])
    trainer.case_facts = {f"case_{n}": CaseFacts(tuple(row), True) for n, row in enumerate(present.tolist())}
    data, target, known = trainer._to_device(content)
    with torch.no_grad():
        found = trainer.compute_losses(data, target, known).terms["separate"]
        separate = trainer.network(data, auxiliary=data).separate
        rows = [(sample, number) for sample in range(2) for number in range(4) if present[sample, number]]
        logits = torch.stack([separate[row] for row in rows])
        wanted = 4 * trainer.loss(logits, torch.stack([target[sample] for sample, _ in rows]))
    torch.testing.assert_close(found, wanted)


@each_trainer
def test_gradients_of_the_terms(make_trainer, cls):
    """The separate loss trains no fusion, and the fused loss trains neither the maps nor the separate decoder."""
    trainer = make_trainer(cls)
    wake(trainer.network)

    def reached(name: str) -> set[str]:
        trainer.network.zero_grad(set_to_none=True)
        losses(trainer, batch(trainer)).terms[name].backward()
        moved = {key for key, each in trainer.network.named_parameters() if each.grad is not None and each.grad.any()}
        return {key.split(".")[0] for key in moved} | {part for key in moved for part in key.split(".")[3:4]}

    assert {"modality_encoders", "separate"} <= reached("separate")
    assert not {"encoder", "decoder", "transformer"} & reached("separate")
    fused = reached("segmentation")
    assert {"modality_encoders", "encoder", "decoder"} <= fused and not {"separate", "map"} & fused
    if cls is RFNetTrainer:
        assert "map" in reached("maps") and "separate" not in reached("maps")
    else:
        assert "transformer" in fused


@each_trainer
def test_weight_zero_builds_no_decoder(make_trainer, cls):
    trainer = make_trainer(cls, block=NO_TERMS)
    assert not any(name.startswith("separate") for name in trainer.network.state_dict())
    # RFNet's maps learn from their own loss alone, which cannot be switched off
    others = {"maps"} if cls is methods.RFNetTrainer else set()
    assert set(trainer.train_step(batch(trainer))["terms"]) == {"segmentation", *others}


@each_trainer
def test_coarse_heads_of_the_separate_decoder_are_not_trained(make_trainer, cls):
    heads = make_trainer(cls).network.separate.seg_layers
    assert [head.weight.requires_grad for head in heads] == [False, True]


# ---- mmFormer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_masked_attention_is_attention_over_what_is_left():
    torch.manual_seed(0)
    module, x = Attention(12, 3), torch.randn(2, 6, 12)
    mask = torch.tensor([[True, True, False, True, False, False], [False, True, True, False, True, False]])
    for explicit in (False, True):
        found, maps = module(x, mask=mask, return_attention=explicit)
        for sample in range(2):
            alone, _ = module(x[sample : sample + 1, mask[sample]])
            torch.testing.assert_close(found[sample : sample + 1, mask[sample]], alone)
            assert maps is None or not maps[sample, :, :, ~mask[sample]].any()


def transformer(**options: Any) -> ModalityTransformer:
    torch.manual_seed(0)
    module = ModalityTransformer(3, 4, (2, 2), 8, **{"depth": 2, "mlp_ratio": 2.0, **options})
    torch.nn.init.normal_(module.position)
    return module


@torch.no_grad()
def test_absent_modalities_say_nothing_to_the_others():
    module, x = transformer(), torch.randn(2, 3, 4, 2, 2)
    available = torch.tensor([[True, False, True], [False, True, True]])
    found = module(x, available)
    other = torch.where(available[:, :, None, None, None], x, 100 * torch.randn_like(x))
    torch.testing.assert_close(module(other, available), found)
    assert not found[~available].any() and found[available].any()
    assert not torch.allclose(module(x, torch.ones_like(available))[available], found[available], atol=1e-3)


@torch.no_grad()
def test_modality_transformer_by_hand():
    """Equal to the blocks on the tokens written out, for one sample that lacks the second modality."""
    module, x = transformer(depth=1), torch.randn(1, 3, 4, 2, 2)
    available = torch.tensor([[True, False, True]])
    tokens = []
    for number in (0, 2):
        position = module.position[number].flatten(1).T
        token = module.embed[number](x[0, number].flatten(1).T) + position
        tokens.append(module.intra[number][0](token[None])[0][0] + position)
    together = module.inter[0](torch.cat(tokens)[None])[0][0]
    placed = torch.zeros(4, 3, 8)
    placed[:, 0], placed[:, 2] = together[:4], together[4:]
    wanted = module.leave(placed.flatten(1)).unflatten(1, (3, 4)).permute(1, 2, 0).unflatten(2, (2, 2))
    wanted[1] = 0
    torch.testing.assert_close(module(x, available)[0], wanted)


def test_positions_follow_smaller_patches(make_trainer):
    trainer = make_trainer(MMFormerTrainer)
    assert trainer.network.transformer.position.shape == (4, 24, 4, 4, 4)
    assert trainer.network(torch.randn(1, 4, 8, 8, 12))[0].shape[2:] == (8, 8, 12)


def test_transformers_are_trained_with_adamw(make_trainer):
    trainer = make_trainer(MMFormerTrainer)
    added = {id(each) for each in trainer.network.transformer.parameters()}
    groups = trainer.optimizer.members[1].param_groups
    assert {id(each) for group in groups for each in group["params"]} == added


# ---- RFNet -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_region_weights_by_hand():
    torch.manual_seed(0)
    module = RegionWeights(2, 3, 1)
    features = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]], [[-1.0, 0.0]]]])
    regions = torch.tensor([[[0.75, 0.25], [0.0, 0.0]]])
    found = module(features, regions)
    first = torch.tensor([0.75 + 0.75, 1.5 + 1.0, -0.75, 0.5])  # means of a region of size 1, and its share of 2 voxels
    torch.testing.assert_close(found[0, 0], module.layers[0](first))
    torch.testing.assert_close(found[0, 1], module.layers[1](torch.zeros(4)))  # an empty region is no division by zero


def stage(make_trainer, labels: dict[str, Any], number: int = 0) -> RegionFusion:
    return make_trainer(RFNetTrainer, labels=labels, dimensions=2).network.encoder.stages[number]


def test_probabilities_of_regions(make_trainer):
    logits = torch.randn(2, 2, 4, 4)
    regions = stage(make_trainer, REGIONS).probabilities(logits)
    assert regions.shape[1] == 3 and torch.equal(regions[:, 1:], logits.sigmoid())
    torch.testing.assert_close(regions[:, 0], 1 - logits.sigmoid().max(1).values)
    labels = stage(make_trainer, LABELS).probabilities(torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(labels.sum(1), torch.ones(2, 4, 4))


@torch.no_grad()
def test_fusion_by_hand(make_trainer):
    """Each voxel's regional features are those of its region, with that region's weights of the modalities."""
    module = stage(make_trainer, LABELS).eval()
    features, below = torch.randn(1, 4, 4, 6, 6), torch.randn(1, 8, 6, 6)
    seen: list[torch.Tensor] = []
    module.regional.register_forward_pre_hook(lambda layers, given: seen.append(given[0]))
    fused, logits = module(features, below)
    assert fused.shape == (1, 8, 6, 6) and logits.shape == (1, 3, 6, 6)
    p = logits.softmax(1)
    weights = module.weights(features.flatten(3), p.flatten(2))
    for region in range(3):
        wanted = p[0, region] * sum(weights[0, region, m] * features[0, m] for m in range(4))
        torch.testing.assert_close(seen[0][0, 4 * region : 4 * region + 4], wanted)


@pytest.mark.parametrize(("labels", "activation"), [(LABELS, "softmax"), (REGIONS, "sigmoid")])
def test_prediction_builds_the_network_of_the_data_set(make_trainer, labels, activation):
    trainer = make_trainer(RFNetTrainer, labels=labels)
    assert trainer.settings[type(trainer).design.sections[0]].activation == activation
    heads = trainer.label_manager.num_segmentation_heads
    network = RFNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 4, heads, enable_deep_supervision=False
    ).eval()
    network.load_state_dict(trainer.network.state_dict())
    trainer.set_deep_supervision_enabled(False)
    data = batch(trainer)["data"]
    with torch.no_grad():
        assert torch.equal(network(data), trainer.network.eval()(data))


def test_map_loss_is_the_sum_over_stages_at_full_resolution(make_trainer):
    trainer = make_trainer(RFNetTrainer, deep_supervision=False, block={"rfnet": {"separate": 0}})
    content = batch(trainer)
    complete = torch.ones(2, 4, dtype=torch.bool)
    trainer.draw_availability = lambda size, present=None: complete
    with torch.no_grad():
        found = losses(trainer, content).terms["maps"]
        maps = trainer.network(content["data"], auxiliary=content["data"]).maps
        assert [each.shape[2] for each in maps] == [4, 8, 16]
        large = [torch.nn.functional.interpolate(each, (16, 16, 16), mode="trilinear") for each in maps]
        torch.testing.assert_close(found, sum(trainer.loss(each, content["target"]) for each in large))


# ---- MedMAP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "host"), list(zip(ALIGNED, TRAINERS, strict=True)), ids=lambda cls: cls.__name__)
def test_medmap_aligns_the_encoders_of_the_network(make_trainer, cls, host):
    trainer, plain = make_trainer(cls), make_trainer(host)
    wake(trainer.network)
    front = trainer.network.front
    count = sum(each.numel() for each in plain.network.parameters())
    anchors = sum(each.numel() for each in front.anchors.parameters())
    assert sum(each.numel() for each in trainer.network.parameters()) == count + anchors
    assert trainer.plans_manager.plans["configurations"]["tiny"]["mstkd"]["medmap"]["placement"] == "encoders"
    found = trainer.train_step(batch(trainer))["terms"]
    assert found.keys() == {*plain.train_step(batch(plain))["terms"], "alignment"} and found["alignment"] > 0


@pytest.mark.parametrize("cls", ALIGNED, ids=lambda cls: cls.__name__)
def test_behind_medmap_only_available_modalities_segment_alone(make_trainer, cls):
    trainer = make_trainer(cls, deep_supervision=False)
    data, subsets = batch(trainer)["data"], torch.tensor([[True, False, True, False], [False, False, False, True]])
    seen: list[Any] = []
    trainer.network.register_forward_hook(lambda module, given, output: seen.append(output))
    trainer.draw_availability = lambda size, present=None: subsets
    losses(trainer, {"data": data, "target": batch(trainer)["target"]})
    assert torch.equal(seen[0].output.encoded, subsets)


@pytest.mark.parametrize("cls", ALIGNED, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_imputed_features_reach_the_fusion(make_trainer, cls):
    network = make_trainer(cls, deep_supervision=False).network.eval()
    wake(network)
    data = torch.randn(1, 4, 16, 16, 16)
    data[:, 1:] = 0
    seen: list[torch.Tensor] = []
    network.encoder.stages[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    network(data)
    features = seen[0] if seen[0].ndim == 6 else seen[0].unflatten(1, (4, -1))
    assert all(torch.equal(features[:, number], features[:, 0]) and features.any() for number in range(1, 4))


# ---- SMML ------------------------------------------------------------------------------------------------------------


each_mutual = pytest.mark.parametrize("cls", MUTUAL, ids=lambda cls: cls.__name__)
mutual_and_host = pytest.mark.parametrize(
    ("cls", "host"), list(zip(MUTUAL, TRAINERS, strict=True)), ids=lambda cls: cls.__name__
)


@mutual_and_host
def test_students_have_the_network_and_losses_of_the_method(make_trainer, cls, host):
    """Two equal students of complete input learn nothing from one another; what is left is the method's own step."""
    plain = make_trainer(host)
    wake(plain.network)
    trainer = make_trainer(cls, block={"smml": {"warmup": 0.0}})
    for student in trainer.network.students:
        student.load_state_dict(plain.network.state_dict())
    everything = torch.ones(2, 4, dtype=torch.bool)
    for each in (plain, trainer):
        each.draw_availability = lambda size, present=None: everything
    trainer.draw_partner = lambda availability, present=None: everything
    found, wanted = losses(trainer, batch(trainer)), losses(plain, batch(plain))
    assert found.terms["pixel"] == found.terms["feature"] == 0
    assert found.terms.keys() == {*wanted.terms, "pixel", "feature"}
    for name, value in wanted.terms.items():
        torch.testing.assert_close(found.terms[name], value)
    torch.testing.assert_close(found.total, 2 * wanted.total)


@each_mutual
def test_students_teach_each_other_at_the_fused_bottleneck(make_trainer, cls):
    trainer = make_trainer(cls, block={"smml": {"warmup": 0.0}})
    seen: list[torch.Tensor] = []
    for student in trainer.network.students:
        wake(student)
        student.encoder.stages[-1].register_forward_hook(lambda module, given, output: seen.append(output))
    data = batch(trainer)["data"]
    first, second = trainer.network(data, other=data, auxiliary=data)
    deepest = [each[0] if isinstance(each, tuple) else each for each in seen]  # the second student runs first
    assert torch.equal(second.bottleneck, deepest[0]) and torch.equal(first.bottleneck, deepest[1])
    losses(trainer, batch(trainer)).terms["feature"].backward()
    for student in trainer.network.students:
        assert student.encoder.stages[-1].state_dict() and any(
            each.grad is not None and each.grad.any() for each in student.encoder.stages[-1].parameters()
        )
        assert all(each.grad is None for each in student.decoder.parameters())


@each_mutual
@pytest.mark.parametrize("prior", ["none", "self"])
def test_sequential_students_get_the_same_gradients(make_trainer, cls, prior):
    results = []
    for sequential in (False, True):
        trainer = make_trainer(cls, block={"smml": {"sequential": sequential, "warmup": 0.0, "prior": prior}})
        trainer._subset_generator.manual_seed(0)
        step = losses(trainer, batch(trainer))
        trainer.backward(step.total)
        modules = {"network": trainer.network, "refiners": trainer.refiners or torch.nn.ModuleList()}
        named = {f"{part}.{name}": p.grad for part, net in modules.items() for name, p in net.named_parameters()}
        results.append((step.terms, {name: grad for name, grad in named.items() if grad is not None}))
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=name)


@each_mutual
@torch.no_grad()
def test_prediction_is_the_mean_or_one_student(make_trainer, cls):
    trainer = make_trainer(cls, deep_supervision=False)
    network, data = trainer.network.eval(), batch(trainer)["data"]
    wake(network)
    subsets = torch.tensor([[True, False, True, False], [False, True, True, True]])
    masked = modalities.mask_modalities(data, subsets)
    first, second = (student(masked) for student in network.students)
    assert torch.equal(network(masked), (first + second) / 2)
    for number, wanted in ((1, first), (2, second)):
        with network.conditioned(subsets, trainer.label_manager, number):
            assert torch.equal(network(data), wanted)  # features of what is absent are dropped
    pair = network(masked, other=masked, auxiliary=data)
    assert torch.equal(pair[0].logits, first) and torch.equal(pair[1].logits, second)


def test_transformers_of_both_students_are_trained_with_adamw(make_trainer):
    trainer = make_trainer(SMMLMMFormerTrainer)
    added = {id(each) for student in trainer.network.students for each in student.transformer.parameters()}
    groups = trainer.optimizer.members[1].param_groups
    assert {id(each) for group in groups for each in group["params"]} == added


@each_mutual
def test_students_are_never_light(make_trainer, cls):
    trainer = make_trainer(cls, block={"smml": {"light": True}})
    assert trainer.plans_manager.plans["configurations"]["tiny"]["mstkd"]["smml"]["light"] is False


def test_every_multi_encoder_trainer_is_tested():
    from nnunetv2_mstkd.training.multi_encoder import MultiEncoderTrainer

    found = {name for name in methods.__all__ if issubclass(getattr(methods, name), MultiEncoderTrainer)}
    assert found == {cls.__name__ for cls in TRAINERS + ALIGNED + MUTUAL}
