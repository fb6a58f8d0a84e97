"""Moments of multisets of shards, against the raw rows of the images that they hold."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.resampling import LayerMixture, MomentMixture, check_shards

WEIGHTS = torch.tensor([[1, 1, 1], [2, 0, 1], [0, 3, 0]])


@pytest.fixture(scope="module")
def parts():
    """A network, three batches of unequal size, and the statistics of each."""
    net, loader = conv_net(), [batches(n, n, seed=n)[0] for n in (10, 16, 22)]
    return net, loader, [calibrate(net, [b], positions="all", consumers=True, progress=False) for b in loader]


def test_layers_are_those_of_the_repeated_images(parts):
    net, loader, shards = parts
    layers = {name: dict(net.named_modules())[name] for name in ("conv2", "fc")}
    raw = [reference.emitted(net, [images], layers) for images, _ in loader]
    read = [reference.received(net, [images], layers) for images, _ in loader]
    with torch.no_grad():
        margins = [
            reference.task_variables(net(images).double().numpy(), labels.numpy())["margin"]
            for images, labels in loader
        ]
    for name in layers:
        for weights, layer in zip(WEIGHTS.tolist(), LayerMixture(shards, name).draw(WEIGHTS), strict=True):
            chosen = [shard for shard, times in enumerate(weights) for _ in range(times)]
            rows = np.concatenate([raw[shard][name] for shard in chosen])
            inputs = np.concatenate([read[shard][name] for shard in chosen])
            margin = np.concatenate([margins[shard] for shard in chosen])
            assert (layer.num_rows, layer.num_images) == (rows.shape[0] * rows.shape[1], len(rows))
            np.testing.assert_allclose(layer.mean, rows.mean((0, 1)), rtol=1e-5, atol=1e-6)
            expected = reference.covariance(reference.flat(rows))
            scale = np.diag(expected)
            assert reference.relative_error(layer.covariance, expected, scale, scale) < 1e-5
            pooled = rows.mean(1)
            np.testing.assert_allclose(layer.pooled_correlation, reference.correlation(pooled), atol=1e-5)
            np.testing.assert_allclose(
                layer.target_correlation("margin"), reference.correlation(pooled, margin)[:, 0], atol=1e-5
            )
            np.testing.assert_allclose(
                layer.input_covariance, reference.covariance(reference.flat(inputs)), rtol=1e-4, atol=1e-6
            )


def test_mixing_is_merging(parts, monkeypatch):
    shards = parts[2]
    together = copy.deepcopy(shards[0])
    for shard in shards[1:]:
        together.merge(shard)
    monkeypatch.setattr("tp_twoaxis.statistics.resampling.BLOCK_NUMBERS", 1)  # a row at a time
    for name in together:
        layer = next(LayerMixture(shards, name).draw(WEIGHTS))
        torch.testing.assert_close(layer.covariance, together[name].covariance, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layer.rows.scatter, next(LayerMixture(shards, name).draw(WEIGHTS)).rows.scatter)


def test_shards_stay_as_they_are(parts):
    before = copy.deepcopy(parts[2])
    for layer in LayerMixture(parts[2], "conv1").draw(WEIGHTS):
        layer.rows.scatter.zero_()
        layer.rows.mean.zero_()
    for shard, old in zip(parts[2], before, strict=True):
        assert torch.equal(shard["conv1"].rows.scatter, old["conv1"].rows.scatter)
        assert torch.equal(shard["conv1"].rows.mean, old["conv1"].rows.mean)


def test_far_means_cancel_nothing():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 50, 2, generator=generator, dtype=torch.float64) + 1e8
    rows[:, :, 1] = 1e8  # constant in every part
    moments = []
    for part in rows:
        moments.append(CoMoments(2))
        moments[-1].update(part)
    mixed = next(MomentMixture(moments).draw(torch.tensor([[2, 1, 0]])))
    values = torch.cat([rows[0], rows[0], rows[1]])[:, 0]
    assert float(mixed.covariance[0, 0]) == pytest.approx(float(values.var(correction=0)), rel=1e-6)
    assert float(mixed.covariance[1, 1]) == 0.0


def test_parts_of_different_weights_mix_as_they_merge():
    parts = []
    for seed, weight in enumerate((1.0, 8.0, 50 / 7)):
        parts.append(CoMoments(4))
        rows = torch.randn(20 + seed, 4, generator=torch.Generator().manual_seed(seed)) + seed
        parts[-1].update(rows, weight=weight)
    mixed, merged = next(MomentMixture(parts).draw(torch.tensor([[2, 0, 1]]))), CoMoments(4)
    for index in (0, 0, 2):
        merged.merge(parts[index])
    assert (mixed.count, mixed.weight) == (merged.count, pytest.approx(merged.weight))
    torch.testing.assert_close(mixed.mean, merged.mean)
    torch.testing.assert_close(mixed.covariance, merged.covariance)


def test_what_cannot_be_resampled(parts):
    _, loader, shards = parts
    for few in ([], shards[:1], shards[0]):
        with pytest.raises(TwoAxisError, match="at least 2 shards"):
            check_shards(few)
    with pytest.raises(TwoAxisError, match="weights"):
        check_shards([shards[0], calibrate(conv_net(1), loader, consumers=True, progress=False)])


def test_moments_of_means_alone_mix_too():
    parts = []
    for seed in range(3):
        parts.append(CoMoments(4, 0))
        parts[-1].update(
            torch.randn(5 + seed, 4, generator=torch.Generator().manual_seed(seed)), torch.zeros(5 + seed, 0)
        )
    twice, once = next(MomentMixture(parts).draw(torch.tensor([[2, 0, 1]]))), CoMoments(4, 0)
    for index in (0, 0, 2):
        once.merge(parts[index])
    assert (twice.count, twice.scatter.shape) == (once.count, (4, 0))
    torch.testing.assert_close(twice.mean, once.mean)
