"""`mstkd adapters`: how alike the adapters of different subsets are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import empty_folders
from predict_inputs import trainer_class, write_model

from nnunetv2_mstkd import cli, modalities
from nnunetv2_mstkd.methods import AdaMMTrainer, ModalityDropoutTrainer
from nnunetv2_mstkd.methods.adamm.similarity import COLUMNS, adapter_similarity
from nnunetv2_mstkd.reporting.figures import similarity_maps

NAMES = ("T0", "T1", "T2", "T3")


def similarity(network, **where) -> pd.DataFrame:
    table = adapter_similarity(network, modalities.all_subsets(4), NAMES)
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    return table


def test_similarity_is_the_cosine_of_the_subsets_own_weights(make_trainer):
    network = make_trainer(AdaMMTrainer).network
    bank = network.encoder_adapters[1]
    first, second, third = (modalities.subset_code(row) - 1 for row in np.eye(3, 4, dtype=bool))
    with torch.no_grad():
        for part in (bank.down, bank.down_bias, bank.up, bank.up_bias):
            part.normal_()
            part[second], part[third] = 2 * part[first], part[first]
        bank.down[third] *= -1
    pair = similarity(network, stage="E2", first="T0").set_index("second")
    assert pair.loc["T1", "weights"] == pytest.approx(1) and pair.loc["T1", "map"] == pytest.approx(1)
    assert pair.loc["T2", "map"] == pytest.approx(-1) and -1 < pair.loc["T2", "weights"] < 1
    one, other = (
        torch.cat([part[row].flatten() for part in (bank.down, bank.down_bias, bank.up, bank.up_bias)])
        for row in (first, third)
    )
    assert pair.loc["T2", "weights"] == pytest.approx(torch.cosine_similarity(one, other, dim=0).item(), abs=1e-5)
    assert pair.loc["T2", "chance"] == pytest.approx(math.sqrt(2 / math.pi / bank.down[first].numel()))


def test_new_adapters_are_unrelated_and_do_nothing(make_trainer):
    table = similarity(make_trainer(AdaMMTrainer).network)
    assert list(table.columns) == list(COLUMNS) and len(table) == 4 * 14 * 14  # E1, E2, D1, D2; no full set
    assert list(dict.fromkeys(table["stage"])) == ["E1", "E2", "D1", "D2"]
    off = table[table["first"] != table["second"]]
    assert off["map"].isna().all()
    # the mean of 4 stages of 91 pairs
    assert off["weights"].abs().mean() == pytest.approx(off["chance"].mean(), rel=0.2)
    figure = similarity_maps(table)
    assert sum("untrained" in axis.get_title() for axis in figure.axes) == 4


def test_subsets_of_a_factorised_bank_share_parts(make_trainer):
    network = make_trainer(AdaMMTrainer, block={"adamm": {"bank": "factorised"}}).network
    with torch.no_grad():
        for bank in [*network.encoder_adapters, *network.decoder_adapters]:
            bank.part_up.normal_()
    table = similarity(network, stage="E1", first="T0").set_index("second")
    assert table["chance"].isna().all()
    assert not any("chance" in axis.get_title() for axis in similarity_maps(similarity(network)).axes)
    # T0 and T0+T1 differ in one of four parts, T0 and T1+T2+T3 in all
    assert table.loc["T0+T1", "map"] > 0.4 > table.loc["T1+T2+T3", "map"]


def test_networks_without_adapters_are_refused(make_trainer):
    networks = [make_trainer(ModalityDropoutTrainer).network]
    networks.append(make_trainer(AdaMMTrainer, block={"adamm": {"adapters": False}}).network)
    for network in networks:
        with pytest.raises(ValueError, match=r"no adapters; expected one of AdaMMTrainer"):
            similarity(network)
    full = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least two subsets"):
        adapter_similarity(make_trainer(AdaMMTrainer).network, full, NAMES)


def test_the_command_draws_and_writes(tmp_path: Path, monkeypatch, capsys):
    empty_folders(tmp_path, monkeypatch)
    model = write_model(trainer_class("AdaMMTrainer"), folds=(1, 2))
    assert cli.main(["adapters", str(model), "-o", str(tmp_path / "new" / "f.png")]) == 0
    assert "fold 1: " in capsys.readouterr().out
    assert (tmp_path / "new" / "f.png").read_bytes()[:4] == b"\x89PNG"
    first = pd.read_csv(tmp_path / "new" / "f.csv")
    assert list(first.columns) == list(COLUMNS) and len(first) == 4 * 14 * 14
    assert (first.loc[first["first"] == first["second"], ["weights", "map"]] == 1).all(axis=None)
    few = ["-f", "2", "--subsets", "T0", "T1+T2"]
    assert cli.main(["adapters", str(model), "-o", str(tmp_path / "g.svg"), *few]) == 0
    second = pd.read_csv(tmp_path / "g.csv")
    assert len(second) == 4 * 2 * 2
    pair = {"first": "T0", "second": "T1+T2", "stage": "E1"}
    values = [table.loc[(table[list(pair)] == pair).all(axis=1), "map"].item() for table in (first, second)]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        ("ModalityDropoutTrainer", ["-o", "f.png"], "no adapters; expected one of AdaMMTrainer"),
        ("AdaMMTrainer", ["-o", "f.csv"], "the numbers go to .csv"),
        ("AdaMMTrainer", ["-o", "f.png", "--subsets", "T9"], "T9"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path: Path, monkeypatch, capsys, trainer, options, message):
    empty_folders(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = write_model(trainer_class(trainer))
    capsys.readouterr()
    assert cli.main(["adapters", str(model), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "f.png").exists()


def test_no_model_folder_is_one_line(tmp_path: Path, capsys):
    assert cli.main(["adapters", str(tmp_path / "nothing"), "-o", "f.png"]) == 2
    assert "no model folder" in capsys.readouterr().err
