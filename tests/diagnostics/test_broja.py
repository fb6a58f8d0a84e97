"""Partial information: parts of known distributions, sums, bins, and the table of a network against loops."""

import numpy as np
import pandas as pd
import pytest
import reference_collapse
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.broja import broja_layers, broja_table, decompose, quantile_bins
from tp_twoaxis.diagnostics.evidence import NotApplicableError
from tp_twoaxis.statistics import PooledSamples, pooled_samples

LN2 = np.log(2)


def gate(function, *, sizes=(2, 2)):
    """[T, Y, X] of a function of two independent uniform variables."""
    values = [[function(y, x) for x in range(sizes[1])] for y in range(sizes[0])]
    table = torch.zeros(1 + np.max(values), *sizes, dtype=torch.float64)
    for y, x in np.ndindex(*sizes):
        table[values[y][x], y, x] = 1.0 / np.prod(sizes)
    return table


# shared, unique of the first, unique of the second, synergy, in bits (Bertschinger et al. 2014, section 5)
KNOWN = {
    "copy": (torch.diag_embed(torch.eye(2)).double() / 2, (1.0, 0.0, 0.0, 0.0)),
    "exclusive or": (gate(lambda y, x: y ^ x), (0.0, 0.0, 0.0, 1.0)),
    "and": (gate(lambda y, x: y & x), (0.75 * np.log2(4 / 3), 0.0, 0.0, 0.5)),
    "first alone": (gate(lambda y, x: y), (0.0, 1.0, 0.0, 0.0)),
    "second alone": (gate(lambda y, x: x), (0.0, 0.0, 1.0, 0.0)),
    "both, side by side": (gate(lambda y, x: 2 * y + x), (0.0, 1.0, 1.0, 0.0)),
}


@pytest.mark.parametrize(("table", "expected"), KNOWN.values(), ids=KNOWN)
def test_parts_of_known_distributions(table, expected):
    parts = decompose(table[None])
    found = [parts.shared, parts.unique_first, parts.unique_second, parts.synergy]
    np.testing.assert_allclose([float(x) / LN2 for x in found], expected, atol=1e-6)


def test_copy_of_four_values_is_all_shared():
    table = torch.zeros(4, 4, 4, dtype=torch.float64)
    table[range(4), range(4), range(4)] = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    parts = decompose(table[None])
    assert float(parts.shared) == pytest.approx(float(parts.joint), abs=1e-7)
    assert float(parts.unique_first + parts.unique_second + parts.synergy) < 1e-6


def test_parts_add_up_to_informations_of_the_formula():
    generator = np.random.default_rng(0)
    joint = torch.tensor(generator.dirichlet(np.full(64, 0.4), size=20)).view(-1, 4, 4, 4)
    parts = decompose(joint)
    for i, table in enumerate(joint.numpy()):
        first = reference_collapse.mutual_information(table.sum(2))
        second = reference_collapse.mutual_information(table.sum(1))
        both = reference_collapse.mutual_information(table.reshape(4, -1))
        assert float(parts.first[i]) == pytest.approx(first, abs=1e-12)
        assert float(parts.shared[i] + parts.unique_first[i]) == pytest.approx(first, abs=1e-6)
        assert float(parts.shared[i] + parts.unique_second[i]) == pytest.approx(second, abs=1e-6)
        total = parts.shared[i] + parts.unique_first[i] + parts.unique_second[i] + parts.synergy[i]
        assert float(total) == pytest.approx(both, abs=1e-6)


def test_bins_are_equally_full_keep_order_and_share_ties():
    values = torch.randn(1003, 3, generator=torch.Generator().manual_seed(0))
    bins = quantile_bins(values, 4)
    for column in range(3):
        assert torch.bincount(bins[:, column]).tolist() in ([250, 251, 251, 251], [250, 251, 250, 252])
        assert np.all(np.diff(bins[values[:, column].argsort(), column].numpy()) >= 0)
    assert torch.equal(quantile_bins(values.exp(), 4), bins)
    ties = torch.tensor([0.0] * 60 + list(range(1, 41)))[:, None]
    assert len(quantile_bins(ties, 4)[:60].unique()) == 1
    assert len(quantile_bins(torch.ones(10, 1), 4).unique()) == 1
    with pytest.raises(TwoAxisError, match="bins"):
        quantile_bins(values, 1)


@pytest.fixture(scope="module")
def measured():
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[3] = 0.0
    loader = batches(400, 100)
    return calibrate(net, loader, progress=False), pooled_samples(net, loader, progress=False)


def test_the_table_equals_loops(measured):
    stats, samples = measured
    table = broja_table(stats, samples, ["conv2", "reduce"], channels=6)
    assert table.groupby("layer").size().to_dict() == {"conv2": 6, "reduce": 6}
    assert 3 not in table[table.layer == "conv2"].channel.tolist()
    target = pd.qcut(samples.target_values().numpy(), 4, labels=False)
    for row in table.iloc[[0, 3, 8]].itertuples():
        outputs = samples.outputs[row.layer].numpy()
        rho = [np.corrcoef(outputs[:, k], samples.target_values())[0, 1] if k != 3 or row.layer != "conv2" else 0.0
               for k in range(outputs.shape[1])]  # fmt: skip
        relevance = -0.5 * np.log1p(-np.square(rho))
        assert row.task_mi == pytest.approx(relevance[row.channel], abs=1e-5)
        assert row.peer == max((k for k in range(len(rho)) if k != row.channel), key=lambda k: relevance[k])
        joint = np.zeros((4, 4, 4))
        y, x = (pd.qcut(outputs[:, k], 4, labels=False) for k in (row.channel, row.peer))
        np.add.at(joint, (target, y, x), 1 / 400)
        least = reference_collapse.union_information_by_descent(joint.sum(2), joint.sum(1))
        first = reference_collapse.mutual_information(joint.sum(2))
        second = reference_collapse.mutual_information(joint.sum(1))
        both = reference_collapse.mutual_information(joint.reshape(4, -1))
        assert row.information == pytest.approx(first, abs=1e-9)
        assert row.shared == pytest.approx(first + second - least, abs=1e-3)
        assert row.synergy == pytest.approx(both - least, abs=1e-3)
        assert row.irrecoverable == pytest.approx(row.unique / first)
    assert float(table.gap.max()) < 1e-6


def test_shuffled_parts_are_the_bias_of_the_estimator():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 5))
    loader = [(torch.randn(1000, 16, 1, 1, generator=generator), torch.randint(5, (1000,), generator=generator))]
    table = broja_table(calibrate(net, loader, progress=False), pooled_samples(net, loader, progress=False), ["0"])
    shuffled = table.shuffled_shared + table.shuffled_unique
    assert shuffled.mean() == pytest.approx(9 / 2000, rel=0.5)  # (bins - 1)^2 / 2 n
    assert table.information.mean() > 2 * shuffled.mean()


def test_layers_are_summarised(measured):
    stats, samples = measured
    table = broja_table(stats, samples, list(stats.layers))
    layers = broja_layers(table)
    assert layers.layer.tolist() == list(stats.layers)
    part = table[table.layer == "conv2"]
    row = layers[layers.layer == "conv2"].iloc[0]
    assert row.rho_shared_task == pytest.approx(part[["shared", "task_mi"]].corr("spearman").iloc[0, 1])
    assert row.rho_shared_overlap == pytest.approx(part[["shared", "overlap"]].corr("spearman").iloc[0, 1])
    assert row.rho_irrecoverable_capture == pytest.approx(
        part[["irrecoverable", "capture"]].corr("spearman").iloc[0, 1]
    )
    assert row.shared_over_synergy == pytest.approx(part.shared.mean() / part.synergy.mean())
    above = part.mean(numeric_only=True)
    if above.synergy > above.shuffled_synergy:
        expected = (above.shared - above.shuffled_shared) / (above.synergy - above.shuffled_synergy)
        assert row.corrected_ratio == pytest.approx(expected)


def test_draws_repeat_with_their_seed_and_other_layers_do_not_matter(measured):
    stats, samples = measured
    options = {"channels": 5, "seed": 7}
    alone = broja_table(stats, samples, ["conv2"], **options)
    both = broja_table(stats, samples, ["conv1", "conv2"], **options)
    both = both[both.layer == "conv2"].reset_index(drop=True).assign(depth=0.0)
    pd.testing.assert_frame_equal(alone, both, atol=1e-6)
    other = broja_table(stats, samples, ["conv2"], channels=5, seed=8)
    assert other.channel.tolist() != alone.channel.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: PooledSamples(s.outputs, {"margin": s.task["margin"][:255]}, "margin", 255), "at least 256 images"),
        (lambda s: PooledSamples(s.outputs, {"margin": torch.ones(400, 1)}, "margin", 400), "same for all images"),
        (lambda s: PooledSamples(s.outputs, s.task, "one_vs_rest", 400), "5 numbers an image"),
    ],
    ids=["few images", "constant target", "several columns"],
)
def test_what_cannot_be_decomposed_is_said(measured, change, message):
    stats, samples = measured
    with pytest.raises(NotApplicableError, match=message):
        broja_table(stats, change(samples), ["conv2"])


def test_a_layer_without_a_peer_is_left_out():
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loader = [(x, y % 4) for x, y in batches(300, 100)]
    stats, samples = calibrate(net, loader, progress=False), pooled_samples(net, loader, progress=False)
    assert broja_table(stats, samples, ["0", "1"]).layer.unique().tolist() == ["1"]
    with pytest.raises(NotApplicableError, match="two channels that vary"):
        broja_table(stats, samples, ["0"])
    with pytest.raises(TwoAxisError, match=r"\[B, T, Y, X\]"):
        decompose(torch.ones(2, 2))
