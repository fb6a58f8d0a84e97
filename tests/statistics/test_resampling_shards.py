"""Calibration in shards: the same pass, dealt out."""

from __future__ import annotations

import pytest
import torch
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate, calibrate_shards
from tp_twoaxis.runtime.batches import image_batches, split_shards


def dealt(loader, hands, seed=0):
    """Image and label tensors of each hand."""
    with image_batches(loader, max_images=None, labels=True, description="", progress=False) as read:
        parts = {}
        for hand, batch in split_shards(read, hands, seed):
            parts.setdefault(hand, []).append(batch)
    return [
        (torch.cat([b.images for b in parts[hand]]), torch.cat([b.labels for b in parts[hand]]))
        for hand in range(hands)
    ]


def assert_same(one, other):
    assert list(one) == list(other)
    for mine, theirs in zip(one._moments(), other._moments(), strict=True):
        assert mine.count == theirs.count
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-6, atol=1e-7)
        sizes = (
            theirs.scatter if theirs.paired else theirs.scatter.diagonal().outer(theirs.scatter.diagonal()).sqrt()
        ).abs()
        assert bool(((mine.scatter - theirs.scatter).abs() <= 1e-5 * sizes + 1e-5).all())


@pytest.mark.parametrize(("positions", "batch_size"), [("auto", 16), ("auto", 50), (4, 16)])
def test_merged_shards_are_one_calibration(monkeypatch, positions, batch_size):
    # so few rows that "auto" samples positions: 8 of 64 for 50 images, more if a shard were taken for the whole
    monkeypatch.setattr("tp_twoaxis.statistics.recorder.MINIMUM_ROWS", 400)
    monkeypatch.setattr("tp_twoaxis.statistics.recorder.ROWS_PER_CHANNEL", 1)
    net, loader = conv_net(), batches(50, batch_size)
    options = {"positions": positions, "consumers": True, "progress": False}
    shards = calibrate_shards(net, loader, shards=4, **options)
    assert sorted(shard.num_images for shard in shards) == [12, 12, 13, 13]
    first = shards[0]
    for shard in shards[1:]:
        first.merge(shard)
    assert_same(first, calibrate(net, loader, **options))


def test_each_shard_is_a_calibration_of_its_own_images():
    net, loader = conv_net(), batches(40, 16)
    shards = calibrate_shards(net, loader, shards=3, seed=5, positions="all", progress=False)
    for shard, images in zip(shards, dealt(loader, 3, seed=5), strict=True):
        assert_same(shard, calibrate(net, [images], positions="all", progress=False))


def test_the_deal_is_even_and_blind_to_batches():
    loader = batches(45, 45)
    numbered = [(images, torch.arange(45)) for images, _ in loader]
    hands = dealt(numbered, 4)
    assert sorted(len(labels) for _, labels in hands) == [11, 11, 11, 12]
    for start in range(0, 44, 4):  # one of every four in a row
        window = set(range(start, start + 4))
        assert all(len(window & set(labels.tolist())) == 1 for _, labels in hands)
    images, labels = numbered[0]
    for size in (1, 7, 16):
        again = dealt(list(zip(images.split(size), labels.split(size), strict=True)), 4)
        for (a, first), (b, second) in zip(hands, again, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(first, second)
    # no period: the place within four in a row changes
    assert len({int(label) % 4 for label in hands[0][1]}) > 1
    other = dealt(numbered, 4, seed=1)
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(hands, other, strict=True))


def test_batches_stay_as_large_as_the_loaders():
    sizes = []
    with image_batches(batches(256, 16), max_images=None, labels=False, description="", progress=False) as read:
        sizes = [len(batch.images) for _, batch in split_shards(read, 8)]
    assert sum(sizes) == 256
    assert min(sizes[:-8]) >= 16
    assert max(sizes) <= 18


def test_images_of_two_shapes_are_not_stacked():
    loader = [(torch.randn(8, 3, size, size), torch.randint(5, (8,))) for size in (8, 12, 12)]
    shards = calibrate_shards(conv_net(), loader, shards=2, progress=False)
    assert [shard.num_images for shard in shards] == [12, 12]


def test_bad_input():
    net, loader = conv_net(), batches(16, 8)
    with pytest.raises(TwoAxisError, match="at least 2, got 1"):
        calibrate_shards(net, loader, shards=1, progress=False)
    with pytest.raises(TwoAxisError, match="each of 20 shards, got 16 images"):
        calibrate_shards(net, loader, shards=20, progress=False)
    with pytest.raises(TwoAxisError, match="got none"):
        calibrate_shards(net, [], progress=False)
    with pytest.raises(TwoAxisError, match="batch 1 comes without labels"):
        calibrate_shards(net, [loader[0], loader[1][0]], shards=2, progress=False)
    with pytest.raises(TwoAxisError, match="a label for each of 8 images"):
        calibrate_shards(net, [(loader[0][0], torch.zeros(7, dtype=torch.long))], shards=2, progress=False)
