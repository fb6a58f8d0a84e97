"""BatchNorm re-estimation against NumPy, and what it must not change."""

import copy

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.repair import batch_norms, check_repair, reestimate_batch_norm


def test_one_batch_equals_numpy():
    net, [(x, y)] = conv_net(), batches(24, 24)
    before = net.conv1(x).detach().double().numpy()
    assert reestimate_batch_norm(net, [(x, y)], progress=False) == 24
    np.testing.assert_allclose(net.bn1.running_mean.numpy(), before.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(net.bn1.running_var.numpy(), before.var((0, 2, 3), ddof=1), rtol=1e-4)
    # the second layer saw what the first one gives with its new statistics
    z = (before - before.mean((0, 2, 3), keepdims=True)) / np.sqrt(before.var((0, 2, 3), keepdims=True) + net.bn1.eps)
    scale, shift = (p.detach().double().numpy()[:, None, None] for p in (net.bn1.weight, net.bn1.bias))
    second = net.conv2(torch.from_numpy(np.maximum(z * scale + shift, 0)).float()).detach().double().numpy()
    np.testing.assert_allclose(net.bn2.running_mean.numpy(), second.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(net.bn2.running_var.numpy(), second.var((0, 2, 3), ddof=1), rtol=1e-3)


def test_batches_count_the_same():
    net, data = conv_net(), batches(48, 16)
    reestimate_batch_norm(net, data, progress=False)
    parts = [net.conv1(x).detach().double().numpy() for x, _ in data]
    np.testing.assert_allclose(net.bn1.running_mean.numpy(), np.mean([p.mean((0, 2, 3)) for p in parts], 0), atol=1e-6)
    variance = np.mean([p.var((0, 2, 3), ddof=1) for p in parts], 0)
    np.testing.assert_allclose(net.bn1.running_var.numpy(), variance, rtol=1e-4)
    assert net.bn1.num_batches_tracked == 3


def test_state_is_restored_and_dropout_stays_off():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten())
    net.train()
    net[2].eval()
    data = batches(32, 16)
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    held = net[2].running_mean
    old = held.clone()
    reestimate_batch_norm(net, data, progress=False)
    assert net[2].momentum == 0.3
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, parameters[name]) for name, p in net.named_parameters())
    assert torch.equal(held, old)  # replaced, not written into
    expected = torch.stack([net[1](x).mean((0, 2, 3)) for x, _ in data]).mean(0)
    torch.testing.assert_close(net[2].running_mean, expected.detach())


def test_no_batch_norm_reads_nothing():
    def loader():
        raise AssertionError("read")
        yield

    assert reestimate_batch_norm(nn.Conv2d(3, 4, 1), loader(), progress=False) == 0
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert batch_norms(plain) == []


def test_max_images_and_lone_images():
    net = conv_net()
    assert reestimate_batch_norm(net, batches(48, 16), max_images=20, progress=False) == 20
    twin = conv_net()
    data = batches(48, 16)
    reestimate_batch_norm(twin, [data[0], (data[1][0][:4], None)], progress=False)
    torch.testing.assert_close(net.bn2.running_var, twin.bn2.running_var)
    # a last batch of one image is skipped; so is what max_images cuts down to one
    assert reestimate_batch_norm(net, batches(17, 16), progress=False) == 16
    assert reestimate_batch_norm(net, batches(48, 16), max_images=17, progress=False) == 16


@pytest.mark.parametrize("loader", [[], [torch.randn(1, 3, 8, 8)] * 3])
def test_nothing_to_estimate_from(loader):
    with pytest.raises(TwoAxisError, match="at least 2 images"):
        reestimate_batch_norm(conv_net(), loader, progress=False)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.randint(255, (4, 3, 8, 8)), "float images.*batch 0"),
        (torch.full((4, 3, 8, 8), torch.nan), "batch 0 holds NaN"),
    ],
)
def test_bad_images(batch, message):
    net = conv_net()
    before = copy.deepcopy(net.bn1.momentum)
    with pytest.raises(TwoAxisError, match=message):
        reestimate_batch_norm(net, [batch], progress=False)
    assert net.bn1.momentum == before
    assert not net.bn1.training


def test_requests_are_checked():
    net = conv_net()
    assert check_repair("bn", net, []) == ("bn",)
    assert check_repair((), net, None) == ()
    assert check_repair(("bn",), nn.Linear(2, 2), None) == ()
    with pytest.raises(TwoAxisError, match=r"one of bn, bias, .*, joint, distill or none, got 'glue'"):
        check_repair(("bn", "glue"), net, [])
    with pytest.raises(TwoAxisError, match=r"pass loader=.*or repair=\(\)"):
        check_repair(("bn",), net, None)
