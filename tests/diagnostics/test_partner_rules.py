"""Partners of target excess by hand."""

from __future__ import annotations

import pytest
import reference_alignment as slow
import reference_scores
from alignment_cases import evidence_inputs
from cases import conv_net

from tp_twoaxis.diagnostics.axis_coordinates import local_axis
from tp_twoaxis.diagnostics.partner_rules import DEFAULT, PARTNERS, partner_table


@pytest.mark.parametrize(("label", "rule"), [("top task information, 5", "task-mi"), ("top excess, 10", "excess")])
def test_partners_by_hand(label, rule):
    inputs = evidence_inputs()
    layer = inputs.statistics["conv2"]
    table = partner_table(inputs)
    cell = table[table.layer == "conv2"].set_index("partners")
    assert cell.index.tolist() == list(PARTNERS)
    r, rho = layer.target_correlation().numpy(), layer.pooled_correlation.numpy()
    excess = reference_scores.target_excess(r, rho, partners=PARTNERS[label].number, rule=rule)
    default = reference_scores.target_excess(r, rho)
    assert cell.loc[label, "rho"] == pytest.approx(slow.spearman(local_axis(layer).capture.numpy(), excess))
    assert cell.loc[label, "rho_default"] == pytest.approx(slow.spearman(excess, default))
    assert cell.loc[DEFAULT, "rho_default"] == pytest.approx(1.0)


def test_where_all_peers_are_partners_the_rules_are_one():
    table = partner_table(evidence_inputs(conv_net(width=12)))
    ten = table[(table.layer == "reduce") & table.partners.str.endswith("10")]
    assert len(ten) == 4
    assert ten.rho_default.to_numpy() == pytest.approx(1.0)
