"""Several subsets in one forward pass give what nnU-Net's predictor gives for each of them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import empty_folders
from evaluate_inputs import CASES, write_dataset
from predict_inputs import CHANNELS, trainer_class, write_model

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.evaluation.cases import LabelledCase, prepare
from nnunetv2_mstkd.evaluation.scoring import NEAR, near_decision
from nnunetv2_mstkd.evaluation.stacking import StackedNetwork, SubsetPredictor, default_stack
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.nnunet.model import load_predictor

SUBSETS = modalities.all_subsets(CHANNELS)
FEW = SUBSETS[[0, 3, 6, 11, 14]]
CPU = torch.device("cpu")

MODELS = {
    "student": ("MSTKDTrainer", {}),
    "stock trainer": ("nnUNetTrainer", {}),
    "regions": ("nnUNetTrainer", {"labels": tiny.REGIONS}),
    "mirroring": ("MSTKDTrainer", {"mirroring": (0, 2)}),
    "2d": ("ModalityDropoutTrainer", {"dimensions": 2}),
    "residual": ("FullModalityTrainer", {"residual": True}),
    "adapters": ("AdaMMTrainer", {}),
}


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture(params=MODELS)
def model(request, nnunet_folders) -> Path:
    trainer, options = MODELS[request.param]
    folder = write_model(trainer_class(trainer), **options)
    write_dataset(folder, cases=CASES[:1])
    return folder


@pytest.fixture
def student(nnunet_folders) -> Path:
    folder = write_model(trainer_class("MSTKDTrainer"))
    write_dataset(folder, cases=CASES[:1])
    return folder


def predictor_of(model: Path, folds=(0,)):
    return load_predictor(model, folds, device=CPU, allow_tqdm=False)


def image_of(model: Path, nnunet_folders: Path) -> torch.Tensor:
    predictor = predictor_of(model)
    data = nnunet_folders / "preprocessed" / tiny.DATASET / "tiny_data"
    case = LabelledCase(CASES[0], "0", Path("unused"), preprocessed=data)
    return torch.from_numpy(
        prepare(case, (), predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json)[0]
    )


def alone(model: Path, image: torch.Tensor, subset: torch.Tensor, folds=(0,)) -> np.ndarray:
    """What nnU-Net's predictor gives for an image whose absent channels are zero."""
    zeroed = image.clone()
    zeroed[~subset] = 0
    return predictor_of(model, folds).predict_logits_from_preprocessed_data(zeroed).numpy()


def stacked(model: Path, image: torch.Tensor, stack: int, folds=(0,), subsets=SUBSETS) -> list[np.ndarray]:
    predictor = SubsetPredictor(predictor_of(model, folds), stack)
    return list(predictor.logits(image, subsets))


def test_a_stack_of_one_is_nnunets_own_prediction_bit_for_bit(model, nnunet_folders):
    image = image_of(model, nnunet_folders)
    found = stacked(model, image, 1, subsets=FEW)
    assert len(found) == len(FEW)
    for subset, logits in zip(FEW, found, strict=True):
        assert np.array_equal(logits, alone(model, image, subset))


def test_stacks_change_labels_near_the_decision_only(model, nnunet_folders):
    image = image_of(model, nnunet_folders)
    manager = predictor_of(model).label_manager
    differing = near_voxels = 0
    one_by_one = stacked(model, image, 1, subsets=FEW)
    for stack in (2, 5):
        for one, other in zip(one_by_one, stacked(model, image, stack, subsets=FEW), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            labels = [manager.convert_logits_to_segmentation(np.float32(logits)) for logits in (one, other)]
            near = near_decision(torch.from_numpy(np.float32(one)), manager.has_regions).numpy()
            assert not ((labels[0] != labels[1]) & ~near).any()
            differing += int((labels[0] != labels[1]).sum())
            near_voxels += int(near.sum())
            assert np.abs(np.float32(one) - other).max() < NEAR / 2
    print(f"{differing} of {2 * len(FEW) * image[0].numel()} voxels differ, {near_voxels} lie near the decision")


def test_subsets_of_a_stack_do_not_mix(student, nnunet_folders):
    image = image_of(student, nnunet_folders)
    rows = SUBSETS[[0, 14, 3]]
    together = stacked(student, image, 3, subsets=rows)
    for subset, logits in zip(rows, together, strict=True):
        assert np.abs(logits - stacked(student, image, 1, subsets=subset[None])[0]).max() < NEAR
    assert np.abs(together[0] - together[1]).max() > NEAR


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_nothing_of_an_absent_channel_reaches_the_network(student, nnunet_folders, value):
    image = image_of(student, nnunet_folders)
    subsets = SUBSETS[[1, 5]]
    filled = image.clone()
    filled[~subsets.any(0)] = value
    assert bool((~subsets.any(0)).any())
    for one, other in zip(
        stacked(student, image, 2, subsets=subsets), stacked(student, filled, 2, subsets=subsets), strict=True
    ):
        assert np.array_equal(one, other)


def test_several_folds_are_averaged(nnunet_folders):
    model = write_model(trainer_class("MSTKDTrainer"), folds=(0, 1))
    write_dataset(model, cases=CASES[:1])
    image = image_of(model, nnunet_folders)
    found = stacked(model, image, 1, folds=(0, 1), subsets=SUBSETS[[2]])[0]
    assert np.array_equal(found, alone(model, image, SUBSETS[2], folds=(0, 1)))
    assert not np.array_equal(found, stacked(model, image, 1, folds=(1,), subsets=SUBSETS[[2]])[0])


def test_a_network_that_asks_is_told_the_subsets_of_its_batch(student, nnunet_folders, monkeypatch):
    image = image_of(student, nnunet_folders)
    predictor = predictor_of(student)
    network = predictor.network
    network.conditioned = AvailabilityAware.conditioned.__get__(network)
    seen = []
    network.register_forward_pre_hook(lambda module, given: seen.append((module.availability, given[0])))
    list(SubsetPredictor(predictor, 2).logits(image, SUBSETS[4:7]))
    assert network.availability is None
    told = {len(rows): rows for rows, _ in seen}
    assert torch.equal(told[2], SUBSETS[4:6]) and torch.equal(told[1], SUBSETS[6:7])
    for rows, batch in seen:
        assert rows.dtype == torch.bool and len(rows) == len(batch)
        assert not batch[~rows].any()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("too large"), RuntimeError("cuDNN error: no engine")], ids=["PyTorch", "cuDNN"]
)
def test_without_enough_memory_the_stack_is_halved(student, nnunet_folders, error):
    image = image_of(student, nnunet_folders)
    predictor = predictor_of(student)
    sizes = []

    def refuse(module, given):
        sizes.append(len(given[0]))
        if len(given[0]) > 5:
            raise error

    predictor.network.register_forward_pre_hook(refuse)
    subsets, before = SubsetPredictor(predictor, 15), set(threading.enumerate())
    found = list(subsets.logits(image, SUBSETS))
    assert set(threading.enumerate()) <= before  # nnU-Net's thread that cuts patches would keep the image
    # 15 do not fit, so at most 7: three times 5
    assert subsets.stack == 7 and sizes[0] == 15 and set(sizes[1:]) == {5}
    for one, other in zip(found, stacked(student, image, 5), strict=True):
        assert np.array_equal(one, other)


def test_a_single_subset_that_does_not_fit_is_an_error(student, nnunet_folders):
    image = image_of(student, nnunet_folders)
    predictor = predictor_of(student)

    def refuse(module, given):
        raise torch.OutOfMemoryError("too large")

    predictor.network.register_forward_pre_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        list(SubsetPredictor(predictor, 4).logits(image, SUBSETS))


def test_stacks_are_of_equal_size_and_keep_the_order():
    class Network(torch.nn.Module):
        def forward(self, batch):
            return batch.flatten(2).sum(2)[:, :, None, None, None] * torch.ones(1, 1, 2, 2, 2)

    network = StackedNetwork(Network())
    network.subsets = SUBSETS[:3]
    patch = torch.ones(1, 4, 2, 2, 2)
    assert torch.equal(network(patch)[0, :, 0, 0, 0], 8 * SUBSETS[:3].float().flatten())
    assert network(patch).shape == (1, 12, 2, 2, 2)


def test_default_stack():
    assert default_stack(2, 15, CPU) == 2
    assert default_stack(2, 15, torch.device("cuda")) == 8
    assert default_stack(12, 15, torch.device("cuda")) == 15
    assert default_stack(1, 1, torch.device("cuda")) == 1


# ---- margin to the decision --------------------------------------------------------------------------------------


def test_near_the_decision_of_labels():
    logits = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.99, 0.0, 0.0, 3.0], [-1.0, 0.96, 2.0, 2.9]])
    assert near_decision(logits, False).tolist() == [True, True, False, False]
    assert near_decision(logits[:1], False).tolist() == [False] * 4


def test_near_the_decision_of_regions():
    logits = torch.tensor([[1.0, -0.04, -1.0], [-0.06, 2.0, 0.049]])
    assert near_decision(logits, True).tolist() == [False, True, True]


def test_near_the_decision_agrees_with_sorting():
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) / 4
    first, second = logits.topk(2, dim=0).values
    assert torch.equal(near_decision(logits, False), first - second < NEAR)
