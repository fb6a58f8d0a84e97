"""Local axis against slow twins, and its invariances."""

import numpy as np
import pytest
import reference_scores as twin
import torch
from cases import batches, conv_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tp_twoaxis import calibrate
from tp_twoaxis.scores import input_capture, pair_overlap, peer_overlap, rayleigh_quotient


def correlation(channels, seed=0, rows=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.corrcoef(x.T) if channels > 1 else torch.ones(1, 1, dtype=torch.float64)


variances = st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1, max_size=12).filter(any)


@given(variances)
@settings(max_examples=40, deadline=None)
def test_capture_twin(values):
    v = torch.tensor(values, dtype=torch.float64)
    np.testing.assert_allclose(input_capture(v).numpy(), twin.capture(values), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(input_capture(v, 0.3).numpy(), twin.capture(values, 0.3), rtol=1e-9, atol=1e-12)


def test_capture_does_not_depend_on_the_common_scale():
    v = torch.rand(9, dtype=torch.float64)
    torch.testing.assert_close(input_capture(7.0 * v), input_capture(v))
    assert not torch.allclose(input_capture(7.0 * v, 1.0), input_capture(v, 1.0))


def test_constant_channels_do_not_move_the_noise_floor():
    v = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert input_capture(v)[4].item() == pytest.approx(0.5 * np.log(2.0))
    assert input_capture(v)[:3].tolist() == [0.0, 0.0, 0.0]
    assert input_capture(torch.zeros(4)).tolist() == [0.0] * 4


def test_rayleigh_quotient_equals_the_unfolded_patch_path():
    net, data = conv_net(), batches(16, 16)
    layer = calibrate(net, data, positions="all", progress=False)["conv1"]
    patches = F.unfold(data[0][0].double(), 3, padding=1).movedim(1, 2).reshape(-1, 27).numpy()
    weight = net.conv1.weight.detach().double().flatten(1).numpy()
    slow = twin.rayleigh_quotient(weight, np.cov(patches.T, bias=True))
    np.testing.assert_allclose(rayleigh_quotient(layer.variance, layer.weight_power).numpy(), slow, rtol=1e-5)
    assert rayleigh_quotient(torch.tensor([1.0]), torch.tensor([0.0])).tolist() == [0.0]


@pytest.mark.parametrize("channels", [1, 2, 7, 300])  # 300 come in two blocks of rows
def test_peer_overlap_twin(channels):
    rho = correlation(channels, seed=channels)
    active = torch.arange(channels) != 1
    for mask in (torch.ones(channels, dtype=torch.bool), active):
        np.testing.assert_allclose(
            peer_overlap(rho, mask).numpy(), twin.peer_overlap(rho.numpy(), mask.numpy()), rtol=1e-9, atol=1e-12
        )
    torch.testing.assert_close(peer_overlap(rho), peer_overlap(rho, torch.ones(channels, dtype=torch.bool)))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_permuting_channels_permutes_overlap(seed):
    rho = correlation(8, seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(peer_overlap(rho[order][:, order]), peer_overlap(rho)[order])


def test_duplicates_share_much_but_finitely():
    rho = correlation(4)[[0, 1, 2, 3, 0]][:, [0, 1, 2, 3, 0]]
    overlap = pair_overlap(rho)
    assert torch.isfinite(overlap).all()
    assert overlap[0, 4] > 13
    assert overlap.argmax().item() == 4
    torch.testing.assert_close(overlap, overlap.T)
    assert overlap.diagonal().count_nonzero() == 0
