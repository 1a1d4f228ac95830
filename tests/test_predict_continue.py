from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from predict_inputs import (
    SHAPE,
    edit_checkpoint,
    files,
    predict,
    read,
    record,
    segmentations,
    write,
)

from nnunetv2_mstkd import Predictor, cli
from nnunetv2_mstkd.images.atomic import locked
from nnunetv2_mstkd.inference.expected_dice import SUMMARY


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Replace nnU-Net's exporter by a function of the real one's arguments, which gets the real one first."""
    from nnunetv2_mstkd.nnunet import preprocessing

    real = preprocessing.export_prediction_from_logits

    def install(function: Callable) -> None:
        monkeypatch.setattr(
            preprocessing, "export_prediction_from_logits", lambda *arguments: function(real, *arguments)
        )

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
    assert "2 cases predicted, 1 already there" in capsys.readouterr().out
    assert not [name for name in files(folders / "out") if ".part" in name]


def test_without_the_option_every_case_is_predicted_again(folders, model, export):
    assert predict(folders, model) == 0
    exported = []
    export(lambda real, *arguments: (exported.append(name_of(arguments)), real(*arguments)))
    assert predict(folders, model) == 0
    assert exported == ["complete", "one", "two"]


def test_unrecorded_segmentation_is_not_done(folders, model, export):
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


def test_added_or_removed_images_are_noticed(folders, model, export):
    """The sequence that was missing at night is there in the morning."""
    assert predict(folders, model) == 0
    late = folders / "in" / "one_0003.nii.gz"
    assert not late.exists()
    shutil.copy(folders / "in" / "complete_0003.nii.gz", late)
    exported = []
    export(lambda real, *arguments: (exported.append(name_of(arguments)), real(*arguments)))
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["one"]
    assert "T3" in record(folders / "out")["cases"]["one"]["modalities"]
    late.unlink()
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["one", "one"]
    assert "T3" in record(folders / "out")["cases"]["one"]["absent"]
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["one", "one"]


def test_replaced_images_are_noticed(folders, model, export):
    """A sequence that is sent a second time has the name of the first."""
    assert predict(folders, model) == 0
    before = (folders / "out" / "two.nii.gz").read_bytes()
    image = folders / "in" / "two_0001.nii.gz"
    assert image.exists()
    write(image, np.random.default_rng(5).normal(50, 20, SHAPE))
    exported = []
    export(lambda real, *arguments: (exported.append(name_of(arguments)), real(*arguments)))
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["two"]
    assert (folders / "out" / "two.nii.gz").read_bytes() != before
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["two", "two"]
    shutil.copytree(folders / "in", folders / "copy")
    shutil.rmtree(folders / "in")
    (folders / "copy").rename(folders / "in")
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["two", "two"]


def test_images_replaced_during_prediction_are_noticed(folders, model, export):
    exported = []

    def replace_meanwhile(real, *arguments):
        exported.append(name_of(arguments))
        if exported == ["complete"]:
            write(folders / "in" / "complete_0000.nii.gz", np.random.default_rng(5).normal(50, 20, SHAPE))
        real(*arguments)

    export(replace_meanwhile)
    assert predict(folders, model) == 0
    assert predict(folders, model, "--continue_prediction") == 0
    assert exported == ["complete", "one", "two", "complete"]


def test_a_channel_of_zeros_and_a_dropped_one_are_no_change(folders, model, export):
    write(folders / "in" / "one_0003.nii.gz", np.zeros(SHAPE))
    exported = []
    export(lambda real, *arguments: (exported.append(name_of(arguments)), real(*arguments)))
    assert predict(folders, model, "--drop", "T0") == 0
    assert record(folders / "out")["cases"]["one"]["all_zero"] == ["T3"]
    exported.clear()
    write(folders / "in" / "one_0000.nii.gz", np.random.default_rng(5).normal(50, 20, SHAPE))
    assert predict(folders, model, "--drop", "T0", "--continue_prediction") == 0
    assert exported == []


def test_two_processes_do_not_predict_into_one_folder(folders, model, capsys):
    (folders / "out").mkdir()
    with locked(folders / "out" / "predictions.json"):
        assert predict(folders, model) == 2
        assert f"another process predicts into {folders / 'out'}; wait for it" in capsys.readouterr().err
        assert not segmentations(folders / "out")
        assert predict(folders, model, "-num_parts", "2", "-part_id", "0") == 0  # these share a folder
    assert predict(folders, model) == 0
    assert not list((folders / "out").glob(".*"))


def test_a_new_run_leaves_no_record_of_another_one(folders, model):
    """Whose cases are predicted anew: it would name the wrong model, or keep every continued run from beginning."""
    out = folders / "out"
    assert predict(folders, model, "--drop", "T1") == 0
    for part in ("0", "1"):
        assert predict(folders, model, "-num_parts", "2", "-part_id", part) == 0
    assert sorted(path.name for path in out.glob("pred*")) == [f"predictions_part{part}of2.json" for part in (0, 1)]
    assert predict(folders, model, "--drop", "T1") == 0
    assert [path.name for path in out.glob("pred*")] == ["predictions.json"]
    assert predict(folders, model, "--drop", "T1", "--continue_prediction") == 0


def test_stock_predictions_are_kept_by_a_continued_run(folders, model, export):
    (folders / "out").mkdir()
    (folders / "out" / "one.nii.gz").write_bytes(b"made by nnUNetv2_predict")
    assert predict(folders, model, "--continue_prediction") == 0
    assert (folders / "out" / "one.nii.gz").read_bytes() == b"made by nnUNetv2_predict"
    assert sorted(record(folders / "out")["cases"]) == ["complete", "two"]
    assert list(record(folders / "out")["kept"]) == ["one"]
    export(lambda *arguments: pytest.fail("a case was predicted again"))
    for more in ([], ["-num_parts", "2", "-part_id", "0"], ["-num_parts", "2", "-part_id", "1"]):
        assert predict(folders, model, "--continue_prediction", *more) == 0
    assert (folders / "out" / "one.nii.gz").read_bytes() == b"made by nnUNetv2_predict"


def test_a_kept_case_whose_images_change_is_predicted(folders, model):
    assert predict(folders, model, output="whole") == 0
    (folders / "out").mkdir()
    (folders / "out" / "one.nii.gz").write_bytes(b"made by nnUNetv2_predict")
    assert predict(folders, model, "--continue_prediction") == 0
    image = next((folders / "in").glob("one_*"))
    os.utime(image, (1e9, 1e9))
    assert predict(folders, model, "--continue_prediction") == 0
    assert segmentations(folders / "out") == segmentations(folders / "whole")
    assert "one" in record(folders / "out")["cases"] and "kept" not in record(folders / "out")


def test_maps_and_probabilities_of_earlier_images_do_not_stay(folders, model):
    assert predict(folders, model, "--save-uncertainty", "--save_probabilities") == 0
    before = files(folders / "out")
    written = ["uncertainty/{}.nii.gz", "{}.npz", "{}.pkl"]
    assert all(each.format(case) in before for each in written for case in ("one", "two", "complete"))
    shutil.copy(folders / "in" / "complete_0003.nii.gz", folders / "in" / "one_0003.nii.gz")
    assert predict(folders, model, "--continue_prediction") == 0
    after = files(folders / "out")
    assert set(before) - set(after) == {each.format("one") for each in written}


def test_a_run_is_not_continued_with_other_options(folders, model, capsys):
    assert predict(folders, model) == 0
    before = files(folders / "out")
    assert predict(folders, model, "--continue_prediction", "--drop", "T0") == 2
    assert "are of another run: dropped was [] and is now ['T0']" in capsys.readouterr().err
    assert files(folders / "out") == before


def double_weights(model: Path) -> None:
    edit_checkpoint(model, lambda content: [tensor.mul_(2) for tensor in content["network_weights"].values()])


def test_a_run_is_not_continued_with_other_weights(folders, model, capsys):
    assert predict(folders, model) == 0
    assert predict(folders, model, "--continue_prediction") == 0
    before = files(folders / "out")
    double_weights(model)
    assert predict(folders, model, "--continue_prediction") == 2
    assert "are of another run: weights was {'0': " in capsys.readouterr().err
    assert files(folders / "out") == before


def test_a_run_of_an_earlier_version_is_continued(folders, model, export):
    assert predict(folders, model) == 0
    content = record(folders / "out")
    for key in ("weights", "calibrated", "temperatures"):
        del content[key]
    (folders / "out" / "predictions.json").write_text(json.dumps(content))
    export(lambda *arguments: pytest.fail("a case was predicted again"))
    assert predict(folders, model, "--continue_prediction") == 0


def test_another_number_of_parts_continues_the_same_run(folders, model, export, capsys):
    assert predict(folders, model) == 0
    part = "--continue_prediction", "-num_parts", "2", "-part_id", "0"
    before = files(folders / "out")
    assert predict(folders, model, *part, "--drop", "T0") == 2
    assert "are of another run: dropped" in capsys.readouterr().err and files(folders / "out") == before
    export(lambda *arguments: pytest.fail("a case was predicted again"))
    assert predict(folders, model, *part) == 0
    shutil.copy(folders / "in" / "complete_0001.nii.gz", folders / "in" / "two_0001.nii.gz")
    with pytest.raises(pytest.fail.Exception):
        predict(folders, model, *part)


def test_labels_are_those_of_the_logits_as_they_are(folders, model, export):
    """Logits over a temperature are rounded again, which can turn a label."""
    (model / SUMMARY).parent.mkdir()
    (model / SUMMARY).write_text(
        json.dumps({"subsets": {}, "calibration": {"temperature": {str(size): 1.7 for size in range(1, 5)}}})
    )
    last = {}

    def note(real, *arguments):
        last[name_of(arguments)] = arguments[0]
        real(*arguments)

    export(note)
    assert predict(folders, model, "--save_probabilities") == 0
    plain = dict(last)
    assert predict(folders, model, "--calibrate", "--save_probabilities", output="calibrated") == 0
    assert plain and all(np.array_equal(last[name], logits) for name, logits in plain.items())
    stated, calibrated = (np.load(folders / out / "one.npz")["probabilities"] for out in ("out", "calibrated"))
    cropped = (stated[:2] == 0).any(axis=0)  # nnU-Net leaves 0 outside its box
    odds = [np.log(each[1][~cropped] / each[0][~cropped]) for each in (stated, calibrated)]
    assert odds[0].std() > 0.1 and np.allclose(odds[0] / 1.7, odds[1], atol=0.02)


def test_the_dice_of_other_weights_is_not_expected(folders, model, capsys):
    weights = Predictor(model, [0], device="cpu").weights["0"]
    content = {"subsets": {"all": {"WT": {"dice": 0.5}}}, "weights": {"0": weights[:12], "1": "of another fold"}}
    content["calibration"] = {"temperature": {"4": 2.0}}
    (model / SUMMARY).parent.mkdir()
    (model / SUMMARY).write_text(json.dumps(content))
    assert Predictor(model, [0], device="cpu").expected_dice == {15: {"WT": 0.5}}
    assert Predictor(model, [0], device="cpu", calibrate=True).temperatures == {4: 2.0}
    assert predict(folders, model, "--calibrate") == 2  # some cases are incomplete
    assert "the evaluation has no temperature for cases with " in capsys.readouterr().err
    double_weights(model)
    assert Predictor(model, [0], device="cpu").expected_dice == {}
    assert "is of other weights of fold 0; evaluate again with --restart" in capsys.readouterr().err
    assert predict(folders, model, "--calibrate") == 2
    assert "is of other weights of fold 0" in capsys.readouterr().err


def test_a_record_that_is_none_is_refused(folders, model, capsys):
    (folders / "out").mkdir()
    (folders / "out" / "predictions.json").write_text("[]")
    assert predict(folders, model, "--continue_prediction") == 2
    assert "not a record of predictions" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_run_leaves_whole_segmentations_only(folders, model):
    for number in range(10):
        for path in (folders / "in").glob("two_*"):
            (folders / "in" / path.name.replace("two", f"z{number}")).symlink_to(path)
    code = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from nnunetv2_mstkd import cli\n"
        "from nnunetv2_mstkd.nnunet import preprocessing\n"
        "real = preprocessing.export_prediction_from_logits\n"
        # the kill most likely comes when a file is written and not yet in its place
        "preprocessing.export_prediction_from_logits = lambda *arguments: (real(*arguments), time.sleep(0.2))\n"
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


def test_segmentation_is_written_last(folders, model, monkeypatch):
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
