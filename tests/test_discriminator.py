from __future__ import annotations

import pytest
import torch

from nnunetv2_mstkd.losses.style import adversarial_student_term, discriminator_loss
from nnunetv2_mstkd.networks.discriminator import PatchDiscriminator, mean_logit


def build(input_channels: int = 5, *, dimensions: int = 3) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(input_channels, dimensions=dimensions)


@pytest.mark.parametrize(
    ("grid", "positions"),
    [
        ((8, 8, 8), (4, 4, 4)),
        ((8, 10, 8), (4, 5, 4)),
        ((4, 4, 4), (2, 2, 2)),
        ((7, 1, 2), (4, 1, 1)),
        ((1, 1, 1), (1, 1, 1)),
        ((24, 20), (12, 10)),
        ((1, 5), (1, 3)),
        ((1, 1), (1, 1)),
    ],
)
def test_any_grid_gives_a_map_of_logits_of_half_its_edges(grid, positions):
    discriminator = build(dimensions=len(grid))
    for batch in (1, 2):
        x = torch.randn(batch, 5, *grid, requires_grad=True)
        logits = discriminator(x)
        assert logits.shape == (batch, 1, *positions)
        logits.sum().backward()
        assert x.grad.isfinite().all()


def test_scale_and_offset_of_a_channel_do_not_help_to_tell_apart():
    discriminator = build()
    x = torch.randn(2, 5, 4, 4, 4)
    changed = x * torch.tensor([1.0, 2.0, 5.0, 10.0, 100.0]).reshape(1, 5, 1, 1, 1) + 7
    torch.testing.assert_close(discriminator(changed), discriminator(x), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(discriminator(x.flip(1)), discriminator(x), atol=1e-3, rtol=1e-3)


def test_samples_do_not_mix():
    discriminator = build()
    x = torch.randn(3, 5, 4, 5, 4)
    together = discriminator(x)
    apart = torch.cat([discriminator(sample[None]) for sample in x])
    torch.testing.assert_close(together, apart)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_far_position_does_not_change_a_patchs_logit():
    # Contrast within a channel is kept: swapping two far voxels leaves mean and variance, so only the patch itself
    # counts.
    discriminator = build(dimensions=2)
    x = torch.randn(1, 5, 40, 40)
    swapped = x.clone()
    swapped[..., 38, 38], swapped[..., 39, 30] = x[..., 39, 30], x[..., 38, 38]
    before, after = discriminator(x), discriminator(swapped)
    torch.testing.assert_close(before[..., :10, :10], after[..., :10, :10])
    assert (before - after).abs().max() > 1e-4


def test_the_mean_logit_is_one_number_per_sample():
    logits = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]], [[[0.0, 0.0], [0.0, -4.0]]]])
    torch.testing.assert_close(mean_logit(logits), torch.tensor([3.0, -1.0]))
    assert mean_logit(logits.half()).dtype == torch.float32


def test_half_precision_under_autocast_gives_the_float32_logits():
    discriminator = build()
    x = torch.randn(1, 5, 4, 4, 4).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = discriminator(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, discriminator(x.float()))


def test_frozen_discriminator_passes_gradient():
    discriminator = build().requires_grad_(False)
    x = torch.randn(2, 5, 4, 4, 4, requires_grad=True)
    adversarial_student_term(mean_logit(discriminator(x))).backward()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_discriminator_learns_smooth_from_rough():
    discriminator = build(2, dimensions=2)
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(8, 2, 12, 12, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(8, 2, 14, 14, generator=generator), 3, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2, betas=(0.9, 0.99))
    losses = []
    for _ in range(30):
        real, fake = mean_logit(discriminator(torch.cat([rough, smooth]))).chunk(2)
        loss = discriminator_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.compiled
def test_the_discriminator_compiles_as_one_graph():
    discriminator = build()
    x = torch.randn(1, 5, 4, 4, 4)
    compiled = torch.compile(discriminator, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), discriminator(x))
