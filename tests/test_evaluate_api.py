"""``evaluate`` as a Python function, and the queue between the network and the background processes."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from pathlib import Path

import pandas as pd
import pytest
from evaluate_inputs import model_with_regions, results

from nnunetv2_mstkd.inference.workers import Backlog
from nnunetv2_mstkd.reporting.evaluate import evaluate

HERE = {"device": "cpu", "preprocessing_processes": 0, "scoring_processes": 0, "mirroring": False}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return model_with_regions(tmp_path, monkeypatch)


def test_tables_are_data_frames(model, capsys):
    lines: list[str] = []
    found = evaluate(str(model), folds=[0], available="T0,T1", metrics=["dice"], report=lines.append, **HERE)
    assert capsys.readouterr().out == "" and len(lines) == 1 and "cases: 2" in lines[0]
    assert found.folder == model / "subsets"
    pd.testing.assert_frame_equal(found.results, results(found.folder), check_dtype=False)
    assert list(found.by_subset.columns) == ["subset", "modalities", "region", "metric", "value"]
    assert len(found.by_subset) == 3 * 2
    means = found.results.groupby("region", sort=False)["value"].mean()
    overall = found.summary.set_index("region")["value"]
    assert overall[means.index].tolist() == pytest.approx(means.tolist())
    assert found.by_count["modalities"].unique().tolist() == [1, 2]
    assert set(found.shapley["modality"]) == {"T0", "T1"} and set(found.gap["subset"]) == {"T0", "T1"}
    assert "Dice by number of modalities (one patient, no interval)" in found.text
    (note,) = found.notes
    assert note.endswith("were evaluated: T0, T1; complete or full input means all of these") and note in found.text


def test_tables_that_need_other_subsets_are_none(model):
    found = evaluate(model, folds=[0], subsets=["T0"], metrics=["dice"], pictures=0, **HERE)
    assert found.shapley is None and found.gap is None and found.warnings == [] and found.notes == []


def test_impossible_arguments_are_refused(model):
    with pytest.raises(ValueError, match="belong together"):
        evaluate(model, images=model)
    with pytest.raises(TypeError):
        evaluate(model, metric="dice")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        evaluate(model / "absent")


class Waiting(Executor):
    """Nothing is done before it is asked for."""

    def __init__(self) -> None:
        self.open: list[tuple[Future, object]] = []

    def submit(self, function, /, *arguments):
        future: Future = Future()
        self.open.append((future, function(*arguments)))
        return future

    def finish(self, number: int) -> None:
        for _ in range(number):
            future, result = self.open.pop(0)
            future.set_result(result)


def test_a_backlog_hands_over_in_order():
    pool, done = Waiting(), []
    backlog = Backlog(pool, lambda label, result: done.append((label, result)))
    for label in "abc":
        backlog.submit(label, str.upper, label)
    backlog.collect(3)
    assert done == []
    pool.finish(2)
    backlog.collect(3)
    assert done == [("a", "A"), ("b", "B")]
    pool.finish(1)
    backlog.collect()
    assert done[2:] == [("c", "C")]
