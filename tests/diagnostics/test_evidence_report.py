"""All sections in one go: kept, skipped with a reason, gone on with, and told apart by what they depend on."""

from __future__ import annotations

import pytest
import torch
from cases import batches, conv_net
from torch.utils.data import DataLoader, TensorDataset

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics import evidence_report
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.evidence_report import evidence_key, gather_evidence, section_names
from tp_twoaxis.diagnostics.evidence_sections import SECTIONS, SectionRow
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder


@pytest.fixture
def folder(tmp_path):
    return EvidenceFolder(tmp_path / "tables")


@pytest.fixture(scope="module")
def inputs():
    net, data = conv_net(), batches(104)
    return EvidenceInputs(net, calibrate(net, data, progress=False), data, batches(32, seed=1), progress=False)


def test_finished_sections_are_not_computed_again(inputs, folder, monkeypatch):
    first = gather_evidence(inputs, folder, sections=["hulls", "alignment"], key="a")
    assert [record.name for record in first] == ["alignment", "hulls"]
    calls = []

    def compute(inputs):
        calls.append(1)
        return SECTIONS["hulls"].compute(inputs)

    monkeypatch.setattr(evidence_report, "SECTIONS", {"hulls": SectionRow("", compute)})
    again = gather_evidence(inputs, folder, key="a")
    assert (len(calls), str(again)) == (0, str(first[1:]))
    gather_evidence(inputs, folder, key="b")
    gather_evidence(inputs, folder)  # without a key nothing counts as finished
    assert len(calls) == 2
    (folder.path / "hulls.json").write_text("{")
    gather_evidence(inputs, folder, key="a")
    assert len(calls) == 3


def test_what_cannot_be_computed_is_skipped_with_its_reason(inputs, folder, monkeypatch):
    errors = [NotApplicableError("no BatchNorm"), TwoAxisError("no cvxpy")]

    def fail(_):
        raise errors[0]

    rows = {"controls": SectionRow("", fail), "hulls": SECTIONS["hulls"]}
    monkeypatch.setattr(evidence_report, "SECTIONS", rows)
    seen = []
    records = gather_evidence(inputs, folder, key="a", on_section=seen.append)
    assert [record.skipped for record in records] == ["no BatchNorm", None]
    assert records == seen
    # the network stays as it is, but a package may be installed
    errors.pop(0)
    assert gather_evidence(inputs, folder, key="a")[0].skipped == "no BatchNorm"
    assert gather_evidence(inputs, folder, key="b")[0].skipped == "no cvxpy"
    errors[0] = TwoAxisError("still no cvxpy")
    assert gather_evidence(inputs, folder, key="b")[0].skipped == "still no cvxpy"


@pytest.mark.parametrize(
    ("net", "data", "options"),
    [
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)), batches(32), {}),  # no convolutions
        (conv_net(), [(x, torch.zeros_like(y)) for x, y in batches(104)], {}),  # one class
        (conv_net(), batches(12), {}),  # fewer images than channels
        (conv_net(), batches(32), {"target": None}),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5)), batches(32), {}),
    ],
    ids=["no convolutions", "one class", "few images", "no target", "no BatchNorm, one layer"],
)
def test_bad_input_skips_sections_and_writes_the_others_whole(net, data, options, folder):
    inputs = EvidenceInputs(net, calibrate(net, data, progress=False, **options), data, progress=False)
    inputs.snapshots = {epoch: conv_net(width=8).state_dict() for epoch in range(3)}  # of another network
    records = gather_evidence(inputs, folder)
    assert [record.name for record in records] == list(SECTIONS)
    skipped = {record.name for record in records if record.skipped is not None}
    assert {"learning", "interventions", "propagation"} <= skipped
    for record in records:
        assert record.skipped != ""
        assert all(not folder.table(record, table).empty for table in record.tables)
        assert all(folder.png(record, figure) for figure in record.figures)


def test_names_are_checked_and_ordered():
    assert section_names() == list(SECTIONS)
    with pytest.raises(TwoAxisError, match="did you mean 'hulls'"):
        section_names(["hull"])


def test_the_key_is_of_weights_images_snapshots_and_options():
    def key(seed=0, rows=range(8), snapshots=None, **options):
        loader = DataLoader(torch.utils.data.Subset(TensorDataset(torch.zeros(20, 3)), list(rows)), batch_size=3)
        return evidence_key(conv_net(seed), loader, None, snapshots, **options)

    own = key(target="margin")
    assert key(target="margin") == own
    state = {0: conv_net().state_dict()}
    others = [key(1, target="margin"), key(rows=range(1, 9), target="margin"), key(snapshots=state, target="margin")]
    others += [key(target="one_vs_rest"), key(snapshots={1: state[0]}, target="margin")]
    assert len({own, *others}) == 6
    net = conv_net()
    before = evidence_key(net, [])
    net.bn1.running_mean += 1.0
    assert evidence_key(net, []) != before
