"""`mstkd prior`: SMML's semantic prior from a SAM, here a small one of random weights."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import configure, train
from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.methods.smml import sam as sam_module
from nnunetv2_mstkd.methods.smml.sam import Sam, boxes_of, grey, modality_prior, slice_axis, with_background
from nnunetv2_mstkd.nnunet import checkpoints

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory) -> Path:
    """A SAM with the layout of the real ones, 64 pixels wide."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 8, "mlp_dim": 16, "num_pos_feats": 8, "window_size": 4, "global_attn_indexes": [0],
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
    }  # fmt: skip
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    folder = tmp_path_factory.mktemp("sam")
    network = SamModel(config)
    with torch.no_grad():  # its own initial weights are so small that all masks are alike
        for parameter in network.parameters():
            parameter.normal_(0, 0.4)
    network.save_pretrained(folder)
    size, small = ({"height": edge, "width": edge} for edge in (64, 16))
    processor = SamImageProcessor(
        size={"longest_edge": 64},
        pad_size=size,
        mask_size={"longest_edge": 16},
        mask_pad_size=small,
    )
    SamProcessor(processor).save_pretrained(folder)
    return folder


class Bright:
    """Segments what is brighter than half in the whole slice."""

    def __init__(self) -> None:
        self.boxes: list[np.ndarray] = []

    def segment(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        self.boxes.append(boxes)
        return np.repeat((image > 127).astype(np.float32)[None] * 0.75, len(boxes), 0)


def test_each_piece_has_a_box_within_the_slice():
    mask = np.zeros((10, 12), bool)
    mask[0:3, 2:4] = mask[6:8, 9:12] = True
    assert boxes_of(mask, 0).tolist() == [[2, 0, 3, 2], [9, 6, 11, 7]]
    assert boxes_of(mask, 2).tolist() == [[0, 0, 5, 4], [7, 4, 11, 9]]
    assert boxes_of(mask & False, 2).shape == (0, 4)


def test_slices_are_cut_across_the_largest_spacing():
    assert slice_axis((1, 1, 1)) == 0 and slice_axis((1, 3, 1)) == 1 and slice_axis((1.0000001, 1, 5)) == 2


def test_grey_values():
    image = np.concatenate([np.zeros(1000), np.linspace(100, 200, 1001), [9e9]])
    shown = grey(image)
    assert shown.dtype == np.uint8 and (shown[:1000] == 0).all() and shown[-1] == 255 and shown[1500] in (126, 127, 128)
    assert not grey(np.zeros((2, 2))).any() and not grey(np.full((2, 2), 7.0)).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_prior_is_what_is_found_within_the_boxes_of_each_head(axis):
    image = np.full((4, 10, 10), 1.0, np.float32)
    image[:, 2:8, 2:8] = 100
    members = np.zeros((2, 4, 10, 10), bool)
    members[0, 1, 3:5, 3:5] = members[0, 1, 8:, 8:] = members[1, 2, 4, 4] = True
    turned = [np.moveaxis(image, 0, axis), np.moveaxis(members, 1, axis + 1)]
    sam = Bright()
    found = np.moveaxis(modality_prior(sam, *turned, axis, margin=1), axis + 1, 1)
    expected = np.zeros((2, 4, 10, 10))
    expected[0, 1, 2:6, 2:6] = expected[0, 1, 7, 7] = expected[1, 2, 3:6, 3:6] = 0.75
    np.testing.assert_allclose(found, expected)
    assert [len(boxes) for boxes in sam.boxes] == [2, 1]
    assert not modality_prior(sam, 0 * turned[0], turned[1], axis, margin=1).any() and len(sam.boxes) == 2


def test_the_background_is_the_rest():
    found = np.array([[0.0, 1.0, 0.5], [0.0, 0.0, 0.5]], np.float16)
    np.testing.assert_allclose(with_background(found), [[1, 0, 1 / 3], [0, 1, 1 / 3], [0, 0, 1 / 3]], atol=1e-3)


def test_a_sam_sees_the_image_and_its_boxes(sam_folder, monkeypatch):
    sam = Sam(str(sam_folder), CPU)
    image = np.random.default_rng(0).integers(0, 255, (20, 30)).astype(np.uint8)
    boxes = np.array([[1, 2, 9, 9], [10, 3, 29, 19], [0, 0, 4, 4]])
    found = sam.segment(image, boxes)
    assert found.shape == (3, 20, 30) and ((found > 0) & (found < 1)).all()
    assert not np.allclose(found[0], found[1]) and not np.allclose(found, sam.segment(255 - image, boxes))
    # several chunks of boxes are those boxes
    monkeypatch.setattr(sam_module, "BOXES_AT_ONCE", 1)
    np.testing.assert_allclose(sam.segment(image, boxes), found, atol=1e-5)
    # transformers' own forward pass
    given = sam._processor(np.repeat(image[..., None], 3, -1), input_boxes=[boxes.tolist()], return_tensors="pt")
    given = {key: value.float() if key == "input_boxes" else value for key, value in given.items()}
    with torch.no_grad():
        masks = sam._network(**given, multimask_output=False).pred_masks
    sizes = given["original_sizes"], given["reshaped_input_sizes"]
    (logits,) = sam._processor.post_process_masks(masks, *sizes, binarize=False)
    np.testing.assert_allclose(found, logits[:, 0].sigmoid().numpy(), atol=1e-5)


@pytest.fixture
def raw(phantom, tmp_path, monkeypatch) -> Path:
    """A copy of the raw data set, which tests share."""
    shutil.copytree(phantom.raw / phantom.dataset, tmp_path / "own" / phantom.dataset)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "own"))
    return tmp_path / "own" / phantom.dataset


def prior(sam: Path | str, *options: str) -> int:
    return cli.main(["prior", "-d", "902", "--sam", str(sam), "-device", "cpu", "--disable_progress_bar", *options])


def test_from_sam_to_a_trained_student(phantom, raw, sam_folder, capsys):
    assert prior(sam_folder) == 0
    assert "--set smml.prior_path=prior" in capsys.readouterr().out
    labels = sorted((raw / "labelsTr").glob("*.nii.gz"))
    files = sorted((raw / "prior").iterdir())
    assert len(files) == 4 * len(labels)
    with np.load(files[0]) as content:
        maps = content["probabilities"]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(labels[0])))
    assert maps.shape == (3, *label.shape) and maps.dtype == np.float16
    # whole tumor: in the slices of the tumor alone, and everywhere in it
    assert (maps[0].any((1, 2)) == label.any((1, 2))).all() and (maps[0][label > 0] > 0).all()
    # what is there is kept
    files[0].unlink()
    before = {file: file.stat().st_mtime_ns for file in files[1:]}
    assert prior(sam_folder) == 0
    assert "1 new files" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in files[1:]} == before and files[0].is_file()
    configure(phantom, smml__prior="precomputed", smml__prior_path="prior", smml__warmup=0.0)
    train("SMMLTrainer")
    logging = checkpoints.read(phantom.fold("SMMLTrainer") / "checkpoint_final.pth")["logging"]
    assert logging["mstkd_guidance"][1] > 0


def test_bad_arguments_are_one_line(raw, sam_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    weights = sam_folder / "model.safetensors"
    (tmp_path / "half").mkdir()
    for file in sam_folder.iterdir():
        if file != weights:
            (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "half" / weights.name).write_bytes(weights.read_bytes()[:1000])
    for sam, options, message in (
        (tmp_path / "nothing", [], "no folder"),
        (tmp_path / "empty", [], "finds no SAM in"),
        (tmp_path / "half", [], "finds no SAM in"),
        (sam_folder, ["--margin", "-1"], "--margin is -1"),
    ):
        capsys.readouterr()
        assert prior(sam, *options) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1]
    assert not (raw / "prior").exists()


def test_without_transformers_the_extra_is_named(monkeypatch, sam_folder):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install nnunetv2_mstkd\[sam\]"):
        Sam(str(sam_folder), CPU)
