"""Adapters that depend on which modalities each sample has."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods.adamm.adapters import AdapterBank, SubsetIndex

WIDTH, HIDDEN = 6, 8


def make(channels: int, kind: str, *, seed: int = 0):
    """Index and bank, as after some training."""
    codes = {"full": range(1, 2**channels - 1), "factorised": (), "listed": (1, 2)}[kind]
    factorised = kind != "full"
    torch.manual_seed(seed)
    index = SubsetIndex(channels, codes, factorised=factorised)
    bank = AdapterBank(WIDTH, HIDDEN, channels, len(codes), factorised=factorised)
    return index, bank


def wake(bank: AdapterBank) -> AdapterBank:
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(0, 0.5)
    return bank


def features(batch: int, dimensions: int = 3) -> torch.Tensor:
    return torch.randn(batch, WIDTH, *[3, 4, 2][:dimensions], generator=torch.Generator().manual_seed(1))


KINDS = ["full", "factorised", "listed"]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [2, 3, 4, 6])
def test_a_new_bank_is_the_identity_for_every_subset(channels, kind, dimensions):
    index, bank = make(channels, kind)
    subsets = modalities.all_subsets(channels)
    x = features(len(subsets), dimensions)
    assert torch.equal(bank(x, index(subsets)), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [2, 3, 4, 6])
def test_the_full_set_passes_unchanged_and_no_other_subset_does(channels, kind):
    index, bank = make(channels, kind)
    subsets = modalities.all_subsets(channels)
    x = features(len(subsets))
    changed = (wake(bank)(x, index(subsets)) != x).flatten(1).any(1)
    assert changed.tolist() == [True] * (len(subsets) - 1) + [False]


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_a_batch_gets_what_it_would_get_alone(kind):
    index, bank = make(3, kind)
    wake(bank)
    subsets = modalities.all_subsets(3)
    x = features(len(subsets))
    together = bank(x, index(subsets))
    for row in range(len(subsets)):
        alone = bank(x[row : row + 1], index(subsets[row : row + 1]))
        torch.testing.assert_close(together[row : row + 1], alone)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    torch.testing.assert_close(bank(x[order], index(subsets[order])), together[order])


def test_a_bank_is_two_small_layers_with_the_subsets_own_weights():
    index, bank = make(3, "full")
    wake(bank)
    x = features(1)
    subset = torch.tensor([[True, False, True]])
    row = modalities.subset_code(subset[0]) - 1
    hidden = torch.nn.functional.gelu(
        torch.einsum("rc,bcxyz->brxyz", bank.down[row], x) + bank.down_bias[row][None, :, None, None, None]
    )
    update = torch.einsum("cr,brxyz->bcxyz", bank.up[row], hidden) + bank.up_bias[row][None, :, None, None, None]
    torch.testing.assert_close(bank(x, index(subset)), x + update)


def test_a_factorised_adapter_is_the_sum_of_one_per_modality():
    index, bank = make(3, "factorised")
    wake(bank)
    x = features(1)
    subset = torch.tensor([[True, False, True]])
    total = x.clone()
    for row in (0, 3 + 1, 2):  # available, absent, available
        hidden = torch.nn.functional.gelu(
            torch.einsum("rc,bcxyz->brxyz", bank.part_down[row], x)
            + bank.part_down_bias[row][None, :, None, None, None]
        )
        total += torch.einsum("cr,brxyz->bcxyz", bank.part_up[row], hidden)
        total += bank.part_up_bias[row][None, :, None, None, None]
    torch.testing.assert_close(bank(x, index(subset)), total)


def test_gradient_reaches_only_rows_in_the_batch():
    index, bank = make(3, "full")
    wake(bank)
    subsets = torch.tensor([[True, False, False], [False, True, True], [True, True, True]])
    bank(features(3), index(subsets)).square().sum().backward()
    wanted = {modalities.subset_code(row) - 1 for row in subsets[:2]}
    for parameter in bank.parameters():
        touched = parameter.grad.flatten(1).any(1).nonzero().flatten().tolist()
        assert set(touched) == wanted


def test_listed_subsets_have_own_rows():
    index, bank = make(3, "listed")
    wake(bank)
    listed, other = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
    bank(features(1), index(listed)).square().sum().backward()
    assert bank.down.grad[0].any() and not bank.part_down.grad.any()
    bank.zero_grad()
    bank(features(1), index(other)).square().sum().backward()
    assert not bank.down.grad.any() and bank.part_down.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_whatever_the_subset(kind):
    """DDP waits for ever for one that does not."""
    for subset in ([True, True, True], [True, False, False], [False, False, True]):
        index, bank = make(3, kind)
        bank(features(1), index(torch.tensor([subset]))).sum().backward()
        assert all(parameter.grad is not None for parameter in bank.parameters())


def test_the_index_knows_every_subset():
    index = SubsetIndex(4, range(1, 15), factorised=False)
    subsets = modalities.all_subsets(4)
    selection = index(subsets)
    assert selection.row[:-1].tolist() == [modalities.subset_code(row) - 1 for row in subsets[:-1]]
    assert selection.partial.tolist() == [1.0] * 14 + [0.0]
    assert selection.listed is None and selection.parts is None


def test_nothing_of_the_index_is_saved():
    assert not SubsetIndex(4, range(1, 15), factorised=True).state_dict()


def test_the_size_of_a_bank():
    def parameters(kind, channels, **options):
        return sum(parameter.numel() for parameter in make(channels, kind, **options)[1].parameters())

    one = 2 * WIDTH * HIDDEN + HIDDEN + WIDTH
    assert parameters("full", 4) == 14 * one
    # 2 x 4 parts of 2 hidden channels each
    assert parameters("factorised", 4) == 8 * (2 * WIDTH * 2 + 2 + WIDTH)
