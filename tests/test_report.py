"""The page of an evaluation, and the slices that it shows."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from PIL import Image
from report_inputs import (
    CASES,
    EVIL,
    MODALITIES,
    RULES,
    RUN,
    montage,
    report,
    results,
    subsets,
    with_entropies,
    with_further,
)

import nnunetv2_mstkd
from nnunetv2_mstkd.evaluation.montage import (
    ENTROPY_STEP,
    LONGEST,
    SLICES,
    Montage,
    choose_view,
    read_montage,
    slice_entropy,
    slice_images,
    write_montage,
)
from nnunetv2_mstkd.evaluation.results import PRESENCE_COLUMNS
from nnunetv2_mstkd.reporting import pictures
from nnunetv2_mstkd.reporting.page import Pictures, case_page
from nnunetv2_mstkd.reporting.tables import presence_table
from nnunetv2_mstkd.statistics.findings import Findings


def test_a_region_has_the_colour_of_its_own_label():
    colors = pictures.label_colors([0, 1, 2, 3], None)
    regions = {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}
    assert pictures.region_colors(regions, colors) == {"WT": colors[1], "TC": colors[2], "ET": colors[3]}


# ---- which slice ---------------------------------------------------------------------------------------------------


def test_the_slice_with_most_labelled_voxels_is_shown():
    label = np.zeros((5, 6, 7), np.uint8)
    label[1, 2:4, 2:4] = 1
    label[3, 1:4, 1:5] = 2
    label[4] = 9
    view = choose_view(label, (1, 1, 1), ignore_label=9)
    assert (view.axis, view.index, view.depth) == (0, 3, 5)
    assert np.array_equal(view.reference, label[3])
    volume = np.arange(label.size).reshape(label.shape)
    assert np.array_equal(view.cut(volume), volume[3])
    assert choose_view(label, (1, 1, 1)).index == 4


def test_thick_slices_have_square_pixels():
    label = np.zeros((8, 5, 6), np.uint8)
    label[:, 2, :] = 1
    view = choose_view(label, (1.0, 4.0, 2.0))
    assert (view.axis, view.index) == (1, 2)
    # 8 voxels of 1 mm by 6 voxels of 2 mm
    assert view.reference.shape == (8, 12)
    assert view.columns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_the_slice_of_empty_and_flat_labels():
    assert choose_view(np.zeros((9, 4, 4), np.uint8), (1, 1, 1)).index == 4
    assert choose_view(np.zeros((4, 1, 4), np.uint8), (5, 1, 1)).axis == 1


def test_a_large_slice_is_thinned_out():
    view = choose_view(np.zeros((1, 1000, 500), np.uint8), (1, 0.5, 0.5))
    assert view.reference.shape == (LONGEST, LONGEST // 2)
    assert view.rows[0] < 4 and view.rows[-1] > 995


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_image_lies_under_the_label(transpose):
    """Transposed, cropped, and resampled to twice the resolution of each axis."""
    original = np.random.default_rng(0).normal(5, 1, (2, 6, 8, 10)).astype(np.float32)
    box = [(1, 5), (2, 7), (0, 9)]  # of the original axes
    original[:, 0] = original[:, 5] = original[:, :, :2] = original[:, :, 7:] = original[..., 9:] = 0
    cropped = original[:, 1:5, 2:7, 0:9].transpose(0, *(1 + axis for axis in transpose))
    data = cropped.repeat(2, axis=1).repeat(2, axis=2).repeat(2, axis=3)
    properties = {"bbox_used_for_cropping": [box[axis] for axis in transpose]}
    label = np.zeros((6, 8, 10), np.uint8)
    label[3, 4:6, 4:7] = 1
    view = choose_view(label, (1.0, 1.0, 1.0))
    assert (view.axis, view.index) == (0, 3)
    found = slice_images(data, properties, view, transpose)
    assert found.dtype == np.uint8 and found.shape == (2, 8, 10)
    for grey, image in zip(found, original[:, 3], strict=True):
        assert np.array_equal(grey > 0, image != 0)
        inside = image != 0
        order = np.argsort(image[inside])
        assert (np.diff(grey[inside][order].astype(int)) >= 0).all()
        assert grey.max() == 255 and grey[inside].min() == 1


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("regions", [True, False], ids=["regions", "labels"])
def test_entropy_of_a_slice_by_hand(transpose, regions):
    """Logits of the cropped image; two channels, whose entropy at (d, -d) is that of the probability p in bits."""
    d = np.zeros((6, 8, 10), np.float32)
    box = [(1, 5), (2, 7), (0, 9)]
    d[1:5, 2:7, 0:9] = np.random.default_rng(0).normal(0, 2, (4, 5, 9))
    p = 1 / (1 + np.exp(-d if regions else -2 * d))
    bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    inside = np.zeros(d.shape)
    inside[1:5, 2:7, 0:9] = 1
    cropped = np.stack([d, -d])[:, 1:5, 2:7, 0:9].transpose(0, *(1 + axis for axis in transpose))
    view = choose_view(np.ones(d.shape, np.uint8), (1.0, 1.0, 1.0))
    properties = {"bbox_used_for_cropping": [box[axis] for axis in transpose]}
    for each in view.every:
        found = slice_entropy(cropped.astype(np.float16), properties, each, transpose, regions)
        wanted = 100 * (bits * inside)[each.index]
        assert found.dtype == np.uint8 and not (found % ENTROPY_STEP).any()
        assert np.abs(found - wanted).max() < ENTROPY_STEP / 2 + 0.1
    assert found.shape == (8, 10)


def test_an_absent_image_is_black():
    view = choose_view(np.ones((3, 4, 5), np.uint8), (1, 1, 1))
    data = np.zeros((2, 3, 4, 5), np.float32)
    data[1] = np.arange(60).reshape(3, 4, 5) - 30
    found = slice_images(data, {"bbox_used_for_cropping": [(0, 3), (0, 4), (0, 5)]}, view, (0, 1, 2))
    assert not found[0].any() and found[1].any()


# ---- keeping it ----------------------------------------------------------------------------------------------------


def test_a_montage_is_read_as_it_was_written(tmp_path):
    written = montage("0", "fine")
    write_montage(written, tmp_path / "new" / "case.npz")
    found = read_montage(tmp_path / "new" / "case.npz")
    assert (found.axis, found.index, found.depth) == (0, 11, 24)
    assert np.array_equal(found.images, written.images) and np.array_equal(found.reference, written.reference)
    assert list(found.segmentations) == subsets()
    assert all(np.array_equal(found.segmentations[name], written.segmentations[name]) for name in subsets())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["case.npz"]
    assert read_montage(tmp_path / "none.npz") is None
    assert found.further == ()


def test_further_slices_are_kept(tmp_path):
    written = with_further("0", "fine")
    write_montage(written, tmp_path / "case.npz")
    found = read_montage(tmp_path / "case.npz")
    assert [each.index for each in found.every] == [5, 11, 17] and found.index == 11
    for each, wanted in zip(found.every, written.every, strict=True):
        assert np.array_equal(each.images, wanted.images) and np.array_equal(each.reference, wanted.reference)
        assert all(np.array_equal(each.segmentations[name], wanted.segmentations[name]) for name in subsets())


def test_entropies_are_kept_beside_older_slices(tmp_path):
    first, *others = subsets()
    written, older = with_entropies("0", "fine"), with_further("0", "fine")  # an earlier version kept none
    alone = [
        replace(each, segmentations={first: each.segmentations[first]}, entropies={first: each.entropies[first]})
        for each in (written, *written.further)
    ]
    write_montage(replace(alone[0], further=tuple(alone[1:])).with_older(older), tmp_path / "case.npz")
    found = read_montage(tmp_path / "case.npz")
    assert sorted(found.segmentations) == sorted([first, *others])
    for each, wanted in zip(found.every, written.every, strict=True):
        assert list(each.entropies) == [first]
        assert np.array_equal(each.entropies[first], wanted.entropies[first])
    write_montage(written.with_older(older), tmp_path / "case.npz")
    assert list(read_montage(tmp_path / "case.npz").entropies) == subsets()
    assert {each.shape for each in pictures.cropped(written).entropies.values()} == {(38, 28)}


def test_slices_without_all_subsets_are_not_shown():
    """Pictures of an earlier version hold one slice: subsets that were predicted then are in no other."""
    old, new = montage("0", "fine"), with_further("0", "fine")
    last = subsets()[-1]
    parts = [replace(each, segmentations={last: each.segmentations[last]}) for each in (new, *new.further)]
    merged = replace(parts[0], further=tuple(parts[1:])).with_older(old)
    assert list(merged.segmentations) == subsets() and [each.index for each in merged.every] == [11]
    assert [each.index for each in merged.with_older(new).every] == [5, 11, 17]


def test_further_slices_are_spread_over_the_label():
    label = np.zeros((40, 5, 5), np.uint8)
    label[4:35, 2, 2] = 1
    label[21, 2, 1:4] = 1
    view = choose_view(label, (1, 1, 1))
    assert view.index == 21 and len(view.every) == SLICES
    others = [each.index for each in view.further]
    assert others == sorted(others) and others[0] == 4 and others[-1] == 34 and view.index not in others
    assert all(np.array_equal(each.reference, each.cut(label)) for each in view.every)
    label[5:] = 0
    assert [each.index for each in choose_view(label, (1, 1, 1)).every] == [4]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_a_damaged_montage_is_refused(tmp_path, content):
    file = tmp_path / "case.npz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"case\.npz is damaged .*--restart"):
        read_montage(file)


def test_earlier_subsets_are_kept_unless_the_label_changed():
    old, new = montage("0", "fine"), montage("0", "fine")
    first, second = subsets()[:2]
    new = Montage(*(getattr(new, name) for name in ("axis", "index", "depth", "images", "reference")), {})
    new.segmentations[second] = new.reference
    both = new.with_older(old)
    assert list(both.segmentations) == subsets()
    assert np.array_equal(both.segmentations[second], new.reference)
    assert np.array_equal(both.segmentations[first], old.segmentations[first])
    old.reference[0, 0] = 2
    assert list(new.with_older(old).segmentations) == [second]
    assert new.with_older(None) is new


# ---- pictures ------------------------------------------------------------------------------------------------------


def decoded(uri: str) -> Image.Image:
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_overlay_colours():
    labels = np.zeros((200, 250), np.uint8)
    labels[5, 6], labels[7, 8], labels[9, 9] = 1, 4, 2
    outline = np.zeros(labels.shape, bool)
    outline[20:25, 20:25] = True
    uri = pictures.overlay_uri(labels, {1: (255, 0, 0), 4: (0, 0, 255)}, pictures.outline_of(outline))
    found = decoded(uri).convert("RGBA")
    assert found.size == (250, 200)
    assert found.getpixel((6, 5)) == (255, 0, 0, pictures.OPACITY)
    assert found.getpixel((8, 7)) == (0, 0, 255, pictures.OPACITY)
    assert found.getpixel((0, 0))[3] == found.getpixel((9, 9))[3] == found.getpixel((22, 22))[3] == 0
    assert found.getpixel((20, 24)) == (255, 255, 255, 255)


def test_heat_map_colours():
    found = decoded(pictures.heat_uri(np.array([[0, 50, 100], [5, 95, 0]], np.uint8))).convert("RGB")
    magma = colormaps["magma"]
    wanted = {value: tuple(round(255 * part) for part in magma(value / 100)[:3]) for value in (0, 5, 50, 100)}
    assert found.size == (3, 2)
    assert [found.getpixel((column, 0)) for column in range(3)] == [wanted[0], wanted[50], wanted[100]]
    assert found.getpixel((0, 1)) == wanted[5]


def test_a_small_overlay_is_enlarged():
    labels = np.zeros((10, 20), np.uint8)
    labels[:, 10:] = 1
    found = decoded(pictures.overlay_uri(labels, {1: (255, 0, 0)})).convert("RGBA")
    assert found.size == (200, 100)
    assert found.getpixel((99, 50))[3] == 0 and found.getpixel((100, 50)) == (255, 0, 0, pictures.OPACITY)


def test_colours_differ_and_what_is_not_counted_is_grey():
    for number in (4, 14):
        colors = pictures.label_colors([*range(number), 99], 99)
        assert list(colors) == [*range(1, number), 99] and len(set(colors.values())) == number
        assert colors[99] == pictures.IGNORED


def test_the_border_is_cut_off_and_the_clearest_image_is_chosen():
    whole = montage("0", "fine")
    part = pictures.cropped(whole)
    assert part.images.shape == (3, 38, 28) and part.reference.shape == (38, 28)
    assert np.array_equal(part.reference, whole.reference[1:39, 1:29])
    assert all(found.shape == (38, 28) for found in part.segmentations.values())
    assert pictures.clearest_image(part) == 2
    empty = Montage(0, 0, 1, np.zeros((2, 5, 5), np.uint8), np.zeros((5, 5), np.uint8), {})
    assert pictures.cropped(empty) is empty and pictures.clearest_image(empty) == 0


# ---- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements, attributes and the text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(report(tmp_path))


def test_title_and_date(page):
    assert page.texts[0] == "a <b>model</b>: MSTKDTrainer, fold 0"
    about = next(text for text in page.texts if "Written on" in text)
    assert f"Written on 2026-03-04 by nnunetv2_mstkd {nnunetv2_mstkd.__version__}" in about
    text = " ".join(page.texts)
    assert "What this page cannot tell you" in text and "nothing here is a statement about clinical performance" in text
    assert "Dice: 1 if both masks are empty, 0 if one is" in page.texts


def test_names_are_text_wherever_they_stand(page):
    assert len(page.all("script")) == 1 and not page.all("b")[0]
    assert not any("onerror" in attributes or "onclick" in attributes for _, attributes in page.elements)
    # header, summary of its pictures, table of cases, data set
    assert sum(EVIL in text for text in page.texts) == 4
    assert "{{ 7 * 7 }}" in page.texts and MODALITIES[1] in page.texts
    assert any(image["alt"].startswith(f"{EVIL} segmented from") for image in page.all("img"))


def test_nothing_is_loaded_from_elsewhere(tmp_path, page):
    content = report(tmp_path)
    for name in ("src", "href", "srcset", "action", "data", "poster"):
        for tag, attributes in page.elements:
            value = attributes.get(name, "data:")
            if (tag, name) == ("a", "href"):  # a link loads nothing by itself, and leads to files beside the page
                assert value.startswith("#") or re.fullmatch(r"[\w.]+", value), value[:80]
            else:
                assert value.startswith(("data:", "#")), (name, value[:80])
    assert set(re.findall(r"url\(\W*(\w+)", content)) == {"data"} and "@import" not in content
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy


def test_layouts_of_subset_tables(tmp_path):
    content = report(tmp_path)
    # 7 subsets of 3 modalities: 12 available, 9 missing
    first = content[content.index("<table") : content.index("</table>")]
    assert (first.count("●"), first.count("○")) == (12, 9) and first.count("<tr>") == 3 + 2
    names = ("A", "B", "C", "D", "E")
    wide = report(tmp_path, results(names), run={**RUN, "channels": names}, load=lambda f, c: montage(f, c, names))
    first = wide[wide.index("<table") : wide.index("</table>")]
    assert first.count("<tr>") == 1 + 31 + 1 and "average" in first
    assert content.count('<details class="montage" open>') == 3 and wide.count('<details class="montage" open>') == 1
    assert wide.count("<h4>5 modalities</h4>") == 3 and "<h4>3 modalities</h4>" in wide


def test_stated_presence_is_a_table_where_there_is_one(tmp_path, page):
    assert "Presence stated by the model" not in " ".join(page.texts)
    rows = [("0", case, "T1", "WT", score, case != "fine") for case, score in zip(CASES, (0.9, 0.8, 0.1), strict=True)]
    rows += [("0", case, "FLAIR", EVIL, 0.5, True) for case in CASES]
    stated = Page(report(tmp_path, presence=pd.DataFrame(rows, columns=list(PRESENCE_COLUMNS))))
    assert "Presence stated by the model" in " ".join(stated.texts)
    assert "0.85 (n = 2) / 0.10 (n = 1)" in stated.texts and len(stated.all("script")) == 1


def test_the_table_of_stated_presence():
    rows = [("0", case, "T1", "WT", score, True) for case, score in (("a", 0.25), ("b", 0.75))]
    rows.append(("0", "b", "T1+T2", "WT", 0.5, False))
    table = presence_table(pd.DataFrame(rows, columns=list(PRESENCE_COLUMNS)), ["T2", "T1", "T1+T2"])
    assert table.values.tolist() == [["T1", "0.50 (n = 2) / -"], ["T1+T2", "- / 0.50 (n = 1)"]]


def test_cases_stand_worst_first_with_the_numbers_to_sort_by(page):
    keys = [float(each["data-key"]) for each in page.all("td") if each.get("data-key")]
    # mean, two regions, the worst subset's mean, full input
    assert len(keys) == 3 * 5
    assert keys[0] < keys[5] < keys[10]
    dice = results().query("case == @EVIL")["value"]
    assert keys[0] == pytest.approx(dice.mean()) and keys[4] == pytest.approx(0.345) and keys[3] == pytest.approx(0.305)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, []),
        (1, [(EVIL, "worst")]),
        (2, [(EVIL, "worst"), ("fine", "best")]),
        (3, [(EVIL, "worst"), ("middling", "median"), ("fine", "best")]),
        (9, [(EVIL, "worst"), ("middling", "median"), ("fine", "best")]),
    ],
)
def test_pictured_cases_are_the_worst_the_best_and_some_between(tmp_path, number, expected):
    found = Page(report(tmp_path, number=number))
    summaries = [re.match(r"(.*): (\w+), mean Dice", text) for text in found.texts if ", mean Dice" in text]
    assert [match.groups() for match in summaries] == expected
    assert ("Pictures" in found.texts) == (number > 0)


def test_each_subset_of_a_pictured_case_has_its_picture(page):
    alternatives = [image["alt"] for image in page.all("img")]
    for case in CASES:
        assert f"reference of {case}" in alternatives
        assert [alt for alt in alternatives if alt.startswith(f"{case} segmented")] == [
            f"{case} segmented from {subset}" for subset in subsets()
        ]
        assert all(f"{name} of {case}" in alternatives for name in MODALITIES)
    # long names break between modalities
    assert page.texts.count("FLAIR & more") > 3 and len(page.all("wbr")) == 3 * 5
    sources = [image["src"] for image in page.all("img")]
    assert all(decoded(source).size[0] > 1 for source in sources)


def test_each_subset_has_its_entropy_where_it_was_kept(tmp_path, page):
    found = Page(report(tmp_path, load=with_entropies))
    for case in CASES:
        alternatives = [image["alt"] for image in found.all("img") if image["alt"].startswith(f"entropy of {case} seg")]
        # three slices of each
        assert alternatives == [f"entropy of {case} segmented from {subset}" for subset in subsets() for _ in range(3)]
    sources = [image["src"] for image in found.all("img") if image["alt"].startswith("entropy of fine segmented from")]
    assert len(set(sources)) == 9  # in steps of 5, 0 to 2 for the slice and 0 to 6 for the subset
    scales = [
        [image["alt"] for image in each.all("img")].count("from black over red to pale yellow")
        for each in (found, page)
    ]
    assert scales == [3, 0] and found.texts.count("100 %") == 3


def test_a_case_without_pictures_says_so(tmp_path):
    found = Page(report(tmp_path, load=lambda fold, case: None, near=None))
    assert sum("No slice of this case is stored" in text for text in found.texts) == 3
    assert not any("of the decision" in text for text in found.texts)


def test_the_page_begins_with_what_a_missing_modality_costs(page):
    # each modality more adds two points, in both regions alike
    place = next(number for number, text in enumerate(page.texts) if "Dice points" in text)
    costs = [f"{name}: WT -2.0" for name in MODALITIES]
    assert page.texts[place] == (
        f"Without {costs[0]} Dice points; without {costs[1]}; without {costs[2]} "
        "(for each modality, the region that loses most)."
    )
    assert place < page.texts.index("Summary of the Dice") and page.all("img")[0]["alt"].startswith("Loss of Dice")


def test_every_case_is_linked_from_the_table(tmp_path):
    pages = {("0", case): f"cases/fold_0/{case}.html" for case in ("fine", "middling", "a#b")}
    found = Page(report(tmp_path, results(cases=[*CASES, "a#b"]), number=2, pages=pages))
    links = [each["href"] for each in found.all("a") if each["href"].startswith(("#montage-", "cases/"))]
    assert links == ["#montage-0", "cases/fold_0/a%23b.html", "cases/fold_0/middling.html", "#montage-1"]
    assert {"montage-0", "montage-1"} <= {each.get("id") for _, each in found.elements}
    assert "results.csv" in [each["href"] for each in found.all("a")]


def test_a_case_has_a_page_of_its_own(tmp_path):
    findings, pictures = Findings(results()), Pictures(0, montage)
    found = Page(case_page(findings, RULES, RUN, pictures, "0", "fine"))
    assert found.texts[0] == "fine (fold 0)" and {"href": "../../report.html"} in found.all("a")
    assert f"fine segmented from {subsets()[0]}" in [image["alt"] for image in found.all("img")]


def test_warnings_stand_on_top(tmp_path):
    frame = results(("T1", "T1ce", "FLAIR"), cases=[*CASES, "four", "five", "six"])
    frame.loc[frame["subset"] == "T1", "value"] = 0.99
    found = Page(report(tmp_path, frame, load=lambda fold, case: None))
    place = found.texts.index("Results that contradict what the modalities show")
    assert place < found.texts.index("Summary of the Dice") and "full input" in found.texts[place + 1]


def test_one_subset_alone_has_a_page_too(tmp_path):
    frame = results(("T1",))
    found = Page(report(tmp_path, frame, load=lambda fold, case: None))
    assert "worst subset" in found.texts and "full input" not in found.texts
    frame.loc[frame["case"] == "fine", "value"] = np.nan
    missing = Page(report(tmp_path, frame, load=lambda fold, case: None))
    assert [each["data-key"] for each in missing.all("td") if "data-key" in each].count("") == 3


def test_a_case_without_a_value_is_neither_the_worst_nor_the_best(tmp_path):
    frame = results()
    frame.loc[frame["case"] == "fine", "value"] = np.nan
    found = Page(report(tmp_path, frame))
    summaries = [re.match(r"(.*): (\w+), mean Dice", text) for text in found.texts if ", mean Dice" in text]
    assert [match.groups() for match in summaries] == [(EVIL, "worst"), ("middling", "best")]
