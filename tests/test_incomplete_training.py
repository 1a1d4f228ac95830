"""Training on cases that lack modalities, or a label."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import (
    CONFIGURATION,
    PHANTOM,
    Folders,
    configure,
    plan_and_preprocess,
    train,
    train_until_killed,
    use_copy,
)
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from tiny import REGIONS, batch, give_teacher, same, state, wake

from nnunetv2_mstkd import methods, modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.inference.expected_dice import SUMMARY
from nnunetv2_mstkd.losses.pseudo_labels import pseudo_label_loss
from nnunetv2_mstkd.methods import ModalityDropoutTrainer
from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet import case_facts, checkpoints
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts, read_case_facts
from nnunetv2_mstkd.training.full_modality import TeacherTrainer

NAMES = ("T1", "T1ce", "T2", "FLAIR")
LACKING = {"phantom_001": ("T1",), "phantom_002": ("T1", "T1ce", "T2"), "phantom_004": ("T2",)}
UNLABELLED = ("phantom_003", "phantom_004")
VALIDATION = "phantom_005"
IGNORE = 4
TRAINERS = [getattr(methods, name) for name in methods.__all__]
STUDENTS = [trainer for trainer in TRAINERS if issubclass(trainer, ModalityDropoutTrainer)]


@pytest.fixture(scope="module")
def mixed(preprocessed: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The phantom, of which two labelled cases lack modalities, one has no label, and one lacks both; with teachers."""
    top = tmp_path_factory.mktemp("mixed")
    folders = Folders(top / "raw", top / "preprocessed", top / "results")
    for folder in (folders.preprocessed, folders.results):
        folder.mkdir()
    raw = folders.raw / folders.dataset
    shutil.copytree(preprocessed.raw / preprocessed.dataset, raw)
    for case, missing in LACKING.items():
        for name in missing:
            replace(raw / "imagesTr" / f"{case}_{NAMES.index(name):04d}.nii.gz", 0)
    for case in UNLABELLED:
        replace(raw / "labelsTr" / f"{case}.nii.gz", IGNORE)
    content = json.loads((raw / "dataset.json").read_text())
    content["labels"]["ignore"] = IGNORE
    (raw / "dataset.json").write_text(json.dumps(content))
    plan_and_preprocess(folders, PHANTOM, "3d_fullres", spacing=(8.0, 8.0, 8.0))
    train_cases = [f"phantom_00{number}" for number in range(5)]
    splits = [{"train": train_cases, "val": [VALIDATION, "phantom_003"]}]
    (folders.preprocessed / folders.dataset / "splits_final.json").write_text(json.dumps(splits))
    configure(folders)
    with pytest.MonkeyPatch.context() as patch:
        folders.use(patch)
        for teacher in (trainer for trainer in TRAINERS if issubclass(trainer, TeacherTrainer)):
            train(teacher.__name__)
    return folders


@pytest.fixture
def semi(mixed: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    return use_copy(mixed, tmp_path, monkeypatch, results=True)


def replace(file: Path, value: int) -> None:
    """Fill an image with one value."""
    image = sitk.ReadImage(str(file))
    file.unlink()  # it may be shared
    sitk.WriteImage(image * 0 + value, str(file))


def build(trainer: str):
    return get_trainer_from_args(str(PHANTOM), CONFIGURATION, 0, trainer, device=torch.device("cpu"))


def log_text(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log_*.txt")))


# ---- what cases have -------------------------------------------------------------------------------------------------


def data_folder(folders: Folders) -> Path:
    return next((folders.preprocessed / folders.dataset).glob("nnUNetPlans_3d_fullres"))


def read(folders: Folders, **changes):
    folder = data_folder(folders)
    content = {**json.loads((folder.parent / "dataset.json").read_text()), **changes}
    cases = nnUNetDatasetBlosc2.get_identifiers(str(folder))
    return read_case_facts(folder, cases, content, NAMES)


def test_facts_are_read_from_the_data_once(semi, monkeypatch):
    found = read(semi)
    for case, facts in found.items():
        assert facts.present == tuple(name not in LACKING.get(case, ()) for name in NAMES)
        assert facts.labelled == (case not in UNLABELLED)
    monkeypatch.setattr(case_facts, "_read", None)
    assert read(semi) == found


def test_changed_case_is_read_again(semi):
    before, folder = read(semi), data_folder(semi)
    for file in folder.glob("phantom_000*"):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    file = folder / "phantom_000.b2nd"
    file.unlink()
    shutil.copyfile(folder / "phantom_001.b2nd", file)
    after = read(semi)
    assert before["phantom_000"].complete and not after["phantom_000"].complete


def test_damaged_cache_is_ignored(semi):
    found, folder = read(semi), data_folder(semi)
    folder.with_name(f"{folder.name}_cases.json").write_text('{"format": 1, "cases": {"phantom_000": 3}}')
    assert read(semi) == found


@pytest.mark.parametrize(
    "record", [{"missing": {}}, {"missing": {case: list(names) for case, names in LACKING.items()}, "unlabelled": []}]
)
def test_record_that_contradicts_the_data_is_refused(semi, record):
    with pytest.raises(InputError, match=r"dataset\.json says of case phantom_00"):
        read(semi, mstkd_conversion=record)


def test_record_that_agrees_is_accepted(semi):
    record = {"missing": {case: list(names) for case, names in LACKING.items()}, "unlabelled": list(UNLABELLED)}
    assert read(semi, mstkd_conversion=record) == read(semi)


def test_record_names_modalities_as_the_conversion_does(semi):
    """``T1+C`` is one of two names in a subset's, so elsewhere it is ``T1_C``."""
    own = ["T1+C", "T2,FS", " T2 ", "all"]
    channels = {str(number): name for number, name in enumerate(own)}
    lacking = {case: [own[NAMES.index(name)] for name in names] for case, names in LACKING.items()}
    record = {"missing": lacking, "unlabelled": list(UNLABELLED)}
    assert read(semi, mstkd_conversion=record, channel_names=channels) == read(semi)
    wrong = {**record, "missing": {**lacking, next(iter(lacking)): []}}
    with pytest.raises(InputError, match=r"nnUNetv2_preprocess alone leaves .*dataset\.json as it was"):
        read(semi, mstkd_conversion=wrong, channel_names=channels)


def test_case_without_any_modality_is_refused(semi, monkeypatch):
    monkeypatch.setattr(case_facts, "_read", lambda *arguments: CaseFacts((False,) * 4, True))
    folder = data_folder(semi)
    folder.with_name(f"{folder.name}_cases.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no modality"):
        read(semi)


# ---- every trainer, with augmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", STUDENTS, ids=lambda cls: cls.__name__)
def test_no_sample_is_empty_and_no_absent_channel_is_seen(semi, monkeypatch, cls):
    """Through nnU-Net's loaders, training and validation: the network never sees what a case does not have."""
    configure(semi, schedule__iterations=20)
    trainer = build(cls.__name__)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    seen = []
    real = modalities.mask_modalities

    def record(data, availability):
        seen.append((data, availability))
        return real(data, availability)

    monkeypatch.setattr(modalities, "mask_modalities", record)
    checked = 0
    for _ in range(12):
        content = next(trainer.dataloader_train)
        present = torch.tensor([trainer.case_facts[str(case)].present for case in content["keys"]])
        seen.clear()
        result = trainer.train_step(content)
        assert all(np.isfinite(value) for value in result["terms"].values())
        for _, availability in seen:
            rows = len(present)
            assert availability.any(1).all()
            assert not (availability[:rows].cpu() & ~present).any()
        # all but the first look at the loaded batch: absent channels are zeros again
        for data, _ in seen[-1:]:
            if data.shape[1] == len(NAMES):
                checked += int((~present).sum())
                assert not data[: len(present)][~present].any()
    assert checked
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.validation_step(next(trainer.dataloader_val))


def test_noise_of_augmentation_is_removed(semi):
    trainer = build("ModalityDropoutTrainer")
    trainer.do_split()
    content = {"data": torch.ones(2, 4, 8, 8, 8), "target": torch.zeros(2, 1, 8, 8, 8), "keys": list(LACKING)[:2]}
    data, _, present = trainer._to_device(content)
    assert present.tolist() == [[False, True, True, True], [False, False, False, True]]
    assert torch.equal(data.flatten(2).amax(2).bool(), present)
    assert trainer._to_device({**content, "keys": ["phantom_000"] * 2})[2] is None


def test_online_validation_takes_subsets_that_a_case_has():
    subsets = modalities.all_subsets(3)
    present = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    rows = torch.tensor([6, 0, 3])  # all, T0 alone, T0+T1
    found = subsets[modalities.rows_within(subsets, rows, present)]
    assert found.tolist() == [[True, False, True], [False, False, True], [True, True, False]]


@pytest.mark.parametrize("channels", [4, 6, 16])
def test_rows_within_stay_within(channels):
    subsets = modalities.validation_subsets(channels)
    present = torch.rand(200, channels, generator=torch.Generator().manual_seed(0)) < 0.5
    present[~present.any(1), 0] = True
    found = subsets[modalities.rows_within(subsets, torch.arange(200) % len(subsets), present)]
    single = present[:, 15:].all(1) & (present.sum(1) == 1) if channels == 16 else torch.zeros(200, dtype=torch.bool)
    assert not (found & ~present)[~single].any()


def test_samplers_draw_within_what_a_case_has():
    generator = torch.Generator().manual_seed(0)
    present = torch.tensor([[True, False, True], [False, True, False]]).repeat(600, 1)
    for kind, options in (
        ("uniform", {}),
        ("by_size", {}),
        ("independent", {"drop": (0.5, 0.5, 0.0)}),
        ("fixed", {"subsets": ((True, False, False), (True, True, True))}),
        ("weighted", {"subsets": ((True, False, False), (True, True, True)), "weights": (1.0, 2.0)}),
    ):
        sampler = modalities.SubsetSampler(3, kind, **options)
        rows = sampler.sample(len(present), present=present, generator=generator)
        assert rows.any(1).all() and not (rows & ~present).any()
        partner = sampler.sample_other(rows, present=present, generator=generator)
        assert not (partner & ~present).any()
        assert (partner != rows).any(1)[::2].all() and torch.equal(partner[1::2], rows[1::2])
    shares = modalities.SubsetSampler(3).sample(6000, present=present[:1].expand(6000, 3), generator=generator)
    counts = [int((shares == torch.tensor(row)).all(1).sum()) for row in ([1, 0, 0], [0, 0, 1], [1, 0, 1])]
    assert min(counts) > 1850  # 2000 each


def test_sampler_that_keeps_nothing_of_a_case_keeps_all_of_it():
    sampler = modalities.SubsetSampler(3, "fixed", ((True, False, False),))
    present = torch.tensor([[False, True, True]])
    assert sampler.sample(1, present=present).tolist() == [[False, True, True]]


# ---- teachers --------------------------------------------------------------------------------------------------------


def test_teacher_trains_on_complete_cases(semi):
    folder = semi.fold("MSTKDTeacherTrainer")
    split = checkpoints.read(folder / "checkpoint_final.pth")["mstkd"]["split"]
    assert split["train"] == ["phantom_000"]
    assert split["left_out"] == {
        "incomplete": ["phantom_001", "phantom_002"],
        "unlabelled": ["phantom_003", "phantom_004"],
    }
    assert split["val"] == [VALIDATION]
    assert "training cases: 1 labelled, 2 incomplete left out, 2 unlabelled left out" in log_text(folder)


def test_teacher_may_train_on_all(semi):
    configure(semi, teacher__cases="all")
    trainer = build("MSTKDTeacherTrainer")
    trainer.do_split()
    assert trainer.split["train"] == ["phantom_000", "phantom_001", "phantom_002"]


def test_teacher_without_a_complete_case_is_refused(semi):
    file = semi.preprocessed / semi.dataset / "splits_final.json"
    file.write_text(json.dumps([{"train": ["phantom_001", "phantom_002"], "val": [VALIDATION]}]))
    with pytest.raises(InputError, match=r"no training case for MSTKDTeacherTrainer.*teacher\.cases=all"):
        build("MSTKDTeacherTrainer").do_split()


def test_joint_teacher_without_a_complete_case_is_refused(semi):
    file = semi.preprocessed / semi.dataset / "splits_final.json"
    file.write_text(json.dumps([{"train": ["phantom_001", "phantom_002"], "val": [VALIDATION]}]))
    configure(semi, teacher__joint=True)
    trainer = build("KDTrainer")
    with pytest.raises(InputError, match=r"no labelled training case with all modalities.*teacher\.cases=all"):
        trainer.on_train_start()
    configure(semi, teacher__joint=True, teacher__cases="all")
    trainer = build("KDTrainer")
    trainer.do_split()
    trainer.prepare_training()


def test_fold_without_labelled_validation_is_refused(semi):
    file = semi.preprocessed / semi.dataset / "splits_final.json"
    file.write_text(json.dumps([{"train": ["phantom_000"], "val": ["phantom_003"]}]))
    with pytest.raises(InputError, match="no validation case"):
        build("ModalityDropoutTrainer").do_split()


def test_student_says_what_the_teacher_left_out(semi):
    train("MSTKDTrainer")
    folder = semi.fold("MSTKDTrainer")
    text = log_text(folder)
    assert "left out of the teacher's training: 2 incomplete" in text
    assert "3 labelled, 2 of them incomplete (without T1 2, T1ce 1, T2 1), 1 unlabelled, 1 unlabelled left out" in text
    split = checkpoints.read(folder / "checkpoint_final.pth")["mstkd"]["split"]
    assert split["train"] == ["phantom_000", "phantom_001", "phantom_002"] and split["unlabelled"] == ["phantom_003"]
    assert split["left_out"] == {"incomplete": [], "unlabelled": ["phantom_004"]}
    assert "unlabelled" in text.split("terms: ")[1]


def test_teacher_that_saw_a_validation_case_is_refused(semi):
    file = semi.fold("MSTKDTeacherTrainer") / "checkpoint_final.pth"
    content = checkpoints.read(file)
    content["mstkd"]["split"]["train"].append(VALIDATION)
    checkpoints.write(content, file)
    with pytest.raises(InputError, match=f"1 validation cases of this fold, such as {VALIDATION}"):
        build("MSTKDTrainer").on_train_start()


@pytest.mark.parametrize("name", ["MSTKDTrainer", "AdaMMTrainer"])
def test_teacher_is_trusted_for_complete_samples_only(make_trainer, name):
    """Terms of a batch with one complete sample are those of this sample alone, by its share."""
    options = {"batch_size": 2, "block": {"distillation": {"where": "everywhere", "ramp": 0, "fade": 0}}}
    trainer = give_teacher(make_trainer(getattr(methods, name), **options))
    wake(trainer.network)
    trainer.on_train_epoch_start()
    subset = torch.tensor([[True, False, True, True]])
    trainer.draw_availability = lambda size, present=None: subset.expand(size, -1)
    content = batch(trainer)
    data, target = content["data"], content["target"]
    present = torch.tensor([[True, True, True, True], [True, False, True, True]])
    both = trainer.compute_losses(data, target, present)
    alone = trainer.compute_losses(data[:1], [level[:1] for level in target])
    nothing = trainer.compute_losses(data, target, present[1:].expand(2, -1))
    taught = [term.name for term in trainer.terms if term.needs_teacher]
    assert taught
    for term in taught:
        torch.testing.assert_close(both.terms[term], alone.terms[term] / 2, rtol=1e-4, atol=1e-6)
        assert nothing.terms[term] == 0
    assert both.adversary_input is None or both.adversary_input[1] == 0.5


# ---- unlabelled cases ------------------------------------------------------------------------------------------------


def test_pseudo_label_loss_by_hand():
    # two voxels, one region: the guide says 0.9 and 0.6 (not certain)
    guide = torch.logit(torch.tensor([[[0.9, 0.6]]]))
    student = torch.logit(torch.tensor([[[0.8, 0.5]]]))
    cross_entropy = -(0.9 * np.log(0.8) + 0.1 * np.log(0.2)) / 2
    overlap, size = 0.8 + 0.5, 0.8 + 0.5 + 2
    expected = cross_entropy + 0.5 * (1 - 2 * overlap / size)
    found = pseudo_label_loss(student, guide, regions=True, confidence=0.7, dice=0.5)
    assert float(found) == pytest.approx(expected, abs=1e-5)
    # classes: background 0.2, foreground 0.8 in both voxels; the student is right in the first only
    guide = torch.tensor([[[0.2, 0.2], [0.8, 0.8]]]).log()
    student = torch.tensor([[[0.1, 0.7], [0.9, 0.3]]]).log()
    cross_entropy = -np.mean([0.2 * np.log(0.1) + 0.8 * np.log(0.9), 0.2 * np.log(0.7) + 0.8 * np.log(0.3)])
    found = pseudo_label_loss(student, guide, regions=False)
    assert float(found) == pytest.approx(cross_entropy + 1 - 2 * 1.2 / (1.2 + 2), abs=1e-5)


@pytest.mark.parametrize("regions", [True, False])
def test_pseudo_label_loss_reaches_the_student_only(regions):
    guide = torch.randn(2, 3, 4, 4, requires_grad=True)
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    pseudo_label_loss(student, guide, regions=regions).backward()
    assert guide.grad is None and student.grad.abs().sum() > 0
    uncertain = pseudo_label_loss(student.detach(), torch.zeros(2, 3, 4, 4), regions=regions, dice=0.0)
    assert uncertain == 0
    # nothing is left to be certain of, and decisions are the same
    hot = pseudo_label_loss(student.detach(), guide.detach(), regions=regions, dice=0.0, temperature=1e6)
    assert hot == 0
    cold, warm = (
        pseudo_label_loss(student.detach(), guide.detach(), regions=regions, confidence=0.999999, temperature=t)
        for t in (1e3, 2e3)
    )
    assert cold == warm > 0


@pytest.mark.parametrize("size", [4, 3])
def test_the_guide_has_the_temperature_of_its_evaluation(make_trainer, size):
    trainer = make_trainer(methods.KDTrainer, block={"unlabelled": {"temperature": None}})
    with pytest.raises(InputError, match="is null, but this training has no trained teacher; give a number"):
        trainer.guide_temperature  # noqa: B018
    path = "Dataset/Teacher__nnUNetPlans__tiny/fold_0/checkpoint_final.pth"
    trainer._teacher_identity = {"path": path, "sha256": "abcdef"}
    file = Path(trainer.output_folder_base).parents[1] / "Dataset" / "Teacher__nnUNetPlans__tiny" / SUMMARY
    file.parent.mkdir(parents=True)
    content = {"calibration": {"temperature": {"1": 3.0, str(size): 1.5}}}
    file.write_text(json.dumps({**content, "weights": {"0": "another"}}))
    with pytest.raises(InputError, match="is of other weights of fold 0"):
        trainer.guide_temperature  # noqa: B018
    file.write_text(json.dumps({**content, "weights": {"0": "abc"}}))
    if size == 4:
        assert trainer.guide_temperature == 1.5
    else:
        with pytest.raises(InputError, match="was not evaluated with all 4 modalities"):
            trainer.guide_temperature  # noqa: B018


def with_unlabelled(trainer, seed=100):
    data = batch(trainer, batch_size=1, seed=seed)["data"]
    trainer.unlabelled_batches = iter([{"data": data}] * 9)
    return data


def test_an_unlabelled_case_with_nan_is_named(make_trainer):
    trainer = make_trainer(methods.SelfDistillationTrainer)
    trainer.on_train_epoch_start()
    data = batch(trainer, batch_size=1)["data"]
    data[0, :, 0] = float("nan")  # in any subset
    trainer.unlabelled_batches = iter([{"data": data, "keys": ["unlabelled_7"]}])
    with pytest.raises(FloatingPointError, match="cases case_0, case_1, unlabelled_7"):
        trainer.train_step(batch(trainer))


@pytest.mark.parametrize("labels", [None, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize(
    "name", ["ModalityDropoutTrainer", "SelfDistillationTrainer", "MSTKDTrainer", "AdaMMTrainer", "MedMAPMSTKDTrainer"]
)
def test_unlabelled_samples_are_added_and_change_no_other_term(make_trainer, name, labels):
    block = {"distillation": {"ramp": 0}, "unlabelled": {"ramp": 0}, "medmap": {"weight": 0}}
    found = []
    for added in (False, True):
        trainer = make_trainer(getattr(methods, name), labels=labels, block=block)
        if hasattr(trainer, "teacher_trainer"):
            give_teacher(trainer)
        trainer.on_train_epoch_start()
        trainer.draw_availability = lambda size, present=None: torch.tensor([[True, False, True, True]]).expand(
            size, -1
        )
        if added:
            with_unlabelled(trainer)
        content = batch(trainer)
        losses = trainer.compute_losses(content["data"], content["target"])
        found.append({key: float(value.detach()) for key, value in losses.terms.items()})
    extra = found[1].pop("unlabelled")
    assert extra > 0
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def test_teacher_without_terms_is_asked_about_unlabelled_samples_only(make_trainer):
    """Also in a batch whose complete samples come after the incomplete ones."""
    options = {"batch_size": 3, "block": {"mstkd": dict.fromkeys(TERMS, 0), "teacher": {"warm_start": False}}}
    trainer = give_teacher(make_trainer(methods.MSTKDTrainer, **options))
    trainer.on_train_epoch_start()
    with_unlabelled(trainer)
    asked, real = [], trainer.forward_teacher
    trainer.forward_teacher = lambda complete: asked.append(len(complete)) or real(complete)
    content = batch(trainer)
    present = torch.ones(3, 4, dtype=torch.bool)
    present[0, 0] = False
    losses = trainer.compute_losses(content["data"], content["target"], present)
    assert asked == [1] and losses.terms["unlabelled"] > 0


def test_unlabelled_loss_has_its_own_ramp_and_no_fade(make_trainer):
    trainer = make_trainer(methods.MSTKDTrainer, block={"unlabelled": {"weight": 2.0, "ramp": 0.5}})
    trainer.on_train_epoch_start()
    assert trainer.unlabelled_weight() < 0.05
    trainer.current_epoch = trainer.num_epochs - 1
    assert trainer.unlabelled_weight() == 2.0 and trainer.teacher_factor() < 0.01


def test_dropout_guides_itself_with_all_modalities(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, block={"unlabelled": {"share": 0.5}})
    data = with_unlabelled(trainer)
    before = state(trainer.network)
    logits = trainer.guide(None, data)
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        torch.testing.assert_close(logits, trainer.network(data))
    assert not logits.requires_grad and trainer.network.training and same(before, state(trainer.network))


@pytest.mark.parametrize("name", ["ModalityDropoutTrainer", "SelfDistillationTrainer", "SMMLTrainer", "MedMAPTrainer"])
def test_trainers_without_a_teacher_leave_unlabelled_cases_out(semi, name):
    trainer = build(name)
    trainer.do_split()
    assert trainer.split["unlabelled"] == [] and len(trainer.split["left_out"]["unlabelled"]) == 2


def test_smml_refuses_a_share(make_trainer):
    with pytest.raises(InputError, match=r"unlabelled\.share"):
        make_trainer(methods.SMMLTrainer, block={"unlabelled": {"share": 0.5}})


@pytest.mark.parametrize("workers", ["0", "2"])
def test_batches_of_unlabelled_cases(semi, monkeypatch, workers):
    """They come from the unlabelled cases alone, augmented like the others, also with nnU-Net's workers."""
    configure(semi, unlabelled__share=1.5)
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    trainer = build("MSTKDTrainer")
    trainer.on_train_start()
    try:
        for _ in range(3):
            labelled, other = next(trainer.dataloader_train), next(trainer.unlabelled_batches)
            assert set(map(str, other["keys"])) == {"phantom_003"} and len(other["data"]) == 3
            assert "phantom_003" not in set(map(str, labelled["keys"]))
            assert other["data"].shape[1:] == labelled["data"].shape[1:]
            assert other["data"].any()
    finally:
        trainer.finish_loaders()


@pytest.mark.parametrize("name", ["MSTKDTrainer", "ModalityDropoutTrainer", "SMMLTrainer"])
def test_resumed_training_equals_uninterrupted_one(semi, name):
    configure(semi, schedule__epochs=3, **({} if name == "SMMLTrainer" else {"unlabelled__share": 0.5}))
    train(name)
    folder = semi.fold(name)
    whole = checkpoints.read(folder / "checkpoint_final.pth")
    shutil.rmtree(folder)
    train_until_killed(name, 2)
    train(name, continue_training=True)
    resumed = checkpoints.read(folder / "checkpoint_final.pth")
    assert same(whole["network_weights"], resumed["network_weights"])
    assert same(whole["mstkd"], resumed["mstkd"])


def test_training_validates_labelled_cases(semi):
    train("ModalityDropoutTrainer", validate=True)
    predicted = semi.fold("ModalityDropoutTrainer") / "validation"
    assert [file.name for file in predicted.glob("*.nii.gz")] == [f"{VALIDATION}.nii.gz"]
