"""Attempts of one removal: the nearest to the target stays, and notes speak of what was asked."""

import dataclasses

import pytest
import torch
from cases import conv_net
from pruning_cases import Gram

from tp_twoaxis import prune_to_flops
from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.errors import UnreachableTargetError
from tp_twoaxis.pruning import step

X = torch.zeros(1, 3, 8, 8)


def wide():
    return conv_net(width=64)


def ascending(group):
    return torch.arange(len(group[0].idxs)).float()


def prune(net, **options):
    return prune_to_flops(net, X, ascending, **{"repair": (), "progress": False} | options)


def counted_as(monkeypatch, shares):
    """Let the counter report these shares of the dense MACs, one an attempt; gather what each attempt left."""
    left, count = [], step._count_pruned

    def counted(network, inputs, shapes):
        dense = count_macs(wide(), X).total
        left.append([tuple(p.shape) for p in network.parameters()])
        return dataclasses.replace(count(network, inputs, shapes), total=round(shares[len(left) - 1] * dense))

    monkeypatch.setattr(step, "_count_pruned", counted)
    return left


@pytest.mark.parametrize(
    ("shares", "best"),
    [((0.548, 0.479, 0.595, 0.61), 1), ((0.52, 0.47, 0.6, 0.7), 0), ((0.6, 0.4, 0.58, 0.53), 3), ((0.6, 0.501), 1)],
)
def test_the_attempt_nearest_to_the_target_stays(monkeypatch, shares, best):
    left = counted_as(monkeypatch, shares)
    net = wide()
    report = prune(net, flops=0.5)
    assert len(left) == len(shares)
    assert report.achieved == pytest.approx(shares[best], abs=1e-4)
    assert [tuple(p.shape) for p in net.parameters()] == left[best]
    assert net.conv1.out_channels == 64 - len(report.removed_channels["conv1"])
    assert net(X).shape == (1, 5)
    if abs(shares[best] - 0.5) <= 0.005:
        assert not report.notes
    else:
        kept = f"kept {report.achieved:.4f} of the MACs instead of 0.5: the model runs operations"
        assert report.notes[-1].startswith(kept)


def test_a_correction_beyond_the_floors_is_no_error(monkeypatch):
    """What was asked is allowed; only the corrected target is below what the floors leave."""
    counted_as(monkeypatch, (0.9, 0.9, 0.9, 0.9))
    report = prune(wide(), flops=0.7, min_keep=0.7)
    assert report.achieved == pytest.approx(0.9, abs=1e-3)
    assert "instead of 0.7" in report.notes[-1]
    with pytest.raises(UnreachableTargetError, match=r"flops=0\.2: "):
        prune(wide(), flops=0.2, min_keep=0.7)


def test_notes_name_the_share_that_was_asked_for(monkeypatch):
    """A plan that misses its corrected target says so of the target that was given."""
    counted_as(monkeypatch, (0.7, 0.68, 0.68, 0.68))
    report = prune(wide(), flops=0.6, round_to=4)
    assert sum("instead of" in note for note in report.notes) == 1
    assert "instead of 0.6: no removal near the threshold lies closer, multiples of 4 channels" in report.notes[-1]


def test_attempts_leave_the_network_that_was_counted():
    net = Gram()
    report = prune(net, flops=0.75)
    assert report.after.macs == count_macs(net, X).total
    assert report.achieved == pytest.approx(0.75, abs=0.0075)
