"""Modalities whose zero voxels differ: taking one away changes the others, unless each is normalised by itself."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import CONFIGURATION, PHANTOM, Folders, configure, plan_and_preprocess, train, use_copy
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mstkd import cli, modalities
from nnunetv2_mstkd.errors import InputError, MissingFileError, UserError
from nnunetv2_mstkd.inference.expected_dice import read_expected_dice
from nnunetv2_mstkd.inference.workers import workers
from nnunetv2_mstkd.nnunet import checkpoints, mask_differences, per_channel
from nnunetv2_mstkd.nnunet.input_folder import Case
from nnunetv2_mstkd.nnunet.mask_differences import Shift, find_shifts, summarize
from nnunetv2_mstkd.nnunet.preprocessing import preprocess_case, read_preprocessed
from nnunetv2_mstkd.training import base
from nnunetv2_mstkd.training.settings import InputSettings, SettingsError

NAMES = ("A", "B", "C")
CASES = [f"case_{number}" for number in range(6)]
SHAPE = (20, 26, 24)
STUDENT, TEACHER = "ModalityDropoutTrainer", "MSTKDTeacherTrainer"


def head(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three images, (3, *SHAPE), the first with air and skull, the others stripped; and a label."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij"))
    radius = np.sqrt(np.square(grid).sum(0)) + random.normal(0, 0.02)
    brain, skull = radius < 0.6, (radius > 0.7) & (radius < 0.85)
    images = random.normal(100, 12, (3, *SHAPE)) * brain
    images[0] += random.normal(300, 20, SHAPE) * skull + np.abs(random.normal(3, 1, SHAPE)) * ~brain
    label = (np.sqrt(np.square(grid - 0.1).sum(0)) < 0.25).astype(np.uint8)
    images[1:] += 40 * label
    return images.astype(np.float32), label


def write_raw(raw: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for seed, case in enumerate(CASES):
        images, label = head(seed)
        for channel, image in enumerate(images):
            sitk.WriteImage(sitk.GetImageFromArray(image), str(raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(raw / "labelsTr" / f"{case}.nii.gz"))
    content = {
        "channel_names": dict(zip("012", NAMES, strict=True)),
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Preprocessed by nnU-Net without resampling. Never changed."""
    top = tmp_path_factory.mktemp("mixed")
    folders = Folders(top / "raw", top / "preprocessed", top / "results", f"Dataset{PHANTOM}_Mixed")
    folders.results.mkdir()
    write_raw(folders.raw / folders.dataset)
    plan_and_preprocess(folders, PHANTOM, "3d_fullres", spacing=(1.0, 1.0, 1.0))
    configure(folders)
    return folders


@pytest.fixture
def data(planned: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    return use_copy(planned, tmp_path, monkeypatch)


def without_raw(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = folders.results.parent / "empty"
    empty.mkdir(exist_ok=True)
    monkeypatch.setenv("nnUNet_raw", str(empty))


def build(trainer: str = STUDENT):
    return get_trainer_from_args(str(PHANTOM), CONFIGURATION, 0, trainer, device=torch.device("cpu"))


def log_text(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log_*.txt")))


def model(folders: Folders, normalization: str, use_mask: bool = True):
    """nnU-Net's managers of the data set's plans with other normalisation."""
    plans = json.loads(folders.plans_file.read_text())
    entry = plans["configurations"]["3d_fullres"]
    entry["use_mask_for_norm"] = [use_mask] * len(NAMES)
    entry["mstkd"] = {"input": {"normalization": normalization}}
    manager = PlansManager(plans)
    return (
        manager,
        manager.get_configuration("3d_fullres"),
        json.loads((folders.preprocessed / folders.dataset / "dataset.json").read_text()),
    )


def raw_case(folders: Folders, case: str = CASES[0], absent: tuple[int, ...] = ()) -> Case:
    images = folders.raw / folders.dataset / "imagesTr"
    return Case(case, tuple(images / f"{case}_{channel:04d}.nii.gz" for channel in range(3))).without(absent)


def common(first: np.ndarray, box: list, second: np.ndarray, other: list) -> tuple[np.ndarray, np.ndarray]:
    """Two crops of one image where both have voxels."""
    low, high = (
        np.maximum(np.array(box)[:, 0], np.array(other)[:, 0]),
        np.minimum(np.array(box)[:, 1], np.array(other)[:, 1]),
    )
    return tuple(
        array[(slice(None), *(slice(a - start, b - start) for a, b, start in zip(low, high, of[:, 0], strict=True)))]
        for array, of in ((first, np.array(box)), (second, np.array(other)))
    )


# ---- each modality by itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_mask", [True, False])
@pytest.mark.parametrize("normalization", ["per_channel", "plans"])
def test_modalities_look_the_same_whichever_others_are_there(data, use_mask, normalization):
    given = model(data, normalization, use_mask)
    whole, properties = preprocess_case(raw_case(data), *given)
    moved = []
    for row in modalities.all_subsets(3).tolist()[:-1]:
        absent = tuple(channel for channel, there in enumerate(row) if not there)
        part, own = preprocess_case(raw_case(data, absent=absent), *given)
        assert not part[list(absent)].any()
        boxes = [each["bbox_used_for_cropping"] for each in (properties, own)]
        inside, found = common(whole, boxes[0], part, boxes[1])
        there = list(np.flatnonzero(row))
        moved.append(float(np.abs(inside[there] - found[there]).max()))
        if normalization == "per_channel":
            assert np.abs(whole[there]).sum() == pytest.approx(np.abs(part[there]).sum(), rel=1e-5)
    assert max(moved) < 1e-5 if normalization == "per_channel" else max(moved) > 0.3


def test_each_is_what_nnunet_makes_of_it_alone(data):
    """With a mask for normalisation, nnU-Net's own preprocessor of a case that has nothing else."""
    manager, configuration, description = model(data, "per_channel")
    whole, properties = preprocess_case(raw_case(data), manager, configuration, description)
    for channel in range(3):
        case = raw_case(data, absent=tuple({0, 1, 2} - {channel}))
        alone, own = preprocess_case(case, *model(data, "plans"))
        boxes = properties["bbox_used_for_cropping"], own["bbox_used_for_cropping"]
        inside, expected = common(whole, boxes[0], alone, boxes[1])
        np.testing.assert_array_equal(inside[channel], expected[channel])
        brain = expected[channel][expected[channel] != 0]
        assert brain.mean() == pytest.approx(0, abs=1e-4) and brain.std() == pytest.approx(1, abs=1e-3)


def test_resampled_edges_stay_small(data):
    manager, configuration, description = model(data, "per_channel")
    configuration.configuration["spacing"] = [1.3, 0.8, 1.1]
    found, _ = preprocess_case(raw_case(data), manager, configuration, description)
    stripped = found[1:]
    assert found.shape[1:] != SHAPE and np.abs(stripped).max() < 8
    assert (np.abs(stripped) < 1e-3).mean() > 0.3  # outside is zero, not a constant below the mean


def test_a_host_that_normalises_otherwise_is_an_error(data, monkeypatch):
    manager, configuration, description = model(data, "per_channel")
    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", lambda self, *arguments, **options: None)
    with pytest.raises(RuntimeError, match=r"does not let input\.normalization=per_channel take effect"):
        preprocess_case(raw_case(data), manager, configuration, description)


def test_plans_that_say_nothing_mean_nnunets_own(data):
    _, configuration, _ = model(data, "per_channel")
    assert per_channel.normalization(configuration) == "per_channel"
    for block in (None, {}, {"input": {}}, {"input": {"normalization": "auto"}}, {"schedule": {}}, 3, {"input": 3}):
        configuration.configuration["mstkd"] = block
        assert per_channel.normalization(configuration) == "plans"
        assert type(per_channel.preprocessor(configuration)) is DefaultPreprocessor


# ---- detection -------------------------------------------------------------------------------------------------------


def test_shift_by_hand():
    # eight voxels in one row; the second channel covers all, the first has 2 and 4
    images = np.zeros((2, 1, 1, 8), np.float32)
    images[0, ..., 3:5] = 2, 4
    images[1] = np.arange(1, 9)
    first, second = find_shifts(images, ["ZScoreNormalization"] * 2, [True, True])
    # alone: mean 3, sd 1; among eight voxels: mean 6/8, mean of squares 20/8
    wide = np.sqrt(20 / 8 - (6 / 8) ** 2)
    assert first.factor == pytest.approx(wide) and first.offset == pytest.approx(-(3 - 6 / 8) / wide)
    assert second == Shift(0.0, 1.0)
    assert find_shifts(images, ["NoNormalization", "ZScoreNormalization"], [True] * 2) == [None, Shift(0.0, 1.0)]
    images[1] = 0  # an absent channel does not count
    assert find_shifts(images, ["ZScoreNormalization"] * 2, [True] * 2) == [Shift(0.0, 1.0), None]


@pytest.mark.parametrize("use_mask", [True, False])
def test_shift_is_what_preprocessing_does(data, use_mask):
    given = model(data, "plans", use_mask)
    images, _ = head(0)
    shifts = find_shifts(images, given[1].normalization_schemes, given[1].use_mask_for_norm)
    whole, properties = preprocess_case(raw_case(data), *given)
    for channel in (1, 2):
        alone, own = preprocess_case(raw_case(data, absent=tuple({0, 1, 2} - {channel})), *given)
        boxes = properties["bbox_used_for_cropping"], own["bbox_used_for_cropping"]
        before, after = (array[channel] for array in common(whole, boxes[0], alone, boxes[1]))
        brain = common(images, [[0, size] for size in SHAPE], whole, boxes[0])[0][channel]
        box = tuple(slice(low, high) for low, high in own["bbox_used_for_cropping"])
        brain = images[channel][box] != 0
        factor = np.polyfit(before[brain], after[brain], 1)[0]
        assert shifts[channel].factor == pytest.approx(factor, rel=1e-3)
        offset = after[brain].mean() - before[brain].mean()
        assert shifts[channel].offset == pytest.approx(offset, abs=1e-3)
        assert shifts[channel].large


def test_few_edge_voxels_and_single_cases_are_harmless():
    images, _ = head(0)
    stripped = images[1:].copy()
    assert not summarize([find_shifts(stripped, ["ZScoreNormalization"] * 2, [True] * 2)], NAMES[1:])
    edge = np.flatnonzero(stripped[0].ravel())[:3]
    stripped[0].ravel()[edge] = 0
    assert not summarize([find_shifts(stripped, ["ZScoreNormalization"] * 2, [True] * 2)], NAMES[1:])
    one, none = Shift(0.5, 2.0), Shift(0.0, 1.0)
    assert not summarize([[one, none]] + [[none, none]] * 9, "AB")
    assert not summarize([[one, none]] + [[none, none]] * 3, "AB")  # one odd image of several
    assert summarize([[one, none]], "AB") and summarize([[one, none]] * 2 + [[none, none]] * 3, "AB")
    # a rare modality counts among the cases that have it
    assert list(summarize([[none, one]] * 2 + [[none, None]] * 18, "AB").moved) == ["B"]
    found = summarize([[one, None], [Shift(0.7, 1.0), None]] + [[none, none]] * 8, "AB")
    assert found.moved == {"A": Shift(pytest.approx(0.6), 1.5)} and "A moves by +0.60 sd and x1.50" in str(found)


def of_data_set(folders: Folders, raw: Path | None = None):
    manager, configuration, _ = model(folders, "plans")
    preprocessed = folders.preprocessed / folders.dataset
    names = modalities.modality_names(json.loads((preprocessed / "dataset.json").read_text()))
    raw = raw or folders.raw / folders.dataset
    return mask_differences.of_data_set(preprocessed, raw, manager, configuration, names)


def test_detected_on_mixed_data_and_read_once(data, monkeypatch):
    found = of_data_set(data)
    assert set(found.moved) == {"B", "C"} and found.cases == len(CASES)
    monkeypatch.setattr(mask_differences, "find_shifts", None)
    assert of_data_set(data) == found
    file = next((data.preprocessed / data.dataset).glob("*_masks.json"))
    file.write_text('{"format": 1, "normalization": 3}')
    assert of_data_set(data) is None  # cannot be read again
    file.unlink()
    assert of_data_set(data, data.raw / "nothing") is None


def test_not_detected_on_the_phantom(phantom):
    trainer = get_trainer_from_args(str(PHANTOM), CONFIGURATION, 0, STUDENT, device=torch.device("cpu"))
    assert trainer.mask_differences is not None and not trainer.mask_differences
    trainer.choose_normalization()
    assert trainer.configuration_manager.configuration["mstkd"]["input"] == {"normalization": "plans"}
    trainer.on_train_start()
    assert "zero voxels" not in log_text(Path(trainer.output_folder))


def test_configure_says_so(data, capsys):
    for expected in (1, 0):
        assert cli.main(["configure", "-d", str(PHANTOM), "--name", f"new{expected}"]) == 0
        assert capsys.readouterr().out.count("the zero voxels of the modalities differ") == expected
        shutil.rmtree(data.preprocessed / data.dataset / "nnUNetPlans_3d_fullres", ignore_errors=True)


def test_at_most_twenty_cases_are_read():
    assert mask_differences.spread(range(5)) == list(range(5))
    found = mask_differences.spread(range(1000))
    assert len(set(found)) == 20 and (found[0], found[-1]) == (0, 999)


# ---- training --------------------------------------------------------------------------------------------------------


def stored(folders: Folders, trainer: str = STUDENT) -> dict:
    """The settings in the plans of a trained model, and in its checkpoint."""
    folder = folders.fold(trainer)
    plans = json.loads((folder.parent / "plans.json").read_text())
    kept = checkpoints.read(folder / "checkpoint_final.pth")["init_args"]["plans"]
    blocks = [each["configurations"][CONFIGURATION]["mstkd"] for each in (plans, kept)]
    assert blocks[0] == blocks[1]
    return blocks[0]["input"]


def evaluate(folders: Folders, *options: str, trainer: str = STUDENT) -> dict:
    folder = folders.fold(trainer).parent
    run = ["-m", str(folder), "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar"]
    assert cli.main(["evaluate", *run, "--metrics", "dice", "--strips", "0", *options]) == 0
    return json.loads((folder / "subsets" / "summary.json").read_text())


def predict(folders: Folders, images: Path, output: Path, trainer: str = STUDENT) -> dict:
    run = ["-m", str(folders.fold(trainer).parent), "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0"]
    assert cli.main(["predict", "-i", str(images), "-o", str(output), *run, "--disable_progress_bar"]) == 0
    return json.loads((output / "predictions.json").read_text())["cases"]


def dice(folders: Folders, output: Path, case: str) -> float:
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folders.raw / folders.dataset / "labelsTr" / f"{case}.nii.gz")))
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(output / f"{case}.nii.gz")))
    return float(2 * np.sum(found * label) / np.sum(found + label))


def test_train_evaluate_and_predict_agree(data, tmp_path, capsys):
    """Through nnU-Net's commands: what evaluation measures with zeros is what prediction gives without the files."""
    configure(data, schedule__epochs=6, schedule__iterations=12)
    train(STUDENT, validate=True)
    assert stored(data) == {"normalization": "per_channel"}
    text = log_text(data.fold(STUDENT))
    assert "because the zero voxels of the modalities differ (6 cases read): without the others B moves by" in text
    validation = json.loads((data.preprocessed / data.dataset / "splits_final.json").read_text())[0]["val"]
    assert len(list((data.fold(STUDENT) / "validation").glob("*.nii.gz"))) == len(validation)
    capsys.readouterr()
    summary = evaluate(data)
    assert summary["normalization"] == "per_channel" and not summary["mask_first"] and "moved_modalities" not in summary
    (tmp_path / "in").mkdir()
    for case in validation:
        shutil.copy(raw_case(data, case).files[1], tmp_path / "in")
    cases = predict(data, tmp_path / "in", tmp_path / "out")
    assert "warning" not in capsys.readouterr().err
    expected = summary["subsets"]["B"]["lesion"]["dice"]
    assert expected > 0 and expected == pytest.approx(
        np.mean([dice(data, tmp_path / "out", case) for case in validation]), abs=0.02
    )
    assert all(entry["expected_dice"] == {"lesion": expected} for entry in cases.values())
    with pytest.warns(UserWarning, match="per_channel.*Use mstkd predict"):
        nnUNetPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder(
            str(data.fold(STUDENT).parent), (0,)
        )
    first = evaluate(data, "--mask-first", "--restart")["subsets"]["B"]["lesion"]["dice"]
    assert first == pytest.approx(np.mean([dice(data, tmp_path / "out", case) for case in validation]), abs=1e-6)


def test_training_reads_what_prediction_makes(data):
    trainer = build()
    trainer.on_train_start()
    try:
        own = Path(trainer.preprocessed_dataset_folder)
        assert own.name == "nnUNetPlans_3d_fullres_per_channel"
        for dataset in trainer.get_tr_and_val_datasets():
            for case in dataset.identifiers:
                made, _, _, properties = dataset.load_case(case)
                given = trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json
                part, other = preprocess_case(raw_case(data, case, absent=(0,)), *given)
                boxes = properties["bbox_used_for_cropping"], other["bbox_used_for_cropping"]
                inside, found = common(np.asarray(made[:]), boxes[0], part, boxes[1])
                np.testing.assert_allclose(inside[1:], found[1:], atol=1e-5)
                assert "class_locations" in properties
        batch, *_ = trainer._to_device(next(trainer.dataloader_val))
        stripped = batch[:, 1:]
        assert float(stripped.abs().max()) > 1 and float((stripped == 0).float().mean()) > 0.3
    finally:
        trainer.finish_loaders()


def test_unlabelled_batches_come_from_the_same_data(data, monkeypatch):
    configure(data, unlabelled__share=0.5)
    trainer, read = build(), base.read_case_facts
    trainer.initialize()
    case = trainer.do_split()[0][0]

    def without_label(*args, **kwargs):
        facts = read(*args, **kwargs)
        return {**facts, case: replace(facts[case], labelled=False)}

    monkeypatch.setattr(base, "read_case_facts", without_label)
    trainer.on_train_start()
    try:
        batch = next(trainer.unlabelled_batches)
        assert list(batch["keys"]) == [case]
        loaders = trainer.unlabelled_batches, trainer.dataloader_train, trainer.dataloader_val
        folders = {loader.data_loader._data.source_folder for loader in loaders}
        assert folders == {trainer.preprocessed_dataset_folder}
    finally:
        trainer.finish_loaders()


def test_made_once_and_again_where_preprocessed_anew(data, monkeypatch):
    build().initialize()
    own = data.preprocessed / data.dataset / "nnUNetPlans_3d_fullres_per_channel"
    before = {file.name: file.stat().st_mtime_ns for file in own.iterdir()}
    build().initialize()
    assert {file.name: file.stat().st_mtime_ns for file in own.iterdir()} == before
    without_raw(data, monkeypatch)
    build().initialize()  # complete: images are not needed
    (own / f"{CASES[2]}.b2nd").unlink()
    with pytest.raises(MissingFileError, match=r"lacks 1 of 6 cases.*nnUNet_raw.*input\.normalization=plans"):
        build().initialize()
    data.use(monkeypatch)
    source = own.with_name("nnUNetPlans_3d_fullres") / f"{CASES[3]}.b2nd"
    content = source.read_bytes()
    source.unlink()  # a link
    source.write_bytes(content)
    build().initialize()
    after = {file.name: file.stat().st_mtime_ns for file in own.iterdir()}
    assert {name for name in after if after[name] != before[name]} >= {f"{CASES[2]}.b2nd", f"{CASES[3]}.b2nd"}
    assert after[f"{CASES[0]}.b2nd"] == before[f"{CASES[0]}.b2nd"]
    assert not list(own.parent.glob(".*.part"))


def test_the_copy_has_the_cases_of_nnunets_own_folder(data):
    build().initialize()
    source = data.preprocessed / data.dataset / "nnUNetPlans_3d_fullres"
    for file in source.glob(f"{CASES[0]}*"):
        file.unlink()  # as preprocessing again does, where the case is a test case now
    trainer = build()
    trainer.initialize()
    own = Path(trainer.preprocessed_dataset_folder)
    assert own.name.endswith("_per_channel") and not list(own.glob(f"{CASES[0]}*"))
    assert f"no longer has them: {CASES[0]} \n" in log_text(Path(trainer.output_folder))
    trainer.fold = "all"
    assert sorted(trainer.do_split()[0]) == sorted(CASES[1:])


def test_a_copy_without_file_times_is_used(data, monkeypatch):
    trainer = build()
    trainer.initialize()
    chosen = per_channel.normalization(trainer.configuration_manager)
    own = Path(trainer.preprocessed_dataset_folder)
    for number, folder in enumerate((own, own.with_name("nnUNetPlans_3d_fullres"))):  # copied one after the other
        for file in folder.iterdir():
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
            os.utime(file, (10**9 + number, 10**9 + number))
    without_raw(data, monkeypatch)
    trainer = build()
    trainer.initialize()
    assert per_channel.normalization(trainer.configuration_manager) == chosen == "per_channel"
    text = log_text(Path(trainer.output_folder))
    assert "_masks.json is used as it is" in text and "as after a copy without times" in text


def test_a_channel_of_one_value_stays(data):
    """Such as a mask: within its own voxels there is nothing to standardise, and zeros would mean that it is absent."""
    image = np.zeros((3, 6, 6, 6), np.float32)
    image[0] = np.random.default_rng(0).normal(5, 1, image[0].shape)
    image[1, 1:3] = image[0, 1:3]
    image[2, 2:4, 2:4] = 1
    assert find_shifts(image, ["ZScoreNormalization"] * 3, [True] * 3)[2] is None
    _, configuration, _ = model(data, "per_channel")
    intensities = {str(channel): {} for channel in range(3)}
    found = per_channel.preprocessor(configuration)._normalize(
        image.copy(), np.zeros((1, 6, 6, 6)), configuration, intensities
    )
    assert np.array_equal(found[2], image[2]) and abs(found[1][found[1] != 0].mean()) < 1e-5


def test_background_processes_make_the_same(data):
    manager, configuration, description = model(data, "per_channel")
    preprocessed, found = data.preprocessed / data.dataset, []
    own = per_channel.data_folder(preprocessed, configuration)
    for processes in (0, 2):
        per_channel.complete_data(
            preprocessed,
            data.raw / data.dataset,
            CASES[:2],
            manager,
            configuration,
            description,
            pool=partial(workers, processes),
        )
        found.append([read_preprocessed(own, case)[0] for case in CASES[:2]])
        shutil.rmtree(own)
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


def test_without_images_auto_keeps_nnunets_own(data, monkeypatch):
    without_raw(data, monkeypatch)
    trainer = build()
    trainer.on_train_start()
    assert per_channel.normalization(trainer.configuration_manager) == "plans"
    assert "is not known" in log_text(Path(trainer.output_folder))
    configure(data, input__normalization="per_channel")
    with pytest.raises(MissingFileError, match="copy it there, or set input"):
        build().initialize()


def test_another_value_is_refused():
    with pytest.raises(SettingsError, match=r"input\.normalization"):
        InputSettings(normalization="own")


def test_teacher_and_student_must_agree(data):
    configure(data, input__normalization="plans", teacher__warm_start=False)
    train(TEACHER)
    text = log_text(data.fold(TEACHER))
    assert "Training does not see that, prediction does: set input.normalization=per_channel" in text
    configure(data)
    with pytest.raises(UserError, match="normalization is 'plans' for the teacher and 'per_channel' for the student"):
        build("MSTKDTrainer").on_train_start()


def test_folds_and_checkpoints_keep_their_normalisation(data):
    configure(data, input__normalization="plans")
    train(STUDENT)
    configure(data, input__normalization="per_channel")
    with pytest.raises(SettingsError, match=r"input\.normalization = 'per_channel'.*trained with 'plans'"):
        build().load_checkpoint(str(data.fold(STUDENT) / "checkpoint_final.pth"))
    trainer = get_trainer_from_args(str(PHANTOM), CONFIGURATION, 1, STUDENT, device=torch.device("cpu"))
    with pytest.raises(SettingsError, match=r"input\.normalization is 'plans' there and 'per_channel' here"):
        trainer.on_train_start()


def test_checkpoint_of_an_earlier_version_keeps_nnunets_own(data):
    configure(data, input__normalization="plans")
    train(STUDENT)
    file = data.fold(STUDENT) / "checkpoint_final.pth"
    content = checkpoints.read(file)
    del content["init_args"]["plans"]["configurations"][CONFIGURATION]["mstkd"]["input"]
    checkpoints.write(content, file)
    configure(data)
    trainer = build()
    trainer.load_checkpoint(str(file))
    assert per_channel.normalization(trainer.configuration_manager) == "plans"
    assert Path(trainer.preprocessed_dataset_folder).name == "nnUNetPlans_3d_fullres"


def test_resumed_training_equals_uninterrupted_one(data):
    configure(data, schedule__epochs=3)
    train(STUDENT)
    folder = data.fold(STUDENT)
    whole = checkpoints.read(folder / "checkpoint_final.pth")["network_weights"]
    shutil.rmtree(folder)
    start = base.SettingsTrainer.on_epoch_start

    def interrupt(self):
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        start(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base.SettingsTrainer, "on_epoch_start", interrupt)
        train(STUDENT)
    train(STUDENT, continue_training=True)
    found = checkpoints.read(folder / "checkpoint_final.pth")["network_weights"]
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert stored(data) == {"normalization": "per_channel"}


# ---- evaluation and prediction without it ----------------------------------------------------------------------------


@pytest.fixture
def plain(data) -> Folders:
    """A model that was trained with nnU-Net's own normalisation."""
    configure(data, input__normalization="plans")
    train(STUDENT)
    return data


def test_evaluation_masks_first_where_it_matters(plain, capsys):
    summary = evaluate(plain)
    assert summary["mask_first"] and "moved_modalities" not in summary
    assert "removed before preprocessing, as in mstkd predict (--no-mask-first" in capsys.readouterr().out
    folder = plain.fold(STUDENT).parent
    assert read_expected_dice(folder, NAMES)
    with pytest.raises(InputError, match=r"no Dice to expect.*normalization=per_channel"):
        read_expected_dice(folder, NAMES, "per_channel")
    summary = evaluate(plain, "--no-mask-first", "--restart")
    assert not summary["mask_first"] and summary["moved_modalities"] == ["B", "C"]
    assert "will not tell what Dice to expect" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no Dice to expect.*changes B, C.*--mask-first"):
        read_expected_dice(folder, NAMES)


def test_evaluation_of_a_folder_masks_first_too(plain, tmp_path):
    raw = plain.raw / plain.dataset
    folders = "-i", str(raw / "imagesTr"), "-l", str(raw / "labelsTr"), "-o", str(tmp_path / "out")
    run = ["-m", str(plain.fold(STUDENT).parent), "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0"]
    assert cli.main(["evaluate", *run, *folders, "--subsets", "B", "--metrics", "dice"]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["mask_first"]


def test_prediction_warns_once(plain, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for case in CASES:
        for file in raw_case(plain, case).files[: 2 if case == CASES[0] else 3]:
            shutil.copy(file, tmp_path / "in")
    evaluate(plain, "--no-mask-first")
    capsys.readouterr()
    cases = predict(plain, tmp_path / "in", tmp_path / "out")
    assert all("expected_dice" not in entry for entry in cases.values())
    lines = capsys.readouterr().err.splitlines()
    assert sum("the zero voxels of the modalities differ" in line for line in lines) == 1
    assert sum("no Dice to expect" in line for line in lines) == 1
