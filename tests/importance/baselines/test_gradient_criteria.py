"""Criteria on gradients, against NumPy and Torch-Pruning."""

import numpy as np
import pytest
import torch
import torch_pruning as tp
from baseline_cases import X, full_group, reorder, residual
from cases import batches, conv_net
from reference_baselines import layer_saliency
from torch import nn
from torch.nn import functional as F

from tp_twoaxis import TwoAxisError
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance.baselines.gradient_criteria import HessianImportance, TaylorBNImportance, layer_saliencies
from tp_twoaxis.importance.baselines.tp_criteria import tp_activation, tp_hessian
from tp_twoaxis.statistics.gradients import accumulate_gradients


def numbers(tensor):
    return tensor.detach().double().numpy()


def parts_of_the_stream(net, element):
    """Saliency of each layer of the residual group, one after the other: [6] each."""
    read = element(net.second.weight)
    own = [
        layer_saliency(element(net.first.weight)),
        element(net.bn_first.weight) + element(net.bn_first.bias),
        layer_saliency(read) + element(net.second.bias),
        element(net.bn_second.weight) + element(net.bn_second.bias),
        layer_saliency(read, reads=True),
        layer_saliency(element(net.fc.weight)[:, :, None], reads=True).reshape(6, 4).sum(1),
    ]
    return np.array(own)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_taylor_includes_batch_norm_and_biases(reduction):
    net = residual()
    accumulate_gradients(net, batches(), progress=False)
    parts = parts_of_the_stream(net, lambda p: np.abs(numbers(p) * numbers(p.grad)))
    expected = {"mean": parts.mean(0), "sum": parts.sum(0), "max": parts.max(0)}[reduction]
    got = TaylorBNImportance(group_reduction=reduction, normalizer=None)(full_group(net, "first"))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_host_leaves_batch_norm_out_and_nothing_else_differs():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 6)).eval()
    net[1].requires_grad_(False)
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    group = full_group(net, "0")
    assert net[1].weight.grad is None
    ours, host = TaylorBNImportance()(group), tp.importance.TaylorImportance()(group)
    torch.testing.assert_close(ours, host)
    net[1].requires_grad_(True)
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    host = tp.importance.TaylorImportance()(group)
    net[1].weight.grad *= 1000.0
    assert torch.equal(tp.importance.TaylorImportance()(group), host)
    assert not torch.allclose(TaylorBNImportance()(group), host, rtol=0.05)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_sums_over_grouped_and_transposed_weights(layer):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(6, 2, 1))
    element = torch.rand_like(layer.weight)
    # [in, out / 2, 3, 3] to the layout of a convolution, [out, in / 2, 3, 3]
    plain = torch.cat([part.transpose(0, 1) for part in element.split(2)]) if layer.transposed else element
    for name, reads in (("1", False), ("0", True)):
        sums = layer_saliencies(
            full_group(net, name), lambda module, p: element if module is layer and p == "weight" else None
        )
        assert len(sums) == 1
        np.testing.assert_allclose(sums[0][0], layer_saliency(numbers(plain), reads=reads, groups=2), rtol=1e-6)


def test_hessian_is_the_mean_over_images_of_squared_gradients():
    net = residual()
    images, labels = (torch.cat(parts) for parts in zip(*batches(images=12, batch_size=5), strict=True))
    squares = {}
    for i in range(12):
        net.zero_grad()
        F.cross_entropy(net(images[i : i + 1]), labels[i : i + 1]).backward()
        for parameter in net.parameters():
            squares[parameter] = squares.get(parameter, 0.0) + numbers(parameter.grad) ** 2 / 12
    net.zero_grad()
    parts = parts_of_the_stream(net, lambda p: 0.5 * numbers(p) ** 2 * squares[p])
    importance = HessianImportance.calibrate(net, batches(images=12, batch_size=5), progress=False, normalizer=None)
    np.testing.assert_allclose(importance(full_group(net, "first")), parts.mean(0), rtol=1e-4)
    assert all(p.grad is None for p in net.parameters())
    other = HessianImportance.calibrate(net, batches(images=12, batch_size=4), progress=False, normalizer=None)
    torch.testing.assert_close(other(full_group(net, "first")), importance(full_group(net, "first")))


def test_permuting_channels_permutes_scores():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    scores = []
    for net in (residual(), reorder(residual(), order)):
        importance = HessianImportance.calibrate(net, batches(images=6), progress=False)
        accumulate_gradients(net, batches(images=6), progress=False)
        group = full_group(net, "first")
        scores.append((importance(group), TaylorBNImportance()(group)))
    for plain, permuted in zip(*scores, strict=True):
        torch.testing.assert_close(permuted, plain[order], rtol=1e-3, atol=1e-6)


def test_another_loss_is_kept_for_gathering_anew():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()
    calls = []

    def loss(output, label):
        calls.append(output.shape)
        return output.square().sum()

    importance = HessianImportance.calibrate(
        net, batches(images=4), progress=False, loss=loss, loader=batches(images=4)
    )
    with torch.no_grad():
        net[0].weight *= 2.0
    assert importance(full_group(net, "0")).shape == (6,)
    assert calls == [(1, 2, 4, 4)] * 8


def test_what_is_missing_is_said():
    net = residual()
    with pytest.raises(TwoAxisError, match=r"group of first.*loss.backward\(\) before, or make_importance"):
        TaylorBNImportance()(full_group(net, "first"))
    for loader, message in [
        ([torch.zeros(2, 3, 8, 8)], "labels, batch 0 has none"),
        ([], "got none"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 9]))], "loss= that fits"),
    ]:
        with pytest.raises(TwoAxisError, match=message):
            HessianImportance.calibrate(net, loader, progress=False)
    with pytest.raises(TwoAxisError, match="requires a gradient"):
        HessianImportance.calibrate(residual().requires_grad_(False), batches(), progress=False)
    partly = residual()
    for name, parameter in partly.named_parameters():
        parameter.requires_grad_(name == "fc.bias")
    importance = HessianImportance.calibrate(partly, batches(images=2), progress=False)
    with pytest.raises(TwoAxisError, match="expected parameters that were trained"):
        importance(full_group(partly.requires_grad_(True), "first"))


def test_stale_gradients_raise():
    net = residual()
    importance = HessianImportance.calibrate(net, batches(images=2), progress=False)
    with torch.no_grad():
        net.fc.weight += 1.0
    with pytest.raises(StaleStatisticsError, match="fc: its parameters"):
        importance(full_group(net, "first"))


def test_the_hosts_hessian_is_that_of_its_whole_documented_loop():
    loop, ours = residual(), residual()
    images, labels = (torch.cat(parts) for parts in zip(*batches(images=7, batch_size=3), strict=True))
    host = tp.importance.HessianImportance()
    losses = F.cross_entropy(loop(images), labels, reduction="none")
    for loss in losses:
        loop.zero_grad()
        loss.backward(retain_graph=True)
        host.accumulate_grad(loop)
    expected = host(full_group(loop, "first"))
    got = tp_hessian(ours, batches(images=7, batch_size=3), progress=False)(full_group(ours, "first"))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(TwoAxisError, match="labels"):
        tp_hessian(ours, [images], progress=False)


def test_the_hosts_activations_are_those_of_the_last_batch_and_leave_the_model_alone():
    net = conv_net()
    loader = batches(images=20, batch_size=8)
    host = tp.importance.ActivationImportance()
    with host.compute_importance(net), torch.no_grad():
        for images, _ in loader:
            net(images)
    group = full_group(net, "conv1")
    expected = host(group)
    for module in net.modules():
        module.__dict__.pop("_importance", None)
    got = tp_activation(net, loader, progress=False)
    torch.testing.assert_close(got(group), expected)
    assert not any(hasattr(m, "_importance") or m._forward_hooks for m in net.modules())
    net(X)
    with pytest.raises(TwoAxisError, match="got none"):
        tp_activation(net, [], progress=False)
