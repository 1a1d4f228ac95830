"""Deleting absent labels and regions from the logits of a case."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from predict_inputs import CHANNELS, PRESENT, predict, read, segmentations, set_up, write_model

from nnunetv2_mstkd.methods import AdaMMTrainer
from nnunetv2_mstkd.methods.adamm.presence_gate import PresenceGate

CPU = torch.device("cpu")
LABELS = SimpleNamespace(has_regions=False, num_segmentation_heads=3)
REGIONS = SimpleNamespace(has_regions=True, num_segmentation_heads=3, foreground_regions=[(1, 2, 3), (2, 3), 3])


def applied(labels, presence: list[float], *, threshold: float = 0.5, shape=(4, 4)) -> np.ndarray:
    """Logits of one row after a case in which these were the presence logits of one patch, others being lower."""
    gate = PresenceGate(threshold, labels, CPU)
    for below in (3.0, 0.0, 7.0):
        gate.see(torch.tensor([presence]) - below)
    logits = np.random.default_rng(0).normal(0, 3, (1, 3, *shape)).astype(np.float16)
    return gate(logits)[0]


def test_an_absent_label_is_deleted_and_others_stay():
    before, after = applied(LABELS, [9, 9, 9]), applied(LABELS, [9, 9, -3])
    assert np.isfinite(after).all()
    assert (before.argmax(0) == 2).any() and not (after.argmax(0) == 2).any()
    assert np.array_equal(before[:2], after[:2])


def test_background_is_never_deleted():
    assert np.array_equal(applied(LABELS, [-9, 9, 9]), applied(LABELS, [9, 9, 9]))


@pytest.mark.parametrize(
    ("presence", "kept"),
    [([9, 9, 9], [0, 1, 2]), ([9, 9, -9], [0, 1]), ([9, -9, 9], [0]), ([-9, 9, 9], [])],
)
def test_regions_within_an_absent_region_are_deleted(presence, kept):
    before, after = applied(REGIONS, [9, 9, 9]), applied(REGIONS, presence)
    for head in range(3):
        if head in kept:
            assert np.array_equal(before[head], after[head])
        else:
            assert (after[head] < -10).all()


def test_the_threshold_is_a_probability():
    assert np.array_equal(applied(LABELS, [0, -1, 0], threshold=0.2), applied(LABELS, [0, 9, 9], threshold=0.2))
    assert not np.array_equal(applied(LABELS, [0, -1, 0], threshold=0.3), applied(LABELS, [0, 9, 9], threshold=0.3))


def test_rows_are_gated_separately():
    gate = PresenceGate(0.5, LABELS, CPU)
    gate.see(torch.tensor([[9.0, 9.0, -9.0], [9.0, -9.0, 9.0]]))
    logits = np.random.default_rng(0).normal(0, 3, (2, 3, 4, 4))
    first, second = gate(logits.copy())
    assert np.array_equal(first[:2], logits[0, :2]) and (first[2] < first[:2].min()).all()
    assert np.array_equal(second[::2], logits[1, ::2]) and (second[1] < second[::2].min()).all()


@pytest.mark.parametrize("adamm", [{}, {"presence": False}], ids=["gate 0", "no presence head"])
def test_networks_without_a_gate_leave_logits_alone(make_trainer, adamm):
    network = make_trainer(AdaMMTrainer, block={"adamm": adamm}).network
    logits = np.ones((1, 3, 2, 2), np.float32)
    with network.conditioned(torch.ones(1, 4, dtype=torch.bool), LABELS) as finish, torch.no_grad():
        network(torch.zeros(1, 4, 16, 16, 16))
        assert finish(logits) is logits and (logits == 1).all()


def test_conditioning_a_network_gates_its_case(make_trainer):
    trainer = make_trainer(AdaMMTrainer, block={"adamm": {"gate": 0.5}}, deep_supervision=False)
    network, everything = trainer.network.eval(), torch.ones(1, 4, dtype=torch.bool)
    logits = np.random.default_rng(0).normal(0, 3, (1, 3, 4, 4))
    with torch.no_grad():
        network.presence.logits.weight.zero_()
        for bias, there in ((-20.0, False), (20.0, True), (-20.0, False)):  # nothing is left of the case before
            network.presence.logits.bias.copy_(torch.tensor([20.0, bias, 20.0]))
            with network.conditioned(everything, trainer.label_manager) as finish:
                network(torch.zeros(1, 4, 16, 16, 16))
                finished = finish(logits.copy())
            assert (finished.argmax(1) == 1).any() == there
            assert np.array_equal(finished[:, ::2], logits[:, ::2])


# ---- through the command -------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch):
    return set_up(tmp_path, monkeypatch)


def gated(folders, monkeypatch, threshold: float, bias: float, name: str):
    """Predictions of a model whose presence head is sure of everything but label 1, of which it says ``bias``."""
    real = AdaMMTrainer.save_checkpoint

    def save(self, filename):
        with torch.no_grad():
            self.network.presence.logits.weight.zero_()
            self.network.presence.logits.bias.copy_(torch.tensor([20.0, bias, 20.0]))
        real(self, filename)

    with monkeypatch.context() as patch:
        patch.setattr(AdaMMTrainer, "save_checkpoint", save)
        model = write_model(AdaMMTrainer, block={"adamm": {"gate": threshold}})
    assert predict(folders, model, output=name) == 0
    return segmentations(folders / name)


def test_without_a_gate_presence_is_stated_and_nothing_deleted():
    gate = PresenceGate(0.0, LABELS, CPU)
    for shift in (0.0, -5.0):
        gate.see(torch.tensor([[9.0, -9.0, 1.0], [0.0, 0.0, 0.0]]) + shift)
    np.testing.assert_allclose(gate.presence(), [[0.99988, 0.00012, 0.73106], [0.5] * 3], atol=1e-5)
    logits = np.ones((2, 3, 2, 2))
    assert gate(logits) is logits and (logits == 1).all()


def test_predictions_state_presence_with_and_without_the_gate(folders, monkeypatch):
    for threshold, name in ((0.0, "off"), (0.5, "on")):
        gated(folders, monkeypatch, threshold, -20.0, name)
        cases = json.loads((folders / name / "predictions.json").read_text())["cases"]
        assert set(cases) == set(PRESENT)
        assert all(case["presence"] == {"core": 0.0, "edema": 1.0} for case in cases.values())
    model = write_model(AdaMMTrainer, block={"adamm": {"presence": False}})
    assert predict(folders, model, output="none") == 0
    assert "presence" not in (folders / "none" / "predictions.json").read_text()


def test_predict_deletes_an_absent_label(folders, monkeypatch):
    off = gated(folders, monkeypatch, 0.0, -20.0, "off")
    on = gated(folders, monkeypatch, 0.5, -20.0, "on")
    kept = gated(folders, monkeypatch, 0.5, 20.0, "kept")
    assert off == kept != on
    for name in PRESENT:
        assert 1 in np.unique(read(folders / "off" / f"{name}.nii.gz"))
        labels = np.unique(read(folders / "on" / f"{name}.nii.gz"))
        assert 1 not in labels and 2 in labels


def test_evaluate_gates_each_subset_separately(folders, monkeypatch):
    from nnunetv2_mstkd.evaluation.stacking import SubsetPredictor
    from nnunetv2_mstkd.nnunet.model import load_predictor

    model = write_model(AdaMMTrainer, block={"adamm": {"gate": 0.5}})
    predictor = load_predictor(model, (0,), device=CPU, allow_tqdm=False, use_mirroring=False)
    network = predictor.network

    class Head(torch.nn.Module):
        """Label 1 is there where the first modality is."""

        def forward(self, x):
            logits = torch.full((len(x), 3), 9.0)
            logits[:, 1] = torch.where(network.availability[:, 0], 9.0, -9.0)
            return logits

    network.presence = Head()
    image = torch.randn(CHANNELS, 16, 16, 16)
    subsets = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    monkeypatch.setattr(network, "load_state_dict", lambda weights: None)
    for stack in (1, 2):
        predictor.network = network
        first, second = SubsetPredictor(predictor, stack).logits(image, subsets)
        assert (first.argmax(0) == 1).any() and not (second.argmax(0) == 1).any()
    assert network.availability is None
