"""Curves of all groups together: as many images and points as settle the widths, never more than allowed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import batches, conv_net

from tp_twoaxis import AnticipatingImportance, calibrate
from tp_twoaxis.dependency.graph import build_graph, prunable_groups
from tp_twoaxis.importance.curve_measurement import RemovalOrder, measure_curves, removed_at

LOADER = batches(images=64, batch_size=24)


class Simulated:
    """Distortions of known curves with noise of the images, and a count of what they cost."""

    def __init__(self, curves, images=512, noise=0.0):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.zeros(images, 1)
        self.curves, self.cost, self.asked = curves, 0, []
        self.noise = {name: torch.exp(noise * torch.randn(images, generator=generator)) for name in curves}
        self.refits = SimpleNamespace(change=lambda name, missing: (name, int(missing.sum())))

    def repeated_share(self, layers):
        return 0.5

    def power(self, count):
        return 2.0

    def measure(self, trials, images):
        found = {}
        for key, changes in trials.items():
            ((name, count),) = changes.values()
            found[key] = 2.0 * self.curves[name](count) * self.noise[name][images.start : images.stop].double()
            self.cost += 0.5 * len(images)
            self.asked.append((name, count, images))
        return found


def orders_of(curves, size=32):
    every = torch.arange(size)
    return [
        RemovalOrder(name, every, {name: [(every, every, size)]}, ((0.01 * size, (1.0,)),), 0.01) for name in curves
    ]


def smooth(a, b):
    return lambda count: a * (count / 32) ** b


CURVES = {"first": smooth(1.0, 2.0), "second": smooth(0.5, 3.0), "third": smooth(2.0, 2.5)}


def measured(distortion, levels=4, passes=1e6):
    return measure_curves(orders_of(distortion.curves), distortion, levels=levels, passes=passes)


def test_points_are_equal_shares_and_all_channels_but_one():
    distortion = Simulated(CURVES)
    for curve in measured(distortion):
        assert curve.removed == (0, 8, 16, 24, 31)
        expected = [CURVES[curve.name](count) for count in curve.removed]
        np.testing.assert_allclose(curve.distortion, expected, rtol=1e-6)
        assert max(curve.standard_error) == pytest.approx(0.0, abs=1e-6)
        np.testing.assert_allclose(curve.macs_saved, 0.01 * np.asarray(curve.removed))
        assert curve.images == 32  # without noise the first images settle it


def test_noise_takes_more_images_until_the_widths_are_settled():
    used = [measured(Simulated(CURVES, noise=noise))[0].images for noise in (0.1, 1.0)]
    assert used[0] == 32
    assert 64 <= used[1] <= 512
    errors = measured(Simulated(CURVES, noise=0.5))[0]
    values = Simulated(CURVES, noise=0.5).noise["first"][: errors.images].double() * errors.distortion[-1]
    expected = float(values.std() / values.mean() * errors.distortion[-1] / errors.images**0.5)
    assert errors.standard_error[-1] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("passes", [20, 150, 300, 1500])
def test_passes_bound_the_cost_beyond_the_first_images(passes):
    distortion = Simulated(CURVES, noise=2.0)
    images = measured(distortion, passes=passes)[0].images
    assert 16 <= images < 512
    assert distortion.cost + 2 * images <= passes or images == 16


def test_a_cliff_at_a_threshold_gets_points_of_its_own():
    cliff = {**CURVES, "cliff": lambda count: 1e-5 * count if count < 13 else 3.0 + count / 32}
    found = {curve.name: curve for curve in measured(Simulated(cliff))}
    assert found["cliff"].removed == (0, 8, 12, 14, 16, 24, 31)
    assert found["second"].removed == (0, 8, 16, 24, 31)


def test_one_group_alone_takes_all_images():
    assert measured(Simulated({"first": CURVES["first"]}, images=100))[0].images == 100


@pytest.mark.parametrize("size", [1, 2, 3])
def test_narrow_groups_have_curves(size):
    distortion = Simulated(CURVES)
    curves = measure_curves(orders_of(CURVES, size), distortion, levels=4, passes=100)
    for curve in curves:
        assert curve.removed == tuple(range(size))
        assert bool(torch.isfinite(curve.slopes()).all())


def test_widths_are_those_of_leaving_one_at_a_time():
    g = np.random.default_rng(0)
    slopes = [np.sort(g.random(n)) for n in (5, 9, 3)]
    costs = [0.3, 0.1, 0.7]
    leaving = sorted(
        (slope / cost, group) for group, (own, cost) in enumerate(zip(slopes, costs, strict=True)) for slope in own
    )
    total = sum(costs[group] for _, group in leaving)
    for budget in (0.1, 0.5, 0.9):
        gone, expected = 0.0, [0, 0, 0]
        for _, group in leaving:
            if gone >= budget * total:
                break
            gone += costs[group]
            expected[group] += 1
        assert removed_at(slopes, costs, budget).tolist() == expected


def test_all_groups_together_and_the_same_in_every_run():
    net = conv_net()
    stats = calibrate(net, LOADER, target=None, consumers=True, progress=False)
    groups = [g.own for g in prunable_groups(build_graph(net, torch.zeros(1, 3, 8, 8)), net, [])[0]]

    def importance():
        return AnticipatingImportance(stats, loader=LOADER, model=net, progress=False)

    one, two, alone = importance(), importance(), importance()
    one.prepare_groups(groups)
    assert list(one.curves) == ["reduce", "depthwise"]
    two.prepare_groups(groups)
    assert one.curves == two.curves
    passes = one._distortion._bar.n
    scores = [one(group) for group in groups]
    one.prepare_groups(groups)
    assert one._distortion._bar.n == passes  # nothing is measured again
    for got, group in zip(scores, groups, strict=True):
        torch.testing.assert_close(alone(group), got, rtol=1e-3, atol=0)  # the same images, as there are only 25
    assert all(np.isfinite([row["distortion"] for row in one.curves.to_rows()]))
