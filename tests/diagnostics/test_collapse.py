"""The section on target redundancy: arithmetic, claims, figures, and networks that it does not apply to."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.collapse import (
    collapse_claims,
    collapse_section,
    mean_contrast,
    redundancy_layers,
    redundancy_table,
)
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError


def inputs_of(net, loader, **options) -> EvidenceInputs:
    return EvidenceInputs(net, calibrate(net, loader, progress=False, **options), loader, progress=False)


@pytest.fixture(scope="module")
def section():
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[3] = 0.0
    return collapse_section(inputs_of(net, batches(300, 100)), channels=8)


def test_redundancy_orders_as_task_information_but_for_the_best_two(section):
    layers = section.tables["redundancy_layers"]
    assert layers.channels.tolist() == [16, 15, 16, 8]
    expected = [math.sqrt(1 - 6 / (n**3 - n)) for n in layers.channels]
    # a tie in exact arithmetic, which rounding may break in either direction
    np.testing.assert_allclose(layers.rho_redundancy_task, expected, atol=6 / (8**3 - 8))
    for name, part in section.tables["redundancy_channels"].groupby("layer"):
        for row in part.itertuples():
            smaller = [min(row.task_mi, other.task_mi) for other in part.itertuples() if other.channel != row.channel]
            assert row.target_redundancy == pytest.approx(np.mean(smaller))
        found = layers.set_index("layer").rho_overlap_redundancy[name]
        assert found == pytest.approx(part[["overlap", "target_redundancy"]].corr("spearman").iloc[0, 1], abs=0.02)


def test_two_channels_have_no_correlation():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stats = calibrate(net, [(x, y % 2) for x, y in batches()], progress=False)
    layers = redundancy_layers(redundancy_table(stats, ["0"]))
    assert layers[["rho_redundancy_task", "rho_overlap_redundancy"]].isna().all(axis=None)


def test_layers_of_two_channels_leave_gaps_and_no_errors():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = collapse_section(inputs_of(net, [(x, y % 2) for x, y in batches(300, 100)]))
    assert all(claim.verdict == "UNDECIDED" for claim in found.claims)
    for drawing in found.drawings:
        drawing.draw().canvas.draw()


def test_the_section_is_whole(section):
    for table in section.tables.values():
        assert {"layer", "depth"} <= set(table.columns)
        assert len(table)
    assert section.tables["broja_layers"].channels.tolist() == [8, 8, 8, 8]
    assert section.tables["ksg"].channels.tolist() == [8, 8, 8, 8]
    assert [claim.paper for claim in section.claims if claim.paper.startswith("0.")] == [
        "0.883 ResNet-18, 0.884 VGG-16, 0.812 MobileNetV2",
        "0.015 VGG-16, 0.103 MobileNetV2",
    ]
    assert section.claims[0].verdict == "HOLDS"
    for drawing in section.drawings:
        figure = drawing.draw()
        figure.canvas.draw()
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    assert section.follows
    assert section.fails


def test_claims_are_of_several_networks_too(section):
    double = {name: pd.concat([table, table], ignore_index=True) for name, table in section.tables.items()}
    for one, two in zip(section.claims, collapse_claims(double), strict=True):
        assert two.estimate.value == pytest.approx(one.estimate.value, nan_ok=True)


def test_a_u_and_a_climb_are_recognised(section):
    depth = np.linspace(0, 1, 12)
    tables = dict(section.tables)
    blank = {column: np.full(12, 0.9) for column in tables["broja_layers"].columns if column.startswith("rho")}
    u_shape = 0.2 + 4 * (depth - 0.5) ** 2 + 0.01 * np.sin(9 * depth)
    tables["broja_layers"] = pd.DataFrame({"depth": depth, "shared_over_synergy": u_shape, **blank})
    tables["triplets"] = pd.DataFrame({"depth": depth, "ratio": 0.3 + depth + 0.05 * np.sin(9 * depth)})
    verdicts = {claim.sentence.split()[0]: claim.verdict for claim in collapse_claims(tables)}
    assert [verdicts[word] for word in ("Middle", "Deep", "Triplets")] == ["HOLDS"] * 3
    tables["broja_layers"] = tables["broja_layers"].assign(shared_over_synergy=1 / u_shape)
    tables["triplets"] = tables["triplets"].assign(ratio=1.4 - tables["triplets"].ratio)
    verdicts = {claim.sentence.split()[0]: claim.verdict for claim in collapse_claims(tables)}
    assert [verdicts[word] for word in ("Middle", "Deep", "Triplets")] == ["DOES NOT"] * 3


def test_a_contrast_is_of_resampled_means():
    generator = np.random.default_rng(0)
    one, other = generator.normal(1, 1, 9), generator.normal(0, 1, 7)
    found = mean_contrast(one, other)
    draws = generator.choice(one, (20_000, 9)).mean(1) - generator.choice(other, (20_000, 7)).mean(1)
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert found.lower == pytest.approx(np.quantile(draws, 0.025), abs=0.05)
    assert found.upper == pytest.approx(np.quantile(draws, 0.975), abs=0.05)
    assert math.isnan(mean_contrast([], other).value)
    assert math.isnan(mean_contrast([1.0], other).lower)


@pytest.mark.parametrize(
    ("make", "loader", "options", "message"),
    [
        (conv_net, batches(128, 64), {}, "256 images"),
        (conv_net, [(x, y * 0) for x, y in batches(300, 100)], {}, "one class"),
        (conv_net, batches(300, 100), {"target": None}, "no task variable"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), batches(300, 100), {}, "no convolution"),
    ],
    ids=["few images", "one class", "no target", "no convolution"],
)
def test_what_it_does_not_apply_to_is_said(make, loader, options, message):
    inputs = inputs_of(make(), loader, **options)
    with pytest.raises(NotApplicableError, match=message):
        collapse_section(inputs)


def test_statistics_of_another_state_of_the_model_are_refused():
    net, loader = conv_net(), batches(300, 100)
    inputs = inputs_of(net, loader)
    with torch.no_grad():
        net.conv2.weight += 1.0
    with pytest.raises(TwoAxisError, match="conv2"):
        collapse_section(inputs)
