from __future__ import annotations

import gzip
import os
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from predict_inputs import SHAPE, noise, write, write_case

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.completeness import check_complete
from nnunetv2_mstkd.images.geometry import read_image
from nnunetv2_mstkd.inference import checks
from nnunetv2_mstkd.inference.checks import Checker
from nnunetv2_mstkd.inference.selection import select
from nnunetv2_mstkd.nnunet.input_folder import Case, find_cases

NAMES = ("T1", "T1ce", "T2", "FLAIR")
CHECKER = Checker(NAMES, SimpleITKIO)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def texts(folder: Path, checker: Checker = CHECKER, ending: str = ".nii.gz") -> list[str]:
    """All problems of a folder, as ``select`` lists them."""
    try:
        return [f"{case}: {text}" for case, text in select(folder, ending, checker, verb="used").problems]
    except ValueError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]


def test_an_image_that_cannot_fit_into_memory_when_resampled_is_named(folder, monkeypatch):
    """Its spacing is in another unit, say; the system would kill the process, and with it all other cases."""
    for case, spacing in (("good", (1, 1, 1)), ("large", (360, 360, 360))):
        image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(20, 30, 20)).astype(np.float32))
        image.SetSpacing(spacing)
        sitk.WriteImage(image, folder / f"{case}_0000.nii.gz")
    monkeypatch.setattr(checks, "memory", lambda: 2**33)
    assert texts(folder, Checker(NAMES, SimpleITKIO, target=(1.0, 1.0, 1.0))) == [
        "large: needs 8343 GiB after resampling, and this machine has 8 GiB of memory; is the spacing of "
        "360 x 360 x 360 mm right?"
    ]
    for unknown in (Checker(NAMES, SimpleITKIO, target=(1.0, 1.0)), CHECKER):
        assert texts(folder, unknown) == []
    monkeypatch.setattr(checks, "memory", lambda: None)
    assert texts(folder, Checker(NAMES, SimpleITKIO, target=(1.0, 1.0, 1.0))) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_is_a_problem_of_its_case(folder):
    """SimpleITK ends the process: the name is Latin-1, as on old network shares."""
    write_case(folder, "good", [0])
    shutil.copy(folder / "good_0000.nii.gz", os.fsencode(folder) + b"/M\xfcller_0000.nii.gz")
    (problem,) = texts(folder)
    assert r"M\xfcller_0000.nii.gz' is not UTF-8; rename it" in problem
    with pytest.raises(InputError, match="is not UTF-8"):
        read_image(Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller_0000.nii.gz")))


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < checks.memory() < 2**50


# ---- names ------------------------------------------------------------------------------------------------------


def test_files_become_cases_with_gaps(folder):
    touch(
        folder, "b_0001.nii.gz", "b_0003.nii.gz", "a_x_0000.nii.gz", ".hidden_0000.nii.gz", "notes.txt", "b_0001.json"
    )
    (folder / "c_0000.nii.gz").mkdir()
    cases, problems = find_cases(folder, ".nii.gz", NAMES)
    assert problems == []
    assert cases == [
        Case("a_x", (folder / "a_x_0000.nii.gz", None, None, None)),
        Case("b", (None, folder / "b_0001.nii.gz", None, folder / "b_0003.nii.gz")),
    ]
    assert cases[1].availability == (False, True, False, True)
    assert cases[1].without([3]).availability == (False, True, False, False)


@pytest.mark.parametrize(
    ("name", "case", "message"),
    [
        ("a_0004.nii.gz", "a", "has the channel number 4; the data set has the 4 channels 0000 T1, 0001 T1ce"),
        ("a_0000.mha", "a", "a_0000.mha does not end in .nii.gz"),
        ("a_0000.nii", "a", "a_0000.nii does not end in .nii.gz"),
        ("a_0000.NII.GZ", "a", "a_0000.NII.GZ does not end in .nii.gz"),
        ("scan.png", None, "scan.png does not end in .nii.gz"),
        ("a.nii.gz", "a", "a.nii.gz has no channel number"),
        ("a_000.nii.gz", "a", "a_000.nii.gz has no channel number"),
        ("a_00001.nii.gz", "a", "a_00001.nii.gz has no channel number"),
        ("a_0002.nii.gz.part", "a", "a_0002.nii.gz.part looks like an image that has not arrived in full"),
        ("b_0001.nii.gz.crdownload", "b", "looks like an image that has not arrived in full"),
        ("A_0001.nii.gz", "a", "is a duplicate case id: A and a differ in upper and lower case only"),
    ],
)
def test_a_file_that_nnunet_would_misread_is_a_problem(folder, name, case, message):
    touch(folder, "a_0001.nii.gz", name)
    if len(list(folder.iterdir())) == 1:
        pytest.skip("this file system does not tell upper from lower case")
    _, problems = find_cases(folder, ".nii.gz", NAMES)
    found = [problem for problem in problems if problem.case == case]
    assert len(found) == 1 and message in found[0].text


def test_a_file_with_the_name_of_a_case_is_no_image(folder):
    touch(folder, "a_0001.nii.gz", "a")
    cases, problems = find_cases(folder, ".nii.gz", NAMES)
    assert [case.name for case in cases] == ["a"] and problems == []


def test_case_with_unknown_channel_only(folder):
    write_case(folder, "a", [0])
    touch(folder, "b_0009.nii.gz")
    assert [line.split(" has ")[0] for line in texts(folder)] == ["b: b_0009.nii.gz", "b:"]
    assert texts(folder)[1] == "b: has no modality"


def test_the_ending_is_taken_literally(folder):
    touch(folder, "a_0000xnii.gz", "a_0001.nii.gz")
    cases, problems = find_cases(folder, ".nii.gz", NAMES)
    assert cases == [Case("a", (None, folder / "a_0001.nii.gz", None, None))] and problems == []


def test_no_input(folder):
    touch(folder, "a_0000.mha")
    with pytest.raises(FileNotFoundError, match=r"CASE_0000\.nii\.gz(.|\n)*a_0000\.mha does not end"):
        find_cases(folder, ".nii.gz", NAMES)
    with pytest.raises(FileNotFoundError, match="no input folder"):
        find_cases(folder / "absent", ".nii.gz", NAMES)


# ---- voxels and grids -------------------------------------------------------------------------------------------


def test_a_sound_folder_has_no_problems(folder):
    write_case(folder, "a", [0, 1, 2, 3])
    write_case(folder, "b", [3])
    selection = select(folder, ".nii.gz", CHECKER, verb="used")
    assert [case.name for case in selection.cases] == ["a", "b"]
    assert (selection.problems, selection.done) == ([], 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3e38])
@pytest.mark.parametrize(
    ("ending", "reader"), [(".nii.gz", SimpleITKIO), (".nii.gz", NibabelIO), (".nii", NibabelIO), (".mha", SimpleITKIO)]
)
def test_voxels_that_are_no_numbers_are_counted(folder, value, ending, reader):
    array = noise(0)
    array[3, 4:6, 7] = value
    write(folder / f"a_0000{ending}", array)
    write_case(folder, "a", [1], ending=ending)
    found = texts(folder, Checker(NAMES, reader), ending)
    assert found == [f"a: T1 (a_0000{ending}) has 2 of {np.prod(SHAPE)} voxels that are NaN, infinite or beyond 1e15"]


def test_nan_image_is_not_absent(folder):
    """ITK reads zeros for it."""
    write(folder / "a_0000.nii.gz", np.full(SHAPE, np.nan, np.float32))
    write_case(folder, "a", [1])
    assert texts(folder) == [
        f"a: T1 (a_0000.nii.gz) has {np.prod(SHAPE)} of {np.prod(SHAPE)} voxels that are NaN, infinite or beyond 1e15"
    ]


def test_constant_and_zero_images(folder):
    write(folder / "a_0000.nii.gz", np.full(SHAPE, 7, np.int16))
    write(folder / "a_0001.nii.gz", np.zeros(SHAPE, np.int16))
    write_case(folder, "a", [3])
    assert texts(folder) == [
        "a: T1 (a_0000.nii.gz) is constant, 7 everywhere; an absent modality is zero or has no file"
    ]
    case, problems = CHECKER.check(Case("a", (None, folder / "a_0001.nii.gz", None, folder / "a_0003.nii.gz")))
    assert (case.availability, case.all_zero, problems) == ((False, False, False, True), (1,), [])


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_an_image_that_only_its_sform_moves_is_a_problem(folder, reader):
    """ITK takes the qform for a sform code of 2, most tools the sform."""
    write_case(folder, "a", [0, 1])
    image = nibabel.load(folder / "a_0001.nii.gz")
    image.set_sform(np.diag([-1.0, 1, 1, 1]) @ image.affine, 2)
    nibabel.save(image, folder / "a_0001.nii.gz")
    found = " ".join(texts(folder, Checker(NAMES, reader)))
    told = "T1ce has another position than T1 by its sform" if reader is SimpleITKIO else "T1ce has direction"
    assert told in found


def test_a_case_of_zero_images_has_no_modality(folder):
    write(folder / "a_0001.nii.gz", np.zeros(SHAPE, np.int16))
    assert texts(folder) == ["a: has no modality, only all-zero images"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing": (1.0, 1.002, 1.25)}, "spacing (1, 1.002, 1.25) instead of (1, 1, 1.25)"),
        ({"origin": (-9.0, 4.0, 2.502)}, "origin (-9, 4, 2.502) instead of (-9, 4, 2.5)"),
        ({"direction": (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)}, "direction"),
        ({"array": noise(1, (14, 20, 17))}, "size (17, 20, 14) instead of (18, 20, 14)"),
    ],
    ids=["spacing", "origin", "direction", "shape"],
)
def test_images_of_one_case_must_lie_in_one_place(folder, change, message):
    write_case(folder, "a", [0, 2])
    array = change.pop("array", noise(1))
    write(folder / "a_0001.nii.gz", array, **change)
    found = texts(folder)
    assert len(found) == 1
    assert found[0].startswith(f"a: T1ce has {message}") and "as in T1; resample it" in found[0]


def test_rounding_in_headers_is_no_problem(folder):
    write_case(folder, "a", [0])
    write(folder / "a_0001.nii.gz", noise(1), spacing=(1.0005, 1.0, 1.25), origin=(-9.0005, 4.0, 2.5))
    assert texts(folder) == []


def test_a_file_of_four_dimensions_is_a_problem(folder):
    write_case(folder, "a", [0])
    for name, reader in (("SimpleITKIO", SimpleITKIO), ("NibabelIO", NibabelIO)):
        nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6, 2)), np.eye(4)), folder / "a_0001.nii.gz")
        found = texts(folder, Checker(NAMES, reader))
        assert len(found) == 1, name
        assert found[0].startswith("a: T1ce (a_0001.nii.gz) has 4 dimensions")


def test_a_colour_picture_is_not_one_channel(folder):
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    picture = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8), isVector=True)
    sitk.WriteImage(picture, str(folder / "a_0000.png"))
    assert texts(folder, Checker(NAMES, NaturalImage2DIO), ".png") == [
        "a: T1 (a_0000.png) holds 3 images, expected one file per channel"
    ]


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.02])
@pytest.mark.parametrize(
    ("ending", "reader"),
    [
        (".nii.gz", SimpleITKIO),
        (".nii.gz", NibabelIO),
        (".nii", SimpleITKIO),
        (".nii", NibabelIO),
        (".mha", SimpleITKIO),
        (".nrrd", SimpleITKIO),
        (".gipl", SimpleITKIO),
    ],
)
def test_a_truncated_file_is_a_problem(folder, ending, reader, kept):
    _, short = write_case(folder, "a", [0, 1], ending=ending)
    content = short.read_bytes()
    short.write_bytes(content[: int(len(content) * kept)])
    found = texts(folder, Checker(NAMES, reader), ending)
    assert len(found) == 1
    assert found[0].startswith(f"a: T1ce (a_0001{ending}) ")
    assert "truncated" in found[0] or "cannot be read" in found[0]


def test_a_damaged_compressed_file_is_a_problem(folder):
    _, path = write_case(folder, "a", [0, 1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    found = texts(folder)
    assert len(found) == 1 and found[0].startswith("a: T1ce (a_0001.nii.gz) is damaged")


def test_a_file_may_be_longer_than_its_image(folder):
    path = write(folder / "a_0000.nii", noise(0))
    path.write_bytes(path.read_bytes() + np.full(9, np.nan, np.float32).tobytes())
    assert check_complete(path) == 0
    path.write_bytes(path.read_bytes()[: -9 * 4 - 1])
    with pytest.raises(ValueError, match="is truncated: it has 20511 of 20512 bytes"):  # 352 + 14 * 20 * 18 * 4
        check_complete(path)


def test_whole_numbers_are_not_looked_at_for_nan(folder):
    path = folder / "a_0000.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.full(SHAPE, -1, np.int32)), str(path))
    assert b"\xff\xff\xff\xff" in gzip.decompress(path.read_bytes())  # NaN, read as a float
    assert check_complete(path) == 0


def test_an_unreadable_file_is_named_with_its_reason(folder):
    write_case(folder, "a", [0])
    (folder / "a_0001.nii.gz").write_bytes(b"")
    (folder / "a_0002.nii.gz").symlink_to(folder / "nowhere")
    found = texts(folder)
    assert [line.split(" cannot be read")[0] for line in found] == ["a: T1ce (a_0001.nii.gz)", "a: T2 (a_0002.nii.gz)"]


def test_problems_are_listed_in_order(folder):
    write_case(folder, "a", [0, 1])
    write(folder / "a_0002.nii.gz", np.full(SHAPE, 3, np.int16), spacing=(2.0, 1.0, 1.25))
    write_case(folder, "b", [1])
    touch(folder, "b_0000.mha", "c_0007.nii.gz")
    assert [line.split()[0] for line in texts(folder)] == ["a:", "a:", "b:", "c:", "c:"]


def test_a_done_case_is_counted_and_not_read(folder):
    write_case(folder, "a", [0])
    touch(folder, "b_0000.nii.gz")
    selection = select(folder, ".nii.gz", CHECKER, is_done=lambda case: case.name == "b", verb="used")
    assert ([case.name for case in selection.cases], selection.done) == (["a"], 1)


def test_skip_bad_needs_a_good_or_done_case(folder):
    write_case(folder, "a", [0])
    touch(folder, "b_0000.nii.gz")
    options = {"skip_bad": True, "verb": "used"}
    selection = select(folder, ".nii.gz", CHECKER, is_done=lambda case: case.name == "a", **options)
    assert (selection.cases, selection.done, len(selection.problems)) == ([], 1, 1)
    (folder / "a_0000.nii.gz").unlink()
    with pytest.raises(ValueError, match="nothing was used"):
        select(folder, ".nii.gz", CHECKER, **options)
