"""Information between a channel and the next outputs, against determinants."""

import numpy as np
import pytest
import torch
from reference_baselines import adjacent_information as slow

from tp_twoaxis import TwoAxisError
from tp_twoaxis.scores.adjacent import adjacent_information


def rows(seed=0, inputs=7, outputs=4):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, inputs)) @ rng.normal(size=(inputs, inputs))
    x[:, 2] = 1.0
    return x, x @ rng.normal(size=(inputs, outputs)) + 0.1 * rng.normal(size=(60, outputs))


def fast(x, y, noise):
    x, y = x - x.mean(0), y - y.mean(0)
    cross, outputs = x.T @ y / len(x), y.T @ y / len(x)
    return adjacent_information(*(torch.tensor(a) for a in (x.var(0), cross, outputs)), noise=noise).numpy()


@pytest.mark.parametrize("noise", [0.01, 0.1, 2.0])
def test_equals_determinants(noise):
    x, y = rows()
    got = fast(x, y, noise)
    np.testing.assert_allclose(got, slow(x, y, noise), rtol=1e-8, atol=1e-12)
    assert got[2] == 0.0


def test_scale_of_inputs_and_of_all_outputs_does_not_matter_and_noise_hides():
    x, y = rows()
    before = fast(x, y, 0.1)
    np.testing.assert_allclose(fast(x * np.linspace(0.5, 3, 7), 5 * y, 0.1), before, rtol=1e-9)
    assert (fast(x, y, 1.0) <= before + 1e-12).all()
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(fast(x[:, order], y, 0.1), before[order], rtol=1e-9)


def test_constant_outputs_tell_nothing():
    assert adjacent_information(torch.ones(3), torch.zeros(3, 2), torch.zeros(2, 2)).tolist() == [0.0] * 3


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan")])
def test_noise_is_positive(noise):
    with pytest.raises(TwoAxisError, match="noise: expected a number above 0"):
        adjacent_information(torch.ones(1), torch.ones(1, 1), torch.ones(1, 1), noise=noise)
