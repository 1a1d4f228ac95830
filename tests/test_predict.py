from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
import torch
from predict_inputs import CHANNELS, TURNED, files, noise, read, write, write_case, write_model

from nnunetv2_mstkd import cli

PRESENT = {"complete": [0, 1, 2, 3], "one": [2], "two": [1, 3]}
"""Cases and the channels that have a file; the first channel is absent in two of them."""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's three folders, and an input folder with the cases of PRESENT."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for name, channels in PRESENT.items():
        write_case(tmp_path / "in", name, channels)
    return tmp_path


def trainer_class(name: str) -> type:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunetv2_mstkd import trainers

    return nnUNetTrainer if name == "nnUNetTrainer" else getattr(trainers, name)


@pytest.fixture
def model(folders: Path) -> Path:
    return write_model(trainer_class("MSTKDTrainer"))


def predict(folders: Path, model: Path, *options: str, output: str = "out", source: str = "in") -> int:
    """Run ``mstkd predict`` in this process."""
    arguments = ["-i", str(folders / source), "-o", str(folders / output), "-m", str(model)]
    if "-f" not in options:
        arguments += ["-f", "0"]
    return cli.main(["predict", *arguments, "-device", "cpu", "-npp", "0", "-nps", "0", *options])


def fill(folders: Path, model: Path, *options: str) -> Path:
    assert (
        cli.main(["fill-missing", "-i", str(folders / "in"), "-o", str(folders / "full"), "-m", str(model), *options])
        == 0
    )
    return folders / "full"


def stock(model: Path, source: Path, output: Path, *, folds: Sequence[int] = (0,), probabilities: bool = False) -> Path:
    """What ``nnUNetv2_predict`` calls with ``-npp 0 -nps 0``."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), tuple(folds))
    output.mkdir()
    predictor.predict_from_files_sequential(str(source), str(output), save_probabilities=probabilities)
    return output


def segmentations(folder: Path, ending: str = ".nii.gz") -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name.endswith(ending)}


def record(folder: Path) -> dict:
    return json.loads((folder / "predictions.json").read_text())


# ---- the same as stock prediction on zero images ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("MSTKDTrainer", {}),
        ("ModalityDropoutTrainer", {}),
        ("nnUNetTrainer", {}),
        ("MSTKDTrainer", {"labels": tiny.REGIONS}),
        ("MSTKDTrainer", {"mirroring": (0, 2)}),
        ("MSTKDTrainer", {"dimensions": 2}),
        ("FullModalityTrainer", {"residual": True}),
    ],
    ids=["student", "dropout", "stock trainer", "regions", "mirroring", "2d", "residual"],
)
def test_segments_like_nnunet_on_zero_images(folders, trainer, options):
    model = write_model(trainer_class(trainer), **options)
    assert predict(folders, model) == 0
    expected = segmentations(stock(model, fill(folders, model), folders / "stock"))
    assert sorted(expected) == [f"{name}.nii.gz" for name in sorted(PRESENT)]
    assert segmentations(folders / "out") == expected
    assert all(len(np.unique(read(folders / "out" / name))) > 1 for name in expected)


def test_several_folds_are_averaged_like_in_nnunet(folders):
    model = write_model(trainer_class("MSTKDTrainer"), folds=(0, 1))
    assert predict(folders, model, "-f", "0", "1") == 0
    assert predict(folders, model, "-f", "1", output="single") == 0
    expected = segmentations(stock(model, fill(folders, model), folders / "stock", folds=(0, 1)))
    assert segmentations(folders / "out") == expected
    assert segmentations(folders / "single") != expected
    assert record(folders / "out")["folds"] == [0, 1]


def test_probabilities_are_those_of_nnunet(folders, model):
    assert predict(folders, model, "--save_probabilities") == 0
    expected = stock(model, fill(folders, model), folders / "stock", probabilities=True)
    for name in PRESENT:
        ours, theirs = (np.load(folder / f"{name}.npz")["probabilities"] for folder in (folders / "out", expected))
        np.testing.assert_array_equal(ours, theirs)
        assert (folders / "out" / f"{name}.pkl").is_file()


def test_axes_that_the_plans_swap_are_swapped_back(folders):
    model = write_model(trainer_class("MSTKDTrainer"))
    plans = json.loads((model / "plans.json").read_text())
    plans.update(transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0])
    (model / "plans.json").write_text(json.dumps(plans))
    assert predict(folders, model) == 0
    assert segmentations(folders / "out") == segmentations(stock(model, fill(folders, model), folders / "stock"))
    assert read(folders / "out" / "one.nii.gz").shape == noise(0).shape


@pytest.mark.parametrize(
    ("ending", "reader"),
    [
        (".mha", "SimpleITKIO"),
        (".nrrd", "SimpleITKIO"),
        (".gipl", "SimpleITKIO"),
        (".nii", "NibabelIO"),
        (".nii.gz", "SimpleITKIOWithReorient"),
        (".nii.gz", "NibabelIOWithReorient"),
    ],
)
def test_every_format_of_the_plans_reader_is_predicted(folders, ending, reader):
    model = write_model(trainer_class("MSTKDTrainer"), file_ending=ending, reader=reader)
    for path in (folders / "in").iterdir():
        path.unlink()
    for name, channels in PRESENT.items():
        write_case(folders / "in", name, channels, ending=ending)
    assert predict(folders, model) == 0
    expected = stock(model, fill(folders, model), folders / "stock")
    for name in PRESENT:
        np.testing.assert_array_equal(read(folders / "out" / f"{name}{ending}"), read(expected / f"{name}{ending}"))


def test_sheared_nifti_images_are_read_by_nibabel_alone(folders):
    import nibabel

    model = write_model(trainer_class("MSTKDTrainer"), reader="NibabelIO")
    affine = np.array([[1, 0.3, 0, 5], [0, 1, 0, -2], [0, 0, 1.25, 1], [0, 0, 0, 1.0]])
    for path in (folders / "in").iterdir():
        path.unlink()
    for channel in (1, 2):
        image = nibabel.Nifti1Image(noise(channel).transpose(), affine)
        nibabel.save(image, folders / "in" / f"case_{channel:04d}.nii.gz")
    assert predict(folders, model) == 0
    found = nibabel.load(folders / "out" / "case.nii.gz")
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    expected = nibabel.load(stock(model, fill(folders, model), folders / "stock") / "case.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))


@pytest.mark.parametrize(
    ("ending", "reader", "shape"), [(".png", "NaturalImage2DIO", (20, 18)), (".tif", "Tiff3DIO", None)]
)
def test_images_without_a_place_in_space_are_predicted(folders, ending, reader, shape):
    model = write_model(
        trainer_class("MSTKDTrainer"), file_ending=ending, reader=reader, dimensions=2 if ending == ".png" else 3
    )
    for path in (folders / "in").iterdir():
        path.unlink()
    for channel in (1, 2):
        image = noise(channel) if shape is None else noise(channel, shape)
        write(folders / "in" / f"case_{channel:04d}{ending}", image.astype(np.uint8))
    if ending == ".tif":
        (folders / "in" / "case.json").write_text('{"spacing": [1.25, 1, 1]}')
    assert predict(folders, model) == 0
    expected = stock(model, fill(folders, model), folders / "stock")
    assert (folders / "out" / f"case{ending}").read_bytes() == (expected / f"case{ending}").read_bytes()
    if ending == ".tif":
        assert json.loads((folders / "out" / "case.json").read_text()) == {"spacing": [1.25, 1, 1]}


def test_two_dimensional_images_are_predicted(folders):
    model = write_model(trainer_class("MSTKDTrainer"), dimensions=2)
    for path in (folders / "in").iterdir():
        path.unlink()
    write(folders / "in" / "flat_0002.nii.gz", noise(1, (20, 18)))
    assert predict(folders, model) == 0
    assert segmentations(folders / "out") == segmentations(stock(model, fill(folders, model), folders / "stock"))
    assert read(folders / "out" / "flat.nii.gz").shape == (20, 18)


def test_commands_in_processes_of_their_own_agree(folders, model):
    """nnUNetv2_predict and mstkd predict as they are called; the latter with background processes."""
    from nnunetv2_mstkd._register import TRAINER_PATH

    variables = {
        **os.environ,
        "nnUNet_extTrainer": TRAINER_PATH,
        "nnUNet_def_n_proc": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    which = ["-d", "901", "-c", "tiny", "-f", "0", "-tr", "MSTKDTrainer", "-device", "cpu"]
    full = fill(folders, model)
    theirs = ["-c", "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as run; run()"]
    ours = ["-m", "nnunetv2_mstkd.cli", "predict"]
    for code, options in (
        (theirs, ["-i", str(full), "-o", str(folders / "stock"), "-npp", "0", "-nps", "0"]),
        (ours, ["-i", str(folders / "in"), "-o", str(folders / "out"), "-npp", "1", "-nps", "1"]),
    ):
        done = subprocess.run([sys.executable, *code, *which, *options], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert segmentations(folders / "out") == segmentations(folders / "stock")
    assert len(segmentations(folders / "out")) == 3
    assert "two (T1+T3)" in done.stderr  # the bar


# ---- which modalities -------------------------------------------------------------------------------------------


def test_the_record_says_what_each_case_was_predicted_from(folders, model, capsys):
    assert predict(folders, model) == 0
    found = record(folders / "out")
    assert found["cases"] == {
        "complete": {"subset": "T0+T1+T2+T3", "modalities": ["T0", "T1", "T2", "T3"], "absent": []},
        "one": {"subset": "T2", "modalities": ["T2"], "absent": ["T0", "T1", "T3"]},
        "two": {"subset": "T1+T3", "modalities": ["T1", "T3"], "absent": ["T0", "T2"]},
    }
    assert found["model"] == "MSTKDTrainer__nnUNetPlans__tiny"
    assert (found["trainer"], found["folds"], found["channels"]) == ("MSTKDTrainer", [0], ["T0", "T1", "T2", "T3"])
    assert {"dataset.json", "plans.json"} <= set(files(folders / "out"))
    out = capsys.readouterr().out
    assert "3 cases predicted" in out and "  T1+T3: 1\n" in out


def test_the_record_holds_the_expected_dice_of_an_evaluation(folders, model, capsys):
    (model / "subsets").mkdir()
    subsets = {"T3+T1": {"WT": {"dice": 0.8}, "ET": {"dice": None}}, "all": {"WT": {"dice": 0.9}}}
    (model / "subsets" / "summary.json").write_text(json.dumps({"subsets": subsets}))
    assert predict(folders, model) == 0
    cases = record(folders / "out")["cases"]
    assert {name: case["expected_dice"] for name, case in cases.items()} == {
        "complete": {"WT": 0.9},
        "one": None,
        "two": {"WT": 0.8},
    }
    assert "T1+T3: 1 (expected Dice: WT 0.800)" in capsys.readouterr().out


def test_a_broken_evaluation_is_a_warning(folders, model, capsys):
    (model / "subsets").mkdir()
    (model / "subsets" / "summary.json").write_text("{")
    assert predict(folders, model) == 0
    assert "warning" in capsys.readouterr().err
    assert "expected_dice" not in record(folders / "out")["cases"]["one"]


def test_the_input_folder_stays_as_it_is(folders, model):
    before = files(folders / "in")
    assert predict(folders, model) == 0
    assert files(folders / "in") == before


def test_a_dropped_modality_is_as_good_as_absent(folders, model):
    assert predict(folders, model, "--drop", "t3,T0") == 0
    (folders / "in" / "complete_0000.nii.gz").write_bytes(b"not read")
    assert predict(folders, model, "--drop", "T0+T3", output="again") == 0
    for channel in (0, 3):
        (folders / "in" / f"complete_000{channel}.nii.gz").unlink()
    (folders / "in" / "two_0003.nii.gz").unlink()
    assert predict(folders, model, output="deleted") == 0
    expected = segmentations(folders / "deleted")
    assert segmentations(folders / "out") == segmentations(folders / "again") == expected
    assert record(folders / "out")["dropped"] == ["T0", "T3"]
    assert record(folders / "out")["cases"] == record(folders / "deleted")["cases"]


def test_dropping_the_only_modality_of_a_case_is_a_problem(folders, model, capsys):
    assert predict(folders, model, "--drop", "T2") == 2
    assert "one: has no modality" in capsys.readouterr().err


@pytest.mark.parametrize(("drop", "message"), [("all", "leaves no modality"), ("PD", "unknown modality 'PD'")])
def test_an_impossible_drop_is_refused(folders, model, capsys, drop, message):
    assert predict(folders, model, "--drop", drop) == 2
    assert message in capsys.readouterr().err


def test_an_all_zero_image_is_an_absent_modality(folders, model):
    assert predict(folders, model) == 0
    # of another size and place, too: nothing of it is used
    write(folders / "in" / "one_0000.nii.gz", np.zeros((3, 4, 5), np.float32), origin=(0.0, 0.0, 0.0))
    assert predict(folders, model, output="zero") == 0
    assert segmentations(folders / "zero") == segmentations(folders / "out")
    assert record(folders / "zero")["cases"]["one"] == {
        "subset": "T2",
        "modalities": ["T2"],
        "absent": ["T0", "T1", "T3"],
        "all_zero": ["T0"],
    }


def test_a_network_that_asks_is_told_the_availability_of_each_case(folders, model, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    told, predictors = [], []

    def manual(self, network, *arguments):
        network.availability = None
        network.register_forward_pre_hook(lambda module, inputs: told.append(module.availability))
        predictors.append(self)
        real(self, network, *arguments)

    real = nnUNetPredictor.manual_initialization
    monkeypatch.setattr(nnUNetPredictor, "manual_initialization", manual)
    assert predict(folders, model) == 0
    assert all(value.dtype == torch.bool and value.shape == (1, CHANNELS) for value in told)
    seen = [tuple(value[0].nonzero().flatten().tolist()) for value in told]
    assert list(dict.fromkeys(seen)) == [(0, 1, 2, 3), (2,), (1, 3)]
    assert predictors[0].network.availability is None


def test_a_network_that_does_not_ask_is_left_alone(folders, model):
    from nnunetv2_mstkd.inference.model import load_predictor, set_availability

    predictor = load_predictor(model, (0,), device=torch.device("cpu"))
    set_availability(predictor, (True, False, True, False))
    assert not hasattr(predictor.network, "availability")


# ---- stopping and continuing ------------------------------------------------------------------------------------


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Replace nnU-Net's exporter by a function of the real one's arguments, which gets the real one first."""
    from nnunetv2_mstkd.inference import case_steps

    real = case_steps.export_prediction_from_logits

    def install(function: Callable) -> None:
        monkeypatch.setattr(case_steps, "export_prediction_from_logits", lambda *arguments: function(real, *arguments))

    return install


def name_of(arguments: tuple) -> str:
    return Path(arguments[5]).name


def test_a_stopped_run_is_continued_without_repeating_a_case(folders, model, export, capsys):
    assert predict(folders, model, output="whole") == 0

    def stop_at_the_second(real, *arguments):
        if name_of(arguments) == "one":
            Path(f"{arguments[5]}.nii.gz").write_bytes(b"half a segmentation")
            raise KeyboardInterrupt
        real(*arguments)

    export(stop_at_the_second)
    assert predict(folders, model) == 130
    assert sorted(segmentations(folders / "out")) == ["complete.nii.gz"]
    assert list(record(folders / "out")["cases"]) == ["complete"]

    exported = []
    export(lambda real, *arguments: (exported.append(name_of(arguments)), real(*arguments)))
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["one", "two"]
    assert segmentations(folders / "out") == segmentations(folders / "whole")
    assert record(folders / "out") == record(folders / "whole")
    assert "2 cases predicted, 1 were already there" in capsys.readouterr().out
    assert not [name for name in files(folders / "out") if ".part" in name]


def test_without_the_option_every_case_is_predicted_again(folders, model, export):
    assert predict(folders, model) == 0
    exported = []
    export(lambda real, *arguments: (exported.append(name_of(arguments)), real(*arguments)))
    assert predict(folders, model) == 0
    assert exported == ["complete", "one", "two"]


def test_a_segmentation_of_an_earlier_run_does_not_count_as_done(folders, model, export):
    """The earlier one may have had another model: what counts is the record of the run that is continued."""
    assert predict(folders, model) == 0

    def stop(real, *arguments):
        raise KeyboardInterrupt

    export(stop)
    assert predict(folders, model) == 130
    exported = []
    export(lambda real, *arguments: (exported.append(name_of(arguments)), real(*arguments)))
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["complete", "one", "two"]


def test_a_continued_run_needs_the_probabilities_too(folders, model, export):
    assert predict(folders, model) == 0
    exported = []
    export(lambda real, *arguments: (exported.append(name_of(arguments)), real(*arguments)))
    assert predict(folders, model, "--continue_prediction", "--save_probabilities") == 0
    assert exported == ["complete", "one", "two"]


def test_stock_predictions_are_kept_by_a_continued_run(folders, model, export):
    (folders / "out").mkdir()
    (folders / "out" / "one.nii.gz").write_bytes(b"made by nnUNetv2_predict")
    assert predict(folders, model, "--continue_prediction") == 0
    assert (folders / "out" / "one.nii.gz").read_bytes() == b"made by nnUNetv2_predict"
    assert sorted(record(folders / "out")["cases"]) == ["complete", "two"]


def test_a_run_is_not_continued_with_other_options(folders, model, capsys):
    assert predict(folders, model) == 0
    before = files(folders / "out")
    assert predict(folders, model, "--continue_prediction", "--drop", "T0") == 2
    assert "predicted with dropped [], now it is ['T0']" in capsys.readouterr().err
    assert files(folders / "out") == before


def test_a_record_that_is_none_is_refused(folders, model, capsys):
    (folders / "out").mkdir()
    (folders / "out" / "predictions.json").write_text("[]")
    assert predict(folders, model, "--continue_prediction") == 2
    assert "no record of predictions" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_run_leaves_whole_segmentations_only(folders, model):
    for number in range(10):
        for path in (folders / "in").glob("two_*"):
            (folders / "in" / path.name.replace("two", f"z{number}")).symlink_to(path)
    code = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from nnunetv2_mstkd import cli\n"
        "from nnunetv2_mstkd.inference import case_steps\n"
        "real = case_steps.export_prediction_from_logits\n"
        # the kill most likely comes when a file is written and not yet in its place
        "case_steps.export_prediction_from_logits = lambda *arguments: (real(*arguments), time.sleep(0.2))\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    options = ["-i", str(folders / "in"), "-o", str(folders / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    root = str(Path(cli.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, "-c", code, "predict", *options, "-npp", "0", "-nps", "0"],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not list((folders / "out").glob("z*.nii.gz")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = segmentations(folders / "out")
    whole = {name: read(folders / "out" / name) for name in left if "/" not in name}
    assert 0 < len(whole) < 13
    assert predict(folders, model, "--continue_prediction") == 0
    assert predict(folders, model, output="whole") == 0
    expected = segmentations(folders / "whole")
    assert segmentations(folders / "out") == expected
    for name, array in whole.items():
        np.testing.assert_array_equal(array, read(folders / "whole" / name))


def test_the_segmentation_is_put_in_its_place_after_the_probabilities(folders, model, monkeypatch):
    """It is what a continued run takes for a finished case."""
    order = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append(Path(new).name), real(old, new)))
    assert predict(folders, model, "--save_probabilities") == 0
    found = [name for name in order if name.startswith("one.")]
    assert sorted(found) == ["one.nii.gz", "one.npz", "one.pkl"] and found[-1] == "one.nii.gz"


def test_leftovers_of_a_killed_run_are_cleared(folders, model):
    scratch = folders / "out" / ".one.part"
    scratch.mkdir(parents=True)
    (scratch / "one.nii.gz").write_bytes(b"half")
    (scratch / "other.txt").write_bytes(b"half")
    assert predict(folders, model, "--continue_prediction") == 0
    assert not scratch.exists()
    assert "other.txt" not in files(folders / "out")


def test_parts_share_the_cases_and_keep_records_of_their_own(folders, model):
    assert predict(folders, model, "-num_parts", "2", "-part_id", "0") == 0
    assert sorted(segmentations(folders / "out")) == ["complete.nii.gz", "two.nii.gz"]
    (folders / "in" / "complete_0000.nii.gz").write_bytes(b"the other part's business")
    assert predict(folders, model, "-num_parts", "2", "-part_id", "1") == 0
    assert len(segmentations(folders / "out")) == 3
    parts = [json.loads((folders / "out" / f"predictions_part{k}of2.json").read_text()) for k in (0, 1)]
    assert [sorted(part["cases"]) for part in parts] == [["complete", "two"], ["one"]]


# ---- problems ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(folders: Path) -> Path:
    """Two of the three cases have problems, and there is a file of no case."""
    (folders / "in" / "two_0003.nii.gz").write_bytes(b"no image")
    array = noise(1)
    array[5, 5, 5] = np.nan
    write(folders / "in" / "one_0000.nii.gz", array, spacing=(1.0, 1.0, 2.0))
    write(folders / "in" / "lonely.nii.gz", noise(2))
    return folders


def test_all_problems_are_listed_before_the_network_runs(bad, model, capsys, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    monkeypatch.delattr(nnUNetPredictor, "predict_logits_from_preprocessed_data")
    assert predict(bad, model) == 2
    err = capsys.readouterr().err
    first, *lines = err.strip().splitlines()[-5:]
    assert "4 problems in 2 cases, nothing was predicted (--skip-bad: go on with the other 1):" in first
    assert [line.split()[0] for line in lines] == ["lonely.nii.gz", "one:", "one:", "two:"]
    assert not (bad / "out").exists()


def test_skip_bad_predicts_the_good_cases_and_fails(bad, model, capsys):
    assert predict(bad, model, "--skip-bad") == 1
    assert sorted(segmentations(bad / "out")) == ["complete.nii.gz"]
    err = capsys.readouterr().err
    assert "4 problems in 2 cases, left out:" in err
    assert "  two: T3 (two_0003.nii.gz) cannot be read" in err


def test_skip_bad_with_bad_cases_only_is_refused(bad, model, capsys):
    for path in (bad / "in").glob("complete_*"):
        path.unlink()
    assert predict(bad, model, "--skip-bad") == 2
    assert "nothing was predicted:" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["in", "model", "link"])
def test_folders_that_must_stay_are_no_output_folder(folders, model, capsys, other):
    (folders / "link").symlink_to(folders / "in")
    (folders / "model").symlink_to(model)
    before = files(folders / "in"), files(model)
    assert predict(folders, model, output=other) == 2
    assert "choose another one" in capsys.readouterr().err
    assert (files(folders / "in"), files(model)) == before


def test_an_absent_modality_that_would_not_be_zero_is_a_problem(folders, capsys):
    schemes = ["CTNormalization", "ZScoreNormalization", "ZScoreNormalization", "ZScoreNormalization"]
    model = write_model(trainer_class("nnUNetTrainer"), schemes=schemes)
    assert predict(folders, model) == 2
    err = capsys.readouterr().err
    assert "one: T0 is absent, but CTNormalization turns the zeros" in err
    assert "complete" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-step_size", "0"], "-step_size is 0.0"),
        (["-step_size", "1.5"], "-step_size is 1.5"),
        (["-npp", "-1"], "-npp -1"),
        (["-num_parts", "2", "-part_id", "2"], "-part_id is 2, expected 0 to 1"),
        (["-f", "zero"], "-f zero: expected fold numbers"),
    ],
)
def test_impossible_options_are_refused(folders, model, capsys, options, message):
    assert predict(folders, model, *options) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_default_device_names_the_way_out(folders, model, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["predict", "-i", str(folders / "in"), "-o", str(folders / "out"), "-m", str(model)]) == 2
    err = capsys.readouterr().err
    assert err == "mstkd predict: -device is cuda (the default), but torch finds no CUDA GPU; use -device cpu\n"


def test_a_configuration_belongs_to_a_data_set(folders, capsys):
    assert cli.main(["predict", "-i", str(folders / "in"), "-o", str(folders / "out"), "-d", "901"]) == 2
    assert "-d needs -c CONFIGURATION" in capsys.readouterr().err


def test_geometry_of_the_segmentation_is_that_of_the_first_image(folders, model):
    assert predict(folders, model) == 0
    found = sitk.ReadImage(str(folders / "out" / "one.nii.gz"))
    image = sitk.ReadImage(str(folders / "in" / "one_0002.nii.gz"))
    assert found.GetSpacing() == pytest.approx(image.GetSpacing())
    assert found.GetOrigin() == pytest.approx(image.GetOrigin())
    assert found.GetDirection() == pytest.approx(TURNED)


def test_the_bar_can_be_switched_off(folders, model, capsys):
    assert predict(folders, model) == 0
    assert "one (T2)" in capsys.readouterr().err
    assert predict(folders, model, "--disable_progress_bar") == 0
    assert capsys.readouterr().err == ""
