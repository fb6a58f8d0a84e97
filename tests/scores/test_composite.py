"""Standardisation within a layer, and the weights of the composites."""

import pytest
import torch
from cases import batches, conv_net
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis import calibrate
from tp_twoaxis.scores import hull, local
from tp_twoaxis.scores.composite import compact_hull, composite_local, composite_pid, norm_local, pid_no_red, z_scores


@pytest.fixture(scope="module")
def layer():
    return calibrate(conv_net(), batches(), progress=False)["conv1"]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_z_has_mean_0_and_deviation_1_and_knows_no_scale(values, scale, shift):
    v = torch.tensor(values, dtype=torch.float64)
    if v.std(correction=0) < 1e-3 * v.abs().max().clamp_min(1.0):
        return
    z = z_scores(v)
    assert abs(float(z.mean())) < 1e-9
    assert float(z.std(correction=0)) == pytest.approx(1.0)
    torch.testing.assert_close(z_scores(scale * v + shift), z, rtol=1e-6, atol=1e-6)


def test_z_of_what_is_alike_is_0():
    assert z_scores(torch.full((5,), 0.1)).tolist() == [0.0] * 5
    assert z_scores(torch.tensor([0.1, 0.1 + 1e-17], dtype=torch.float64)).tolist() == [0.0, 0.0]
    assert z_scores(torch.tensor([7.0])).tolist() == [0.0]
    assert z_scores(torch.zeros(0)).shape == (0,)
    assert z_scores(torch.tensor([1.0, 2.0]), torch.tensor([False, False])).tolist() == [0.0, 0.0]


def test_weights_are_those_of_the_formulas(layer):
    capture, overlap = z_scores(local.input_capture(layer.variance)), z_scores(local.peer_overlap(layer.correlation))
    norm = z_scores(layer.weight_power.sqrt().log())
    hulls = hull.greedy_hulls(layer.correlation)
    torch.testing.assert_close(composite_local(layer, 2.0, 0.5), 2 * capture - 0.5 * overlap)
    torch.testing.assert_close(norm_local(layer, 0.5, 2.0, 1.5), 1.5 * norm + 0.5 * capture - 2 * overlap)
    torch.testing.assert_close(compact_hull(layer, 3.0), capture - 3 * z_scores(hulls.explanation / hulls.size))


def test_redundancy_is_what_the_two_target_composites_differ_by(layer):
    difference = pid_no_red(layer) - composite_pid(layer)
    information = layer.target_correlation().abs()
    # the redundancy rises with a channel's own task information (lemma 1); the two largest are equally redundant
    assert torch.equal(difference.argsort()[:-2], information.argsort()[:-2])
    torch.testing.assert_close(*difference[information.argsort()[-2:]], rtol=1e-6, atol=1e-6)
