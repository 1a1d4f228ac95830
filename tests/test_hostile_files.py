"""Files of strangers: nothing in them is executed, and nothing leads out of the output folder."""

from __future__ import annotations

import ast
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluate_inputs import evaluate, write_dataset
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from predict_inputs import files, predict, write, write_case
from tiny import NO_TERMS, dataset_json, plans

import nnunetv2_mstkd
from nnunetv2_mstkd import cli
from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd.dataset_conversion.restoring import restoration
from nnunetv2_mstkd.evaluation.montage import Montage
from nnunetv2_mstkd.evaluation.records import CaseRecords
from nnunetv2_mstkd.nnunet.description import find_format
from nnunetv2_mstkd.nnunet.folders import check_file_name
from nnunetv2_mstkd.nnunet.model import load_predictor
from nnunetv2_mstkd.nnunet.safe_plans import check_architecture, open_plans
from nnunetv2_mstkd.training.teacher import load_teacher

CPU = torch.device("cpu")
PACKAGE = Path(nnunetv2_mstkd.__file__).parent
ELSEWHERE = ["../out", "a/b", "/absolute", "a\\b", "..", ".", "", "nul\0", 5, None]


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def poison(file: Path, marker: Path) -> None:
    content = torch.load(file, weights_only=False)
    torch.save({**content, "optimizer_state": Attack(marker)}, file)


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(capsys: pytest.CaptureFixture, code: int) -> str:
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    return error


# ---- pickles -------------------------------------------------------------------------------------------------------


def test_checkpoint_with_code_is_refused_by_commands(folders, model, capsys):
    marker = folders / "executed"
    poison(model / "fold_0" / "checkpoint_final.pth", marker)
    write_dataset(model)
    for command in (lambda: predict(folders, model), lambda: evaluate(model, "-f", "0")):
        error = refused(capsys, command())
        assert "asks to import posix.mkdir" in error and "--trust" in error
    assert not marker.exists()
    assert not (folders / "out").exists() and not (model / "subsets").exists()
    # it is a program indeed: --trust hands it to nnU-Net
    assert predict(folders, model, "--trust") == 0
    assert "warning: --trust" in capsys.readouterr().err
    assert marker.exists()


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_nothing_is_unpickled_by_nnunet(folders, model, monkeypatch, command):
    """Not even by nnU-Net's code on our behalf: every call of torch.load says weights_only."""
    real, asked = torch.load, []

    def load(*arguments, **options):
        asked.append(options.get("weights_only"))
        return real(*arguments, **options)

    write_dataset(model)
    monkeypatch.setattr(torch, "load", load)
    if command == "predict":
        assert predict(folders, model) == 0
    else:
        assert evaluate(model, "-f", "0", "--subsets", "T0", "--metrics", "dice", "--strips", "0") == 0
    assert asked and set(asked) == {True}


def test_a_poisoned_checkpoint_to_continue_from_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(trainers.ModalityDropoutTrainer)
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    poison(file, tmp_path / "executed")
    with pytest.raises(ValueError, match=r"refused: it asks to import posix\.mkdir"):
        trainer.load_checkpoint(str(file))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", trainers.__all__)
def test_no_trainer_unpickles_what_it_continues_from(make_trainer, tmp_path, monkeypatch, name):
    trainer = make_trainer(getattr(trainers, name), block=NO_TERMS)
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    real, asked = torch.load, []

    def load(*arguments, **options):
        asked.append(options.get("weights_only"))
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    make_trainer(getattr(trainers, name), block=NO_TERMS, seed=1).load_checkpoint(str(file))
    assert asked == [True]


def test_poisoned_weights_to_start_from_are_refused(make_trainer, tmp_path):
    file = tmp_path / "start.pth"
    torch.save({"network_weights": {}, "x": Attack(tmp_path / "executed")}, file)
    trainer = make_trainer(trainers.ModalityDropoutTrainer, block={"schedule": {"init_from": str(file)}})
    with pytest.raises(ValueError, match=r"refused: it asks to import posix\.mkdir"):
        trainer.prepare_training()
    assert not (tmp_path / "executed").exists()


# ---- plans ---------------------------------------------------------------------------------------------------------


def empties(file: Path) -> Callable[[dict], None]:
    """Plans whose activation function opens ``file`` for writing."""

    def change(content: dict) -> None:
        kwargs = content["configurations"]["tiny"]["architecture"]["arch_kwargs"]
        kwargs["nonlin"] = "logging.basicConfig"
        kwargs["nonlin_kwargs"] = {"filename": str(file), "filemode": "w", "force": True}

    return change


def test_plans_that_would_empty_a_file_are_refused(folders, model, capsys):
    victim = folders / "thesis.txt"
    victim.write_text("years of work")
    edit(model / "plans.json", empties(victim))
    assert "plans.json names 'logging.basicConfig' as nonlin" in refused(capsys, predict(folders, model))
    write_dataset(model)
    assert "plans.json names 'logging.basicConfig' as nonlin" in refused(capsys, evaluate(model, "-f", "0"))
    assert victim.read_text() == "years of work"
    # an attack indeed, as nnU-Net's loader shows
    handlers = logging.root.handlers[:]
    try:
        load_predictor(model, (0,), device=CPU, trust=True)
    finally:
        logging.root.handlers[:] = handlers
    assert victim.read_text() == ""


def test_a_teacher_whose_plans_would_empty_a_file_is_refused(make_trainer, tmp_path):
    victim = tmp_path / "thesis.txt"
    victim.write_text("years of work")
    trainer = make_trainer(trainers.MSTKDTeacherTrainer)
    empties(victim)(trainer.my_init_kwargs["plans"])
    file = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    with pytest.raises(ValueError, match=r"teacher .*checkpoint_final\.pth names 'logging\.basicConfig' as nonlin"):
        load_teacher(file, trainers.MSTKDTeacherTrainer, trainer)
    assert victim.read_text() == "years of work"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        # each of these is found by nnU-Net's search and then called
        ("image_reader_writer", "tifffile"),
        ("image_reader_writer", "isfile"),
        ("image_reader_writer", "BaseReaderWriter"),
        ("label_manager", "deepcopy"),
        ("preprocessor_name", "os"),
        ("preprocessor_name", "maybe_mkdir_p"),
        ("preprocessor_name", "ZScoreNormalization"),
        ("normalization_schemes", "ABC"),
        ("normalization_schemes", "ImageNormalization"),
        ("resampling_fn_data", "recursive_find_resampling_fn_by_name"),
        ("resampling_fn_seg", "resize"),
        ("resampling_fn_probabilities", "torch"),
        ("resampling_fn_probabilities", "map_coordinates"),
        # and these are no names at all
        ("image_reader_writer", "os.system"),
        ("preprocessor_name", "../x"),
        ("resampling_fn_data", 3),
        ("label_manager", None),
    ],
)
def test_what_nnunet_finds_by_name_must_be_what_the_key_says(folders, key, name):
    content = plans()
    table = content if key in ("image_reader_writer", "label_manager") else content["configurations"]["tiny"]
    table[key] = [name] * 4 if key == "normalization_schemes" else name
    with pytest.raises(ValueError, match=rf"here names .* as {key}, expected .*; nothing was built"):
        open_plans(content, "tiny", "here")


@pytest.mark.parametrize("key", ["dataset_name", "plans_name", "data_identifier"])
@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_plans_cannot_name_a_folder_elsewhere(folders, key, name):
    """In a folder of the attacker's choice nnU-Net would unpickle the properties of the preprocessed cases."""
    content = plans()
    (content["configurations"]["tiny"] if key == "data_identifier" else content)[key] = name
    with pytest.raises(ValueError, match=f"{key} in here is"):
        open_plans(content, "tiny", "here")


@pytest.mark.parametrize(
    "name",
    [
        # a real layer of PyTorch, but not of the packages that networks are made of
        "dynamic_network_architectures.architectures.unet.torch.jit.ScriptModule",
        "dynamic_network_architectures.architectures.unet.nn.Sequential",
        "nnunetv2_mstkd.methods.medmap.network.nn.Identity",
    ],
)
def test_a_network_counts_by_the_module_that_defines_it(name):
    architecture = {**plans()["configurations"]["tiny"]["architecture"], "network_class_name": name}
    with pytest.raises(ValueError, match="as network_class_name, expected a network layer"):
        check_architecture(ConfigurationManager({"architecture": architecture}))


@pytest.mark.parametrize("trainer", trainers.__all__)
def test_the_plans_of_every_trainer_are_accepted(make_trainer, trainer):
    made = make_trainer(getattr(trainers, trainer))
    open_plans(made.plans_manager.plans, "tiny", "here")


@pytest.mark.parametrize("name", ["resample_torch_fornnunet", "no_resampling_hack", "resample_data_or_seg_to_shape"])
def test_nnunets_own_resampling_functions_are_accepted(name):
    content = plans()
    content["configurations"]["tiny"].update(dict.fromkeys(["resampling_fn_data", "resampling_fn_seg"], name))
    open_plans(content, "tiny", "here")


@pytest.mark.parametrize("name", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "Tiff3DIO", "NaturalImage2DIO"])
def test_fill_missing_accepts_only_nnunet_readers(folders, model, name):
    edit(model / "plans.json", lambda content: content.update(image_reader_writer=name))
    assert find_format(None, model)[1].__name__ == name
    edit(model / "plans.json", lambda content: content.update(image_reader_writer="tifffile"))
    with pytest.raises(ValueError, match="names 'tifffile' as image_reader_writer"):
        find_format(None, model)


# ---- names that become paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_a_name_that_leads_elsewhere_is_none(name):
    with pytest.raises(ValueError, match=r"a case id is .*, expected the name of one file or folder"):
        check_file_name(name, "a case id")
    assert check_file_name("BraTS-GLI-00001-100", "a case id") == "BraTS-GLI-00001-100"


@pytest.mark.parametrize("ending", ["/../../x.nii.gz", ".nii/../x", "nii.gz", "", ".", 5, "\\x.nii"])
def test_a_file_ending_that_leads_elsewhere_is_refused(folders, model, capsys, ending):
    edit(model / "dataset.json", lambda content: content.update(file_ending=ending))
    before = files(folders)
    assert "file_ending in" in refused(capsys, predict(folders, model))
    arguments = ["-i", str(folders / "in"), "-o", str(folders / "full"), "-m", str(model)]
    assert "file_ending in" in refused(capsys, cli.main(["fill-missing", *arguments]))
    assert files(folders) == before


def test_a_case_of_dataset_json_cannot_write_elsewhere(folders, model, capsys):
    """nnU-Net takes cases from a table in dataset.json; their names become files of the evaluation."""
    raw = write_dataset(model)
    edit(raw / "dataset.json", lambda content: content.update(dataset={"../../../evil": {"images": [], "label": ""}}))
    records = CaseRecords(folders / "subsets", {})
    for name in ELSEWHERE:
        with pytest.raises(ValueError, match="a case id is"):
            records.load("0", name)
    assert evaluate(model, "-f", "0", "--mask-first", "--subsets", "T0") == 2
    assert not list(folders.rglob("evil*"))
    with pytest.raises(ValueError, match="a case id is"):
        records.save("0", "../../../evil", {}, Montage.__new__(Montage))


def test_a_split_in_a_checkpoint_cannot_name_files_elsewhere(folders, model, capsys):
    write_dataset(model)
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=True)
    torch.save({**content, "mstkd": {"split": {"train": [], "val": ["../../../evil"]}}}, file)
    assert "no preprocessed data of the validation case ../../../evil" in refused(capsys, evaluate(model, "-f", "0"))
    assert not list(folders.rglob("evil*"))


@pytest.mark.parametrize("name", ["../{case}.nii.gz", "/tmp/{case}.nii.gz", "sub/{case}.nii.gz", "label.nii.gz", 5])
def test_restored_labels_stay_in_the_output_folder(folders, capsys, name):
    predicted = folders / "predicted"
    write_case(predicted, "a", [0])
    record = {"release_values": {"0": 0, "1": 4}, "label_file": name}
    (predicted / "dataset.json").write_text(json.dumps({**dataset_json(), "mstkd_conversion": record}))
    before = files(folders)
    code = cli.main(["restore-labels", "-i", str(predicted), "-o", str(folders / "restored")])
    assert "label_file in mstkd_conversion of dataset.json is" in refused(capsys, code)
    assert files(folders) == before


@pytest.mark.parametrize(
    "values", [{"0": 300}, {"300": 0}, {"0": -1}, {"0": True}, {"0": "4"}, {"-1": 0}, {"x": 0}, [1, 2], 3]
)
def test_a_table_of_labels_holds_labels(values):
    record = {"release_values": values, "label_file": "{case}.nii.gz"}
    with pytest.raises(ValueError, match="release_values in mstkd_conversion"):
        restoration({"mstkd_conversion": record})


@pytest.mark.parametrize("value", [300, "4", [1], True])
def test_a_replacement_of_small_tumors_is_a_label(value):
    record = {"release_values": {"0": 0}, "label_file": "{case}.nii.gz", "small_et_becomes": value}
    with pytest.raises(ValueError, match="small_et_becomes in mstkd_conversion"):
        restoration({"mstkd_conversion": record})


def test_a_link_in_a_source_does_not_lead_out_of_it(folders, capsys):
    source, secret = folders / "source", folders / "secret.nii.gz"
    (source / "case_1").mkdir(parents=True)
    label = write(secret, torch.zeros(6, 6, 6).numpy())
    for name in ("t1", "seg"):
        (source / "case_1" / f"{name}.nii.gz").symlink_to(label)
    description = {"modalities": {"T1": "t1.nii.gz"}, "label": "seg.nii.gz", "labels": {"background": 0, "x": 1}}
    (folders / "d.json").write_text(json.dumps(description))
    arguments = ["generic", str(source), "-d", "77", "--name", "X", "--description", str(folders / "d.json")]
    assert cli.main(["convert", *arguments]) != 0
    assert "--follow-links accepts it" in "".join(capsys.readouterr())


# ---- the source of this package ------------------------------------------------------------------------------------


def calls(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_source_has_no_unsafe_calls():
    """No eval, exec, shell, unsafe YAML or NumPy pickle, and torch.load only with weights_only."""
    loads = []
    for folder in (PACKAGE, PACKAGE.parent / "dataset_conversion"):
        for file in folder.rglob("*.py"):
            for call in calls(ast.parse(file.read_text(encoding="utf-8"))):
                name = ast.unparse(call.func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                where = f"{file.name}:{call.lineno} {name}"
                assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "__import__"), where
                assert name.split(".")[0] not in ("pickle", "marshal", "shelve") and name != "yaml.load", where
                assert not name.endswith(("extractall", "unpack_archive")), where
                assert options.get("shell", "False") == "False", where
                assert name != "np.load" or options.get("allow_pickle") == "False", where
                if name == "torch.load":
                    loads.append(file.name)
                    assert options.get("weights_only") == "True", where
    assert loads == ["checkpoints.py"]
