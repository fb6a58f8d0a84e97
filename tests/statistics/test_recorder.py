"""Hooks that leave no trace, pooled means over all positions, and samples that do not depend on batches."""

import numpy as np
import pytest
import reference
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.runtime.layers import channel_layers
from tp_twoaxis.statistics.recorder import PENDING_IMAGES, Recorder
from tp_twoaxis.statistics.sampling import image_keys, sampled_positions


def record(model, inputs, *, task=None, **options):
    """Records of a model that sees the batches."""
    with torch.no_grad(), Recorder(channel_layers(model), **options) as recorder:
        for i, batch in enumerate(inputs):
            recorder.begin(batch)
            model(batch)
            recorder.finish(None if task is None else task[i])
    return recorder.records


def images(n=24, batch_size=8, **options):
    return [x for x, _ in batches(n, batch_size, **options)]


class Twice(nn.Module):
    """Applies one layer to two views of the image of different size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) + self.conv(x[..., ::2, ::2]).mean((2, 3))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y = self.attention(x, x, x, need_weights=False)[0]
        return y if self.attention.batch_first else y.transpose(0, 1)


# leaving no trace


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_afterwards_and_other_peoples_stay(fails):
    net = conv_net()
    seen = []
    net.conv1.register_forward_hook(lambda *_: seen.append(1))
    hooks = {name: dict(module._forward_hooks) for name, module in net.named_modules()}

    def run():
        with Recorder(channel_layers(net)) as recorder:
            assert len(net.conv2._forward_hooks) == 1
            recorder.begin(images()[0])
            net(images()[0])
            if fails:
                raise KeyboardInterrupt
            recorder.finish()

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert {name: dict(module._forward_hooks) for name, module in net.named_modules()} == hooks
    assert seen == [1]
    assert all(not module._forward_pre_hooks and not module._backward_hooks for module in net.modules())


def test_the_output_is_not_touched_and_gradients_still_flow():
    net, x = conv_net(), images()[0]
    expected = net(x)
    with Recorder(channel_layers(net)) as recorder:
        recorder.begin(images()[0])
        output = net(x)
        recorder.finish()
    assert torch.equal(output, expected)
    output.sum().backward()
    assert net.conv1.weight.grad is not None
    assert not recorder.records["conv1"].rows.scatter.requires_grad


def test_rows_are_what_the_layer_wrote_before_anything_in_place():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    records = record(net, images(), positions="all")
    expected = reference.flat(reference.emitted(net, images(), {"0": net[0]})["0"])
    assert expected.min() < 0
    np.testing.assert_allclose(records["0"].rows.mean, expected.mean(0), rtol=1e-6, atol=1e-7)


# which rows


def test_a_layer_called_twice_a_batch_gives_rows_of_both_and_one_pooled_average():
    net = Twice().double()
    x = [part.double() for part in images()]
    record_ = record(net, x, positions="all")["conv"]
    with torch.no_grad():
        large, small = (torch.cat([net.conv(v) for v in views]) for views in (x, [v[..., ::2, ::2] for v in x]))
    rows = [reference.rows_of(output.numpy(), net.conv) for output in (large, small)]
    every = np.concatenate([reference.flat(part) for part in rows])
    assert record_.rows.count == 24 * (36 + 4)
    np.testing.assert_allclose(record_.rows.covariance, reference.covariance(every), rtol=1e-10, atol=1e-14)
    pooled = np.concatenate(rows, axis=1).mean(1)
    assert record_.pooled.count == 24
    np.testing.assert_allclose(record_.pooled.covariance, reference.covariance(pooled), rtol=1e-10, atol=1e-14)


def test_a_layer_that_never_runs_has_no_record():
    net = conv_net()
    net.spare = nn.Linear(2, 2)
    assert list(record(net, images())) == ["conv1", "conv2", "depthwise", "reduce", "fc"]


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_runs_in_some_batches_only_is_named(first):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.sometimes, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.sometimes(self.always(x)) if (self.calls == 1) == first else self.always(x)

    with pytest.raises(TwoAxisError, match=r"^sometimes: expected .*every batch or in none.*leave it out"):
        record(Moody(), [torch.randn(4, 3) for _ in range(3)])


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_in_either_order(batch_first):
    torch.manual_seed(0)
    net, x = Attention(batch_first).double().eval(), [torch.randn(4, 5, 8).double() for _ in range(3)]
    expected = reference.emitted(net, x, {"attention": net.attention})["attention"]
    found = record(net, x, positions="all")["attention"]
    assert (found.rows.count, found.pooled.count) == (60, 12)
    np.testing.assert_allclose(
        found.rows.covariance, reference.covariance(reference.flat(expected)), rtol=1e-10, atol=1e-14
    )
    np.testing.assert_allclose(found.pooled.covariance, reference.covariance(expected.mean(1)), rtol=1e-10, atol=1e-14)


def test_windows_of_an_image_are_pooled_together():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):  # [n, 3, 8, 8] -> [4 n, 16, 3], the windows of an image side by side
            n = len(x)
            windows = x.view(n, 3, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(4 * n, 16, 3)
            return self.fc(windows)

    net = Windows().double()
    x = torch.cat(images()).double()
    found = record(net, [x], positions="all")["fc"]
    with torch.no_grad():
        everywhere = net.fc(x.movedim(1, -1)).numpy()
    assert (found.rows.count, found.pooled.count) == (24 * 64, 24)
    np.testing.assert_allclose(
        found.pooled.covariance, reference.covariance(everywhere.mean((1, 2))), rtol=1e-10, atol=1e-14
    )


# sampled positions


def test_sampled_rows_are_those_positions_and_pooled_values_use_all():
    net, x = conv_net().double(), [part.double() for part in images()]
    rows = reference.emitted(net, x, channel_layers(net))
    sampled, everything = record(net, x, positions=5), record(net, x, positions="all")
    chosen = sampled_positions(image_keys(torch.cat(x)), 64, 5).numpy()
    for name in ("conv1", "conv2", "depthwise", "reduce"):
        assert (sampled[name].rows.count, sampled[name].rows.weight) == (24 * 5, pytest.approx(24 * 64))
        np.testing.assert_allclose(
            sampled[name].rows.covariance,
            reference.covariance(reference.flat(rows[name][np.arange(24)[:, None], chosen])),
            rtol=1e-9,
            atol=1e-13,
        )
        assert torch.equal(sampled[name].pooled.mean, everything[name].pooled.mean)
        assert torch.equal(sampled[name].pooled.scatter, everything[name].pooled.scatter)
        np.testing.assert_allclose(sampled[name].pooled.mean, rows[name].mean((0, 1)), rtol=1e-10, atol=1e-13)
    assert sampled["fc"].rows.count == 24  # fewer positions than asked for: all of them


@pytest.mark.parametrize("batch_size", [5, 24])
def test_the_same_positions_whatever_the_batch_size(batch_size):
    net = conv_net().double()
    parts = [[x.double() for x in images(batch_size=size)] for size in (8, batch_size)]
    expected, found = (record(net, part, positions=3) for part in parts)
    for name, record_ in found.items():
        assert record_.rows.count == expected[name].rows.count
        torch.testing.assert_close(record_.rows.scatter, expected[name].rows.scatter, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(record_.pooled.scatter, expected[name].pooled.scatter, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "expected_images", "positions"),
    # max(8 C, 16384) rows over all images, a power of two, and at least 8 of each
    [
        (16, 24, None),
        (16, 1024, 16),
        (16, 1000, 16),
        (16, 5000, 8),
        (16, 10**6, 8),
        (2048, 1024, 16),
        (4096, 1024, 32),
        (4096, 512, None),
        (16, None, None),
    ],
)
def test_auto_spends_a_budget_of_rows(channels, expected_images, positions):
    conv = nn.Conv2d(3, channels, 1)
    found = record(conv, [torch.randn(2, 3, 8, 8)], positions="auto", expected_images=expected_images)[""]
    assert found.rows.count == 2 * (positions or 64)


def test_a_layer_called_twice_samples_each_call_alike():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    found = record(Twice(), images(), positions=5)["conv"]
    assert found.rows.count == 2 * 5 * found.pooled.count


def test_the_same_rows_whatever_the_order_of_images():
    net, x = conv_net().double(), torch.cat(images()).double()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    expected, found = record(net, [x], positions=3), record(net, x[order].split(7), positions=3)
    for name, record_ in found.items():
        torch.testing.assert_close(record_.rows.scatter, expected[name].rows.scatter, rtol=1e-9, atol=1e-12)


class Pattern(nn.Module):
    """A 1x1 convolution of a map that is filled where ``where`` says."""

    def __init__(self, where):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.register_buffer("where", where.float())

    def forward(self, x):
        return self.conv(x * self.where)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("odd", [0, 1])
def test_rows_and_columns_of_both_kinds_are_seen(axis, odd):
    where = torch.arange(32) % 2 == odd
    net = Pattern(where[:, None].expand(32, 32) if axis == 0 else where.expand(32, 32))
    x = torch.randn(400, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    exact, found = (record(net, x.split(100), positions=p)["conv"].rows.covariance for p in ("all", 4))
    assert 0.9 < float(found / exact) < 1.1


def test_a_class_token_has_the_weight_of_one_token():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 1, bias=False)

        def forward(self, x):  # only the first of 65 tokens is not 0
            return self.fc(torch.cat([x, torch.zeros(len(x), 64, 1)], 1))

    x = torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(0))
    net = Tokens()
    exact, found = (record(net, [x], positions=p)["fc"].rows.covariance for p in ("all", 8))
    assert 0.8 < float(found / exact) < 1.2


def test_parts_of_different_rates_merge_as_their_images():
    """Few images with many positions weigh no more than they would with few."""
    net, x = conv_net().double(), torch.cat(images(60)).double()
    x[:20] *= 3
    dense, sparse = record(net, [x[:20]], positions="all"), record(net, [x[20:]], positions=8)
    for name in ("conv1", "depthwise"):
        rows = reference.emitted(net, [x], channel_layers(net))[name]
        chosen = sampled_positions(image_keys(x[20:]), 64, 8).numpy()
        some = rows[20:][np.arange(40)[:, None], chosen]
        flat = np.concatenate([reference.flat(rows[:20]), reference.flat(some)])
        weights = np.concatenate([np.ones(20 * 64), np.full(40 * 8, 8.0)])
        merged = dense[name].rows.merge(sparse[name].rows)
        assert (merged.count, merged.weight) == (20 * 64 + 40 * 8, 60 * 64)
        np.testing.assert_allclose(merged.mean, np.average(flat, axis=0, weights=weights), rtol=1e-10, atol=1e-12)
        expected = np.cov(flat, rowvar=False, bias=True, aweights=weights)
        np.testing.assert_allclose(merged.covariance, expected, rtol=1e-9, atol=1e-12)


def test_memory_formats_agree():
    x = images()
    plain = record(conv_net(), x, positions=5)
    last = record(
        conv_net().to(memory_format=torch.channels_last),
        [part.to(memory_format=torch.channels_last) for part in x],
        positions=5,
    )
    for name, record_ in plain.items():
        torch.testing.assert_close(last[name].rows.covariance, record_.rows.covariance, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last[name].pooled.mean, record_.pooled.mean, rtol=1e-5, atol=1e-6)


# pooled values and task variables


def test_pooled_values_are_paired_with_the_task_across_flushes():
    net = nn.Linear(3, 4).double()
    total, batch = PENDING_IMAGES * 2 + 90, 100
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(total, 3, generator=generator, dtype=torch.float64)
    task = torch.randn(total, 2, generator=generator, dtype=torch.float64) + x[:, :2]
    found = record(net, x.split(batch), task=task.split(batch))[""]
    with torch.no_grad():
        outputs = net(x).numpy()
    assert found.cross.count == found.pooled.count == total
    np.testing.assert_allclose(found.cross.covariance, reference.covariance(outputs, task.numpy()), rtol=1e-9)
    np.testing.assert_allclose(found.pooled.covariance, reference.covariance(outputs), rtol=1e-9)


def test_what_waits_does_not_grow():
    net = nn.Linear(3, 4)
    with torch.no_grad(), Recorder({"": net}) as recorder:
        for _ in range(40):
            rows = torch.randn(100, 3)
            recorder.begin(rows)
            net(rows)
            recorder.finish(torch.zeros(100, 1))
            assert sum(len(part) for part in recorder._pending.get("", [])) < PENDING_IMAGES
            assert sum(len(part) for part in recorder._pending_task) < PENDING_IMAGES
    assert recorder.records[""].pooled.count == 4000


def test_without_a_task_there_is_no_cross():
    assert record(nn.Linear(3, 4), [torch.randn(5, 3)])[""].cross is None


def test_a_reduced_precision_mean_is_not_kept_in_reduced_precision():
    conv = nn.Conv2d(3, 4, 1).bfloat16()
    x = torch.cat(images(size=32)).bfloat16()
    found = record(conv, [x], positions="all")[""]
    rows = reference.emitted(conv, [x], {"": conv})[""]
    pooled = rows.mean(1)
    assert reference.relative_error(found.pooled.covariance, reference.covariance(pooled), *[pooled.var(0)] * 2) < 1e-5


def test_values_that_are_not_finite_stay_visible():
    net = nn.Linear(3, 4)
    with torch.no_grad():
        net.bias[1] = torch.inf
    found = record(net, [torch.randn(5, 3)])[""]
    assert not torch.isfinite(found.rows.scatter).all()
    assert not torch.isfinite(found.pooled.scatter).all()


@pytest.mark.parametrize("positions", [0, -1, 2.5, "some", None])
def test_positions_that_make_no_sense(positions):
    with pytest.raises(TwoAxisError, match="positions: expected 'auto', 'all' or a positive number"):
        Recorder({}, positions=positions)
