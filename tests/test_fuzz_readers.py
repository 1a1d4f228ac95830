"""Whatever stands in a file of our own formats, its reader takes it or refuses it in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.dataset_conversion.description import Description, read_description
from nnunetv2_mstkd.dataset_conversion.restoring import restoration
from nnunetv2_mstkd.evaluation.records import CaseRecords
from nnunetv2_mstkd.evaluation.results import COLUMNS, check_results, read_results
from nnunetv2_mstkd.inference.expected_dice import read_expected_dice
from nnunetv2_mstkd.inference.record import Record
from nnunetv2_mstkd.methods.configuration import complete_block
from nnunetv2_mstkd.nnunet.description import check_description
from nnunetv2_mstkd.nnunet.patients import patient_naming
from nnunetv2_mstkd.nnunet.safe_plans import open_plans

quick = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.integers(-3, 5),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["T0", "T0+T1", "all", "../x", "2d", "nan", "1e400", "{case}", "<b>", "(", "\ud800"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=6), st.just("0")), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(document: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a document."""
    yield path
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inner:
        yield from places(value, (*path, key))


def changed(document: Any) -> st.SearchStrategy:
    """The document with one or two values replaced or taken away, or anything at all."""
    paths = list(places(document))

    @st.composite
    def draw_changed(draw: Callable) -> Any:
        found = copy.deepcopy(document)
        for _ in range(draw(st.integers(1, 2))):
            path = draw(st.sampled_from(paths))
            if not path:
                continue
            inner = found
            try:
                for key in path[:-1]:
                    inner = inner[key]
                if draw(st.booleans()):
                    inner[path[-1]] = draw(VALUES)
                else:
                    del inner[path[-1]]
            except (KeyError, IndexError, TypeError):
                continue  # the first change took the place away
        return found

    return st.one_of(draw_changed(), draw_changed(), VALUES)


def takes_or_refuses(read: Callable[[], Any], *also: type[Exception]) -> Any:
    """What ``read`` gives, or None if it refuses; anything but a one-line ValueError is a defect."""
    try:
        return read()
    except (ValueError, *also) as error:
        text = str(error)
        assert text and "\n" not in text, text
        return None


@quick
@given(changed(json.loads(json.dumps(complete_block(None)))))
def test_settings(block):
    found = takes_or_refuses(lambda: complete_block(block))
    if found is not None:
        assert complete_block(found) == found


DESCRIPTION = {
    "modalities": {"T1": "t1.nii.gz", "T2": ["*_t2.nii.gz", "{case}.nii"]},
    "label": "seg.nii.gz",
    "labels": {"background": 0, "whole": [1, 2], "core": 1, "ignore": 3},
    "regions_class_order": [2, 1],
    "cases": "*",
    "test_cases": ["a*"],
    "remap": {"4": 2},
    "patient": "(.*)-[0-9]+",
}


@quick
@given(changed(DESCRIPTION))
def test_descriptions_of_data_sets(content):
    if isinstance(content, dict):
        takes_or_refuses(lambda: Description.from_mapping(content))


@quick
@given(st.one_of(st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode())), st.booleans())
def test_files_of_descriptions(tmp_path, content, is_yaml):
    file = tmp_path / ("d.yaml" if is_yaml else "d.json")
    file.write_bytes(content)
    takes_or_refuses(lambda: read_description(file))


RUN = {"model": "m", "channels": ["T0", "T1"], "dropped": []}
ENTRY = {"subset": "T0", "modalities": ["T0"], "absent": ["T1"], "expected_dice": {"core": 0.5}}


@quick
@given(st.one_of(st.binary(max_size=60), changed({**RUN, "cases": {"a": ENTRY, "b": ENTRY}})))
def test_predictions_json(tmp_path, content):
    file = tmp_path / "predictions.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    record = takes_or_refuses(lambda: Record(file, RUN, ("T0", "T1"), {}, resume=True))
    if record is not None:
        record.by_subset()
        record.save()
        assert Record(file, RUN, ("T0", "T1"), {}, resume=True).cases.keys() == record.cases.keys()


ROWS = [["m", "t", "0", case, "T0+T1", "2", "core", "dice", "0.5"] for case in "ab"]


@quick
@given(st.data())
def test_results_csv(tmp_path, data):
    rows = [list(COLUMNS), *copy.deepcopy(ROWS)]
    for _ in range(data.draw(st.integers(0, 3))):
        row, column = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, len(COLUMNS) - 1))
        rows[row][column] = str(data.draw(SCALARS))
    text = "\n".join(",".join(row) for row in rows)
    file = tmp_path / "results.csv"
    raw = data.draw(st.one_of(st.just(text.encode(errors="replace")), st.binary(max_size=80)))
    file.write_bytes(raw)
    table = takes_or_refuses(lambda: read_results(file))
    if table is not None:
        pd.testing.assert_frame_equal(check_results(table), table)
        assert not np.isinf(table["value"]).any()


RECORD = {
    "weights": "w",
    "subsets": {"T0": {"values": {"core": {"dice": 0.5, "hd95": None}}, "near": 3, "voxels": 100}},
}


@quick
@given(st.one_of(st.binary(max_size=60), changed(RECORD)))
def test_records_of_cases(tmp_path, content):
    records = CaseRecords(tmp_path, {"a": 1})
    records.use_weights("0", "w")
    file = tmp_path / "cases" / "fold_0" / "case.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    scores = takes_or_refuses(lambda: records.load("0", "case"))
    for score in (scores or {}).values():
        assert all(isinstance(value, float) for of_region in score.values.values() for value in of_region.values())


@quick
@given(st.one_of(st.binary(max_size=60), changed({"a": 1, "channels": ["T0"]})))
def test_the_run_of_an_evaluation(tmp_path, content):
    file = tmp_path / "cases" / "run.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    takes_or_refuses(lambda: CaseRecords(tmp_path, {"a": 1, "channels": ["T0"]}))


SUMMARY = {"channels": ["T0", "T1"], "subsets": {"T0": {"dice": {"core": {"mean": 0.5}}}}}


@quick
@given(st.one_of(st.binary(max_size=60), changed(SUMMARY)))
def test_the_summary_of_an_evaluation(tmp_path, content):
    file = tmp_path / "subsets" / "summary.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    takes_or_refuses(lambda: read_expected_dice(tmp_path, ("T0", "T1")))


@quick
@given(changed(tiny.plans()))
def test_plans(content):
    if isinstance(content, dict):
        takes_or_refuses(lambda: open_plans(content, "tiny", "here"))


CONVERTED = {**tiny.dataset_json(), "mstkd_conversion": {
    "classes": {"ET": 3}, "release_values": {"0": 0, "3": 4}, "label_file": "{case}.nii.gz", "small_et_becomes": 1,
    "patient": "(.*)-[0-9]+",
}}  # fmt: skip


@quick
@given(changed(CONVERTED))
def test_dataset_json(content):
    if isinstance(content, dict):
        takes_or_refuses(lambda: check_description(content, "here"))
        takes_or_refuses(lambda: patient_naming(content))
        found = takes_or_refuses(lambda: restoration(content))
        if found is not None:
            assert "/" not in found.label_file and all(0 <= value <= 255 for value in found.values.values())


@quick
@given(st.text(max_size=20))
def test_names_of_subsets(text):
    found = takes_or_refuses(lambda: modalities.parse_subset(text, ("T0", "T1", "T2")))
    if found is not None:
        assert found.shape == (3,) and found.any()


def test_a_reader_that_lets_something_else_through_is_noticed():
    with pytest.raises(KeyError):
        takes_or_refuses(lambda: {}["x"])
    with pytest.raises(AssertionError):
        takes_or_refuses(lambda: modalities.parse_subset("T9", ("first line\nsecond line", "T1")))
