"""What a layer reads, seen as what a layer writes: against NumPy, and what it must refuse."""

import numpy as np
import pytest
import reference
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.scores.named_scores import SCORES, evaluate
from tp_twoaxis.statistics.layer_statistics import InputStatistics


@pytest.fixture(scope="module")
def stats():
    return calibrate(conv_net(), batches(), consumers=True, positions="all", progress=False)


@pytest.mark.parametrize("name", ["conv2", "depthwise", "fc"])
def test_moments_are_those_of_the_rows_that_are_read(stats, name):
    net = conv_net()
    rows = reference.received(net, [x for x, _ in batches()], {name: net.get_submodule(name)})[name]
    rows = reference.flat(rows)
    read = InputStatistics(stats[name])
    assert (read.num_channels, read.num_rows) == (rows.shape[1], len(rows))
    np.testing.assert_allclose(read.mean, rows.mean(0), rtol=1e-6)
    spread = rows.var(0)
    assert reference.relative_error(read.covariance, reference.covariance(rows), spread, spread) < 3e-6
    np.testing.assert_allclose(read.variance, spread, rtol=3e-6)
    np.testing.assert_allclose(read.correlation, reference.correlation(rows), atol=3e-6)


# norm-local looks at weights, which inputs have none of
@pytest.mark.parametrize("name", [n for n, entry in SCORES.items() if entry.axis == "local" and n != "norm-local"])
def test_local_scores_take_inputs(stats, name):
    assert evaluate(SCORES[name].function, InputStatistics(stats["reduce"])).shape == (16,)


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda read: read.target_correlation("margin"), "correlations with the task"),
        (lambda read: read.pooled_correlation, "pooled values"),
        (lambda read: read.num_images, "pooled values"),
        (lambda read: read.weight_power, "weight norms"),
        (lambda read: read.saliency, "first-order saliencies"),
    ],
)
def test_what_inputs_do_not_have_is_said(stats, ask, what):
    with pytest.raises(TwoAxisError, match=rf"input of conv2: expected.*needs {what}; take site='producer'"):
        ask(InputStatistics(stats["conv2"]))


def test_unrecorded_inputs_are_named():
    stats = calibrate(conv_net(), batches(16), progress=False)
    with pytest.raises(TwoAxisError, match=r"conv2: what the layer reads was not recorded.*consumers=True"):
        InputStatistics(stats["conv2"])


def test_it_prints_and_has_no_other_attributes(stats):
    read = InputStatistics(stats["conv2"])
    assert repr(read) == "InputStatistics(input of conv2, 16 channels, 3072 rows)"
    with pytest.raises(AttributeError, match="colour"):
        _ = read.colour
