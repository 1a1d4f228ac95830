from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from nnunetv2_mstkd.nnunet import checkpoints


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(3, 2, 3, 3, generator=generator),
        "conv.bias": torch.randn(3, generator=generator),
        "steps": torch.tensor(7),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


def content() -> dict:
    """What nnU-Net's checkpoints hold: tensors, plain Python, and NumPy scalars in the log."""
    return {
        "network_weights": weights(),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"train_losses": [np.float32(1.5), np.float64(0.25)], "lrs": [0.01, float("nan")]},
        "_best_ema": np.float64(0.5),
        "current_epoch": np.int64(3),
        "init_args": {"plans": {"configurations": {"2d": {"mstkd": {}}}}, "fold": 0, "device": torch.device("cpu")},
        "inference_allowed_mirroring_axes": (0, 1),
        "mstkd": {"split": {"train": ["a"], "val": ["b"]}},
    }


# ---- reading and writing -------------------------------------------------------------------------------------------


def test_what_nnunet_writes_reads_back(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    torch.save(content(), path)
    found = checkpoints.read(path)
    assert found["init_args"] == content()["init_args"]
    assert found["logging"]["train_losses"] == [1.5, 0.25]
    assert (found["_best_ema"], found["current_epoch"]) == (0.5, 3)
    for name, tensor in weights().items():
        assert found["network_weights"][name].dtype == tensor.dtype
        assert torch.equal(found["network_weights"][name], tensor)


def test_write_and_read(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    checkpoints.write(content(), path)
    assert torch.equal(checkpoints.read(str(path))["network_weights"]["half"], weights()["half"])
    assert os.listdir(tmp_path) == [path.name]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    checkpoints.write(content(), tmp_path / "a.pth")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.pth").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_writer_that_dies_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint_latest.pth"
    checkpoints.write(content(), path)
    before = path.read_bytes()

    def die(obj, file):
        file.write(b"half a file")
        raise error

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(type(error)):
        checkpoints.write({"network_weights": {}}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_writer_killed_before_first_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    with pytest.raises(OSError, match="read-only"):
        checkpoints.write(content(), tmp_path / "checkpoint_latest.pth")
    assert os.listdir(tmp_path) == []


def test_old_file_is_readable_during_write(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_latest.pth"
    checkpoints.write(content(), path)
    save, seen = torch.save, []

    def watch(obj, file):
        save(obj, file)
        seen.append(checkpoints.read(path)["current_epoch"])

    monkeypatch.setattr(torch, "save", watch)
    checkpoints.write({**content(), "current_epoch": 4}, path)
    assert seen == [3]
    assert checkpoints.read(path)["current_epoch"] == 4


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint_final\.pth does not exist"):
        checkpoints.read(tmp_path / "checkpoint_final.pth")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, kept):
    path = tmp_path / "checkpoint_final.pth"
    checkpoints.write(content(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match="damaged, truncated or not a checkpoint") as error:
        checkpoints.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_header_is_a_value_error(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    checkpoints.write(content(), path)
    whole = path.read_bytes()
    refused = 0
    for position in range(60, 1200, 12):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            checkpoints.read(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 40


@pytest.mark.parametrize("data", [b"hello world", b"\x93NUMPY\x01\x00", pickle.dumps({"network_weights": {}}, 2)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, data):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(ValueError, match="damaged, truncated or not a checkpoint"):
        checkpoints.read(tmp_path / "x.pth")


def test_a_checkpoint_without_network_weights_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="it has no network_weights"):
        checkpoints.read(tmp_path / "x.pth")
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(ValueError, match="it has no network_weights"):
        checkpoints.read(tmp_path / "x.pth")


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_pickled_code_is_refused_by_name_and_not_executed(tmp_path):
    marker = tmp_path / "executed"
    torch.save({"network_weights": {}, "x": Attack(str(marker))}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"refused: it asks to import (posix|nt)\.mkdir") as error:
        checkpoints.read(tmp_path / "x.pth")
    assert not marker.exists()
    assert "\n" not in str(error.value)
    # the file is an attack indeed
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert marker.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path):
    torch.save({"network_weights": {}, "network": nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        checkpoints.read(tmp_path / "x.pth")


# ---- fingerprint ---------------------------------------------------------------------------------------------------


def test_fingerprint_ignores_file_name_and_order(tmp_path):
    expected = checkpoints.fingerprint(weights())
    assert len(expected) == 64
    shuffled = dict(reversed(weights().items()))
    for name in ("checkpoint_final.pth", "another_name.pth"):
        torch.save({"network_weights": shuffled}, tmp_path / name)
        assert checkpoints.fingerprint(checkpoints.read(tmp_path / name)["network_weights"]) == expected
    # why it is not the file's own hash
    assert (tmp_path / "checkpoint_final.pth").read_bytes() != (tmp_path / "another_name.pth").read_bytes()


def test_fingerprint_ignores_layout_and_gradients():
    changed = weights()
    tensor = changed["conv.weight"].to(memory_format=torch.channels_last)
    changed["conv.weight"] = nn.Parameter(tensor)
    changed["conv.bias"] = changed["conv.bias"].repeat_interleave(2)[::2]
    assert checkpoints.fingerprint(changed) == checkpoints.fingerprint(weights())


@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "steps", "half", "flags"])
def test_the_fingerprint_changes_with_one_bit_of_any_tensor(name):
    changed = weights()
    changed[name].reshape(-1)[-1:].view(torch.uint8)[0] ^= 1
    assert checkpoints.fingerprint(changed) != checkpoints.fingerprint(weights())


def test_fingerprint_sees_names_shapes_types_and_zero_sign():
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"a": -torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
        {},
    ]
    prints = [checkpoints.fingerprint(entry) for entry in (base, *others)]
    assert len(set(prints)) == len(prints)


# ---- load_matching -------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """As in nnU-Net's networks, the decoder holds the encoder once more."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder
        self.head = nn.Linear(3, 4)


def test_load_matching():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    own = {name: value.clone() for name, value in network.state_dict().items()}
    given = {"0.weight": torch.full((3, 2), 5.0), "1.weight": torch.zeros(9, 3), "2.weight": torch.zeros(1)}
    loaded, kept = checkpoints.load_matching(network, given)
    assert loaded == ["0.weight"]
    assert kept == ["0.bias", "1.bias", "1.weight"]
    assert torch.equal(network[0].weight, given["0.weight"])
    for name in kept:
        assert torch.equal(network.state_dict()[name], own[name])


@pytest.mark.parametrize("prefix", ["encoder", "decoder.encoder"])
def test_a_shared_tensor_is_loaded_under_either_of_its_names(prefix):
    network = Shared()
    given = {f"{prefix}.weight": torch.full((3, 2), 5.0), f"{prefix}.bias": torch.full((3,), 6.0)}
    loaded, kept = checkpoints.load_matching(network, given)
    assert loaded == sorted(given)
    assert kept == ["head.bias", "head.weight"]
    assert network.encoder.weight.unique().tolist() == [5.0]
    assert network.encoder.bias.unique().tolist() == [6.0]


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match="is it another one"):
        checkpoints.load_matching(nn.Linear(2, 3), {"weight": torch.zeros(4, 4), "other": torch.zeros(3)})


def test_training_hours_are_those_of_the_epochs(tmp_path):
    """A pause between two epochs, of an interrupted training, does not count."""
    log = {"epoch_start_timestamps": [1000.0, 99000.0], "epoch_end_timestamps": [2800.0, 100800.0]}
    for name, content in (("with", {"logging": log}), ("without", {})):
        torch.save({"network_weights": {}, **content}, tmp_path / name)
    assert checkpoints.read_notes(tmp_path / "with").hours == 1.0
    assert checkpoints.read_notes(tmp_path / "without").hours is None
