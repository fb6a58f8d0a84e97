"""Alignment of the axes: tables by hand, verdicts, and a section that is whole."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import reference_alignment as slow
import torch
from alignment_cases import evidence_inputs
from cases import conv_net

from tp_twoaxis.diagnostics.alignment import (
    alignment_claims,
    alignment_figure,
    alignment_section,
    alignment_table,
    groups_table,
)
from tp_twoaxis.diagnostics.axis_coordinates import local_axis, target_axis
from tp_twoaxis.diagnostics.channel_groups import group_channels, standardised


def test_a_cell_by_hand():
    inputs = evidence_inputs()
    table = alignment_table(inputs)
    assert table.layer.unique().tolist() == ["conv1", "conv2", "depthwise", "reduce"]
    assert table.depth.unique().tolist() == [0.0, 1 / 3, 2 / 3, 1.0]
    row = table[(table.layer == "conv2") & (table.groups == 3)].iloc[0]
    here, task = local_axis(inputs.statistics["conv2"]), target_axis(inputs.statistics["conv2"])
    assert row.rho == pytest.approx(slow.spearman(here.capture.numpy(), task.task_mi.numpy()))
    assert row.mi_over_chance == pytest.approx(float(task.task_mi.mean()) * 2 * 160)
    features = [standardised(*axis) for axis in (here, task)]
    labels = [group_channels(points) for points in features]
    assert row.ari == pytest.approx(slow.adjusted_rand(*labels))
    assert row.silhouette_target == pytest.approx(slow.silhouette(features[1], labels[1]))
    assert 1 / 201 <= row.p <= 1.0


def test_unrelated_channels_have_the_information_of_chance():
    # logits that do not depend on what the convolutions write
    network = conv_net()
    torch.nn.init.zeros_(network.fc.weight)
    network.register_forward_hook(lambda module, read, logits: logits + read[0].flatten(1)[:, :5] * 0 + noise(logits))
    generator = torch.Generator().manual_seed(0)

    def noise(logits):
        return torch.randn(logits.shape, generator=generator)

    inputs = evidence_inputs(network, images=640, batch_size=640)
    table = alignment_table(inputs, [3])
    assert table.mi_over_chance.mean() == pytest.approx(1.0, abs=0.5)


def test_the_order_of_channels_and_the_batch_size_do_not_matter():
    network = conv_net()
    table = alignment_table(evidence_inputs(network, batch_size=32))
    other = alignment_table(evidence_inputs(network, batch_size=53))
    pd.testing.assert_frame_equal(table, other, rtol=1e-3)
    with torch.no_grad():
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        for name in ("weight", "bias"):
            parameter = getattr(network.reduce, name)
            parameter.copy_(parameter[order])
        network.fc.weight.copy_(network.fc.weight.reshape(5, 8, 4)[:, order].reshape(5, 32))
    permuted = alignment_table(evidence_inputs(network))
    for column in ("rho", "ari", "silhouette_local", "silhouette_target"):
        assert permuted[column].to_numpy() == pytest.approx(table[column].to_numpy(), abs=1e-3)


def test_few_channels_have_a_correlation_and_no_groups():
    table = alignment_table(evidence_inputs(conv_net(width=8)), [3])
    last = table[table.layer == "reduce"].iloc[0]
    assert last.channels == 4
    assert not math.isnan(last.rho)
    assert math.isnan(last.ari)
    assert groups_table(table).cells.tolist() == [3]


def test_verdicts_follow_the_intervals():
    generator = np.random.default_rng(0)
    rows = [
        {"groups": 3, "network": name, "seed": seed, "rho": generator.normal(0.0, 0.1), "ari": 0.01, "p": 0.4}
        for name in ("a", "b")
        for seed in range(5)
        for _ in range(20)
    ]
    weak = pd.DataFrame(rows)
    assert [claim.verdict for claim in alignment_claims(weak)] == ["HOLDS"] * 4
    coupled = weak.assign(rho=weak.rho + 0.6, ari=0.5 + generator.normal(0.0, 0.01, len(weak)), p=0.005)
    assert [claim.verdict for claim in alignment_claims(coupled)] == ["DOES NOT"] * 4


def test_the_section_is_whole_and_the_network_as_it_was():
    inputs = evidence_inputs()
    before = {name: tensor.clone() for name, tensor in inputs.model.state_dict().items()}
    section = alignment_section(inputs)
    assert section.question.endswith("?")
    assert set(section.tables) == {"alignment", "alignment_summary", "alignment_groups"}
    assert section.tables["alignment_groups"].groups.tolist() == [2, 3, 4, 5]
    assert all(drawing.draw().axes for drawing in section.drawings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.model.state_dict().items())
    assert len(alignment_figure(section.tables["alignment"]).axes) == 2
