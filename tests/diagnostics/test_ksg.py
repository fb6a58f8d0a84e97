"""Nearest-neighbour task information against its formula, known values, and another implementation."""

import numpy as np
import pytest
import reference_collapse
import torch
from cases import batches, conv_net

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.evidence import NotApplicableError
from tp_twoaxis.diagnostics.ksg import ksg_information, ksg_table
from tp_twoaxis.scores.target import task_information
from tp_twoaxis.statistics import pooled_samples


def correlated(rho, images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, images, generator=generator, dtype=torch.float64)
    return x[:, None], rho * x + (1 - rho**2) ** 0.5 * noise


@pytest.mark.parametrize("neighbours", [3, 5])
def test_equals_distances_of_all_pairs(neighbours):
    x, y = correlated(0.7, 200)
    values = torch.cat([x, x.square() + 0.1 * y[:, None]], dim=1)
    found = ksg_information(values, y, neighbours=neighbours)
    # both variables are first scaled to unit variance, as the joint distance asks for
    expected = [reference_collapse.ksg((c / c.std()).numpy(), (y / y.std()).numpy(), neighbours) for c in values.T]
    np.testing.assert_allclose(found, np.maximum(expected, 0.0), atol=1e-3)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_gaussians_have_the_gaussian_information(rho):
    x, y = correlated(rho, 3000)
    assert float(ksg_information(x, y)) == pytest.approx(-0.5 * np.log(1 - rho**2), abs=0.05)


def test_sees_what_correlation_does_not():
    x, _ = correlated(0.0, 1500)
    y = x[:, 0].square()
    assert float(ksg_information(x, y)) > 1.0
    assert float(task_information(torch.corrcoef(torch.stack([x[:, 0], y]))[0, 1:])) < 0.05


def test_equals_ennemi():
    ennemi = pytest.importorskip("ennemi")
    x, y = correlated(0.6, 800)
    expected = ennemi.estimate_mi(y.numpy(), x.numpy(), k=3)
    assert float(ksg_information(x, y)) == pytest.approx(float(expected.ravel()[0]), abs=0.02)


def test_the_table_compares_it_with_the_gaussian_one():
    net, loader = conv_net(), batches(200, 100)
    stats, samples = calibrate(net, loader, progress=False), pooled_samples(net, loader, progress=False)
    table = ksg_table(stats, samples, {"conv1": [0, 3, 7, 9], "reduce": [1, 2]})
    assert table[["layer", "depth", "channels"]].values.tolist() == [["conv1", 0.0, 4], ["reduce", 1.0, 2]]
    found = ksg_information(samples.outputs["conv1"][:, [0, 3, 7, 9]], samples.target_values())
    gaussian = task_information(stats["conv1"].target_correlation())[[0, 3, 7, 9]]
    assert table.ksg[0] == pytest.approx(float(found.mean()))
    assert table.gaussian[0] == pytest.approx(float(gaussian.mean()))
    ranks = np.corrcoef(found.argsort().argsort(), gaussian.argsort().argsort())
    assert table.rho[0] == pytest.approx(ranks[0, 1])
    assert np.isnan(table.rho[1])


def test_too_few_images_and_several_columns_are_refused():
    x, y = correlated(0.5, 3)
    with pytest.raises(NotApplicableError, match="more than 3 images"):
        ksg_information(x, y)
    with pytest.raises(NotApplicableError, match="target"):
        ksg_information(x, torch.ones(3, 2))
