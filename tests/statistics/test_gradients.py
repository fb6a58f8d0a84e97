"""calibrate(gradients=True): saliencies equal a backward pass an image, merge, are saved, and cost nothing unasked."""

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from torch import nn
from torch.nn import functional as F

from tp_twoaxis import CalibrationStatistics, TwoAxisError, calibrate
from tp_twoaxis.runtime.layers import channel_layers
from tp_twoaxis.runtime.serialization import read_tensors, write_tensors
from tp_twoaxis.statistics.store import FORMAT, VERSION


def run(model, loader, **options):
    return calibrate(model, loader, progress=False, **{"gradients": True, **options})


def catching(kept):
    def hook(layer, inputs, output):
        value = output[0] if isinstance(output, tuple) else output
        value.retain_grad()
        kept.append((value.detach().clone(), value))

    return hook


def slow_saliency(model, loader, layers):
    """One image at a time: keep each layer's outputs with their gradients, multiply, sum over positions, then |.|."""
    sums = {name: [] for name in layers}
    for x, y in loader:
        for image, label in zip(x, y, strict=True):
            kept = {name: [] for name in layers}

            handles = [layer.register_forward_hook(catching(kept[name])) for name, layer in layers.items()]
            F.cross_entropy(model(image[None]), label[None]).backward()
            for handle in handles:
                handle.remove()
            for name, layer in layers.items():
                total = 0.0
                for activation, output in kept[name]:
                    product = (activation * output.grad).double().numpy()
                    channel = 1 if isinstance(layer, nn.modules.conv._ConvNd) else product.ndim - 1
                    total = total + product.sum(tuple(a for a in range(product.ndim) if a != channel))
                sums[name].append(np.abs(total))
            model.zero_grad()
    return {name: np.mean(values, axis=0) for name, values in sums.items()}


class Twice(nn.Module):
    """One layer called twice, one whose output the logits do not see."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.side = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.b(torch.tanh(self.b(torch.tanh(self.a(x)))))
        self.side(x)
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=batch_first), nn.Linear(6, 5)

    def forward(self, x):
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(y.mean(1 if self.attention.batch_first else 0))


class Windows(nn.Module):
    """Linear layers on pieces of an image: the leading dimension is twice the batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        pieces = torch.relu(self.embed(x.reshape(2 * len(x), -1, 6)))
        return self.head(pieces.reshape(len(x), -1, 8).mean(1))


MODELS = {
    "conv2d": (conv_net, (3, 8, 8)),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Tanh(), nn.ConvTranspose2d(8, 5, 3, groups=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        (3, 5, 5),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 3, groups=3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        (3, 9),
    ),
    "windows": (Windows, (4, 6)),
    "attention": (lambda: Attention(True), (7, 6)),
    "attention, tokens first": (lambda: Attention(False), (7, 6)),
    "called twice": (Twice, (3, 6, 6)),
}


def case(name, n=10, batch_size=4):
    factory, shape = MODELS[name]
    torch.manual_seed(0)
    model = factory().double().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (n,), generator=generator)
    return model, list(zip(x.split(batch_size), y.split(batch_size), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_saliency_equals_a_backward_pass_an_image(name):
    model, loader = case(name)
    stats = run(model, loader)
    slow = slow_saliency(model, loader, channel_layers(model) if name != "called twice" else {"a": model.a})
    for layer, expected in slow.items():
        np.testing.assert_allclose(stats[layer].saliency.numpy(), expected, rtol=1e-9, atol=1e-14, err_msg=layer)
        assert expected.max() > 0
        assert stats[layer].gradients.count == 10


def test_a_layer_called_twice_counts_once_and_an_unseen_one_with_nothing():
    model, loader = case("called twice")
    stats = run(model, loader)
    slow = slow_saliency(model, loader, {"b": model.b})
    np.testing.assert_allclose(stats["b"].saliency.numpy(), slow["b"], rtol=1e-9)
    assert stats["side"].saliency.tolist() == [0.0, 0.0]


def test_to_first_order_it_is_the_change_of_the_loss():
    model, loader = case("conv2d", n=1)
    (x, y) = loader[0]
    saliency = run(model, loader)["reduce"].saliency
    step = 1e-6

    def loss(k):
        handle = model.reduce.register_forward_hook(
            lambda layer, inputs, output: output * (1 - step * (torch.arange(8) == k).double())[:, None, None]
        )
        with torch.no_grad():
            value = F.cross_entropy(model(x), y)
        handle.remove()
        return value

    with torch.no_grad():
        dense = F.cross_entropy(model(x), y)
    changes = torch.stack([(loss(k) - dense).abs() / step for k in range(8)])
    torch.testing.assert_close(saliency, changes, rtol=1e-4, atol=1e-8)


def test_operations_in_place_do_no_harm():
    def net(inplace):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Hardswish(inplace), nn.Conv2d(6, 5, 3), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )  # fmt: skip

    one, other = run(net(True), batches()), run(net(False), batches())
    for name in one:
        torch.testing.assert_close(one[name].saliency, other[name].saliency)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_any_batch_size_agrees(batch_size):
    x, y = (torch.cat(part) for part in zip(*batches(40), strict=True))
    expected = run(conv_net().double(), [(x.double(), y)])
    found = run(conv_net().double(), list(zip(x.double().split(batch_size), y.split(batch_size), strict=True)))
    for name in expected:
        torch.testing.assert_close(found[name].saliency, expected[name].saliency, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_merge_in_any_order(order):
    loader = batches(37, 15)
    whole = run(conv_net(), loader)
    parts = [run(conv_net(), [loader[i]]) for i in order]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for name in whole:
        assert merged[name].gradients.count == 37
        torch.testing.assert_close(merged[name].saliency, whole[name].saliency, rtol=1e-5, atol=1e-9)


def test_the_other_statistics_are_the_same_to_the_last_bit():
    plain, graded = run(conv_net(), batches(), gradients=False), run(conv_net(), batches())
    assert not plain.has_gradients
    assert graded.has_gradients
    for name in plain:
        assert torch.equal(plain[name].covariance, graded[name].covariance)
        assert torch.equal(plain[name].target_correlation(), graded[name].target_correlation())


def test_without_gradients_the_forward_pass_builds_no_graph():
    net, seen = conv_net(), []
    net.reduce.register_forward_hook(lambda layer, inputs, output: seen.append(output.requires_grad))
    run(net, batches(), gradients=False)
    run(net, batches())
    assert seen == [False] * 5 + [False] * 2 + [True] * 3  # two small runs first


def test_permuting_channels_permutes_the_saliency():
    net, other = conv_net(), conv_net()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.reduce.weight.copy_(net.reduce.weight[order])
        other.reduce.bias.copy_(net.reduce.bias[order])
        other.fc.weight.copy_(net.fc.weight.view(5, 8, 4)[:, order].reshape(5, 32))
    torch.testing.assert_close(
        run(other, batches())["reduce"].saliency, run(net, batches())["reduce"].saliency[order], rtol=1e-4, atol=1e-8
    )


def test_labels_are_enough_no_target_is_needed():
    stats = run(conv_net(), batches(), target=None)
    expected = run(conv_net(), batches())
    assert torch.equal(stats["conv1"].saliency, expected["conv1"].saliency)


# files


def test_a_file_gives_them_back_and_an_older_one_has_none(tmp_path):
    stats = run(conv_net(), batches())
    stats.save(tmp_path / "a")
    loaded = CalibrationStatistics.load(tmp_path / "a")
    assert loaded.has_gradients
    for name in stats:
        assert torch.equal(loaded[name].saliency, stats[name].saliency)
    assert loaded.merge(stats)["fc"].gradients.count == 96
    run(conv_net(), batches(), gradients=False).save(tmp_path / "b")
    tensors, header = read_tensors(tmp_path / "b", kind=FORMAT, version=VERSION)
    write_tensors(tmp_path / "b", tensors, header, kind=FORMAT, version=1)
    old = CalibrationStatistics.load(tmp_path / "b")
    assert not old.has_gradients
    with pytest.raises(TwoAxisError, match=r"conv1: expected statistics with gradients.*calibrate\(gradients=True\)"):
        _ = old["conv1"].saliency


def test_statistics_with_and_without_do_not_merge():
    stats = run(conv_net(), batches())
    with pytest.raises(TwoAxisError, match="differ in their gradients"):
        stats.merge(run(conv_net(), batches(), gradients=False))


# the model comes back


@pytest.mark.parametrize("accident", [None, "labels", "forward"])
def test_the_model_comes_back(accident):
    net = conv_net().train()
    net.bn1.eval()
    net.conv1.weight.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    grad = net.fc.weight.grad
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    loader = batches()
    if accident == "labels":
        loader[2] = loader[2][0]
    if accident == "forward":
        loader[2] = (torch.zeros(4, 7, 8, 8), loader[2][1][:4])
    if accident is None:
        assert run(net, loader)["conv1"].saliency.sum() > 0
    else:
        with pytest.raises(TwoAxisError):
            run(net, loader)
    assert [module.training for module in net.modules()] == modes
    assert net.fc.weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert all(p.grad is None for name, p in net.named_parameters() if name != "fc.weight")
    assert [p.requires_grad for p in net.parameters()].count(False) == 1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_frozen_model_has_saliencies_too():
    frozen = conv_net().requires_grad_(False)
    torch.testing.assert_close(run(frozen, batches())["conv1"].saliency, run(conv_net(), batches())["conv1"].saliency)


# bad input


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        with torch.no_grad():
            return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "loader", "options", "message"),
    [
        (conv_net, [torch.zeros(2, 3, 8, 8)], {}, "gradients=True needs labels and batch 0 has none"),
        (conv_net, [torch.zeros(2, 3, 8, 8)], {"target": None}, "needs labels and batch 0 has none; yield"),
        (conv_net, [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 9]))], {"target": None}, r"labels in \[0, 5\)"),
        (conv_net, [(torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 1.0]))], {"target": None}, "class indices"),
        (Detached, batches(), {}, "batch 0: gradients=True: expected logits that depend on"),
        (lambda: nn.Conv2d(3, 4, 3), batches(), {"target": None}, r"expected logits \[16, K\].*no classifiers"),
    ],
)  # fmt: skip
def test_input_that_does_not_fit(model, loader, options, message):
    with pytest.raises(TwoAxisError, match=message):
        run(model(), loader, **options)


def test_gradients_that_are_not_finite():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc((self.conv(x) * 0).abs().sqrt().mean((2, 3)))

    with pytest.raises(TwoAxisError, match=r"conv: the loss's gradients are not finite"):
        run(Root(), batches())
