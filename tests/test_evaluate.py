"""`mstkd evaluate` against nnU-Net's own preprocessing, prediction and export, case by case and subset by subset."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import empty_folders
from evaluate_inputs import (
    CASES,
    SPLITS,
    evaluate,
    label_image,
    naive_dice,
    refused,
    results,
    without_drawing,
    write_dataset,
)
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from predict_inputs import CHANNELS, SHAPE, files, read, trainer_class, write, write_case, write_model

from nnunetv2_mstkd import cli, modalities
from nnunetv2_mstkd.evaluation import run as run_module
from nnunetv2_mstkd.evaluation.montage import ENTROPY_STEP, Montage, choose_view, read_montage
from nnunetv2_mstkd.evaluation.results import PRESENCE_COLUMNS
from nnunetv2_mstkd.images.atomic import locked
from nnunetv2_mstkd.inference.expected_dice import read_expected_dice
from nnunetv2_mstkd.inference.predictor import Predictor
from nnunetv2_mstkd.nnunet.model import load_predictor
from nnunetv2_mstkd.statistics.shapley import shapley_matrix

NAMES = ("T0", "T1", "T2", "T3")
FEW = ("T0", "T1+T3", "all")
FEW_NAMES = ("T0", "T1+T3", "T0+T1+T2+T3")


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        without_drawing(monkeypatch)


@pytest.fixture
def drawn():
    """Asks for real figures."""


@pytest.fixture
def student(nnunet_folders) -> Path:
    """Two folds of a model with regions, and its data set."""
    folder = write_model(trainer_class("MSTKDTrainer"), folds=(0, 1), labels=tiny.REGIONS)
    write_dataset(folder)
    return folder


def value(table: pd.DataFrame, **where) -> float:
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    assert len(table) == 1
    return float(table["value"].iloc[0])


def segmentation_of(model: Path, fold: int, case: str, subset: str, folder: Path) -> np.ndarray:
    """What nnU-Net predicts and exports for preprocessed data whose absent channels are zero."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    predictor = load_predictor(model, (fold,), device=torch.device("cpu"), allow_tqdm=False)
    data = Path(os.environ["nnUNet_preprocessed"], tiny.DATASET, "tiny_data")
    image, _, _, properties = nnUNetDatasetBlosc2(str(data), [case]).load_case(case)
    image = torch.from_numpy(np.asarray(image[:]).copy())
    image[~modalities.parse_subset(subset, NAMES)] = 0
    export_prediction_from_logits(
        predictor.predict_logits_from_preprocessed_data(image).numpy(),
        properties,
        predictor.configuration_manager,
        predictor.plans_manager,
        predictor.dataset_json,
        str(folder / "naive"),
    )
    return read(folder / "naive.nii.gz")


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("nnUNetTrainer", {}),
        ("MSTKDTrainer", {"labels": tiny.REGIONS, "mirroring": (1,)}),
        ("ModalityDropoutTrainer", {"dimensions": 2, "labels": tiny.LABELS_WITH_IGNORE}),
    ],
    ids=["stock trainer", "regions and mirroring", "2d and ignore label"],
)
def test_dice_equals_nnunets_for_each_subset_alone(nnunet_folders, trainer, options):
    model = write_model(trainer_class(trainer), **options)
    ignore = 3 if "ignore" in options.get("labels", {}) else None
    write_dataset(model, ignore=ignore)
    assert evaluate(model, "--subsets", *FEW, "--stack", "1", "--metrics", "dice") == 0
    table = results(model / "subsets")
    regions = {"whole": (1, 2), "core": (1,)} if "mirroring" in options else {"core": (1,), "edema": (2,)}
    assert set(table["region"]) == set(regions) and set(table["trainer"]) == {trainer}
    assert len(table) == 2 * len(FEW) * len(regions)
    for number, case in enumerate(CASES[:2]):
        reference = label_image(number, ignore=ignore)
        counted = reference != 3
        for subset, name in zip(FEW, FEW_NAMES, strict=True):
            found = segmentation_of(model, 0, case, subset, nnunet_folders)
            for region, labels in regions.items():
                expected = naive_dice(np.isin(found, labels) & counted, np.isin(reference, labels) & counted)
                assert value(table, case=case, subset=name, region=region) == expected
                assert 0 < expected < 1


def test_patients_are_those_of_the_conversion(student, capsys):
    file = student / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "mstkd_conversion": {"patient": "BraTS-([A-Z]+)-"}}))
    assert evaluate(student, "--subsets", "all", "--disable_tta") == 0
    assert set(results(student / "subsets")["patient"]) == {"GLI"}
    assert json.loads((student / "subsets" / "summary.json").read_text())["patients"] == 1
    file.write_text(json.dumps({**content, "mstkd_conversion": {"patient": "("}}))
    assert "patient in mstkd_conversion of dataset.json is '('" in refused(capsys, student, "--restart")


def test_all_subsets_are_stacked_measured_and_summarised(student, capsys, drawn):
    assert evaluate(student, "--stack", "8", "--disable_tta") == 0
    table = results(student / "subsets")
    assert list(table.columns) == [
        *("model", "trainer", "fold", "case", "subset", "modalities", "region", "metric", "value")
    ]
    every = [modalities.subset_name(row, NAMES) for row in modalities.all_subsets(CHANNELS).tolist()]
    assert list(dict.fromkeys(table["subset"])) == every
    assert set(table["metric"]) == {"dice", "hd95"} and set(table["region"]) == {"whole", "core"}
    assert len(table) == 3 * 15 * 2 * 2
    assert dict(zip(table["case"], table["fold"], strict=True)) == {CASES[0]: "0", CASES[1]: "0", CASES[2]: "1"}

    written = sorted(path.name for path in (student / "subsets").iterdir())
    pictures = ["curve.png", "heat_map.png", "missing.png", "shapley.png"]
    assert written == sorted(
        [*pictures, "cases", "report.html", "results.csv", "summary.json", "tables.md", "tables.tex"]
    )
    assert all((student / "subsets" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    printed = capsys.readouterr().out
    assert "HD95: 0 if both masks are empty, the image diagonal if one is" in printed
    assert "up to 8 in one forward pass" in printed and "only these may differ from --stack 1" in printed
    for name in ("tables.md", "tables.tex"):
        text = (student / "subsets" / name).read_text()
        assert text.count("both masks are empty") == 2 and "whole" in text

    summary = json.loads((student / "subsets" / "summary.json").read_text())
    dice = table[table["metric"] == "dice"]
    means = dice.groupby(["region", "subset"])["value"].mean()
    assert (summary["cases"], summary["patients"], summary["folds"]) == (3, 2, ["0", "1"])
    for region in ("whole", "core"):
        codes = [modalities.subset_code(modalities.parse_subset(subset, NAMES)) for subset in every]
        game = shapley_matrix(CHANNELS)[:, codes] @ [means[region, subset] for subset in every]
        for name, expected in zip(NAMES, game, strict=True):
            found = summary["shapley"][region][name]
            assert math.isclose(found["dice"], expected) and found["low"] <= found["dice"] <= found["high"]
        assert summary["worst_subset"][region]["subset"] == means[region].idxmin()
        assert math.isclose(summary["worst_subset"][region]["dice"], means[region].min())
        singles = np.mean([means[region, name] for name in NAMES])
        assert math.isclose(summary["by_number_of_modalities"][region]["1"]["dice"], singles)
        loss = means[region, every[-1]] - means[region, "T1"]
        assert math.isclose(summary["loss_against_full_input"][region]["T1"]["dice"], loss, abs_tol=1e-12)
    assert summary["parameters"] > 1000 and "training_hours" not in summary  # the checkpoint has no log
    ranges = summary["ranges"]["T1"]
    of_subset = table[(table["subset"] == "T1") & (table["region"] == "whole") & (table["metric"] == "dice")]["value"]
    assert ranges["whole"] == [of_subset.min(), of_subset.max()] and 0 < ranges["entropy"][0] <= ranges["entropy"][1]
    near = summary["near_decision"]
    assert near["of"] == 3 * 15 * math.prod((14, 20, 18)) and 0 < near["voxels"] < near["of"]


def test_the_report_marks_regions_that_a_reference_lacks(student):
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        for file in Path(os.environ[folder]).rglob(f"{CASES[2]}.nii.gz"):
            label = read(file)
            write(file, np.where(label == 1, 2, label))  # no core
    options = "--disable_tta", "--metrics", "dice", "--et-min", "core=1", "--subsets", *FEW
    note = "* The reference has no voxel of this region, so the value follows from the rules for empty masks."
    for subsets in (options, (*options, "T2")):  # the second time most is read from the records
        assert evaluate(student, *subsets) == 0
        page = (student / "subsets" / "report.html").read_text()
        assert re.findall(r">([\d.]+)\*</td>", page) == ["0.0"] * 2 and note in page
    assert evaluate(student, "-f", "0", *options, "--restart") == 0  # the fold without this case
    assert note not in (student / "subsets" / "report.html").read_text()


def test_an_empty_segmentation_of_a_region_that_a_reference_lacks_is_right(student):
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        for file in Path(os.environ[folder]).rglob(f"{CASES[2]}.nii.gz"):
            write(file, np.where(read(file) == 1, 2, read(file)))  # no core
    options = "--disable_tta", "--metrics", "dice", "--et-min", "core=1", "--available", "T1,T3"
    assert evaluate(student, *options) == 0
    summary = json.loads((student / "subsets" / "summary.json").read_text())
    full = {region: values["dice"] for region, values in summary["subsets"]["T1+T3"].items()}
    nothing = {"whole": 0, "core": 1 / 3, "core (min 1)": 1 / 3}
    assert {region: sum(each["dice"] for each in values.values()) for region, values in summary["shapley"].items()} == (
        pytest.approx({region: full[region] - nothing[region] for region in nothing})
    )


def test_stated_presence_is_written_for_each_case_and_subset(nnunet_folders, capsys):
    model = write_model(trainer_class("AdaMMTrainer"), folds=(0, 1), labels=tiny.REGIONS)
    write_dataset(model)
    options = "--subsets", *FEW, "--disable_tta"
    assert evaluate(model, *options, "--stack", "2") == 0
    stated = pd.read_csv(model / "subsets" / "presence.csv")
    assert list(stated.columns) == list(PRESENCE_COLUMNS)
    assert len(stated) == 3 * 3 * 2 and stated["in_reference"].all() and stated["presence"].between(0, 1).all()
    assert "Presence stated by the model" in (model / "subsets" / "report.html").read_text()
    # what predict states of a case with these images, and what a continued evaluation keeps
    folder = nnunet_folders / "in"
    folder.mkdir()
    for channel in (1, 3):
        name = f"{CASES[0]}_{channel:04d}.nii.gz"
        shutil.copy(nnunet_folders / "raw" / tiny.DATASET / "imagesTr" / name, folder / name)
    for channel in (0, 2):  # the same crop as of complete cases
        write(folder / f"{CASES[0]}_{channel:04d}.nii.gz", np.zeros(SHAPE, np.float32))
    command = ["-i", str(folder), "-o", str(nnunet_folders / "out"), "-m", str(model), "-f", "0", "--disable_tta"]
    assert cli.main(["predict", *command, "-device", "cpu", "-npp", "0", "-nps", "0"]) == 0
    case = json.loads((nnunet_folders / "out" / "predictions.json").read_text())["cases"][CASES[0]]
    rows = stated[(stated["case"] == CASES[0]) & (stated["subset"] == "T1+T3")]
    assert dict(zip(rows["region"], rows["presence"], strict=True)) == pytest.approx(case["presence"], abs=2e-4)
    before = (model / "subsets" / "presence.csv").read_bytes()
    assert evaluate(model, *options) == 0
    assert (model / "subsets" / "presence.csv").read_bytes() == before


def test_predict_reads_the_expected_dice_from_the_summary(student):
    assert evaluate(student, "--subsets", *FEW, "-f", "0") == 0
    expected = read_expected_dice(student, NAMES)
    dice = results(student / "subsets").query("metric == 'dice'").groupby(["subset", "region"])["value"].mean()
    assert len(expected) == len(FEW)
    for name in FEW_NAMES:
        code = modalities.subset_code(modalities.parse_subset(name, NAMES))
        assert expected[code] == {region: dice[name, region] for region in ("whole", "core")}


def test_calibration_is_that_of_the_probabilities(student, nnunet_folders, capsys):
    raw, out = nnunet_folders / "raw" / tiny.DATASET, nnunet_folders / "out"
    assert evaluate(student, "--subsets", "all", "-f", "0") == 0
    summary = json.loads((student / "subsets" / "summary.json").read_text())["calibration"]
    predictor = Predictor(student, [0], device="cpu")
    counts = {"whole": [], "core": []}
    for case in results(student / "subsets")["case"].unique():
        images = {name: raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz" for channel, name in enumerate(NAMES)}
        probabilities = predictor.predict(images).probabilities
        label = read(raw / "labelsTr" / f"{case}.nii.gz").reshape(probabilities.shape[1:])
        for head, (region, labels) in enumerate({"whole": (1, 2), "core": (1,)}.items()):
            counts[region].append((probabilities[head].ravel(), np.isin(label, labels).ravel()))
    for region, parts in counts.items():
        stated, true = (np.concatenate(each) for each in zip(*parts, strict=True))
        stated, true = stated[stated >= 0.01], true[stated >= 0.01]
        group = np.minimum((stated * 15).astype(int), 14)
        gap = sum(abs((true - stated)[group == each].sum()) for each in range(15)) / len(stated)
        assert summary["expected_calibration_error"]["T0+T1+T2+T3"][region] == pytest.approx(gap, abs=0.01)
        assert np.isfinite(summary["with_temperature"]["T0+T1+T2+T3"][region])
    assert list(summary["temperature"]) == ["4"]
    calibrated = Predictor(student, [0], device="cpu", calibrate=True)
    warm = calibrated.predict(images).probabilities
    odds = np.log(probabilities / (1 - probabilities)) / summary["temperature"]["4"]
    there = (probabilities > 1e-4) & (probabilities < 1 - 1e-4)
    assert np.allclose(warm[there], (1 / (1 + np.exp(-odds)))[there], atol=1e-3)
    options = ["-m", str(student), "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0", "--save-uncertainty"]
    for folder, more in ((out / "as_is", []), (out / "calibrated", ["--calibrate"])):
        assert cli.main(["predict", "-i", str(raw / "imagesTr"), "-o", str(folder), *options, *more]) == 0
    as_is, other = (files(out / name) for name in ("as_is", "calibrated"))
    labels = [name for name in as_is if name.endswith(".nii.gz") and "uncertainty" not in name]
    assert labels and all(as_is[name] == other[name] for name in labels)
    maps = [name for name in as_is if "uncertainty" in name]
    assert maps and any(as_is[name] != other[name] for name in maps)
    assert json.loads((out / "calibrated" / "predictions.json").read_text())["calibrated"] is True


def test_a_quick_look_is_not_a_complete_evaluation(student):
    note = student / "subsets" / "cases" / "fold_0.json"
    for subsets, complete in ((["--subsets", "all"], False), ([], True), (["--available", "T0,T1"], False)):
        assert evaluate(student, *subsets, "-f", "0") == 0
        assert json.loads(note.read_text())["complete"] is complete


def test_background_processes_give_the_same_results(student):
    options = ("--subsets", *FEW, "-f", "0")
    assert evaluate(student, *options) == 0
    assert evaluate(student, *options, "-npp", "1", "-nps", "1", "-o", str(student.parent / "other")) == 0
    assert files(student.parent / "other")["results.csv"] == files(student / "subsets")["results.csv"]


def test_images_give_the_results_of_preprocessed_data(student, nnunet_folders):
    raw, out = nnunet_folders / "raw" / tiny.DATASET, nnunet_folders / "out"
    options = ("--subsets", *FEW, "-f", "0")
    assert evaluate(student, *options) == 0
    assert evaluate(student, *options, "-i", str(raw / "imagesTr"), "-l", str(raw / "labelsTr"), "-o", str(out)) == 0
    assert set(results(out)["case"]) == set(CASES)
    columns = ["case", "subset", "region", "metric", "value"]
    both = results(out).query("case in @CASES[:2]")[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, results(student / "subsets")[columns])


def test_on_a_folder_several_folds_are_averaged(student, nnunet_folders):
    raw = nnunet_folders / "raw" / tiny.DATASET
    images = nnunet_folders / "one"
    write_case(images, CASES[3], range(CHANNELS))
    arguments = ["-i", str(images), "-l", str(raw / "labelsTr"), "--subsets", "T2", "--metrics", "dice"]
    found = {}
    for folds in (("0",), ("1",), ("0", "1")):
        out = nnunet_folders / "-".join(folds)
        assert evaluate(student, *arguments, "-o", str(out), "-f", *folds) == 0
        found["+".join(folds)] = results(out)
    assert set(found["0+1"]["fold"]) == {"0+1"}
    values = [tuple(table["value"]) for table in found.values()]
    assert len(set(values)) == 3
    predictor = load_predictor(student, (0, 1), device=torch.device("cpu"), allow_tqdm=False)
    assert len(predictor.list_of_parameters) == 2


def test_mask_first_is_what_predict_gives_without_the_files(student, nnunet_folders, capsys):
    """One channel reaches beyond the others, so that cropping without it is another crop."""
    raw = nnunet_folders / "raw" / tiny.DATASET
    for name in CASES[:2]:
        image = read(raw / "imagesTr" / f"{name}_0000.nii.gz")
        image[0, 0] = 50
        write(raw / "imagesTr" / f"{name}_0000.nii.gz", image)
    options = ("--subsets", "T1+T3", "-f", "0", "--metrics", "dice")
    assert evaluate(student, *options, "--mask-first") == 0
    table = results(student / "subsets")
    arguments = ["-i", str(raw / "imagesTr"), "-l", str(raw / "labelsTr"), "-o", str(nnunet_folders / "default")]
    assert evaluate(student, *options, *arguments, "--available", "T1,T3") == 0
    alone = results(nnunet_folders / "default").query("case in @CASES[:2]")
    assert list(alone["value"]) == list(table["value"])
    # with all channels the crop is another one, whichever subsets are asked for
    message = refused(capsys, student, *options, *arguments)
    assert "preprocessed_from ['T1', 'T3'], now it is ['T0', 'T1', 'T2', 'T3']" in message
    assert evaluate(student, *options, *arguments, "--restart") == 0
    together = results(nnunet_folders / "default").query("case in @CASES[:2]")
    assert list(together["value"]) != list(table["value"])
    assert evaluate(student, *options, *arguments, "--restart", "--mask-first") == 0
    assert list(results(nnunet_folders / "default").query("case in @CASES[:2]")["value"]) == list(table["value"])
    out = nnunet_folders / "predicted"
    predict = ["-i", str(raw / "imagesTr"), "-o", str(out), "-m", str(student), "-f", "0", "--drop", "T0,T2"]
    assert cli.main(["predict", *predict, "-device", "cpu", "-npp", "0", "-nps", "0"]) == 0
    for number, name in enumerate(CASES[:2]):
        found, reference = read(out / f"{name}.nii.gz"), label_image(number)
        for region, labels in {"whole": (1, 2), "core": (1,)}.items():
            expected = naive_dice(np.isin(found, labels), np.isin(reference, labels))
            assert value(table, case=name, region=region) == expected
    assert json.loads((student / "subsets" / "summary.json").read_text())["mask_first"] is True


# ---- pictures of the report ----------------------------------------------------------------------------------------


def stored(model: Path, fold: int, case: str) -> Montage:
    found = read_montage(model / "subsets" / "cases" / f"fold_{fold}" / f"{case}.npz")
    assert found is not None
    return found


@pytest.mark.parametrize("labels", [None, tiny.REGIONS], ids=["labels", "regions"])
def test_pictured_entropies_are_those_of_prediction(nnunet_folders, labels):
    model = write_model(trainer_class("ModalityDropoutTrainer"), labels=labels)
    write_dataset(model)
    options = ["--subsets", *FEW, "-f", "0", "--mask-first", "--metrics", "dice"]
    assert evaluate(model, *options) == 0
    case, name, raw = CASES[0], "T1+T3", nnunet_folders / "raw" / tiny.DATASET
    out = nnunet_folders / "predicted"
    predict = ["-i", str(raw / "imagesTr"), "-o", str(out), "-m", str(model), "-f", "0", "--drop", "T0,T2"]
    assert cli.main(["predict", *predict, "--save-uncertainty", "-device", "cpu", "-npp", "0", "-nps", "0"]) == 0
    wanted, strip = read(out / "uncertainty" / f"{case}.nii.gz"), stored(model, 0, case)
    view = choose_view(label_image(0), (1.25, 1.0, 1.0))
    assert len(strip.further) > 0
    for each, place in zip((strip, *strip.further), view.every, strict=True):
        found = each.entropies[name].astype(float)
        assert found.any() and not (found % ENTROPY_STEP).any()
        assert np.abs(found - place.cut(wanted)).max() <= ENTROPY_STEP / 2 + 0.5


def test_pictured_slices_equal_nnunets_segmentations(student, nnunet_folders):
    assert evaluate(student, "--subsets", *FEW, "-f", "0", "--stack", "1", "--metrics", "dice") == 0
    for number, case in enumerate(CASES[:2]):
        strip, label = stored(student, 0, case), label_image(number)
        view = choose_view(label, (1.25, 1.0, 1.0))  # as the array is ordered
        assert (strip.axis, strip.index, strip.depth) == (0, view.index, len(label))
        assert np.array_equal(strip.reference, view.cut(label)) and strip.reference.any()
        assert [each.index for each in strip.further] == [each.index for each in view.further] and strip.further
        assert list(strip.segmentations) == list(FEW_NAMES)
        for name, found in strip.segmentations.items():
            expected = segmentation_of(student, 0, case, name, nnunet_folders)
            assert np.array_equal(found, view.cut(expected)) and found.dtype == np.uint8
            for each, other in zip(strip.further, view.further, strict=True):
                assert np.array_equal(each.segmentations[name], other.cut(expected))
        # a head in air: the border is zero in the image, and so is the grey value
        raw = read(nnunet_folders / "raw" / tiny.DATASET / "imagesTr" / f"{case}_0000.nii.gz")
        assert np.array_equal(strip.images[0] > 0, view.cut(raw) != 0)
        for each, other in zip(strip.further, view.further, strict=True):
            assert np.array_equal(each.images[0] > 0, other.cut(raw) != 0)


def test_pictures_survive_a_stop_and_grow_with_new_subsets(student):
    options = ("-f", "0", "--metrics", "dice")
    assert evaluate(student, "--subsets", "T0", *options) == 0
    first = stored(student, 0, CASES[0]).segmentations["T0"]
    assert evaluate(student, "--subsets", *FEW, *options) == 0
    both = stored(student, 0, CASES[0])
    assert set(both.segmentations) == set(FEW_NAMES) and np.array_equal(both.segmentations["T0"], first)
    page = (student / "subsets" / "report.html").read_text()
    assert page.count('<figure class="segmented">') == 2 * 3 and "No slice of this case" not in page
    # nothing is predicted any more
    assert evaluate(student, "--subsets", "all", *options, "--strips", "1") == 0
    page = (student / "subsets" / "report.html").read_text()
    assert page.count('<figure class="segmented">') == 1
    assert evaluate(student, "--subsets", "T0", *options, "--restart") == 0
    assert set(stored(student, 0, CASES[0]).segmentations) == {"T0"}


def test_with_mask_first_the_pictures_show_all_images(student):
    assert evaluate(student, "--subsets", "T1+T3", "T0", "-f", "0", "--metrics", "dice", "--mask-first") == 0
    strip = stored(student, 0, CASES[0])
    assert strip.images.any(axis=(1, 2)).tolist() == [True, True, False, True]


def test_every_case_has_a_page_that_is_kept(student):
    assert evaluate(student, "--subsets", *FEW, "--strips", "1") == 0
    pages = sorted((student / "subsets" / "cases").rglob("*.html"))
    assert [page.stem for page in pages] == list(CASES[:3])
    report = (student / "subsets" / "report.html").read_text()
    linked = [page.relative_to(student / "subsets").as_posix() for page in pages]
    assert sum(f'href="{link}"' in report for link in linked) == 2  # the third is on the page itself
    before = [page.stat().st_mtime_ns for page in pages]
    assert evaluate(student, "--subsets", *FEW) == 0
    assert [page.stat().st_mtime_ns for page in pages] == before


def test_an_evaluation_without_pictures_still_has_its_page(student, capsys):
    options = ("--subsets", "T0", "-f", "0", "--metrics", "dice")
    assert evaluate(student, *options, "--strips", "0") == 0
    assert 'id="montages"' not in (student / "subsets" / "report.html").read_text()
    files_of_pictures = list((student / "subsets" / "cases").rglob("*.npz"))
    assert len(files_of_pictures) == 2
    files_of_pictures[0].unlink()
    assert evaluate(student, *options) == 0
    assert (student / "subsets" / "report.html").read_text().count("No slice of this case is stored") == 1
    assert "--strips is -1" in refused(capsys, student, *options, "--strips", "-1")
    files_of_pictures[1].write_bytes(b"")
    assert "--restart" in refused(capsys, student, *options)


# ---- which subsets, folds and cases --------------------------------------------------------------------------------


def test_subsets_of_the_available_modalities_only(student, nnunet_folders):
    """As in a clinic that has two of the four: files of the others are not even looked for."""
    raw = nnunet_folders / "raw" / tiny.DATASET
    images, out = nnunet_folders / "clinic", nnunet_folders / "out"
    write_case(images, CASES[0], [1, 3])
    arguments = ["-i", str(images), "-l", str(raw / "labelsTr"), "-o", str(out), "-f", "0"]
    assert evaluate(student, *arguments, "--available", "T3,T1") == 0
    assert list(dict.fromkeys(results(out)["subset"])) == ["T1", "T3", "T1+T3"]
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["shapley"]["whole"]) == {"T1", "T3"}
    assert evaluate(student, "--available", "T1", "-f", "0") == 0
    assert set(results(student / "subsets")["subset"]) == {"T1"}


def test_pooling_folds_takes_each_folds_own_cases_and_weights(student):
    assert evaluate(student, "--subsets", "T0", "-f", "1", "--metrics", "dice") == 0
    one = results(student / "subsets")
    assert set(one["case"]) == set(SPLITS[1]["val"])
    assert evaluate(student, "--subsets", "T0", "--folds", "0", "1", "--metrics", "dice") == 0
    pooled = results(student / "subsets")
    assert set(pooled["case"]) == set(SPLITS[0]["val"]) | set(SPLITS[1]["val"])
    pd.testing.assert_frame_equal(pooled.query("fold == '1'").reset_index(drop=True), one)


def test_the_checkpoints_split_overrides_the_file(student):
    checkpoint = student / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    content["mstkd"]["split"] = {"train": [CASES[0]], "val": [CASES[3]]}
    torch.save(content, checkpoint)
    assert evaluate(student, "--subsets", "T0", "-f", "0", "--metrics", "dice") == 0
    assert set(results(student / "subsets")["case"]) == {CASES[3]}


def test_two_processes_do_not_evaluate_one_fold(student, capsys):
    (student / "subsets").mkdir()
    with locked(student / "subsets" / "fold_1"):
        error = refused(capsys, student, "--subsets", "T0", "--metrics", "dice", "--restart")
        assert f"another process evaluates fold 1 into {student / 'subsets'}; wait for it" in error
        assert evaluate(student, "--subsets", "T0", "--metrics", "dice", "-f", "0") == 0
    assert evaluate(student, "--subsets", "T0", "--metrics", "dice") == 0
    with locked(student / "subsets" / "fold_1"):  # which has nothing left to do
        assert evaluate(student, "--subsets", "T0", "--metrics", "dice") == 0
    assert not list((student / "subsets").glob(".*"))


def test_folds_of_different_splits_are_told(student, capsys):
    assert evaluate(student, "--subsets", "T0", "--metrics", "dice") == 0
    assert "several folds" not in capsys.readouterr().out
    checkpoint = student / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    content["mstkd"]["split"] = {"train": [CASES[0]], "val": SPLITS[1]["val"]}
    torch.save(content, checkpoint)
    assert evaluate(student, "--subsets", "T0", "--metrics", "dice", "--restart") == 0
    told = "cases that validate in several folds, which were trained with different splits"
    assert f"{told} and count with their mean: {SPLITS[1]['val'][0]}" in capsys.readouterr().out


def test_fold_all_is_evaluated_on_request_with_a_warning(student, capsys):
    shutil.copytree(student / "fold_0", student / "fold_all")
    assert evaluate(student, "--subsets", "T0", "--metrics", "dice") == 0
    assert set(results(student / "subsets")["fold"]) == {"0", "1"}
    assert evaluate(student, "--subsets", "T0", "--metrics", "dice", "-f", "all") == 0
    assert "trained on the very cases" in capsys.readouterr().err
    assert set(results(student / "subsets")["case"]) == set(CASES)


def test_the_table_names_the_model_as_asked(student):
    assert evaluate(student, "--subsets", "T0", "-f", "0", "--metrics", "dice", "--name", "ours") == 0
    assert set(results(student / "subsets")["model"]) == {"ours"}
    assert evaluate(student, "--subsets", "T0", "-f", "0", "--metrics", "dice") == 0
    assert set(results(student / "subsets")["model"]) == {student.name}


def test_a_minimum_size_adds_a_region_that_no_average_has(student, capsys):
    assert evaluate(student, "--subsets", *FEW, "--et-min", "whole=100000") == 0
    table, folder = results(student / "subsets"), student / "subsets"
    assert list(dict.fromkeys(table["region"])) == ["whole", "whole (min 100000)", "core"]
    small = table[(table["region"] == "whole (min 100000)") & (table["metric"] == "dice")]
    assert (small["value"] == 0).all()
    summary = json.loads((folder / "summary.json").read_text())
    means = summary["mean_over_subsets"]
    assert math.isclose(means["average"]["dice"], (means["whole"]["dice"] + means["core"]["dice"]) / 2)
    assert "not found where fewer than 100000" in (folder / "tables.md").read_text()
    assert "whole (min 100000)" in (folder / "report.html").read_text()
    assert set(read_expected_dice(student, NAMES)[15]) == {"whole", "core"}
    assert "with min_voxels" in refused(capsys, student, "--subsets", *FEW)


def test_more_metrics_are_measured_on_request(student):
    names = ["hd95", "nsd", "sensitivity", "precision", "volume_error_ml", "lesion_dice", "lesion_hd95"]
    options = ("--metrics", *names, "--convention", "nnunet", "--tolerance", "2.5")
    assert evaluate(student, "--subsets", "T0", "-f", "0", *options) == 0
    table = results(student / "subsets")
    assert set(table["metric"]) == {"dice", *names}
    text = (student / "subsets" / "tables.md").read_text()
    assert "nnunet (nnU-Net 2" in text and "BraTS-2023-Metrics" in text and text.count("2.5 mm") == 1
    assert "NSD in % at a tolerance of 2.5 mm" in (student / "subsets" / "report.html").read_text()


# ---- going on after a stop -----------------------------------------------------------------------------------------


def count_predictions(monkeypatch) -> list:
    seen = []
    real = run_module.SubsetPredictor.predict

    def predict(self, data, rows):
        seen.append(len(rows))
        return real(self, data, rows)

    monkeypatch.setattr(run_module.SubsetPredictor, "predict", predict)
    return seen


def test_a_stopped_run_goes_on_with_the_case_where_it_was(student, monkeypatch):
    options = ("--subsets", *FEW, "--metrics", "dice")
    assert evaluate(student, *options, "-o", str(student.parent / "whole")) == 0
    seen, real = [], run_module.prepare

    def stop_at_the_third(case, *arguments):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(case.name)
        return real(case, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "IMAGES_AHEAD", 0)
        patch.setattr(run_module, "prepare", stop_at_the_third)
        assert evaluate(student, *options) == 130
    assert not (student / "subsets" / "results.csv").exists()
    predicted = count_predictions(monkeypatch)
    assert evaluate(student, *options) == 0
    assert predicted == [3]
    for name in ("results.csv", "tables.md"):
        assert files(student / "subsets")[name] == files(student.parent / "whole")[name]


def test_only_subsets_that_are_new_are_predicted(student, monkeypatch):
    assert evaluate(student, "--subsets", "T0", "-f", "0") == 0
    predicted = count_predictions(monkeypatch)
    assert evaluate(student, "--subsets", *FEW, "-f", "0") == 0
    assert predicted == [2, 2]
    assert evaluate(student, "--subsets", "all", "T0", "-f", "0") == 0
    assert predicted == [2, 2]
    assert list(dict.fromkeys(results(student / "subsets")["subset"])) == ["T0", "T0+T1+T2+T3"]
    assert evaluate(student, "--subsets", "T0", "-f", "0", "--restart") == 0
    assert predicted == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["-step_size", "1"], "step_size 0.5, now it is 1.0"),
        (["--disable_tta"], "mirroring True, now it is False"),
        (["--metrics", "dice"], "metrics ['dice', 'hd95'], now it is ['dice']"),
        (["--mask-first"], "mask_first False, now it is True"),
        (["--convention", "nnunet"], "convention 'brats', now it is 'nnunet'"),
    ],
)
def test_results_of_other_options_are_not_mixed(student, capsys, options, what):
    base = ["--subsets", "T0", "-f", "0"]
    assert evaluate(student, *base) == 0
    message = refused(capsys, student, *base, *options)
    assert what in message and "--restart" in message
    assert evaluate(student, *base, *options, "--restart") == 0


def test_a_run_that_measured_nothing_binds_no_later_one(student, capsys):
    label = Path(os.environ["nnUNet_preprocessed"], tiny.DATASET, "gt_segmentations", f"{CASES[1]}.nii.gz")
    label.rename(label.with_suffix(".away"))
    assert "does not exist" in refused(capsys, student, "--subsets", "T0", "-f", "0", "-step_size", "1")
    label.with_suffix(".away").rename(label)
    assert evaluate(student, "--subsets", "T0", "-f", "0") == 0


def test_a_restart_that_is_refused_forgets_nothing(student, capsys, monkeypatch):
    base = ["--subsets", "T0", "-f", "0"]
    assert evaluate(student, *base) == 0
    before = files(student / "subsets")
    label = Path(os.environ["nnUNet_preprocessed"], tiny.DATASET, "gt_segmentations", f"{CASES[1]}.nii.gz")
    label.rename(label.with_suffix(".away"))
    assert "does not exist" in refused(capsys, student, *base, "--restart", "-step_size", "1")
    assert files(student / "subsets") == before
    label.with_suffix(".away").rename(label)
    predicted = count_predictions(monkeypatch)
    assert evaluate(student, *base, "--restart", "-step_size", "1") == 0
    assert predicted == [1, 1]


@pytest.mark.parametrize("source", ["preprocessed", "images"])
@pytest.mark.parametrize("replaced", ["label", "image"])
def test_a_case_whose_file_was_replaced_is_evaluated_again(student, monkeypatch, capsys, source, replaced):
    preprocessed, raw = (Path(os.environ[f"nnUNet_{name}"], tiny.DATASET) for name in ("preprocessed", "raw"))
    base = ["--subsets", "T0", "all", "-f", "0", "--metrics", "dice", *(["--mask-first"] * (source == "images"))]
    image = {"preprocessed": preprocessed / "tiny_data" / "{}.b2nd", "images": raw / "imagesTr" / "{}_0002.nii.gz"}
    file = {"label": preprocessed / "gt_segmentations" / "{}.nii.gz", "image": image[source]}[replaced]
    assert evaluate(student, *base) == 0
    before = results(student / "subsets")
    if replaced == "label":
        write(Path(str(file).format(CASES[0])), label_image(0) // 2)  # without the core
    else:
        shutil.copyfile(str(file).format(CASES[3]), str(file).format(CASES[0]))
    predicted = count_predictions(monkeypatch)
    capsys.readouterr()
    assert evaluate(student, *base) == 0
    assert sum(predicted) == 2 and "label or images have changed, cases: 1" in capsys.readouterr().out
    changed = results(student / "subsets")["value"].ne(before["value"])
    assert changed.any() and set(before["case"][changed]) == {CASES[0]}
    assert evaluate(student, *base) == 0 and sum(predicted) == 2
    # a record of an earlier version has no stamps
    record = student / "subsets" / "cases" / "fold_0" / f"{CASES[0]}.json"
    content = json.loads(record.read_text())
    assert content.pop("files")
    record.write_text(json.dumps(content))
    shutil.copyfile(str(file).format(CASES[1]), str(file).format(CASES[0]))
    assert evaluate(student, *base) == 0 and sum(predicted) == 2


def test_a_restart_of_a_fold_keeps_the_others(student, monkeypatch):
    base = ["--subsets", "T0"]
    assert evaluate(student, *base) == 0
    predicted = count_predictions(monkeypatch)
    assert evaluate(student, *base, "-f", "0", "--restart") == 0 and predicted == [1, 1]
    assert evaluate(student, *base) == 0 and predicted == [1, 1]
    # other options: the results of fold 1 could not be told from those of fold 0
    assert evaluate(student, *base, "-f", "0", "--restart", "-step_size", "1") == 0 and predicted == [1] * 4
    assert evaluate(student, *base, "-step_size", "1") == 0 and predicted == [1] * 5


def test_results_of_other_weights_are_not_mixed(student, capsys):
    base = ["--subsets", "T0", "-f", "0"]
    assert evaluate(student, *base) == 0
    shutil.copyfile(student / "fold_1" / "checkpoint_final.pth", student / "fold_0" / "checkpoint_final.pth")
    assert "fold 0 has other weights than those that predicted" in refused(capsys, student, *base)
    assert evaluate(student, *base, "--restart") == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"weights": 1}', '{"subsets": 3}'])
def test_a_damaged_record_is_one_line(student, capsys, content):
    base = ["--subsets", "T0", "-f", "0"]
    assert evaluate(student, *base) == 0
    (student / "subsets" / "cases" / "fold_0" / f"{CASES[0]}.json").write_text(content)
    assert "--restart" in refused(capsys, student, *base)
