"""The section on structure: its tables, its claims, its figures, and networks that it is not for."""

from __future__ import annotations

import pytest
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.communities import community_table
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.group_overlap import overlap_table
from tp_twoaxis.diagnostics.structure_section import structure_claims, structure_section


@pytest.fixture(scope="module")
def inputs():
    net = conv_net()
    return EvidenceInputs(net, calibrate(net, batches(), progress=False), batches())


def test_tables_and_claims_are_of_the_convolutions(inputs) -> None:
    section = structure_section(inputs)
    cells = inputs.cells()
    communities, groups = section.tables["communities"], section.tables["group_overlap"]
    assert communities.equals(community_table(inputs.statistics, cells))
    assert groups.equals(overlap_table(inputs.statistics, cells))
    gap, chance, share, trend, early, falling, null = (claim.estimate.value for claim in section.claims)
    assert gap == pytest.approx(communities.gap.mean())
    assert chance == pytest.approx((communities.overlap_modularity - communities.overlap_chance).mean())
    assert share == pytest.approx((communities.gap > 0).mean())
    assert section.claims[2].verdict == ("HOLDS" if share == 1 else "DOES NOT")
    ahead = {**section.tables, "communities": communities.assign(gap=0.1)}
    assert structure_claims(ahead)[2].verdict == "HOLDS"
    assert trend == pytest.approx(communities.gap.corr(communities.depth, method="spearman"))
    assert early == pytest.approx(groups[groups.depth <= 1 / 3].overlap_ratio.mean())
    assert falling == pytest.approx(groups.overlap_ratio.corr(groups.depth, method="spearman"))
    assert null == pytest.approx((groups.excess_p > 0.05).mean())


def test_figures_have_legends_that_cover_nothing_and_a_matrix_a_layer(inputs) -> None:
    modularity, contrast, matrices = (drawing.draw() for drawing in structure_section(inputs).drawings)
    for figure in (modularity, contrast):
        assert figure.legends
        assert figure.axes[0].get_legend() is None
    assert len(matrices.axes) == 2 * 3  # a matrix and its colours


def test_constant_channels_are_in_no_matrix() -> None:
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0
    inputs = EvidenceInputs(net, calibrate(net, batches(), progress=False), batches())
    matrices = structure_section(inputs).drawings[2].draw()
    assert matrices.axes[0].get_images()[0].get_array().shape == (15, 15)


def test_networks_without_a_target_or_with_few_channels_are_refused(inputs) -> None:
    local = calibrate(conv_net(), batches(), target=None, progress=False)
    with pytest.raises(NotApplicableError, match="local axis alone"):
        structure_section(EvidenceInputs(conv_net(), local, batches()))
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5))
    with pytest.raises(NotApplicableError, match="six channels that vary"):
        structure_section(EvidenceInputs(net, calibrate(net, batches(), progress=False), batches()))
