"""`schedule.init_from`: input channels are taken over by the names of the modalities, by every trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import NO_TERMS, state

from nnunetv2_mstkd import methods
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.design import NetworkDesign, first_weights

SKIPPED = "front", "modality_encoders"
WEIGHT = "encoder.stages.0.0.convs.0.conv.weight"
STEM = "encoder.stem.convs.0.conv.weight"


@pytest.fixture
def start(make_trainer, tmp_path):
    """Start a trainer from a plain U-Net of other modalities; returns the trainer, its first weights, and its log."""

    def start(
        cls: type,
        own: Sequence[str],
        given: Sequence[str],
        *,
        source: type = methods.ModalityDropoutTrainer,
        block: dict[str, Any] | None = None,
        change=lambda content: None,
        **options: Any,
    ):
        first = make_trainer(source, channels=len(given), seed=3, block=NO_TERMS if block is None else block, **options)
        tiny.wake(first.network)
        first.dataset_json["channel_names"] = {str(number): name for number, name in enumerate(given)}
        file = tmp_path / "start.pth"
        first.save_checkpoint(str(file))
        content = checkpoints.read(file)
        change(content)
        torch.save(content, file)
        settings = {**(NO_TERMS if block is None else block), "schedule": {"init_from": str(file)}}
        trainer = make_trainer(cls, channels=len(own), block=settings, **options)
        trainer.dataset_json["channel_names"] = {str(number): name for number, name in enumerate(own)}
        before = state(trainer.network)
        trainer.prepare_training()
        log = "".join(path.read_text() for path in Path(trainer.output_folder).glob("training_log_*"))
        return trainer, content["network_weights"], before, log.replace(" \n", "\n")

    return start


NAMES = ("T1", "T1ce", "T2", "FLAIR")


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_another_order_is_permuted(start, residual):
    trainer, given, _, log = start(
        methods.ModalityDropoutTrainer, NAMES, ("flair", "T1", "T2", "T1CE"), residual=residual
    )
    name, own = STEM if residual else WEIGHT, trainer.network.state_dict()
    for channel, source in enumerate((1, 3, 2, 0)):
        assert torch.equal(own[name][:, channel], given[name][:, source])
    twins = [key for key, value in own.items() if value.data_ptr() == own[name].data_ptr()]
    assert len(twins) == 4 and all(torch.equal(own[key], given[key]) for key in own.keys() - set(twins))
    assert "modalities: T1 from T1, T1ce from T1CE, T2 from T2, FLAIR from flair\n" in log
    assert "0 kept their initial value" in log
    # the same images, each in its channel, give the same output
    image = torch.randn(1, 4, 16, 16, 16)
    first = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 4, 3, enable_deep_supervision=False
    )
    first.load_state_dict(given)
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        assert torch.allclose(trainer.network(image), first(image[:, [3, 0, 2, 1]]), atol=1e-5)


def test_fewer_and_more_modalities(start):
    trainer, given, before, log = start(methods.ModalityDropoutTrainer, NAMES, ("T2", "T1"))
    own = trainer.network.state_dict()[WEIGHT]
    assert torch.equal(own[:, 0], given[WEIGHT][:, 1]) and torch.equal(own[:, 2], given[WEIGHT][:, 0])
    assert torch.equal(own[:, [1, 3]], before[WEIGHT][:, [1, 3]])
    assert "T1 from T1, T1ce keeps its initial weights, T2 from T2, FLAIR keeps its initial weights\n" in log
    trainer, given, _, log = start(methods.ModalityDropoutTrainer, ("T2", "T1"), NAMES)
    assert torch.equal(trainer.network.state_dict()[WEIGHT], given[WEIGHT][:, [2, 0]])
    assert "T2 from T2, T1 from T1; not used: T1ce, FLAIR\n" in log


def test_a_trainer_that_names_itself_says_so(make_trainer, monkeypatch):
    trainer = make_trainer(methods.ModalityDropoutTrainer, block={"schedule": {"init_from": "ModalityDropoutTrainer"}})
    told: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", told.append)
    trainer.prepare_training()
    assert told == ["schedule.init_from names this trainer, which starts from random weights"]


def test_no_modality_in_common(start):
    trainer, given, before, log = start(methods.ModalityDropoutTrainer, NAMES, ("CT", "PET", "a", "b"))
    own = trainer.network.state_dict()
    assert torch.equal(own[WEIGHT], before[WEIGHT])
    assert torch.equal(own["decoder.seg_layers.0.weight"], given["decoder.seg_layers.0.weight"])
    assert f"not in it or of another shape: {WEIGHT}\n" in log and "not used: CT, PET, a, b\n" in log


def one_channel_checkpoint(folder: Path, make_trainer, names: Sequence[str] = ("CT",)) -> tuple[Path, Any]:
    """Of nnU-Net's own trainer, as this package's need two modalities."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = make_trainer(nnUNetTrainer, channels=1, seed=5)
    trainer.dataset_json["channel_names"] = {str(number): name for number, name in enumerate(names)}
    trainer.save_checkpoint(str(folder / "one.pth"))
    trainer.set_deep_supervision_enabled(False)
    return folder / "one.pth", trainer.network


@pytest.mark.parametrize("cls", [methods.ModalityDropoutTrainer, methods.ModalityConditionedTrainer])
def test_one_channel_is_spread_over_all(make_trainer, tmp_path, cls):
    file, first = one_channel_checkpoint(tmp_path, make_trainer)
    trainer = make_trainer(cls, block={"schedule": {"init_from": str(file)}})
    trainer.prepare_training()
    trainer.set_deep_supervision_enabled(False)
    image = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        output = trainer.network(image.expand(-1, 4, -1, -1, -1))
        assert torch.allclose(output, first(image), atol=1e-5) and not torch.allclose(output, first(2 * image))


def test_unnamed_channels_are_taken_in_order(start):
    trainer, given, _, log = start(
        methods.ModalityDropoutTrainer, NAMES, ("d", "c", "b", "a"), change=lambda content: content.pop("init_args")
    )
    assert torch.equal(trainer.network.state_dict()[WEIGHT], given[WEIGHT]) and "modalities:" not in log


def test_a_checkpoint_that_does_not_fit_is_refused(start):
    def other(content: dict) -> None:
        content["network_weights"] = {"conv.weight": torch.zeros(3), WEIGHT: torch.zeros(5, 4, 1, 1, 1)}

    with pytest.raises(ValueError, match="no tensor of the checkpoint"):
        start(methods.ModalityDropoutTrainer, NAMES, NAMES, change=other)
    with pytest.raises(ValueError, match="channel_names"):
        start(
            methods.ModalityDropoutTrainer,
            NAMES,
            NAMES,
            change=lambda content: content["init_args"]["dataset_json"].update(channel_names=[]),
        )


ENCODERS = {
    "SMMLTrainer": {**NO_TERMS, "smml": {**NO_TERMS["smml"], "light": False}},
    "MedMAPTrainer": {**NO_TERMS, "medmap": {**NO_TERMS["medmap"], "placement": "encoders"}},
}
FEATURES = {**NO_TERMS, "medmap": {**NO_TERMS["medmap"], "features": 2}}
ONE_FEATURE = {**NO_TERMS, "medmap": {**NO_TERMS["medmap"], "features": 1}}
"""A stem that keeps the number of input channels, and with it the first convolution."""
EVERY = [(name, ONE_FEATURE) for name in methods.__all__] + list(ENCODERS.items()) + [("MedMAPTrainer", FEATURES)]


@pytest.mark.parametrize(("name", "block"), EVERY)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_every_trainer_starts_from_a_plain_network(start, name, block, residual):
    """All of the U-Net is loaded, its first convolution by name, unless another module takes its place."""
    order = [2, 0, 3, 1]
    trainer, given, before, _ = start(
        getattr(methods, name), NAMES, [NAMES[number] for number in order], block=block, residual=residual
    )
    own, first = trainer.network.state_dict(), STEM if residual else WEIGHT
    prefixes = ("students.0.", "students.1.") if "SMML" in name else ("",)
    replaced = any(part in key for key in own for part in SKIPPED) and not own.keys() >= {first}
    permuted = [order.index(channel) for channel in range(4)]
    for prefix in prefixes:
        for key, value in given.items():
            if key.startswith("decoder.encoder.") or (replaced and key.startswith("encoder.")):
                continue
            if key != first and not key.endswith("convs.0.all_modules.0.weight"):
                assert torch.equal(own[prefix + key], value), key
        if block is FEATURES:
            assert torch.equal(own[first], before[first])
        elif not replaced:
            assert torch.equal(own[prefix + first], given[first][:, permuted])
    loaded = sum(not torch.equal(value, before[key]) for key, value in own.items())
    assert loaded >= len([key for key in given if key.startswith("decoder.stages")])


@pytest.mark.parametrize(("name", "block"), EVERY)
def test_every_trainer_starts_from_its_own_kind(start, name, block):
    """With the same modalities everything is loaded; in another order nothing that depends on it otherwise."""
    cls = getattr(methods, name)
    trainer, given, _, log = start(cls, NAMES, NAMES, source=cls, block=block)
    assert tiny.same(trainer.network.state_dict(), given) and " 0 kept their initial value" in log
    trainer, given, before, _ = start(cls, NAMES, NAMES[::-1], source=cls, block=block)
    design, own = cls.design or NetworkDesign(), trainer.network.state_dict()
    names = {
        kind: {key for key, value in own.items() if value.data_ptr() in {weight.data_ptr() for weight in weights}}
        for kind, weights in {
            "input": design.input_weights(trainer.network),
            "other": design.modality_weights(trainer.network),
        }.items()
    }
    for key, value in own.items():
        if key in names["input"]:
            assert torch.equal(value, given[key].flip(1)), key
        elif key in names["other"]:
            assert torch.equal(value, before[key]), key
        else:
            assert torch.equal(value, given[key]), key
    assert names["input"] | names["other"]


def wide(name: str) -> dict[str, Any]:
    """Settings of encoders of single modalities with all of the planned channels."""
    section = {"SMMLTrainer": "smml", "MedMAPTrainer": "medmap"}[name]
    return {**ENCODERS[name], section: {**ENCODERS[name][section], "width": 1.0}}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_every_modality_encoder_starts_from_the_plain_encoder(start, name, residual):
    order = ["T2", "T1", "PD", "FLAIR"]  # T1ce is new
    trainer, given, before, log = start(getattr(methods, name), NAMES, order, block=wide(name), residual=residual)
    own, first = trainer.network.state_dict(), STEM if residual else WEIGHT
    twins = {key for key in given if given[key].shape == given[first].shape and torch.equal(given[key], given[first])}
    students = "students.0.modality_encoders", "students.1.modality_encoders"
    for place in students if name == "SMMLTrainer" else ("front.encoders",):
        for channel, source in enumerate((1, None, 0, 3)):
            for key, value in given.items():
                copy = f"{place}.{channel}.{key.removeprefix('encoder.')}"
                if key.startswith("decoder."):
                    continue
                if key not in twins:
                    assert torch.equal(own[copy], value), copy
                elif source is None:
                    assert torch.equal(own[copy], before[copy]), copy
                else:
                    assert torch.equal(own[copy], value[:, source : source + 1]), copy
    assert "T1ce keeps its initial weights" in log


def test_encoders_of_a_single_channel_are_not_divided(make_trainer, tmp_path):
    file, first = one_channel_checkpoint(tmp_path, make_trainer)
    block = {**wide("SMMLTrainer"), "schedule": {"init_from": str(file)}}
    trainer = make_trainer(methods.SMMLTrainer, block=block)
    trainer.prepare_training()
    image = torch.randn(2, 4, 16, 16, 16)
    with torch.no_grad():
        stages = trainer.network.students[1].modality_encoders(image)
        for channel in range(4):
            wanted = first.encoder(image[:, channel : channel + 1])
            assert all(torch.allclose(stage[:, channel], want) for stage, want in zip(stages, wanted, strict=True))


def test_the_first_weights_read_the_image(make_trainer):
    for residual in (False, True):
        for dimensions in (2, 3):
            network = make_trainer(methods.FullModalityTrainer, residual=residual, dimensions=dimensions).network
            (weight,) = first_weights(network)
            image = torch.randn(1, 4, *[16] * dimensions)
            with torch.no_grad():
                weight.zero_()
                outputs = network(image), network(image + 1)
            assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    assert first_weights(torch.nn.Linear(2, 2)) == []
