from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from predict_inputs import edit_checkpoint, write_model

from nnunetv2_mstkd import cli
from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd.nnunet import model as model_module
from nnunetv2_mstkd.nnunet import trainers as finding
from nnunetv2_mstkd.nnunet.folders import find_checkpoints, find_model_folder, parse_folds
from nnunetv2_mstkd.nnunet.model import load_predictor
from nnunetv2_mstkd.nnunet.safe_plans import check_architecture
from nnunetv2_mstkd.nnunet.trainers import find_trainer

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "results"


@pytest.fixture
def model(results: Path) -> Path:
    return write_model(trainers.MSTKDTrainer)


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ---- finding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["901", "Dataset901_Tiny"])
def test_a_model_is_found_as_nnunet_finds_it(results, model, dataset):
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    found = find_model_folder(dataset, "MSTKDTrainer", "nnUNetPlans", "tiny")
    assert found == model == Path(get_output_folder(dataset, "MSTKDTrainer", "nnUNetPlans", "tiny"))


def test_missing_model_lists_the_others(results, model):
    with pytest.raises(FileNotFoundError) as caught:
        find_model_folder("901", "nnUNetTrainer", "nnUNetPlans", "tiny")
    message = str(caught.value)
    assert str(results / "Dataset901_Tiny" / "nnUNetTrainer__nnUNetPlans__tiny") in message
    assert message.endswith("are: MSTKDTrainer__nnUNetPlans__tiny")


def test_missing_data_set_names_the_folder(results, model, monkeypatch):
    with pytest.raises(FileNotFoundError, match=rf"no folder Dataset902_\* in {results} \(nnUNet_results\)"):
        find_model_folder("902", "MSTKDTrainer", "nnUNetPlans", "tiny")
    (results / "Dataset901_Other").mkdir()
    with pytest.raises(ValueError, match=r"ambiguous.*Dataset901_Other, Dataset901_Tiny"):
        find_model_folder("901", "MSTKDTrainer", "nnUNetPlans", "tiny")
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(FileNotFoundError, match="nnUNet_results is not set"):
        find_model_folder("901", "MSTKDTrainer", "nnUNetPlans", "tiny")


def test_missing_folds_are_named_with_those_that_are_there(results):
    model = write_model(nnUNetTrainer, folds=(0, 3))
    assert [file.parent.name for file in find_checkpoints(model, (3, 0), "checkpoint_final.pth")] == [
        "fold_3",
        "fold_0",
    ]
    with pytest.raises(FileNotFoundError) as caught:
        find_checkpoints(model, (0, 1, 2, 3, 4), "checkpoint_final.pth")
    message = str(caught.value)
    assert "fold_1/checkpoint_final.pth, fold_2/checkpoint_final.pth, fold_4/" in message
    assert message.endswith("that checkpoint is there for: -f 0 3")


def test_an_unfinished_training_is_named_as_such(results, model):
    (model / "fold_0" / "checkpoint_final.pth").rename(model / "fold_0" / "checkpoint_best.pth")
    with pytest.raises(FileNotFoundError, match=r"not finished; found instead: fold_0/checkpoint_best\.pth"):
        find_checkpoints(model, (0,), "checkpoint_final.pth")
    assert load_predictor(model, (0,), "checkpoint_best.pth", device=CPU).trainer_name == "MSTKDTrainer"
    with pytest.raises(FileNotFoundError, match=r"; found instead: fold_0/checkpoint_best\.pth"):
        find_checkpoints(model, (0,), "checkpoint_best")  # this does not mean that the training is unfinished
    with pytest.raises(FileNotFoundError, match=r"is the folder of one fold; name that of the model: -m .*tiny$"):
        find_checkpoints(model / "fold_0", (0,), "checkpoint_final.pth")
    shutil.rmtree(model / "fold_0")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint at all"):
        find_checkpoints(model, (0,), "checkpoint_final.pth")


def test_folds_are_numbers_or_all():
    assert parse_folds(["0", "all", 3]) == (0, "all", 3)
    with pytest.raises(ValueError, match="-f one -1 ²:"):
        parse_folds(["one", "-1", "²", "2"])


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_files_that_a_model_needs_are_named(model, name):
    (model / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is not valid JSON"):
        load_predictor(model, (0,), device=CPU)
    (model / name).write_text("[]")
    with pytest.raises(ValueError, match=f"{name} holds no table"):
        load_predictor(model, (0,), device=CPU)
    (model / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        load_predictor(model, (0,), device=CPU)


# ---- loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", [nnUNetTrainer, trainers.MSTKDTrainer], ids=lambda trainer: trainer.__name__)
def test_the_predictor_is_the_one_that_nnunet_makes(results, trainer):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    model = write_model(trainer, folds=(0, 1), mirroring=(0, 1, 2))
    ours = load_predictor(model, (0, 1), device=CPU, tile_step_size=0.25, use_mirroring=False)
    theirs = nnUNetPredictor(device=CPU, tile_step_size=0.25, use_mirroring=False)
    theirs.initialize_from_trained_model_folder(str(model), (0, 1))
    for name in ("trainer_name", "allowed_mirroring_axes", "tile_step_size", "use_mirroring", "use_gaussian"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert type(ours.network) is type(theirs.network)
    for mine, other in zip(ours.list_of_parameters, theirs.list_of_parameters, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    # the first fold's weights are in the network
    state = ours.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.list_of_parameters[0].items())


def test_nothing_is_unpickled(model, monkeypatch):
    real = torch.load
    asked = []

    def load(*arguments, **options):
        asked.append(options["weights_only"])
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    load_predictor(model, (0,), device=CPU)
    assert asked == [True]


class Dangerous:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_checkpoint_with_code_is_refused(model, tmp_path):
    sign = tmp_path / "executed"
    edit_checkpoint(model, lambda content: content.update(evil=Dangerous(sign)))
    with pytest.raises(ValueError, match=r"is refused.*--trust leaves the loading to nnU-Net"):
        load_predictor(model, (0,), device=CPU)
    assert not sign.exists()
    # with --trust nnU-Net's own loader executes it: that is what the warning says
    load_predictor(model, (0,), device=CPU, trust=True)
    assert sign.exists()


def test_a_damaged_checkpoint_is_not_offered_to_trust(model):
    file = model / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged") as caught:
        load_predictor(model, (0,), device=CPU)
    assert "--trust" not in str(caught.value)


def test_trust_is_announced(model, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    assert cli.main(["predict", *arguments, "--trust"]) == 2
    assert capsys.readouterr().err.startswith("warning: --trust unpickles the checkpoint")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network_class_name", "os.system"),
        ("network_class_name", "subprocess.Popen"),
        ("network_class_name", "torch.nn.Module"),
        ("network_class_name", "nnunetv2_mstkd.cli.main"),
        ("network_class_name", "dynamic_network_architectures.architecturesevil.Unet"),
        ("network_class_name", "dynamic_network_architectures.architectures.unet.NoSuchNet"),
        ("network_class_name", "dynamic_network_architectures.architectures.unet"),
        ("nonlin", "os.system"),
        ("nonlin", "torch.nn.parallel.distributed.os.system"),
        ("nonlin", "torch.nn.functional.relu"),
        ("nonlin", "torch.hub.load"),
        ("nonlin", "torch.nn.__builtins__.eval"),
        ("norm_op", 5),
    ],
)
def test_plans_may_name_network_layers_only(model, key, value):
    def change(plans: dict) -> None:
        architecture = plans["configurations"]["tiny"]["architecture"]
        (architecture if key == "network_class_name" else architecture["arch_kwargs"])[key] = value

    edit(model / "plans.json", change)
    with pytest.raises(ValueError, match=f"plans.json names .* as {key}, expected a network layer"):
        load_predictor(model, (0,), device=CPU)


def test_layers_by_all_their_usual_names_are_allowed():
    configuration = {
        "architecture": {
            # a module that has moved since these plans were written; nnU-Net finds the class by its last name
            "network_class_name": "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet",
            "arch_kwargs": {
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "norm_op": "torch.nn.InstanceNorm3d",
                "nonlin": "torch.nn.LeakyReLU",
                "block": "dynamic_network_architectures.building_blocks.residual.BottleneckD",
                "dropout_op": None,
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin", "block"],
        }
    }
    check_architecture(ConfigurationManager(configuration))


def test_weights_of_another_network_are_refused(model):
    edit_checkpoint(model, lambda content: content["network_weights"].popitem())
    with pytest.raises(ValueError, match=r"the weights in .*fold_0.* do not fit the network of"):
        load_predictor(model, (0,), device=CPU)


def test_folds_of_different_trainers_are_refused(results, model):
    other = write_model(nnUNetTrainer, folds=(1,))
    shutil.copytree(other / "fold_1", model / "fold_1")
    with pytest.raises(ValueError, match=r"different models: trainer name is MSTKDTrainer in .*fold_0"):
        load_predictor(model, (0, 1), device=CPU)


def test_a_configuration_that_the_plans_lack_is_refused(model):
    edit(model / "plans.json", lambda plans: plans["configurations"].update(other=plans["configurations"].pop("tiny")))
    with pytest.raises(ValueError, match=r"'tiny', which .*plans\.json does not have"):
        load_predictor(model, (0,), device=CPU)


def test_a_checkpoint_of_something_else_is_refused(model):
    edit_checkpoint(model, lambda content: content.pop("init_args"))
    with pytest.raises(ValueError, match=r"not an nnU-Net v2 checkpoint: it has no 'init_args'"):
        load_predictor(model, (0,), device=CPU)


def test_the_cascade_is_refused_with_a_way_out(results):
    model = write_model(nnUNetTrainer)

    def change(plans: dict) -> None:
        plans["configurations"]["tiny"]["previous_stage"] = "3d_lowres"

    edit(model / "plans.json", change)
    with pytest.raises(NotImplementedError, match=r"cascade \(after 3d_lowres\).*mstkd fill-missing"):
        load_predictor(model, (0,), device=CPU)


@pytest.mark.parametrize("name", ["NoSuchTrainer", "os", "not a name", "Tuple"])
def test_a_trainer_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"the trainer '{name}' was not found; install"):
        find_trainer(name)


def test_a_misspelt_trainer_is_answered_with_the_right_one():
    with pytest.raises(ValueError, match=r"did you mean 'MSTKDTrainer'\?"):
        find_trainer("MSTKDTrainr")


def test_trainers_are_found_without_a_word(capsys):
    assert find_trainer("nnUNetTrainer") is nnUNetTrainer
    assert find_trainer("nnUNetTrainer_5epochs").__name__ == "nnUNetTrainer_5epochs"
    assert capsys.readouterr().out == ""


def test_nnunets_own_trainers_are_imported_only_where_they_may_be_meant(tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "recursive_find_trainer_class_by_name", lambda name: nnUNetTrainer)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert find_trainer("MSTKDTrainer") is trainers.MSTKDTrainer
    for name in ("nnUNetTrainer_5epochs", "NoSuchTrainer"):
        assert find_trainer(name) is nnUNetTrainer
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))  # it may have one of the same name
    assert find_trainer("MSTKDTrainer") is nnUNetTrainer


def test_a_trainer_of_the_old_signature_is_left_to_nnunet(model, monkeypatch):
    class Old(nnUNetTrainer):
        @staticmethod
        def build_network_architecture(architecture_class_name, arch_init_kwargs, *others):
            raise AssertionError

    monkeypatch.setattr(model_module, "find_trainer", lambda name: Old)
    with pytest.raises(ValueError, match=r"signature of nnU-Net before 2\.7; --trust"):
        load_predictor(model, (0,), device=CPU)


def test_trainers_are_found_without_autoload(model, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert load_predictor(model, (0,), device=CPU).trainer_name == "MSTKDTrainer"
