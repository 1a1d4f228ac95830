"""Keeping only the largest component of the foreground, in prediction and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import empty_folders
from evaluate_inputs import evaluate, results, without_drawing, write_dataset
from predict_inputs import read, trainer_class, write_model
from scipy import ndimage

from nnunetv2_mstkd import Predictor, cli
from nnunetv2_mstkd.evaluation.results import COLUMNS
from nnunetv2_mstkd.inference.expected_dice import SUMMARY
from nnunetv2_mstkd.nnunet.preprocessing import keep_largest_component
from nnunetv2_mstkd.statistics.components import LargestComponent

REGIONS = {"whole": (1, 2), "core": (1,)}


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    empty_folders(tmp_path, monkeypatch)
    without_drawing(monkeypatch)
    model = write_model(trainer_class("MSTKDTrainer"), labels=tiny.REGIONS)
    write_dataset(model)
    return model


def scatter(model: Path, shift: float) -> None:
    """Lower all logits, so that a network of random weights segments islands instead of everything."""
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    for name, values in content["network_weights"].items():
        if "seg_layers" in name and name.endswith("bias"):
            values -= shift
    torch.save(content, file)


def largest_of(segmentation: np.ndarray) -> np.ndarray:
    """By SciPy."""
    parts, _ = ndimage.label(segmentation > 0, np.ones((3,) * segmentation.ndim))
    sizes = np.bincount(parts.ravel())[1:]
    return np.where(np.isin(parts, 1 + np.flatnonzero(sizes == sizes.max(initial=0))), segmentation, 0)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / (one.sum() + other.sum()) if one.any() or other.any() else 1.0


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
    """A model of a few steps segments noise. nnU-Net's own filter is quadratic in their number, and takes minutes."""
    image = (np.random.default_rng(0).random((60, 160, 160)) < 0.03).astype(np.uint8)
    kept = keep_largest_component(image, SimpleNamespace(foreground_labels=[1]))
    assert (kept == largest_of(image)).all() and 0 < kept.sum() < image.sum()


def table(values: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """Dice by subset and region, one value per case."""
    rows = [
        ("m", "t", "0", f"case{number}", subset, subset.count("+") + 1, region, "dice", value)
        for (subset, region), of_cases in values.items()
        for number, value in enumerate(of_cases)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_the_change_is_the_mean_over_subsets_and_regions():
    before = table(
        {("A", "x"): [0.5, 0.5, 0.5], ("A", "y"): [0.2] * 3, ("A+B", "x"): [0.6] * 3, ("A+B", "y"): [0.4] * 3}
    )
    after = table(
        {("A", "x"): [0.9, 0.3, 0.5], ("A", "y"): [0.2] * 3, ("A+B", "x"): [0.6] * 3, ("A+B", "y"): [0.8, 0.4, 0.4]}
    )
    found = LargestComponent(before, after)
    assert found.difference == pytest.approx((0.8 / 4 - 0.2 / 4) / 3)
    assert (found.cases, found.better, found.worse) == (3, 1, 1)
    assert found.low < found.difference < found.high
    assert found.by_subset["A"] == pytest.approx({"x": 1.7 / 3, "y": 0.2})
    assert "+5.0 points [" in found.sentence and "better in 1 of 3 cases, worse in 1" in found.sentence
    assert LargestComponent(before, before).sentence is None
    # a case that two folds predicted counts once
    again = after[after["case"] == "case0"].assign(fold="1")
    twice = LargestComponent(
        pd.concat([before, before[before["case"] == "case0"].assign(fold="1")]), pd.concat([after, again])
    )
    assert twice.by_subset["A"] == pytest.approx(found.by_subset["A"])
    # the only false island of a region without a reference goes, and with it the value, by nnU-Net's rules
    false = table({("A", "x"): [0.5, 0.0]})
    gone = LargestComponent(false, table({("A", "x"): [0.5, float("nan")]}))
    assert gone.undefined == 1 and "without 1 values that are no longer defined" in gone.sentence
    # a region that counts as not found where it is small is no region more
    small = before[before["region"] == "x"].assign(region="x (min 9)", value=0.0)
    assert LargestComponent(pd.concat([before, small]), after).difference == pytest.approx(found.difference)


def test_prediction_and_evaluation_agree(student, tmp_path, capsys):
    scatter(student, 1.0)
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
            scores[region].append(dice(np.isin(kept, labels), np.isin(label, labels)))
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
