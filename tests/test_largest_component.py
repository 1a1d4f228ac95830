"""Keeping only the largest component of the foreground, in prediction and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from evaluate_inputs import evaluate, model_with_regions, naive_dice, results
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from predict_inputs import edit_checkpoint, read

from nnunetv2_mstkd import Predictor, cli
from nnunetv2_mstkd.inference.expected_dice import SUMMARY
from nnunetv2_mstkd.nnunet.preprocessing import keep_largest_component

REGIONS = {"whole": (1, 2), "core": (1,)}


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return model_with_regions(tmp_path, monkeypatch)


def scatter(model: Path) -> None:
    """Lower all logits, so that a network of random weights segments islands instead of everything."""

    def lower(content: dict) -> None:
        for name, values in content["network_weights"].items():
            if "seg_layers" in name and name.endswith("bias"):
                values -= 1

    edit_checkpoint(model, lower)


def largest_of(segmentation: np.ndarray) -> np.ndarray:
    """By nnU-Net's own function."""
    return remove_all_but_largest_component_from_segmentation(segmentation, [1, 2])


def test_labels_that_touch_are_one_component():
    labels = SimpleNamespace(foreground_labels=[1, 2])
    image = np.zeros((4, 6, 6), np.uint8)
    image[0, :2, :2] = 1  # 4 voxels, and 2 that touch them in one corner
    image[1, 2, 2:4] = 2
    image[3, 4:, 4:] = 1  # 4 voxels
    image[3, 0, 0] = 3  # not of the foreground, such as ignore
    kept = keep_largest_component(image, labels)
    assert kept.dtype == image.dtype
    assert kept[3, 4:, 4:].sum() == 0 and kept[3, 0, 0] == 3
    assert (kept[:2] == image[:2]).all()
    assert keep_largest_component(np.zeros((1, 5, 5), np.uint8), labels).sum() == 0


def test_thousands_of_islands():
    """A model of a few steps segments noise."""
    image = (np.random.default_rng(0).random((40, 80, 80)) < 0.03).astype(np.uint8)
    kept = keep_largest_component(image, SimpleNamespace(foreground_labels=[1]))
    assert (kept == largest_of(image)).all() and 0 < kept.sum() < image.sum()


def test_prediction_and_evaluation_agree(student, tmp_path, capsys):
    scatter(student)
    assert evaluate(student, "--disable_tta") == 0
    section = json.loads((student / SUMMARY).read_text())["largest_component"]
    assert "note: keeping only the largest component" in capsys.readouterr().out
    raw = tmp_path / "raw" / tiny.DATASET
    options = ["-m", str(student), "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta"]
    options += ["-i", str(raw / "imagesTr"), "--drop", "T1,T3", "--save_probabilities"]
    for out, more in (("plain", []), ("largest", ["--largest-component"])):
        assert cli.main(["predict", *options, "-o", str(tmp_path / out), *more]) == 0
    scores: dict[str, list[float]] = {region: [] for region in REGIONS}
    changed = 0
    for case in results(student / "subsets")["case"].unique():
        plain, kept = (read(tmp_path / out / f"{case}.nii.gz") for out in ("plain", "largest"))
        assert (kept == largest_of(plain)).all()
        changed += int((kept != plain).any())
        label = read(raw / "labelsTr" / f"{case}.nii.gz")
        for region, labels in REGIONS.items():
            scores[region].append(naive_dice(np.isin(kept, labels), np.isin(label, labels)))
        given = {name: raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz" for channel, name in ((0, "T0"), (2, "T2"))}
        alone = Predictor(student, [0], device="cpu", mirroring=False, largest_component=True).predict(given)
        assert (alone.segmentation.ravel() == kept.ravel()).all()
    assert changed
    means = {region: float(np.mean(values)) for region, values in scores.items()}
    measured = {region: entry["dice"] for region, entry in section["subsets"]["T0+T2"].items()}
    assert measured == pytest.approx(means)
    record = json.loads((tmp_path / "largest" / "predictions.json").read_text())
    assert record["largest_component"] is True
    assert all(entry["expected_dice"] == pytest.approx(means) for entry in record["cases"].values())
    # the other way of predicting is another run
    assert cli.main(["predict", *options, "-o", str(tmp_path / "largest"), "--continue_prediction"]) == 2
    assert "largest_component was True and is now False" in capsys.readouterr().err


def test_an_evaluation_that_did_not_measure_it_expects_nothing(student, capsys):
    content = {"subsets": {"all": {"whole": {"dice": 0.5}}}}
    (student / SUMMARY).parent.mkdir()
    (student / SUMMARY).write_text(json.dumps(content))
    assert Predictor(student, [0], device="cpu").expected_dice
    assert not Predictor(student, [0], device="cpu", largest_component=True).expected_dice
    assert "did not measure the largest component" in capsys.readouterr().err


def test_records_of_earlier_versions_say_nothing_of_it(student):
    assert evaluate(student, "--subsets", "T0", "all", "--disable_tta") == 0
    for file in (student / "subsets" / "cases" / "fold_0").glob("*.json"):
        content = json.loads(file.read_text())
        for entry in content["subsets"].values():
            assert entry.pop("largest")
        file.write_text(json.dumps(content))
    assert evaluate(student, "--subsets", "T0", "all", "--disable_tta") == 0
    assert json.loads((student / SUMMARY).read_text())["largest_component"] is None
