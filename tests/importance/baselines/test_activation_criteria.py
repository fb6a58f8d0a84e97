"""Criteria on what consumers read, against NumPy over captured tensors."""

import copy

import numpy as np
import pytest
import reference_baselines as slow
import torch
from baseline_cases import full_group, reorder, residual
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError, prune_to_flops
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance.baselines.activation_criteria import (
    ActivationRMSImportance,
    CHIPImportance,
    MIPPImportance,
    VBPImportance,
)

CLASSES = [ActivationRMSImportance, VBPImportance, CHIPImportance, MIPPImportance]


@pytest.fixture(scope="module")
def loader():
    return batches(images=20, batch_size=8)


def built(cls, net, images, /, **options):
    return cls.calibrate(net, images, progress=False, **options)


def captured(net, name, loader):
    """Inputs and outputs of a layer, [images, positions, C] each."""
    caught = []
    handle = net.get_submodule(name).register_forward_hook(
        lambda layer, inputs, output: caught.append((inputs[0].double(), output.double()))
    )
    with torch.no_grad():
        for images, _ in loader:
            net(images)
    handle.remove()
    sides = [torch.cat([pair[side] for pair in caught]) for side in (0, 1)]
    return [(x.flatten(2).mT if x.ndim == 4 else x[:, None]).numpy() for x in sides]


def reads_of_the_stream(net, loader):
    """What the two readers of the residual stream are given: a convolution's maps, a linear layer's features."""
    maps = captured(net, "second", loader)[0]
    features = captured(net, "fc", loader)[0].reshape(-1, 6, 4)
    return maps, features


def test_rms_and_variance_of_what_is_read(loader):
    net = residual()
    maps, features = reads_of_the_stream(net, loader)
    expected = {
        ActivationRMSImportance: [np.sqrt((maps**2).mean((0, 1))), np.sqrt((features**2).mean(0)).mean(1)],
        VBPImportance: [maps.var((0, 1)), features.var(0).mean(1)],
    }
    for cls, parts in expected.items():
        got = built(cls, net, loader, normalizer=None)(full_group(net, "first"))
        np.testing.assert_allclose(got, np.mean(parts, axis=0), rtol=1e-5)


def test_chip_prefers_maps_and_equals_plain_decompositions(loader):
    net = residual()
    maps, _ = reads_of_the_stream(net, loader)
    got = built(CHIPImportance, net, loader, normalizer=None)(full_group(net, "first"))
    np.testing.assert_allclose(got, slow.channel_independence(maps.swapaxes(1, 2)), rtol=1e-5)
    only = nn.Sequential(nn.Conv2d(3, 6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)).eval()
    single = captured(only, "3", loader)[0]
    got = built(CHIPImportance, only, loader, normalizer=None)(full_group(only, "0"))
    np.testing.assert_allclose(got, slow.channel_independence(single.swapaxes(1, 2)), rtol=1e-5)


def test_chip_stops_at_its_number_of_images(monkeypatch, loader):
    monkeypatch.setattr("tp_twoaxis.importance.baselines.activation_criteria.CHIP_IMAGES", 12)
    assert built(CHIPImportance, residual(), loader).statistics.num_images == 12
    assert built(CHIPImportance, residual(), loader, max_images=5).statistics.num_images == 5


def test_mipp_is_the_information_between_a_channel_and_the_next_outputs(loader):
    net = residual()
    expected = []
    for name, width in (("second", 16), ("fc", 1)):
        x, y = captured(net, name, loader)
        information = slow.adjacent_information(slow.cells(x, width), slow.cells(y, width), 0.1)
        expected.append(information if len(information) == 6 else information.reshape(6, 4).mean(1))
    got = built(MIPPImportance, net, loader, normalizer=None)(full_group(net, "first"))
    np.testing.assert_allclose(got, np.mean(expected, axis=0), rtol=1e-4)


@pytest.mark.parametrize("cls", CLASSES)
def test_batch_size_does_not_matter_and_the_model_is_as_it_was(cls):
    net = residual().train()
    before = copy.deepcopy(net.state_dict())
    rng = torch.get_rng_state()
    scores = [
        built(cls, net, batches(images=21, batch_size=size))(full_group(copy.deepcopy(net).eval(), "first"))
        for size in (21, 4)
    ]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-7)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("cls", CLASSES)
def test_permuting_channels_permutes_scores(cls, loader):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, other = residual(), reorder(residual(), order)
    torch.testing.assert_close(one(loader[0][0]), other(loader[0][0]), rtol=1e-4, atol=1e-5)
    plain = built(cls, one, loader)(full_group(one, "first"))
    permuted = built(cls, other, loader)(full_group(other, "first"))
    torch.testing.assert_close(permuted, plain[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_stale_statistics_raise_or_are_gathered_anew(cls, loader):
    net = residual()
    importance = built(cls, net, loader)
    renewing = built(cls, net, loader, loader=loader)
    with torch.no_grad():
        net.bn_first.running_var *= 4.0  # upstream of the readers
    with pytest.raises(StaleStatisticsError, match=r"bn_first.*gather them again, or build the importance with loader"):
        importance(full_group(net, "first"))
    torch.testing.assert_close(renewing(full_group(net, "first")), built(cls, net, loader)(full_group(net, "first")))
    prune_to_flops(net, torch.zeros(1, 3, 8, 8), "l2", flops=0.6, repair=(), tolerance=0.2, progress=False)
    with pytest.raises(StaleStatisticsError, match="it was pruned"):
        importance(full_group(net, "first"))
    assert len(renewing(full_group(net, "first"))) == net.first.out_channels


@pytest.mark.parametrize("cls", CLASSES)
def test_outputs_that_nobody_reads_are_declined(cls, loader):
    net = residual()
    importance = built(cls, net, loader)
    assert importance(full_group(net, "fc")) is None


def test_an_expansion_is_scored_where_it_is_projected(loader):
    net = conv_net()
    got = built(VBPImportance, net, loader, normalizer=None)(full_group(net, "depthwise"))
    maps = [captured(net, name, loader)[0].var((0, 1)) for name in ("conv2", "reduce")]
    np.testing.assert_allclose(got, np.mean(maps, axis=0), rtol=1e-5)


@pytest.mark.parametrize("name", ["activation-rms", "vbp", "chip", "mipp"])
def test_names_prune_without_labels(name):
    images = [x for x, _ in batches(images=20)]
    net = conv_net()
    report = prune_to_flops(net, torch.zeros(1, 3, 8, 8), name, flops=0.5, loader=images, progress=False)
    assert report.achieved == pytest.approx(0.5, rel=0.1)
    assert report.importance == name


def test_layers_that_did_not_run_are_named(loader):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.short = True

        def forward(self, x):
            return self.a(x) if self.short else self.c(self.b(self.a(x)))

    net = Skips()
    importance = built(VBPImportance, net, loader)
    net.short = False
    with pytest.raises(TwoAxisError, match=r"group of a.*\(b\).*calibration images"):
        importance(full_group(net, "a"))


def test_layers_too_wide_for_covariances_are_named(monkeypatch, loader):
    monkeypatch.setattr("tp_twoaxis.statistics.activations.MAX_NUMBERS", 60)
    net = residual()
    importance = built(MIPPImportance, net, loader)
    with pytest.raises(TwoAxisError, match=r"second, fc: expected.*1 GiB"):
        importance(full_group(net, "first"))


@pytest.mark.parametrize(
    ("loader", "message"),
    [([], "got none"), ([torch.zeros(2, 4, 8, 8)], "does not run on batch 0"), ([torch.zeros(2)], "batch 0")],
)
def test_bad_images(loader, message):
    net = residual()
    with pytest.raises(TwoAxisError, match=message):
        built(VBPImportance, net, loader)
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("cls", CLASSES)
def test_values_that_are_not_finite_are_named(cls, loader):
    net = residual()
    with torch.no_grad():
        net.bn_first.bias[0] = torch.nan
    with pytest.raises(TwoAxisError, match=r"second: what the layer reads is not finite"):
        built(cls, net, loader)
