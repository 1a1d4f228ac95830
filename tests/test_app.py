"""``mstkd app`` without a browser: uploads, segmentations, DICOM, refusals, and what is left behind."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from app_inputs import ADDRESS, NAMES, Page, case_of, served_page, stored_values, write_series
from predict_inputs import read
from starlette.testclient import TestClient

from nnunetv2_mstkd import Predictor, cli
from nnunetv2_mstkd.app import dicom, server, serving, viewer
from nnunetv2_mstkd.app.sequences import recognise
from nnunetv2_mstkd.app.server import Settings, make_app
from nnunetv2_mstkd.app.session import Session
from nnunetv2_mstkd.commands import app as app_command
from nnunetv2_mstkd.demo import steps
from nnunetv2_mstkd.demo.pipeline import Demo, Options
from nnunetv2_mstkd.errors import DependencyError
from nnunetv2_mstkd.processes import command_path


@pytest.fixture(scope="module")
def model(trained) -> Path:
    return trained.fold("MSTKDTrainer").parent


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor(model, device="cpu")


@pytest.fixture(scope="module")
def images(trained) -> dict[str, Path]:
    return case_of(trained)


@pytest.fixture(scope="module")
def app(predictor):
    with served_page(predictor) as page:
        yield page.client


@pytest.fixture
def page(app) -> Iterator[Page]:
    page = Page(app)
    yield page
    app.post(f"{page.own}/close")


def changed(path: Path, target: Path, change) -> Path:
    image = sitk.ReadImage(str(path))
    array = change(sitk.GetArrayFromImage(image))
    new = sitk.GetImageFromArray(array)
    if array.ndim == 3:
        new.CopyInformation(image)
    sitk.WriteImage(new, str(target))
    return target


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("BraTS-GLI-00042-000-t1n.nii.gz", "T1"),
        ("BraTS20_Training_001_t1ce.nii.gz", "T1ce"),
        ("UPENN-GBM-00001_11_T1GD.nii.gz", "T1ce"),
        ("sub-01_T1_post.nii", "T1ce"),
        ("T1 post contrast axial", "T1ce"),
        ("ax T2 FLAIR", "FLAIR"),
        ("t2w.nii.gz", "T2"),
        ("case_0003.nii.gz", "FLAIR"),
        ("t1_0003.nii.gz", "T1"),
        ("case_0004.nii.gz", None),
        ("adc.nii.gz", None),
        ("t12.nii.gz", None),
        ("", None),
        ("T1 C-", "T1"),
        ("t1_se_tra_KM-.nii.gz", "T1"),
        ("T1 Gd-", "T1"),
        ("t1_mpr -KM", "T1"),
        ("t1_gd-enhanced", "T1ce"),
        ("t1 CE-MPRAGE", "T1ce"),
        ("T1 -C", "T1"),
        ("T1 (C-) tra", "T1"),
        ("T1 pre contrast", "T1"),
        ("T1 w/o Gd", "T1"),
        ("T1 MPRAGE +C", "T1ce"),
        ("T1 C+", "T1ce"),
        ("ax t1 se km", "T1ce"),
        ("t1_tse_CE_tra", "T1ce"),
        ("T1.SE.CE", "T1ce"),
        ("T1 SE axial Gd-DTPA", "T1ce"),
        ("T1 tra post op", "T1"),
        ("sub-01-t1-c.nii.gz", "T1ce"),
        ("Ax T1 FLAIR", None),
        ("T1W_FLAIR.nii.gz", None),
        ("T2* ax", None),
        ("T2 star", None),
        ("T2starW", None),
        ("T2_GRE.nii.gz", None),
        ("SWI_0002.nii.gz", None),
        ("T2_Gregor.nii.gz", "T2"),
        ("t2_tirm_tra_dark-fluid", "FLAIR"),
        ("t2_spc_ir_ns_sag_dark-fluid_iso", "FLAIR"),
        ("t1_dark-fluid", None),
        ("t2_tirm_cor", None),
        ("T2.FLAIR.nii.gz", "FLAIR"),
        ("sub-01_ce-gadolinium_T1w.nii.gz", "T1ce"),
        ("sub-01_T1w.nii.gz", "T1"),
        ("POST AX T1", "T1ce"),
        ("post_contrast_t1.nii.gz", "T1ce"),
        ("Gd T1", "T1ce"),
        ("CE T1", "T1ce"),
        ("T1_MPRAGE_C", "T1ce"),
        ("T1 nKM", "T1ce"),
        ("T1 vKM", "T1"),
        ("T1 POST-OP", "T1"),
        ("t1 postoperative", "T1"),
        ("post RT T1", "T1"),
        ("T1 post-op Gd", "T1ce"),
        ("t2_fl2d_tra_hemo", None),
        ("T1_seg.nii.gz", None),
        ("T1_mask.nii.gz", None),
        ("T1_masked.nii.gz", "T1"),
        ("T1 SUB", None),
        ("T2 DWI", None),
        ("T1map", None),
        ("T1_NCE", "T1"),
        ("T1 nCE", "T1"),
        ("sub-01_ses-post_T1w.nii.gz", "T1"),
        ("sub-KM_T1w", "T1"),
        ("sub-01_acq-post_T1w", None),
        ("Patient_KM_T1", None),
        ("CE_001_T1.nii.gz", None),
        ("Gadea_T1", "T1"),
        ("FLAIR_TIRM", "FLAIR"),
        ("t2_flair_tirm", "FLAIR"),
        ("pat_sub_001_T1", "T1"),
        ("T1 MPRAGE sub01", "T1"),
        ("Segovia_T1", "T1"),
        ("perfect_T1", "T1"),
        ("T1_brainmask.nii.gz", None),
    ],
)
def test_sequences_are_recognised_by_name(name, modality):
    found = recognise(name, NAMES)
    assert (None if found is None else NAMES[found]) == modality


def test_contrast_medium_makes_a_t1_a_t1ce():
    assert recognise("ax T1", NAMES, contrast=True) == 1
    assert recognise("ax T2", NAMES, contrast=True) == 2
    assert recognise("ax T1", ("T1", "T2"), contrast=True) == 0
    assert recognise("ax T1 Gd", ("T1", "T2")) == 0
    assert recognise("ax T1 +C", ("T1ce", "T2")) == 0
    for contradiction in ("ax T1 C-", "ax T1 pre", "pre T1", "T1 nativ", "T1 baseline"):  # of header and name
        assert recognise(contradiction, NAMES, contrast=True) is None
    assert recognise("pre-op T1", NAMES, contrast=True) == recognise("baseline T1 post", NAMES, contrast=True) == 1
    assert recognise("ax T1", ("T2", "FLAIR")) is None
    assert recognise("SWI_tra.nii.gz", ("T1", "SWI")) == 1
    assert recognise("DWI_b1000.nii.gz", ("dwi b1000", "T1")) == 0
    assert recognise("p1_ADC_map.nii.gz", ("T1", "ADC")) == 1
    assert recognise("perfusion CBF", ("T1", "CBF")) == 1
    assert recognise("ADC T1 map", ("T1", "ADC")) is None


# ---- a case --------------------------------------------------------------------------------------------------------


def test_two_of_four_sequences_give_what_the_command_gives(page, images, model, tmp_path):
    state = page.drop((images["T1ce"], "x_t1gd.nii.gz"), (images["FLAIR"], "x_flair.nii.gz"))
    assert [image["modality"] for image in state["images"]] == ["T1ce", "FLAIR"]
    assert state["ready"] and state["available"] == ["T1ce", "FLAIR"] and page.sentences() == []
    job = page.segment()
    assert job["state"] == "done" and job["subset"] == "T1ce+FLAIR" and job["progress"] > 0

    (tmp_path / "in").mkdir()
    for channel in (1, 3):
        (tmp_path / "in" / f"x_{channel:04d}.nii.gz").write_bytes(images[NAMES[channel]].read_bytes())
    command = ["predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(model), "-f", "0"]
    options = ["-device", "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar", "--save-uncertainty"]
    assert cli.main([*command, *options]) == 0
    assert page.result(job) == (tmp_path / "out" / "x.nii.gz").read_bytes()
    assert page.result(job, "uncertainty.nii.gz") == (tmp_path / "out" / "uncertainty" / "x.nii.gz").read_bytes()

    segmentation = sitk.ReadImage(str(tmp_path / "out" / "x.nii.gz"))
    array, ml = sitk.GetArrayFromImage(segmentation), np.prod(segmentation.GetSpacing()) / 1000
    assert array.any()
    expected = {"whole tumor": (1, 2, 3), "tumor core": (2, 3), "enhancing tumor": (3,)}
    assert job["volumes"] == pytest.approx(
        {name: ml * np.isin(array, values).sum() for name, values in expected.items()}
    )
    index = segmentation.TransformPhysicalPointToIndex([-job["center"][0], -job["center"][1], job["center"][2]])
    assert np.all(np.abs(np.array(index)[::-1] - np.median(np.argwhere(array), axis=0)) <= 1)


def test_a_second_subset_is_one_request_away(page, images, predictor):
    page.drop(images["T1"], images["T1ce"])
    first = page.segment()
    second = page.segment("T1ce")
    assert second["subset"] == "T1" and first["agreement"] is None
    assert page.segment("T1ce")["number"] == second["number"]  # it is there already
    assert len(page.state()["jobs"]) == 2
    one, other = (
        predictor.predict({name: images[name] for name in names}).segmentation for names in (("T1", "T1ce"), ("T1",))
    )
    overlap = 2 * ((one > 0) & (other > 0)).sum() / ((one > 0).sum() + (other > 0).sum())
    assert second["agreement"]["whole tumor"] == pytest.approx(overlap)
    answer = page.start("T1", "T1ce")
    assert answer.status_code == 400 and "no image left" in answer.text


def test_a_subset_asked_for_before_the_first_is_done_is_compared_with_it(page, images):
    page.drop(images["T1"], images["T1ce"])
    page.start()
    page.start("T1ce")
    page.segment("T1ce")  # waits
    first, second = page.state()["jobs"]
    assert first["agreement"] is None and 0 <= second["agreement"]["whole tumor"] <= 1


def test_expected_dice_is_that_of_the_subset(predictor, images, monkeypatch):
    monkeypatch.setattr(predictor, "expected_dice", {0b0001: {"whole tumor": 0.5}, 0b0011: {"whole tumor": 0.75}})
    with served_page(predictor) as page:
        assert page.client.get("/api/model").json()["evaluated"]
        assert page.drop(images["T1"], images["T1ce"])["expected"] == {"whole tumor": 0.75}
        assert page.segment("T1ce")["expected"] == {"whole tumor": 0.5}


def test_a_new_image_ends_earlier_segmentations(page, images):
    page.drop(images["T1"])
    job = page.segment()
    assert len(page.result(job)) > 0
    state = page.drop(images["T2"])
    assert state["jobs"] == [] and state["available"] == ["T1", "T2"]
    assert page.client.get(f"{page.own}/jobs/{job['number']}/segmentation.nii.gz").status_code == 404


# ---- what is wrong with images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda good, new: new.write_bytes(b"no image" * 100), "t2.nii.gz is neither a NIfTI nor a DICOM file"),
        (lambda good, new: new.write_bytes(b""), "t2.nii.gz is empty"),
        (lambda good, new: new.write_bytes(good.read_bytes()[:3000]), "(t2.nii.gz) is truncated"),
        (
            lambda good, new: new.write_bytes(gzip.compress(b"no image" * 100)),
            "t2.nii.gz is damaged",
        ),
        (lambda good, new: new.write_bytes(b"\0" * 128 + b"DICM" + b"\1" * 300), "t2.nii.gz is a damaged DICOM file"),
        (lambda good, new: changed(good, new, lambda array: array[None].repeat(2, 0)), "expected one scalar image"),
        (lambda good, new: changed(good, new, np.ones_like), "(t2.nii.gz) is constant"),
        (
            lambda good, new: changed(good, new, lambda array: np.where(array > 0, np.nan, 0)),
            "NaN, infinite or",
        ),
    ],
    ids=["broken", "empty", "truncated", "no image", "no DICOM", "4-D", "constant", "NaN"],
)
def test_a_bad_file_is_one_sentence(page, images, tmp_path, make, told):
    make(images["T2"], tmp_path / "t2.nii.gz")
    page.drop(images["T1"], tmp_path / "t2.nii.gz")
    (sentence,) = page.sentences()
    assert told in sentence and sentence.endswith(".") and "upload" not in sentence
    if page.state()["problems"]:
        assert page.start().status_code == 400
        page.assign("t2.nii.gz", None)
    assert page.state()["ready"] and page.state()["available"] == ["T1"]


def test_two_files_for_one_sequence_are_a_choice(page, images):
    page.drop((images["T1"], "a_t1.nii.gz"), (images["T2"], "b_t1.nii.gz"))
    (sentence,) = page.sentences()
    assert sentence.startswith("2 images are T1: a_t1.nii.gz and b_t1.nii.gz") and not page.state()["ready"]
    assert page.assign("b_t1.nii.gz", "T2")["available"] == ["T1", "T2"] and page.sentences() == []


def test_a_fifth_sequence_is_left_out(page, images):
    page.drop(*images.values(), (images["T1"], "adc.nii.gz"))
    (sentence,) = page.sentences()
    assert sentence.startswith("adc.nii.gz is left out: the model knows T1, T1ce, T2, FLAIR")
    assert page.state()["ready"] and page.state()["available"] == list(NAMES)


def test_a_name_that_says_nothing_is_a_question(page, images):
    page.drop((images["T1"], "scan.nii.gz"))
    (sentence,) = page.sentences()
    assert sentence.startswith("Which sequence is scan.nii.gz?")
    assert page.assign("scan.nii.gz", "T1")["ready"]
    assert page.assign("scan.nii.gz", None)["ready"] is False
    assert "Every image is left out" in page.sentences()[0]
    assert page.client.post(f"{page.own}/images/999999", json={"modality": "T1"}).status_code == 404
    number = page.state()["images"][0]["number"]
    assert page.client.post(f"{page.own}/images/{number}", json={"modality": "PET"}).status_code == 400


def test_another_geometry_is_one_sentence(page, images, tmp_path):
    moved = sitk.ReadImage(str(images["T2"]))
    moved.SetOrigin((1.0, 2.0, 3.0))
    sitk.WriteImage(moved, str(tmp_path / "t2.nii.gz"))
    page.drop(images["T1"], tmp_path / "t2.nii.gz")
    (sentence,) = page.sentences()
    assert sentence.startswith("T2 has origin") and "resample it" in sentence


@pytest.mark.parametrize(
    ("moved", "codes", "told"),
    [(True, (1, 2), "a qform and an sform that differ"), (False, (0, 0), "neither a qform nor an sform")],
    ids=["differ", "none"],
)
def test_an_image_that_the_viewer_shows_elsewhere_is_refused(page, images, tmp_path, moved, codes, told):
    image = nibabel.load(images["T2"])
    affine = np.diag([-1.0, 1, 1, 1]) @ image.affine if moved else image.affine
    image.set_qform(affine, codes[0])
    image.set_sform(image.affine, codes[1])
    nibabel.save(image, tmp_path / "t2.nii.gz")
    page.drop(tmp_path / "t2.nii.gz")
    (sentence,) = page.sentences()
    assert sentence.startswith("T2 (t2.nii.gz) has ") and told in sentence and not page.state()["ready"]


def test_what_arrived_of_a_failed_drop_is_forgotten(page, images):
    page.upload(images["T1"])
    assert page.client.post(f"{page.own}/discard").status_code == 204
    state = page.drop(images["T2"])
    assert [image["modality"] for image in state["images"]] == ["T2"]


def test_an_empty_drop_keeps_the_segmentation(page, images):
    page.drop(images["T1"])
    page.segment()
    state = page.drop()
    assert state["jobs"][0]["state"] == "done" and page.sentences()[0].startswith("No file arrived")
    assert page.result(state["jobs"][0])


def test_a_drop_without_images_keeps_the_segmentation(page, images):
    page.drop(images["T1"])
    page.segment()
    state = page.drop((b"a remark", "notes.txt"))
    assert state["jobs"][0]["state"] == "done" and "neither a NIfTI nor a DICOM" in page.sentences()[0]
    assert page.result(state["jobs"][0])


def test_a_refused_file_does_not_count_against_the_limit(predictor, images):
    with served_page(predictor, limit=2**20) as page:
        for _ in range(3):
            page.drop((bytes([1]) * 2**19, "t1.nii.gz"))
        assert len(page.drop(images["T2"])["images"]) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that hang up")
def test_a_closed_terminal_ends_the_server_in_good_order(monkeypatch):
    class Server:
        ended = False

        def handle_exit(self, *_: object) -> None:
            self.ended = True

        def run(self, sockets: object) -> None:
            signal.raise_signal(signal.SIGHUP)

    server = Server()
    monkeypatch.setattr(serving, "make_server", lambda *_: (server, contextlib.nullcontext(), "address"))
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        serving.serve(None, None, browser=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert server.ended


def test_an_empty_drop_says_so(page):
    page.drop()
    (sentence,) = page.sentences()
    assert sentence.startswith("No file arrived")
    assert page.start().status_code == 400


def test_an_image_of_zeros_counts_as_missing(page, images, tmp_path):
    zero = changed(images["T2"], tmp_path / "t2.nii.gz", np.zeros_like)
    state = page.drop(images["T1"], zero)
    assert state["available"] == ["T1"] and state["ready"]
    assert page.sentences() == ["T2 (t2.nii.gz) is zero everywhere, so it counts as missing."]
    page.assign("t2.nii.gz", "FLAIR")
    assert page.sentences() == ["FLAIR (t2.nii.gz) is zero everywhere, so it counts as missing."]


# ---- hostile requests ----------------------------------------------------------------------------------------------


def test_gzip_and_header_that_ask_for_too_much_memory_are_refused(predictor, images):
    huge = bytearray(gzip.decompress(images["T1"].read_bytes()))
    huge[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    small = bytes(gzip.decompress(images["T2"].read_bytes()))
    with served_page(predictor, limit=2**21) as page:
        page.drop((bytes(huge), "t1.nii"), (gzip.compress(small + bytes(2**22)), "t2.nii.gz"), images["FLAIR"])
        first, second = page.sentences()
        assert first.startswith("t1.nii has more than 2 MB when it is unpacked") and second.startswith("t2.nii.gz has")
        assert page.state()["available"] == ["FLAIR"]


def test_uploads_are_limited(predictor):
    with served_page(predictor, limit=2**20) as page:
        answer = page.upload(bytes(2**20 + 1), "t1.nii.gz")
        assert answer.status_code == 400 and "more than 1 MB" in answer.text
        assert page.upload(bytes(2**19), "t1.nii.gz").status_code == 204
        assert page.upload(bytes(2**19 + 1), "t2.nii.gz").status_code == 400
        assert page.client.post(f"{page.own}/jobs", content=b"{" * 10_000).status_code == 413
        assert page.client.post(f"{page.own}/jobs", content=b"[]").status_code == 400
        assert page.client.post(f"{page.own}/jobs", json={"drop": ["PET"]}).status_code == 400


def test_names_never_become_paths(page, images):
    state = page.drop((images["T1"], "../../../../tmp/evil_t1.nii.gz"), (images["T2"], "..\\x\n\0_t2.nii.gz"))
    assert [image["name"] for image in state["images"]] == ["evil_t1.nii.gz", "x_t2.nii.gz"]
    assert all(re.fullmatch(r"images/\d+\.nii\.gz", image["file"]) for image in state["images"])
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", f"{page.own}/jobs/1/..%2f..%2fimage"):
        assert page.client.get(path).status_code == 404


def test_other_hosts_and_other_pages_are_refused(page):
    client = page.client
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "evil.example:8000"}).status_code == 421
    assert client.get("/", headers={"Host": "localhost:8000"}).status_code == 200
    for malformed in ("[", "127.0.0.1:x"):
        assert client.get("/", headers={"Host": malformed}).status_code == 421
        assert client.post("/api/sessions", headers={"Origin": f"http://{malformed}"}).status_code == 403
    assert client.post("/api/sessions", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post("/api/sessions", headers={"Origin": "http://127.0.0.1:9000"}).status_code == 403
    assert client.post("/api/sessions", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post(f"{page.own}/close", headers={"Origin": ADDRESS}).status_code == 204
    assert client.get(page.own).status_code == 404


def test_every_request_needs_the_token(predictor):
    app = make_app(predictor, Settings(host="0.0.0.0", token="secret"))
    with TestClient(app, base_url="http://192.0.2.1:8000", follow_redirects=False) as client:
        for path in ("/", "/?token=wrong", "/api/model", "/niivue.js", "/static/app.js", "/api/model?token=secret"):
            assert client.get(path).status_code == 401
        assert client.post("/api/sessions").status_code == 401
        assert client.get("/api/model", headers={"Authorization": "Bearer secret"}).status_code == 200
        answer = client.get("/?token=secret")
        assert answer.status_code == 303 and "HttpOnly" in answer.headers["set-cookie"]
        assert client.get("/").status_code == 200  # the cookie
        assert client.get("/", headers={"Host": "192.0.2.1:8001"}).status_code == 401  # that of another server


def test_a_host_name_has_no_case(predictor):
    with TestClient(make_app(predictor, Settings(host="Station", token="secret")), base_url="http://station") as client:
        assert client.get("/api/model", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_sessions_may_close_while_unused_ones_are_looked_for(predictor, tmp_path):
    sessions = server.Sessions(predictor, Settings(grace=-1), tmp_path)
    first, second = sessions.add(), sessions.add()

    class Closing(list):
        def __iter__(self):
            sessions.close(second)
            return super().__iter__()

    sessions.open[first].jobs = Closing()
    assert first in sessions.unused()


def test_the_page_loads_nothing_from_elsewhere(page):
    answer = page.client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    texts = [answer.text, *(page.client.get(f"/static/app.{kind}").text for kind in ("js", "css"))]
    assert [text for text in texts if re.search(r"https?:|//[a-z]+\.", text)] == []
    script = page.client.get("/niivue.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert re.search(r"export \{ \w+ as Niivue \};\s*$", script.text)


# ---- jobs and pages ------------------------------------------------------------------------------------------------


@pytest.fixture
def held(predictor, monkeypatch):
    """A predictor whose first forward pass waits until the event is set."""
    event, predict = threading.Event(), predictor.predict

    def slow(images, on_pass):
        def wait(done, total):
            on_pass(done, total)
            event.wait(30)
            on_pass(done, total)

        return predict(images, on_pass=wait)

    monkeypatch.setattr(predictor, "predict", slow)
    yield event
    event.set()


def test_a_job_waits_for_its_turn_and_can_be_cancelled(predictor, images, held):
    with served_page(predictor) as first:
        second = Page(first.client)
        for page in (first, second):
            page.drop(images["T1"])
            assert page.start().status_code == 204
        first.wait("running")
        assert second.state()["jobs"][0]["state"] == "waiting"
        (job,) = first.state()["jobs"]
        assert first.client.post(f"{first.own}/jobs/{job['number']}/cancel").status_code == 204
        held.set()
        assert first.wait()["state"] == "cancelled" and second.wait()["state"] == "done"
        assert first.segment()["state"] == "done"


def test_a_closed_page_stops_its_job_and_leaves_no_file(predictor, images, held, monkeypatch):
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.02)
    opened = []
    monkeypatch.setattr(server, "Session", lambda *what: opened.append(Session(*what)) or opened[-1])
    with serving.served(predictor, Settings(grace=0.3)) as address, httpx.Client(base_url=address) as client:
        page = Page(client)
        with client.stream("GET", f"{page.own}/events") as stream:
            page.drop(images["T1"])
            lines = stream.iter_lines()  # its end would close the stream
            while not next(lines).startswith('data: {"images": [{'):
                pass
            page.start()
            page.wait("running")
            time.sleep(0.5)  # longer than the grace: the open stream keeps the page
            assert page.state()["ready"]
        (session,), (job,) = opened, opened[0].jobs
        folder = session.folder
        assert folder.is_dir()
        end = time.monotonic() + 10
        while folder.exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert not folder.exists() and client.get(page.own).status_code == 404
        held.set()
        while job.state == "running" and time.monotonic() < end:
            time.sleep(0.02)
        assert job.state == "cancelled"
        assert folder.parent.is_dir()
    assert not folder.parent.exists()


def test_pages_are_limited(page, monkeypatch):
    monkeypatch.setattr(server, "MAX_SESSIONS", 0)
    answer = page.client.post("/api/sessions")
    assert answer.status_code == 400 and "close one" in answer.text


@pytest.mark.parametrize(
    ("error", "told"), [(MemoryError(), "not enough memory"), (KeyError("x"), "Internal error")], ids=["memory", "bug"]
)
def test_an_error_in_the_network_is_one_sentence(predictor, images, monkeypatch, capsys, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(predictor, "predict", fail)
    with served_page(predictor) as page:
        page.drop(images["T1"])
        job = page.segment()
    assert job["state"] == "failed" and told in job["message"]
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, KeyError)


def test_an_upload_that_is_overtaken_by_removing_is_not_kept(page, images, monkeypatch):
    counted, sessions = Session.count_received, []

    def count_and_remove(session: Session, number: int) -> None:
        counted(session, number)
        if not sessions:
            sessions.append(session)
            session.clear()

    monkeypatch.setattr(Session, "count_received", count_and_remove)
    parts = iter([b"first", b"second"])
    answer = page.client.post(f"{page.own}/files", content=parts, headers={"X-File-Name": "T1.nii.gz"})
    (session,) = sessions
    assert answer.status_code == 400 and "T1.nii.gz was removed with the other images" in answer.text
    assert (session.received, session.uploads, list(session.folder.iterdir())) == (0, [], [])
    monkeypatch.undo()
    assert page.drop(images["T1"])["images"]


def test_removing_the_images_removes_their_files(page, images):
    page.drop(images["T1"])
    page.segment()
    page.client.post(f"{page.own}/clear")
    state = page.state()
    assert state["images"] == state["jobs"] == [] and not state["ready"] and page.sentences() == []


def held_bytes() -> int:
    """What Python, NumPy and tensors hold. The memory of the whole process jumps by more than a small case has."""
    gc.collect()
    tensors = (each for each in gc.get_objects() if isinstance(each, torch.Tensor))
    return tracemalloc.get_traced_memory()[0] + sum(each.untyped_storage().nbytes() for each in tensors)


def test_memory_does_not_grow(model, images):
    held = {}
    with served_page(Predictor(model, device="cpu", mirroring=False)) as page:
        tracemalloc.start()
        try:
            for case in range(1, 21):
                page.drop(images["T1"], images["FLAIR"])
                assert page.segment()["state"] == "done"
                page.client.post(f"{page.own}/clear")
                if case in (5, 20):  # it takes seconds
                    held[case] = held_bytes()
        finally:
            tracemalloc.stop()
    image = 4 * sitk.ReadImage(str(images["T1"])).GetNumberOfPixels()  # float32; a case has several of that size
    assert held[20] - held[5] < (20 - 5) * image / 2


# ---- DICOM ---------------------------------------------------------------------------------------------------------


def test_dicom_series_in_and_dicom_seg_out(page, images, predictor, tmp_path):
    series = [
        write_series(tmp_path / "a", images["T1"], "ax T1", contrast=True),
        write_series(tmp_path / "b", images["FLAIR"], "ax T2 FLAIR"),
    ]
    state = page.drop(*(file for folder in series for file in sorted(folder.iterdir())))
    assert [(image["name"], image["modality"]) for image in state["images"]] == [
        ("ax T1", "T1ce"),
        ("ax T2 FLAIR", "FLAIR"),
    ]
    assert page.sentences() == []
    content = page.client.get(f"{page.own}/{state['images'][0]['file']}").content
    (tmp_path / "t1.nii.gz").write_bytes(content)
    converted, original = (sitk.ReadImage(str(path)) for path in (tmp_path / "t1.nii.gz", images["T1"]))
    assert np.allclose(converted.GetOrigin(), original.GetOrigin(), atol=1e-3)
    assert np.allclose(converted.GetDirection(), original.GetDirection(), atol=1e-5)
    stored, true = (sitk.GetArrayFromImage(each) for each in (converted, original))
    np.testing.assert_array_equal(stored, stored_values(true))
    job = page.segment()
    assert job["dicom"]
    (tmp_path / "seg.dcm").write_bytes(page.result(job, "segmentation.dcm"))
    assert page.result(job, "segmentation.dcm") == (tmp_path / "seg.dcm").read_bytes()  # written once
    (tmp_path / "seg.nii.gz").write_bytes(page.result(job))
    labels = read(tmp_path / "seg.nii.gz")
    import highdicom as hd

    found = hd.seg.segread(tmp_path / "seg.dcm")
    assert found.PatientID == "phantom" and found.StudyInstanceUID == "1.2.3"
    names = [found.get_segment_description(number).SegmentLabel for number in found.segment_numbers]
    assert names == list(predictor.labels)
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in by_position(series[0])]
    masks = found.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, values in enumerate(predictor.labels.values()):
        np.testing.assert_array_equal(masks[..., number] > 0, np.isin(labels, values))
    assert labels.any()


def by_position(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: pydicom.dcmread(file).InstanceNumber)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda files: files[4].unlink(), "lacks slices"),
        (lambda files: [file.unlink() for file in files[1:]], "a single slice"),
        (lambda files: edit(files[3], "ImagePositionPatient", None), "something other than slices"),
        (lambda files: edit(files[3], "ImageOrientationPatient", [0, 1, 0, 0, 0, 1]), "different orientations"),
        (lambda files: edit(files[3], "NumberOfFrames", 2), "several slices in one file"),
        (
            lambda files: edit(files[3], "ImagePositionPatient", list(pydicom.dcmread(files[4]).ImagePositionPatient)),
            "several slices at one position",
        ),
        (lambda files: [shift(file, 0.3 * number) for number, file in enumerate(files)], "shifted sideways"),
        (lambda files: shift(files[3], 0.3), "shifted sideways"),
        (lambda files: edit(files[3], "PixelSpacing", [1.5, 1.5]), "different pixel spacings"),
        (lambda files: [edit(file, "PixelSpacing", [0, 0]) for file in files], "without a pixel spacing"),
        (lambda files: [edit(file, "PixelSpacing", None) for file in files], "without a pixel spacing"),
        (
            lambda files: [edit(file, "ImageOrientationPatient", [1, 0, 0, 0.3, 1, 0]) for file in files],
            "not perpendicular",
        ),
        (lambda files: edit(files[3], "SamplesPerPixel", 3), "in color"),
    ],
    ids=[
        "gap",
        "single",
        "no position",
        "orientation",
        "multi-frame",
        "two volumes",
        "sheared",
        "one shifted",
        "spacing",
        "zero spacing",
        "no spacing",
        "skewed",
        "color",
    ],
)
def test_a_series_that_is_no_volume_is_one_sentence(page, images, tmp_path, change, told):
    folder = write_series(tmp_path / "a", images["T1"], "T1")
    change(by_position(folder))
    page.drop(*folder.iterdir())
    (sentence,) = page.sentences()
    assert sentence.startswith("The DICOM series T1 ") and told in sentence and page.state()["images"] == []


def test_each_slice_is_scaled_by_its_own_factors(images, tmp_path):
    files = by_position(write_series(tmp_path / "a", images["T1"], "T1"))
    edit(files[1], "RescaleSlope", 0.25)
    edit(files[2], "RescaleSlope", 1000.5)
    edit(files[3], "RescaleIntercept", -1000)
    expected = np.stack([pydicom.dcmread(file).pixel_array.astype(np.float64) for file in files])
    expected[1] *= 0.25
    expected[2] *= 1000.5
    expected[3] -= 1000
    (series,), problems = dicom.read_series((file, file.name) for file in files)
    dicom.write_volume(series, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read(tmp_path / "a.nii.gz"), expected, rtol=1e-6)
    assert problems == [] and series.size == 4 * expected.size


def test_a_slice_with_too_few_pixels_is_refused(page, images, tmp_path):
    file = by_position(write_series(tmp_path / "a", images["T1"], "T1"))[3]
    dataset = pydicom.dcmread(file)
    dataset.PixelData = dataset.PixelData[:-2]
    dataset.save_as(file)
    page.drop(*(tmp_path / "a").iterdir())
    (sentence,) = page.sentences()
    assert sentence.startswith("The DICOM series T1 has a slice with fewer pixels than its header says")
    assert page.state()["images"] == []


def test_series_of_two_patients_are_refused(page, images, tmp_path):
    first, second = (write_series(tmp_path / name, images[name], f"ax {name}") for name in ("T1", "T2"))
    for file in second.iterdir():
        edit(file, "FrameOfReferenceUID", "1.2.4")
    state = page.drop(*first.iterdir(), *second.iterdir())
    assert state["ready"] and "different frames of reference" in page.sentences()[0]
    page.client.post(f"{page.own}/clear")
    for file in second.iterdir():
        edit(file, "PatientID", "")
    assert page.drop(*first.iterdir(), *second.iterdir())["ready"]  # the names are equal
    page.client.post(f"{page.own}/clear")
    for file in second.iterdir():
        edit(file, "PatientID", "another")
    state = page.drop(*first.iterdir(), *second.iterdir())
    assert not state["ready"] and state["available"] == []
    (sentence,) = page.sentences()
    assert sentence.startswith("The headers of ax T1 and ax T2 name different patients")
    assert page.assign("ax T2", None)["ready"]


def test_a_series_that_asks_for_too_much_memory_is_refused(predictor, images, tmp_path):
    folder = write_series(tmp_path / "a", images["T1"], "T1")
    for file in folder.iterdir():
        edit(file, "Rows", 60000)
        edit(file, "Columns", 60000)
    with served_page(predictor, limit=2**28) as page:
        page.drop(*folder.iterdir())
        (sentence,) = page.sentences()
        assert sentence.startswith("The DICOM series T1 has more than 256 MB")


def test_a_deflated_file_is_not_unpacked(page, images, tmp_path, monkeypatch):
    file = next(write_series(tmp_path / "a", images["T1"], "T1").iterdir())
    dataset = pydicom.dcmread(file)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(file, implicit_vr=False, little_endian=True)
    monkeypatch.setattr(pydicom, "dcmread", None)
    page.drop(file)
    (sentence,) = page.sentences()
    assert sentence.startswith(f"{file.name} is a deflated DICOM file")


def test_a_series_without_a_study_gives_no_dicom_seg(page, images, tmp_path):
    files = sorted(write_series(tmp_path / "a", images["T1"], "ax T1").iterdir())
    for file in files:
        dataset = pydicom.dcmread(file)
        del dataset.StudyInstanceUID
        dataset.save_as(file)
    page.drop(*files)
    job = page.segment()
    answer = page.client.get(f"{page.own}/jobs/{job['number']}/segmentation.dcm")
    assert answer.status_code == 400 and "download the segmentation as NIfTI" in answer.text
    assert page.result(job)


def shift(file: Path, mm: float) -> None:
    """Move a slice within its plane."""
    header = pydicom.dcmread(file)
    position = np.array(header.ImagePositionPatient) + mm * np.array(header.ImageOrientationPatient[:3])
    edit(file, "ImagePositionPatient", [f"{part:.6f}" for part in position])


def edit(file: Path, keyword: str, value) -> None:
    dataset = pydicom.dcmread(file)
    setattr(dataset, keyword, value)
    dataset.save_as(file)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(model, images, tmp_path):
    command = [command_path("mstkd"), "app", str(model), "--no-browser", "-device", "cpu"]
    environment = {"TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address), process.stderr.read()
        with httpx.Client(base_url=address) as client:
            page = Page(client)
            page.drop(images["T1"])
            assert len(list(tmp_path.glob("mstkd_app_*/*/*"))) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
    assert list(tmp_path.glob("mstkd_app_*")) == []


def test_another_host_gets_a_token(model, monkeypatch):
    served = []
    monkeypatch.setattr(serving, "serve", lambda predictor, settings, port, browser: served.append(settings))
    for options in ([], ["--host", "192.0.2.1"], ["--host", "0.0.0.0", "--token", "mine"]):
        assert cli.main(["app", str(model), "-device", "cpu", "--no-browser", *options]) == 0
    assert served[0].token is None and len(served[1].token) >= 16 and served[2].token == "mine"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["nowhere"], "no model folder nowhere"),
        (["MODEL", "--port", "99999"], "--port is 99999, expected 0 to 65535"),
        (["MODEL", "--max-upload", "0"], "--max-upload is 0"),
        (["MODEL", "--token", "a&b"], "--token is part of an address"),
        (["MODEL", "--host", "192.0.2.1"], "the address 192.0.2.1:0 cannot be used"),
    ],
)
def test_impossible_options_are_one_line(model, capsys, options, told):
    assert (
        cli.main(["app", *(str(model) if option == "MODEL" else option for option in options), "-device", "cpu"]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("mstkd app: ") and told in error and error.count("\n") == 1


def test_a_model_of_other_images_is_refused(folders, capsys):
    from predict_inputs import trainer_class, write_model

    model = write_model(trainer_class("MSTKDTrainer"), file_ending=".png", reader="NaturalImage2DIO")
    assert cli.main(["app", str(model), "-device", "cpu", "--no-browser"]) == 2
    assert "the page is for NIfTI and DICOM images" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_the_demo_is_used_or_trained_first(tmp_path, monkeypatch, capsys, there):
    runs = []
    monkeypatch.setattr(Demo, "run", lambda demo: runs.append(demo.options))
    monkeypatch.setattr(steps.TrainModel, "done", lambda step: there)
    parser = cli._parser(["app"])
    folder, example = app_command._demo(parser.parse_args(["app", "--demo", "--out", str(tmp_path / "new")]))
    assert folder.parts[-4:-2] == ("new", "results") and folder.name.startswith("ModalityDropoutTrainer__")
    assert example.endswith("imagesTs") and len(runs) == (not there)
    assert ("about" in capsys.readouterr().out) == (not there)
    # a demo with other options than the usual ones is continued with them
    options = asdict(Options("cpu", 3, 12, 2, 6.0, 1, "procedural", ()))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "demo.json").write_text(json.dumps({"options": options, "seconds": {}}))
    app_command._demo(parser.parse_args(["app", "--demo", "--out", str(tmp_path / "old")]))
    assert [asdict(run) for run in runs[1:]] == ([] if there else [options])


def test_missing_packages_are_named(model, monkeypatch, capsys):
    monkeypatch.setattr(viewer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"needs ipyniivue.*nnunetv2_mstkd\[app\]"):
        viewer.niivue_module()
    monkeypatch.delitem(sys.modules, "nnunetv2_mstkd.app.serving")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["app", str(model)]) == 2
    assert "the page needs uvicorn: pip install 'nnunetv2_mstkd[app]'" in capsys.readouterr().err


def test_an_unknown_bundle_is_refused(tmp_path, monkeypatch):
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "widget.js").write_text("export default {}")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(viewer.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DependencyError, match="holds no NiiVue"):
        viewer.niivue_module()
