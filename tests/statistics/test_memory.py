"""Memory is known before the first pass, and several passes give what one gives, or say why they cannot."""

import pytest
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.statistics import memory
from tp_twoaxis.statistics.memory import GIB, LayerSize, MemoryPlan
from tp_twoaxis.statistics.recorder import PENDING_IMAGES, Recorder
from tp_twoaxis.statistics.resampling import calibrate_shards
from tp_twoaxis.statistics.row_queue import waiting_numbers

OPTIONS = {"consumers": True, "gradients": True, "positions": 5, "progress": False}


def wide_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 600, 1), nn.ReLU(), nn.Conv2d(600, 40, 3), nn.ReLU(), nn.Conv2d(40, 700, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(700, 5)).eval()


def plan_of(net, batch=16, **options):
    """The plan for a network, by the sizes that its recorder states."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    sizes = Recorder(layers, **options).sizes()
    return MemoryPlan.of(sizes, batch=batch, columns=10, pooled_images=PENDING_IMAGES)


def test_the_plan_is_what_a_calibration_holds():
    net = wide_net()
    stats = calibrate(net, batches(), consumers=True, positions=5, progress=False)
    sizes = Recorder({n: net.get_submodule(n) for n in stats}, positions=5, consumers=True).sizes()
    for name, entry in stats.layers.items():
        moments = (entry.rows, entry.pooled, entry.cross, entry.inputs)
        assert sum(8 * part.scatter.numel() for part in moments) == sizes[name].accumulators(columns=10), name


@pytest.mark.parametrize("positions", [3, "all"])
def test_rows_wait_no_longer_than_planned(positions):
    net = wide_net()
    layers = {name: net.get_submodule(name) for name in ("0", "2", "4")}
    with torch.no_grad(), Recorder(layers, positions=positions) as recorder:
        for x, _ in batches(60 * 16, 16):
            recorder.begin(x)
            net(x)
            recorder.finish()
            for name, size in recorder.sizes().items():
                queue = recorder._queues[id(recorder.records[name].rows)]
                assert queue.numbers < waiting_numbers(size.width)
                pooled = sum(part.numel() * part.element_size() for part in recorder._pending.get(name, []))
                assert 4 * queue.numbers + pooled <= size.waiting(16, PENDING_IMAGES)


@pytest.mark.parametrize("share", [0.999, 0.7, 0.0])
def test_several_passes_give_what_one_gives(share):
    net, loader = wide_net(), batches()
    once = calibrate(net, loader, **OPTIONS)
    plan = plan_of(net, positions=5, consumers=True)
    least = max(plan.total([name]) for name in plan.layers)
    limit = max(least, int(share * plan.total()))
    assert len(plan.passes(limit)) > 1
    split = calibrate(net, loader, max_memory=(limit + 1) / GIB, **OPTIONS)
    assert list(split) == list(once)
    assert split.num_images == once.num_images
    for mine, theirs in zip(split._moments(), once._moments(), strict=True):
        assert (mine.count, mine.weight) == (theirs.count, theirs.weight)
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine.scatter, theirs.scatter, rtol=1e-9, atol=1e-12)


def test_shards_in_several_passes():
    net, loader = wide_net(), batches()
    plan = plan_of(net, positions=5)
    limit = 2 * max(plan.total([name]) for name in plan.layers) / GIB
    once, split = (
        calibrate_shards(net, loader, shards=2, positions=5, progress=False, **more)
        for more in ({}, {"max_memory": limit})
    )
    for mine, theirs in zip(split, once, strict=True):
        for one, other in zip(mine._moments(), theirs._moments(), strict=True):
            torch.testing.assert_close(one.scatter, other.scatter, rtol=1e-9, atol=1e-12)


class Changing:
    """Gives other batches every time that it is read."""

    def __init__(self, *readings):
        self.readings, self.read = readings, 0

    def __iter__(self):
        self.read += 1
        return iter(self.readings[min(self.read, len(self.readings)) - 1])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (batches(seed=1), "pass 2 of 2 got other images in its first batch .* switch shuffling"),
        (batches()[::-1], "pass 2 of 2 got other images in its first batch"),
        (batches(batch_size=12), "pass 2 of 2 got other images in its first batch"),
        (batches()[:2], "pass 2 of 2 got 32 images, 48 in the first pass"),
        ([], "at least one batch of images"),
    ],
)
def test_a_loader_that_changes_is_refused(second, message):
    net = conv_net()
    plan = plan_of(net, positions=5)
    loader = Changing(batches(), second)
    with pytest.raises(TwoAxisError, match=message):
        calibrate(net, loader, positions=5, progress=False, max_memory=(plan.total() - 1) / GIB)
    assert all(not module._forward_hooks for module in net.modules())


def test_a_loader_for_one_reading_is_refused_before_the_pass():
    net = conv_net()
    limit = (plan_of(net, positions=5).total() - 1) / GIB
    with pytest.raises(TwoAxisError, match=r"can be read 2 times, got a list_iterator.* max_memory=0\.\d"):
        calibrate(net, iter(batches()), positions=5, progress=False, max_memory=limit)


def test_a_limit_that_is_too_low_names_one_that_is_not():
    net, loader = wide_net(), batches()
    with pytest.raises(TwoAxisError, match=r"^max_memory: .* alone takes .* pass max_memory=0\.\d+") as caught:
        calibrate(net, loader, positions=5, progress=False, max_memory=1e-6)
    named = float(str(caught.value).split("pass max_memory=")[1].split(",")[0])
    assert len(calibrate(net, loader, positions=5, progress=False, max_memory=named)) == 4
    with pytest.raises(TwoAxisError, match="max_memory: expected a positive number"):
        calibrate(net, loader, max_memory=0.0)


def test_what_does_not_fit_is_said_before_the_first_pass(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    net = wide_net()
    with pytest.raises(
        TwoAxisError, match=r"4 layers take 0\.\d+ GiB, on cpu 0\.001 GiB are free; calibrate some layers"
    ):
        calibrate(net, batches(), progress=False)
    plan = MemoryPlan.of({"a": LayerSize(4096)}, batch=8, columns=0, pooled_images=512)
    with pytest.raises(TwoAxisError, match=r"on cuda 0\.001 GiB are free; pass max_memory=0\.001 for several passes"):
        plan.check_free(torch.device("cuda"))
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert len(calibrate(net, batches(), progress=False)) == 4
