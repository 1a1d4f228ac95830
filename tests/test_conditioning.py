"""What a network is told for the time of one prediction."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2_mstkd.inference.conditioning import conditioned, presence_of

LABELS = SimpleNamespace(has_regions=False, num_segmentation_heads=3)
ROWS = torch.tensor([[True, False], [True, True]])


class Asking(torch.nn.Module):
    """Offers what it needs by itself, and adds the number of the student to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.students = (None, None)
        self.told: tuple | None = None

    @contextmanager
    def conditioned(self, availability, label_manager, student):
        self.told = availability, label_manager, student
        yield lambda logits: logits + (student or 0)
        self.told = None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("student", [None, 2])
def test_a_network_that_asks(compiled, student):
    network = Asking()
    wrapped = SimpleNamespace(_orig_mod=network) if compiled else network
    with conditioned(wrapped, ROWS, LABELS, student=student) as finish:
        assert network.told == (ROWS, LABELS, student)
        assert finish(np.zeros(1)) == (student or 0)
    assert network.told is None


def test_a_network_that_does_not_ask():
    network = torch.nn.Conv3d(2, 3, 1)
    before = dict(vars(network))
    with conditioned(network, ROWS, LABELS) as finish:
        assert vars(network) == before
        logits = np.ones((2, 3, 2, 2))
        assert finish(logits) is logits


class Stating(Asking):
    """States a presence."""

    @contextmanager
    def conditioned(self, availability, label_manager, student):
        class Finish:
            def __call__(self, logits):
                return logits

            def presence(self):
                return np.full((len(availability), 3), 0.25)

        yield Finish()


def test_what_a_network_states_about_presence():
    for network, wanted in ((Asking(), None), (torch.nn.Identity(), None), (Stating(), np.full((2, 3), 0.25))):
        with conditioned(network, ROWS, LABELS) as finish:
            assert np.array_equal(presence_of(finish), wanted)


@pytest.mark.parametrize(
    ("network", "student", "message"),
    [(torch.nn.Identity(), 1, "one network and no students"), (Asking(), 3, "students 1 to 2"), (Asking(), 0, "is 0")],
)
def test_a_student_that_does_not_exist(network, student, message):
    with pytest.raises(ValueError, match=message), conditioned(network, ROWS, LABELS, student=student):
        pass
