"""Patch rows against loops, and least squares against NumPy."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from tp_twoaxis.reconstruction import patch_fit, patches
from tp_twoaxis.reconstruction.patch_fit import PatchFit
from tp_twoaxis.reconstruction.patch_moments import PatchMoments
from tp_twoaxis.reconstruction.patches import fits, patch_rows

LAYERS = [
    nn.Conv2d(4, 6, 3, padding=1, stride=2),
    nn.Conv2d(4, 6, (3, 1), groups=2, padding=(2, 0), dilation=(2, 1)),
    nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    nn.Conv1d(4, 5, 3, stride=2, padding=2),
    nn.Conv3d(4, 3, 2),
]


def images(layer, n=3):
    shape = {1: (16,), 2: (6, 7), 3: (3, 4, 3)}[len(layer.kernel_size)]
    return torch.randn(n, 4, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", LAYERS[:2] + LAYERS[3:], ids=str)
def test_rows_equal_the_loops(layer):
    x = images(layer)
    expected = reference.patches(x.numpy(), layer)  # [n, positions, C, taps]
    positions = torch.tensor([0, 3, expected.shape[1] - 1])
    rows = patch_rows(x, layer, positions)
    assert rows.shape[2] == layer.groups
    np.testing.assert_array_equal(rows.reshape(3, 3, 4, -1), expected[:, positions])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_times_weights_are_the_outputs(layer):
    x = images(layer)
    y = layer(x).flatten(2).transpose(1, 2)
    rows = patch_rows(x, layer, torch.arange(y.shape[1]))
    weight = layer.weight.reshape(layer.groups, len(layer.weight) // layer.groups, -1)
    torch.testing.assert_close(torch.einsum("npgf,gof->npgo", rows, weight).flatten(2) + layer.bias, y)


def test_circular_padding():
    layer = nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular", bias=False)
    x = images(layer)
    rows = patch_rows(x, layer, torch.tensor([0]))[:, 0, 0]
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T, layer(x)[:, :, 0, 0])


def test_solution_equals_numpy_least_squares():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    x, target = torch.randn(40, 3, 6, 6).double(), torch.randn(40, 4, 6, 6).double()
    fit = PatchFit(layer, images=40, ridge=1e-12)
    for part in (slice(0, 7), slice(7, 40)):
        fit.update(x[part], target[part])
    shift = fit.solve()
    rows = reference.patches(x.numpy(), layer).reshape(-1, 27)
    assert fit.rows == len(rows)
    outputs = target.flatten(2).transpose(1, 2).reshape(-1, 4).numpy()
    solution, *_ = np.linalg.lstsq(np.column_stack([rows, np.ones(len(rows))]), outputs, rcond=None)
    np.testing.assert_allclose(layer.weight.detach().flatten(1).T, solution[:-1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(layer.bias.detach() + shift, solution[-1], rtol=1e-6, atol=1e-9)


def test_batches_chunks_and_order_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    x, target = torch.randn(30, 4, 5, 5).double(), torch.randn(30, 6, 5, 5).double()

    def solved(size):
        torch.manual_seed(1)
        layer = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
        fit = PatchFit(layer, images=30)
        for a, b in zip(x.split(size), target.split(size), strict=True):
            fit.update(a, b)
        return torch.cat([fit.solve(), layer.weight.detach().flatten()])

    expected = solved(30)
    torch.testing.assert_close(solved(7), expected)
    monkeypatch.setattr(patch_fit, "CHUNK_NUMBERS", 1)
    torch.testing.assert_close(solved(11), expected)


def test_many_positions_are_sampled(monkeypatch):
    monkeypatch.setattr(patches.positions_of, "__defaults__", (1, 64))
    monkeypatch.setattr(patches, "FEWEST_ROWS_OF_BLOCKS", 64)
    monkeypatch.setattr(patches, "MOST_ROWS", 64)
    layer = nn.Conv2d(3, 4, 1)
    fit = PatchFit(layer, images=16)
    fit.update(torch.randn(16, 3, 9, 9), torch.randn(16, 4, 9, 9))
    assert fit.rows == 64


def test_small_layers_fit():
    assert fits(nn.Conv2d(512, 8, 3))
    assert not fits(nn.Conv2d(513, 8, 3))
    assert fits(nn.Conv2d(960, 960, 3, groups=960))
    assert not fits(nn.Linear(25_088, 4))


@pytest.mark.parametrize(("blocks", "width"), [(1, 5), (3, 5), (1, 1100), (2, 600)])
def test_moments_of_narrow_and_wide_patches_are_sums_over_rows(blocks, width):
    torch.manual_seed(0)
    rows, targets = torch.randn(70, blocks, width) + 3.0, torch.randn(70, blocks, 2)
    moments = PatchMoments(blocks, width, 2)
    for part in (slice(0, 20), slice(20, 70)):
        moments.update(rows[part], targets[part])
    moments.symmetrize()
    for block in range(blocks):
        x, y = rows[:, block].double(), targets[:, block].double()
        x, y = x - x.mean(0), y - y.mean(0)
        torch.testing.assert_close(moments.scatter[block], x.T @ x)
        torch.testing.assert_close(moments.cross[block], x.T @ y)
        assert torch.equal(moments.scatter[block], moments.scatter[block].T)
    before = moments.scatter.clone()
    assert torch.equal(moments.symmetrize().scatter, before)
