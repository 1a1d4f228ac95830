from __future__ import annotations

import math

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.progress import PREFIX, TermLog


@pytest.fixture
def terms(tmp_path) -> TermLog:
    return TermLog(MetaLogger(str(tmp_path), False), str(tmp_path))


def lists(terms: TermLog) -> dict[str, list]:
    return terms._logger.local_logger.my_fantastic_logging


def test_values_are_kept_by_name_and_epoch(terms):
    terms.log({"kl": 0.5, "evd": 2}, 0)
    terms.log({"kl": 0.25, "evd": 1}, 1)
    assert terms.history() == {"kl": [0.5, 0.25], "evd": [2.0, 1.0]}


def test_the_history_holds_nothing_of_nnunet_and_is_a_copy(terms):
    terms.log({"kl": 0.5}, 0)
    terms.history()["kl"].append(3.0)
    assert terms.history() == {"kl": [0.5]}


def test_a_name_that_appears_late_is_padded_in_front(terms):
    terms.log({"kl": 0.5}, 0)
    terms.log({"kl": 0.5, "style": 3.0}, 2)
    assert [math.isnan(value) for value in terms.history()["kl"]] == [False, True, False]
    assert [math.isnan(value) for value in terms.history()["style"]] == [True, True, False]
    assert terms.history()["style"][2] == 3.0


def test_a_name_that_stops_does_not_hold_back_the_plot_of_nnunet(terms, tmp_path):
    terms.log({"kl": 0.5, "style": 3.0}, 0)
    terms.log({"kl": 0.5}, 1)
    terms.plot(1)
    assert [len(values) for values in terms.history().values()] == [2, 2]
    assert math.isnan(terms.history()["style"][1])
    terms.log({"kl": 0.5, "style": 1.0}, 2)
    assert terms.history()["style"][2] == 1.0


def test_the_log_is_part_of_a_checkpoint_and_comes_back_with_it(terms, tmp_path):
    terms.log({"kl": torch.tensor(0.5).item()}, 0)
    checkpoints.write({"network_weights": {}, "logging": terms._logger.get_checkpoint()}, tmp_path / "c.pth")
    other = TermLog(MetaLogger(str(tmp_path), False), str(tmp_path))
    other._logger.load_checkpoint(checkpoints.read(tmp_path / "c.pth")["logging"])
    other.log({"kl": 0.25}, 1)
    assert other.history() == {"kl": [0.5, 0.25]}


def test_the_lists_of_nnunet_are_left_alone(terms):
    before = {key: list(values) for key, values in lists(terms).items()}
    terms.log({"kl": 0.5}, 3)
    terms.plot(5)
    assert {key: values for key, values in lists(terms).items() if not key.startswith(PREFIX)} == before


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_picture_is_drawn_with_a_panel_per_name(terms, tmp_path, count, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, path, **_: drawn.append((self, path)), raising=True
    )
    terms.log({f"term_{index}": index for index in range(count)}, 0)
    # nnU-Net's own plot leaves seaborn's fonts for much larger figures
    with matplotlib.rc_context({"axes.titlesize": 30.0, "axes.labelsize": 30.0, "ytick.labelsize": 27.5}):
        terms.plot(0)
    ((figure, path),) = drawn
    texts = figure.findobj(matplotlib.text.Text)
    assert max(text.get_fontsize() for text in texts) < 10
    visible = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in visible] == [f"term {index}" for index in range(count)]
    assert path == tmp_path / "progress_terms.png"


def test_a_picture_is_written_and_leaves_no_state_behind(terms, tmp_path):
    style = dict(matplotlib.rcParams)
    terms.log({"kl": 0.5, "evd": math.nan}, 0)
    terms.plot(0)
    assert (tmp_path / "progress_terms.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == style


def test_nothing_is_drawn_before_the_first_value(terms, tmp_path):
    terms.plot(0)
    assert list(tmp_path.glob("*.png")) == []
