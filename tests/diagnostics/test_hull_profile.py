"""Hulls by depth against least squares, channel by channel, for every threshold."""

from __future__ import annotations

import pytest
import reference_scores as twin
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.hull_profile import COLUMNS, hull_section, hull_table


@pytest.fixture(scope="module")
def stats():
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0
        net.conv2.weight[7] = 2.0 * net.conv2.weight[6]  # duplicates
    return calibrate(net, batches(), progress=False)


def test_shares_are_those_of_hulls_found_by_least_squares(stats) -> None:
    table = hull_table(stats, ["conv1", "conv2"])
    assert list(table) == list(COLUMNS)
    assert len(table) == 16
    for name in ("conv1", "conv2"):
        layer = stats[name]
        rho, active = layer.correlation.numpy(), (layer.variance > 0).numpy()
        varying = [k for k in range(16) if active[k]]
        selected = {k: twin.greedy_hull(rho, k, active) for k in varying}
        for row in table[table.layer == name].itertuples():
            sizes = []
            for k, (chosen, _, pool, _) in selected.items():
                everyone = [j for j in varying if j != k]
                whole = pool if row.compared_with == "pool" else twin.explanation(rho, k, everyone, 1e-6)
                required = (1 - row.epsilon) * whole if row.tolerance == "factor" else whole - row.epsilon
                prefixes = [twin.explanation(rho, k, chosen[:n], 1e-6) for n in range(len(chosen) + 1)]
                sizes.append(next((n for n, e in enumerate(prefixes) if e >= required), len(chosen)))
            count = len(varying)
            assert row.channels == count
            assert row.mean_size == pytest.approx(sum(sizes) / count)
            assert row.empty == pytest.approx(sizes.count(0) / count)
            assert row.singleton == pytest.approx(sizes.count(1) / count)
            assert row.saturated == pytest.approx(sizes.count(10) / count)
    assert table[table.layer == "conv2"].singleton.min() >= 2 / 16


def test_the_section_judges_by_all_peers_and_draws(stats) -> None:
    inputs = EvidenceInputs(conv_net(), stats, batches())
    section = hull_section(inputs)
    table = section.tables["hulls"]
    assert section.name == "hulls"
    assert table.layer.unique().tolist() == inputs.cells()
    chosen = (table.compared_with == "peers") & (table.tolerance == "factor") & (table.epsilon == 0.1)
    judged = table[chosen]
    first, last = section.claims[0], section.claims[1]
    assert first.estimate.value == pytest.approx(judged.singleton.iloc[0])
    assert last.estimate.value == pytest.approx(judged.saturated.iloc[-1])
    assert [len(drawing.draw().axes) for drawing in section.drawings] == [3]


def test_fewer_rows_than_channels_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.Linear(8, 3))
    images = [(torch.randn(6, 3, 8, 8), torch.randint(3, (6,)))]
    stats = calibrate(net, images, progress=False)
    with pytest.raises(NotApplicableError, match="layer 0 has 6 for 8"):
        hull_section(EvidenceInputs(net, stats, images))
