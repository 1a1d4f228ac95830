"""Where SMML's semantic prior comes from, and that it stays where the image is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from conftest import CONFIGURATION, PHANTOM, configure, train
from nnunetv2.run.run_training import get_trainer_from_args
from tiny import REGIONS, REGIONS_WITH_IGNORE, batch

from nnunetv2_mstkd.methods import SMMLTrainer
from nnunetv2_mstkd.methods.smml.semantic_prior import (
    FileNetwork,
    MovePriorToImage,
    MovingAverage,
    PriorDataset,
    one_hot_maps,
)
from nnunetv2_mstkd.nnunet import checkpoints

CPU = torch.device("cpu")

# ---- the student's own ---------------------------------------------------------------------------------------------


@pytest.fixture
def student(make_trainer):
    return make_trainer(SMMLTrainer, deep_supervision=False, dimensions=2).network.students[0]


def test_the_average_follows_its_network(student):
    average = MovingAverage(student, 0.5)
    before = average.network.state_dict()["encoder.stages.0.0.convs.0.conv.weight"].clone()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    moved = []
    for _ in range(20):
        average.update(student)
        moved.append(float((average.network.encoder.stages[0][0].convs[0].conv.weight - before).mean()))
    # the first step takes 1 - 1/10 of the way, later ones half of what is left
    assert moved[0] == pytest.approx(0.9, rel=1e-4) and moved[-1] == pytest.approx(1.0, rel=1e-4)
    assert all(not p.requires_grad for p in average.parameters())
    slow = MovingAverage(student, 0.999)
    assert slow.network is not student


@pytest.mark.parametrize("regions", [False, True])
def test_own_prior_is_predicted_from_one_modality(student, regions):
    average, data = MovingAverage(student, 0.9), torch.randn(2, 4, 16, 16)
    found = average.maps(data, torch.tensor([True, True, False, True]), regions)
    assert found.shape == (2, 4, 3, 16, 16)
    alone = torch.zeros_like(data)
    alone[:, 3] = data[:, 3]
    logits = student(alone).logits
    torch.testing.assert_close(found[:, 3], logits.sigmoid() if regions else logits.softmax(1))
    assert (found[:, 2] == 0).all()


# ---- label maps ----------------------------------------------------------------------------------------------------


def test_label_maps_become_class_and_region_maps(make_trainer):
    maps = torch.tensor([[[[0.0, 1.0, 2.0]], [[2.0, 0.0, 0.0]]]])  # (1, 2, 1, 3)
    manager = make_trainer(SMMLTrainer, dimensions=2).label_manager
    found = one_hot_maps(maps, manager)
    assert found.shape == (1, 2, 3, 1, 3)
    assert found[0, 0, :, 0].equal(torch.eye(3))
    manager = make_trainer(SMMLTrainer, dimensions=2, labels=REGIONS_WITH_IGNORE).label_manager
    found = one_hot_maps(maps, manager)  # whole: labels 1 and 2; core: label 1
    assert found[0, 0, :, 0].tolist() == [[0, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("grid", [(6, 8), (5, 6, 7)], ids=["2d", "3d"])
def test_prior_is_flipped_with_the_image(grid):
    maps = torch.randint(0, 3, (4, *grid), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    case = {"image": maps.float(), "segmentation": torch.cat([maps[:1], maps])}
    torch.manual_seed(1)
    flipped = False
    for _ in range(8):
        moved = MovePriorToImage()(
            **MirrorTransform(tuple(range(len(grid))))(**{k: v.clone() for k, v in case.items()})
        )
        assert moved["image"].shape == (8, *grid) and moved["segmentation"].shape == (1, *grid)
        assert torch.equal(moved["image"][:4], moved["image"][4:])
        flipped = flipped or not torch.equal(moved["image"][:4], maps.float())
    assert flipped


@pytest.mark.parametrize("labels", [None, REGIONS], ids=["labels", "regions"])
def test_prior_is_augmented_like_the_segmentation(make_trainer, labels):
    block = {"smml": {"prior": "precomputed", "prior_path": "maps"}}
    trainer = make_trainer(SMMLTrainer, block=block, labels=labels)
    rotation, dummy_2d, patch, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    regions = trainer.label_manager.foreground_regions if labels else None
    pipeline = trainer.get_training_transforms(
        trainer.configuration_manager.patch_size,
        rotation,
        trainer._get_deep_supervision_scales(),
        mirror,
        dummy_2d,
        use_mask_for_norm=[True] * 4,
        foreground_labels=trainer.label_manager.foreground_labels,
        regions=regions,
    )
    generator = torch.Generator().manual_seed(0)
    for seed in range(6):
        torch.manual_seed(seed)
        np.random.seed(seed)
        label = torch.randint(0, 3, (1, *patch), generator=generator).to(torch.int16)
        image = torch.randn(4, *patch, generator=generator)
        out = pipeline(image=image, segmentation=label.repeat(5, *[1] * len(patch)))
        maps, target = out["image"][4:], out["segmentation"][0]
        assert maps.shape == (4, 16, 16, 16)
        assert all(torch.equal(maps[0], other) for other in maps[1:])
        if labels is None:
            assert torch.equal(maps[0], target[0].float())
        else:
            heads = one_hot_maps(maps[None], trainer.label_manager)[0, 0]
            assert torch.equal(heads, target.float())


def write_maps(folders, target: Path, *, change=None) -> None:
    """The true labels as every modality's map."""
    target.mkdir()
    for file in sorted((folders.raw / folders.dataset / "labelsTr").glob("*.nii.gz")):
        image = sitk.ReadImage(str(file))
        for channel in range(4):
            name = f"{file.name.removesuffix('.nii.gz')}_{channel:04d}.nii.gz"
            sitk.WriteImage(image if change is None else change(image, channel), str(target / name))


def build():
    return get_trainer_from_args(str(PHANTOM), CONFIGURATION, 0, "SMMLTrainer", device=CPU)


def test_label_maps_are_preprocessed_once(phantom_at_6_mm, tmp_path):
    write_maps(phantom_at_6_mm, tmp_path / "maps", change=lambda image, channel: image if channel else image * 0)
    configure(phantom_at_6_mm, smml__prior="precomputed", smml__prior_path=str(tmp_path / "maps"), smml__warmup=0.0)
    trainer = build()
    trainer.initialize()
    trainer.prepare_training()
    cases, _ = trainer.get_tr_and_val_datasets()
    assert isinstance(cases, PriorDataset) and len(cases.identifiers) > 0
    for case in cases.identifiers:
        _, segmentation, previous, _ = cases.load_case(case)
        assert previous is None and segmentation.shape[0] == 5
        assert (segmentation[1] == 0).all()
        for modality in segmentation[2:]:
            assert np.array_equal(modality, np.maximum(segmentation[0], 0))
    files = {path: path.stat().st_mtime_ns for path in trainer._prior_folder().glob("*.npy")}
    trainer.prepare_training()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    changed = sorted((tmp_path / "maps").glob(f"{cases.identifiers[0]}_0001*"))[0]
    sitk.WriteImage(sitk.ReadImage(str(changed)) * 0, str(changed))
    trainer.prepare_training()
    assert (cases.load_case(cases.identifiers[0])[1][2] == 0).all()

    train("SMMLTrainer")
    logging = checkpoints.read(phantom_at_6_mm.fold("SMMLTrainer") / "checkpoint_final.pth")["logging"]
    assert len(logging["mstkd_guidance"]) == 2 and logging["mstkd_guidance"][1] > 0
    # prediction and validation know nothing of it
    for file in trainer._prior_folder().iterdir():
        file.unlink()
    train("SMMLTrainer", only_run_validation=True, validate=True)


# ---- probability maps ----------------------------------------------------------------------------------------------


def test_probabilities_move_with_the_image_and_keep_their_values(make_trainer):
    trainer = make_trainer(SMMLTrainer, block={"smml": {"prior": "precomputed", "prior_path": "maps"}})
    trainer.soft_prior = True
    _, _, patch, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    generator = torch.Generator().manual_seed(0)
    for seed in range(8):
        torch.manual_seed(seed)
        np.random.seed(seed)
        pipeline = trainer.get_training_transforms(
            trainer.configuration_manager.patch_size,
            (-0.5, 0.5),
            trainer._get_deep_supervision_scales(),
            mirror,
            seed % 2 == 1,  # rotation in slices only
            use_mask_for_norm=[True] * 4,
            foreground_labels=trainer.label_manager.foreground_labels,
        )
        depth = 16 if seed % 2 else patch[0]
        label = torch.randint(0, 3, (1, 5, 5, 5), generator=generator).to(torch.int16)  # cubes of 8 voxels
        for axis, size in enumerate((depth, *patch[1:]), 1):
            label = label.repeat_interleave(8, axis).narrow(axis, 0, size)
        # every modality knows the labels, at half certainty
        maps = torch.cat([(label == head).float() / 2 for _ in range(4) for head in range(3)])
        out = pipeline(
            image=torch.cat([torch.randn(4, *label.shape[1:], generator=generator), maps]), segmentation=label
        )
        assert out["image"].shape == (16, 16, 16, 16) and out["segmentation"][0].shape == (1, 16, 16, 16)
        moved = trainer._prior_maps(None, out["image"][None, 4:], None)
        assert moved.shape == (1, 4, 3, 16, 16, 16) and moved.min() >= 0 and moved.max() <= 0.5 + 1e-6
        assert all(torch.equal(moved[:, 0], moved[:, channel]) for channel in range(1, 4))
        # where it is nearly certain of a class, that is the label
        for head in (1, 2):
            assert (out["segmentation"][0][0][moved[0, 0, head] > 0.45] == head).all()
            assert (moved[0, 0, head] > 0.45).any()


def write_probabilities(folders, target: Path, *, change=lambda maps: maps) -> None:
    """Of the true labels three quarters, of the other labels an eighth."""
    target.mkdir()
    for file in sorted((folders.raw / folders.dataset / "labelsTr").glob("*.nii.gz")):
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        heads = write_probabilities.heads
        maps = np.stack([np.where(np.isin(label, members), 0.75, 0.125) for members in heads]).astype(np.float16)
        for channel in range(4):
            name = f"{file.name.removesuffix('.nii.gz')}_{channel:04d}.npz"
            np.savez_compressed(target / name, probabilities=change(maps * (channel > 0)))


def of_heads(folders) -> list[list[int]]:
    labels = json.loads((folders.raw / folders.dataset / "dataset.json").read_text())["labels"]
    return [np.atleast_1d(value).tolist() for name, value in labels.items() if name != "background"]


def test_probability_maps_reach_the_refinement_networks(phantom_at_6_mm, tmp_path, monkeypatch):
    monkeypatch.setattr(write_probabilities, "heads", of_heads(phantom_at_6_mm), raising=False)
    write_probabilities(phantom_at_6_mm, tmp_path / "maps")
    configure(phantom_at_6_mm, smml__prior="precomputed", smml__prior_path=str(tmp_path / "maps"), smml__warmup=0.0)
    trainer = build()
    trainer.initialize()
    trainer.prepare_training()
    cases, _ = trainer.get_tr_and_val_datasets()
    heads = trainer.label_manager.num_segmentation_heads
    for case in cases.identifiers:
        data, segmentation, *_ = cases.load_case(case)
        assert data.shape == (4 + 4 * heads, *segmentation.shape[1:])
        box = (slice(None), *(slice(2, size - 1) for size in segmentation.shape[1:]))
        patch, label = data[box], np.asarray(segmentation[box])[0]
        assert np.array_equal(patch[:4], np.asarray(cases._cases.load_case(case)[0][box]))
        assert patch.dtype == np.float32 and (patch[4 : 4 + heads] == 0).all()
        for head, members in enumerate(write_probabilities.heads):
            # the grid is the image's own, so nothing is interpolated
            expected = np.where(np.isin(label, members), 0.75, 0.125)
            inside = label >= 0
            np.testing.assert_allclose(patch[4 + 2 * heads + head][inside], expected[inside], atol=0.5 / 255)

    train("SMMLTrainer")
    content = checkpoints.read(phantom_at_6_mm.fold("SMMLTrainer") / "checkpoint_final.pth")
    assert content["logging"]["mstkd_guidance"][1] > 0
    log = "".join(path.read_text() for path in phantom_at_6_mm.fold("SMMLTrainer").glob("training_log_*"))
    assert "semantic prior: probabilities in " in log


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: maps[:-1], r"_0000\.npz has shape .*, expected 3 channels"),
        (lambda maps: maps[:, 1:], r"voxels of .* mm, the images of its case have"),
        (lambda maps: maps * 2, r"has values from 1\.5 to 1\.5, expected probabilities"),
        (lambda maps: maps * np.float16("nan"), "expected probabilities"),
    ],
    ids=["channels", "grid", "above 1", "nan"],
)
def test_probability_maps_that_do_not_fit_are_refused(phantom, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(write_probabilities, "heads", of_heads(phantom), raising=False)
    write_probabilities(phantom, tmp_path / "maps", change=lambda maps: change(maps if maps.any() else maps + 0.75))
    configure(phantom, smml__prior="precomputed", smml__prior_path=str(tmp_path / "maps"))
    with pytest.raises(ValueError, match=message):
        train("SMMLTrainer")


def test_damaged_probability_maps_are_one_line(phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(write_probabilities, "heads", of_heads(phantom), raising=False)
    write_probabilities(phantom, tmp_path / "maps")
    configure(phantom, smml__prior="precomputed", smml__prior_path=str(tmp_path / "maps"))
    files = sorted((tmp_path / "maps").iterdir())
    for content in (b"nothing", files[0].read_bytes()[:200]):
        for file in files:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=r"\.npz cannot be read"):
            train("SMMLTrainer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, channel: image + 7, r"_0000\.nii\.gz has values such as \[\d+\], expected the labels"),
        (
            lambda image, channel: sitk.Resample(
                image,
                [n - 1 for n in image.GetSize()],
                sitk.Transform(),
                sitk.sitkNearestNeighbor,
                image.GetOrigin(),
                image.GetSpacing(),
            ),
            r"voxels of .* mm, the images of its case have",
        ),
    ],
    ids=["other labels", "other grid"],
)
def test_label_maps_that_do_not_fit_are_refused(phantom, tmp_path, change, message):
    write_maps(phantom, tmp_path / "maps", change=change)
    configure(phantom, smml__prior="precomputed", smml__prior_path=str(tmp_path / "maps"))
    with pytest.raises(ValueError, match=message):
        train("SMMLTrainer")
    assert not list(phantom.results.rglob("*.pth"))


def test_missing_label_maps_are_counted(phantom):
    configure(phantom, smml__prior="precomputed", smml__prior_path="maps")
    with pytest.raises(
        FileNotFoundError, match=rf"{phantom.dataset}{os.sep}maps{os.sep}.*_0000\.nii\.gz does not exist \((\d+) of \1"
    ):
        train("SMMLTrainer")


# ---- a network in a file -------------------------------------------------------------------------------------------


class OneModality(torch.nn.Module):
    def __init__(self, heads: int, stride: int = 1) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(1, heads, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def write_network(path: Path, heads: int = 3, stride: int = 1) -> OneModality:
    network = OneModality(heads, stride)
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 1, 16, 16)), str(path))
    return network


@pytest.mark.parametrize("labels", [None, REGIONS], ids=["labels", "regions"])
def test_file_network_predicts_from_every_modality(make_trainer, tmp_path, labels):
    heads = 2 if labels else 3
    network = write_network(tmp_path / "prior.pt", heads)
    block = {"smml": {"prior": "checkpoint", "prior_path": str(tmp_path / "prior.pt"), "warmup": 0.0}}
    trainer = make_trainer(SMMLTrainer, dimensions=2, labels=labels, block=block)
    trainer.prepare_training()
    content = batch(trainer)
    maps = trainer._prior_maps(content["data"], None, torch.ones(4, dtype=torch.bool))
    logits = network(content["data"][:, 2:3])
    torch.testing.assert_close(maps[:, 2], logits.sigmoid() if labels else logits.softmax(1))
    result = trainer.train_step(content)
    assert result["terms"]["guidance"] > 0
    assert "prior" not in "".join(trainer.network.state_dict())


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, r"prior\.pt does not exist; expected a TorchScript file"),
        (lambda path: path.write_bytes(b"nothing"), ValueError, "is not a TorchScript file"),
        (
            lambda path: write_network(path, heads=4),
            ValueError,
            r"gives \(1, 4, 16, 16\), expected .* \(1, 3, 16, 16\)",
        ),
        (lambda path: write_network(path, stride=2), ValueError, r"gives \(1, 3, 8, 8\)"),
    ],
    ids=["absent", "something else", "other classes", "other grid"],
)
def test_unusable_file_network_is_refused(tmp_path, write, error, message):
    write(tmp_path / "prior.pt")
    with pytest.raises(error, match=message):
        FileNetwork(tmp_path / "prior.pt", heads=3, patch_size=(16, 16), device=CPU)


def test_file_network_of_other_dimensions_is_refused(tmp_path):
    write_network(tmp_path / "prior.pt")
    with pytest.raises(ValueError, match=r"does not take a batch of shape \(1, 1, 8, 8, 8\)"):
        FileNetwork(tmp_path / "prior.pt", heads=3, patch_size=(8, 8, 8), device=CPU)
