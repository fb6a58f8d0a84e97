"""Criteria on gradients, against NumPy and Torch-Pruning."""

import numpy as np
import pytest
import torch
import torch_pruning as tp
from baseline_cases import X, full_group, reorder, residual
from cases import batches, conv_net
from reference_baselines import layer_saliency, squared_group_sums
from torch import nn
from torch.nn import functional as F

from tp_twoaxis import TwoAxisError
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance import find_criterion
from tp_twoaxis.importance.baselines.gradient_criteria import (
    HessianImportance,
    TaylorBNImportance,
    TaylorGroupImportance,
    layer_saliencies,
)
from tp_twoaxis.importance.baselines.tp_criteria import tp_activation, tp_hessian
from tp_twoaxis.statistics.gradients import accumulate_gradients, gather_minibatch_products


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


def elements_of_channel(net, element, k):
    """All that leaves with channel k of the residual stream, one number after the other."""
    return np.concatenate(
        [
            element[net.first.weight][k].ravel(),
            element[net.second.weight][k].ravel(),
            element[net.second.bias][[k]],
            *(element[p][[k]] for norm in (net.bn_first, net.bn_second) for p in (norm.weight, norm.bias)),
            element[net.second.weight][:, k].ravel(),
            element[net.fc.weight][:, 4 * k : 4 * k + 4].ravel(),
        ]
    )


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 5, 2), (12,), (1,) * 12])
def test_squared_group_sums_of_minibatches(sizes):
    net = residual()
    images, labels = (torch.cat(parts) for parts in zip(*batches(images=12, batch_size=5), strict=True))
    loader = list(zip(images.split(sizes), labels.split(sizes), strict=True))
    products = []
    for batch, targets in loader:
        net.zero_grad()
        F.cross_entropy(net(batch), targets).backward()
        element = {p: numbers(p) * numbers(p.grad) for p in net.parameters()}
        products.append([elements_of_channel(net, element, k) for k in range(6)])
    net.zero_grad()
    importance = TaylorGroupImportance.calibrate(net, loader, progress=False, normalizer=None)
    expected = squared_group_sums(products, sizes)
    np.testing.assert_allclose(importance(full_group(net, "first")), expected, rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in net.parameters())
    assert importance.statistics.num_images == 12


def test_what_parameters_of_a_channel_do_may_cancel():
    """A channel that tells the two classes the same: each weight that reads it acts, all of them together do not."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[1.0, 0.5], [1.0, -0.5]]))
    loader = [(torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 0, 1]))]
    group = full_group(net, "0", torch.zeros(1, 3, 1, 1))
    sums = TaylorGroupImportance.calibrate(net, loader, progress=False, normalizer=None)(group)
    accumulate_gradients(net, loader, progress=False)
    absolute = TaylorBNImportance(normalizer=None)(group)
    assert float(sums[0]) == pytest.approx(0.0, abs=1e-9)
    assert float(sums[1]) > 1e-6
    assert float(absolute[0]) > 0.01


@pytest.mark.parametrize(
    ("layer", "images"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 8, 8)),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 8, 8)),
        (nn.Linear(4, 6), (4,)),
    ],
)
def test_products_are_summed_by_output_and_by_input(layer, images):
    net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    loader = [(torch.randn(3, *images), torch.tensor([0, 1, 2])) for _ in range(2)]
    net(loader[0][0])
    products = gather_minibatch_products(net, loader, progress=False)
    groups = getattr(layer, "groups", 1)
    for number, (batch, labels) in enumerate(loader):
        net.zero_grad()
        F.cross_entropy(net(batch), labels).backward()
        element = layer.weight.detach() * layer.weight.grad
        if isinstance(layer, nn.ConvTranspose2d):
            element = torch.cat([part.transpose(0, 1) for part in element.split(2)])
        plain = numbers(element.flatten(2) if element.ndim > 2 else element[:, :, None])
        for sums, reads in ((products.by_output, False), (products.by_input, True)):
            expected = layer_saliency(plain, reads=reads, groups=groups)
            np.testing.assert_allclose(sums["0.weight"][number], expected, rtol=1e-3, atol=1e-6)
        bias = numbers(layer.bias * layer.bias.grad)
        np.testing.assert_allclose(products.by_output["0.bias"][number], bias, rtol=1e-3, atol=1e-6)
    net.zero_grad()


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
        sums = TaylorGroupImportance.calibrate(net, batches(images=6), progress=False)
        accumulate_gradients(net, batches(images=6), progress=False)
        group = full_group(net, "first")
        scores.append((importance(group), sums(group), TaylorBNImportance()(group)))
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
    calls.clear()
    sums = TaylorGroupImportance.calibrate(net, batches(images=4), progress=False, loss=loss, loader=batches(images=4))
    with torch.no_grad():
        net[0].weight *= 2.0
    assert sums(full_group(net, "0")).shape == (6,)
    assert calls == [(4, 2, 4, 4)] * 2


def test_what_is_missing_is_said():
    net = residual()
    with pytest.raises(TwoAxisError, match=r"group of first.*loss.backward\(\) before, or make_importance"):
        TaylorBNImportance()(full_group(net, "first"))
    for loader, message in [
        ([torch.zeros(2, 3, 8, 8)], "labels, batch 0 has none"),
        ([], "got none"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 9]))], "loss= that fits"),
    ]:
        for made in (HessianImportance, TaylorGroupImportance):
            with pytest.raises(TwoAxisError, match=message):
                made.calibrate(net, loader, progress=False)
    for made in (HessianImportance, TaylorGroupImportance):
        with pytest.raises(TwoAxisError, match="requires a gradient"):
            made.calibrate(residual().requires_grad_(False), batches(), progress=False)
        partly = residual()
        for name, parameter in partly.named_parameters():
            parameter.requires_grad_(name == "fc.bias")
        importance = made.calibrate(partly, batches(images=2), progress=False)
        with pytest.raises(TwoAxisError, match="expected parameters that were trained"):
            importance(full_group(partly.requires_grad_(True), "first"))
    with pytest.raises(TwoAxisError, match=r"option: expected one of loss, normalizer, got 'group_reduction'"):
        find_criterion("taylor-group(group_reduction='sum')")


@pytest.mark.parametrize("made", [HessianImportance, TaylorGroupImportance])
def test_stale_gradients_raise(made):
    net = residual()
    importance = made.calibrate(net, batches(images=2), progress=False)
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
