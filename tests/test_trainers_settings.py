"""How the settings travel: plans, model folder, checkpoint, continued training, validation, prediction."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import CONFIGURATION, PHANTOM, configure, read_plans, snapshot, train
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnunetv2_mstkd.methods.mstkd.network import MultiScaleTransformerUNet
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.settings import SamplerSettings, SettingsError


def build(trainer="MSTKDTrainer", fold=0):
    return get_trainer_from_args(str(PHANTOM), CONFIGURATION, fold, trainer, device=torch.device("cpu"))


def model_plans(folders, trainer="MSTKDTrainer"):
    return json.loads((folders.fold(trainer).parent / "plans.json").read_text())


def block_of(plans):
    return plans["configurations"][CONFIGURATION]["mstkd"]


def predictor(folders):
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folders.fold("MSTKDTrainer").parent), use_folds=(0,))
    return predictor


def test_training_writes_the_complete_block(models):
    given = block_of(read_plans(models))
    assert "network" not in given  # derived from the plans
    for trainer in ("MSTKDTeacherTrainer", "MSTKDTrainer"):
        block = block_of(model_plans(models, trainer))
        assert block["network"] == {
            "placement": "branch",
            "depth": 6,
            "heads": 1,
            "taps": 3,
            "patch": [1, 1, 1],
            "max_tokens": 1024,
            "mlp_ratio": 4.0,
        }
        for name, section in given.items():  # nulls are what the trainer decides
            decided = {key: block[name][key] if value is None else value for key, value in section.items()}
            assert block[name] == decided
        if trainer == "MSTKDTrainer":
            assert None not in block["distillation"].values()
        content = checkpoints.read(models.fold(trainer) / "checkpoint_final.pth")
        assert block_of(content["init_args"]["plans"]) == block


def test_the_preprocessed_plans_are_not_changed_by_a_training(trained):
    assert "network" not in block_of(read_plans(trained))


def test_the_checkpoints_settings_win_when_a_training_goes_on(models):
    configure(models, schedule__epochs=9, mstkd__kl=0.0, sampler__kind="by_size")
    trainer = build()
    kind = trainer.settings[SamplerSettings].kind
    assert (trainer.num_epochs, bool(trainer.active("kl")), kind) == (9, False, "by_size")
    trainer.load_checkpoint(str(models.fold("MSTKDTrainer") / "checkpoint_final.pth"))
    kind = trainer.settings[SamplerSettings].kind
    assert (trainer.num_epochs, bool(trainer.active("kl")), kind) == (2, True, "uniform")
    assert trainer.sampler.kind == "uniform" and trainer.num_iterations_per_epoch == 2
    assert block_of(trainer.plans_manager.plans)["schedule"]["epochs"] == 2
    assert trainer.configuration_manager.configuration["mstkd"]["schedule"]["epochs"] == 2


def test_a_checkpoint_with_deep_supervision_keeps_it_under_plans_without(models):
    configure(models, mstkd__segmentation="dice")
    trainer = build()
    assert not trainer.enable_deep_supervision
    trainer.load_checkpoint(str(models.fold("MSTKDTrainer") / "checkpoint_final.pth"))
    assert trainer.enable_deep_supervision and isinstance(trainer.loss, DeepSupervisionWrapper)


@pytest.mark.parametrize(
    ("trainer", "settings", "message"),
    [
        ("AdaMMTrainer", {"teacher__joint": True, "adamm_teacher__presence": True}, "adamm_teacher.presence"),
        ("MedMAPKDTrainer", {"teacher__joint": True}, "teacher.joint is True, expected false"),
        ("RFNetTrainer", {"rfnet__maps": 0}, "the maps learn from nothing else"),
    ],
)
def test_parts_that_nothing_would_train_are_refused(models, trainer, settings, message):
    with pytest.raises(SettingsError, match=message):
        configure(models, **settings)
        build(trainer)


def test_prediction_reads_the_model_folder_alone(models):
    shutil.rmtree(models.preprocessed)
    shutil.rmtree(models.fold("MSTKDTeacherTrainer").parent)
    network = predictor(models).network
    assert isinstance(network, MultiScaleTransformerUNet)
    assert len(network.transformer.blocks) == 6
    weights = checkpoints.read(models.fold("MSTKDTrainer") / "checkpoint_final.pth")["network_weights"]
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        assert tuple(network(torch.zeros(1, 4, 24, 28, 24)).shape) == (1, 3, 24, 28, 24)


def test_prediction_builds_the_stored_network(models):
    plans = model_plans(models)
    block_of(plans)["network"].update(depth=9, heads=2)
    (models.fold("MSTKDTrainer").parent / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer\.blocks\.[678]"):
        predictor(models)


@pytest.mark.parametrize("only_validate", [False, True], ids=["--c", "--val"])
def test_plans_of_another_network_are_refused(models, only_validate):
    configure(models, network__depth=3)
    before = snapshot(models)
    with pytest.raises(SettingsError, match=r"network\.depth = 3, .*checkpoint_final\.pth was trained with 6"):
        train("MSTKDTrainer", continue_training=not only_validate, only_run_validation=only_validate)
    assert snapshot(models) == before


def test_unused_transformer_settings_do_not_matter(models):
    train("ModalityDropoutTrainer")
    configure(models, network__depth=3)
    train("ModalityDropoutTrainer", only_run_validation=True)
    train("ModalityDropoutTrainer", fold=1)


def test_folds_must_share_one_network(models):
    configure(models, network__depth=3, teacher__warm_start=False)
    before = snapshot(models)
    with pytest.raises(SettingsError, match=r"fold_0 in .* another network: network\.depth is 6 there and 3 here"):
        train("MSTKDTrainer", fold=1)
    assert snapshot(models) == before
    configure(models, schedule__epochs=1, mstkd__kl=0.25)
    train("MSTKDTeacherTrainer", fold=1)


def test_the_same_fold_may_start_again_with_another_network(models):
    configure(models, network__depth=3, schedule__epochs=1)
    train("MSTKDTeacherTrainer")
    train("MSTKDTrainer")
    assert block_of(model_plans(models))["network"]["depth"] == 3
