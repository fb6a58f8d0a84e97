"""Several networks together: tables below each other, claims over all, and each one's own verdict."""

from __future__ import annotations

import pandas as pd
import pytest

from tp_twoaxis import TwoAxisError
from tp_twoaxis.diagnostics.alignment import alignment_claims
from tp_twoaxis.diagnostics.evidence import Claim, Estimate, Section
from tp_twoaxis.diagnostics.evidence_runs import combine_evidence, combined_html
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord


def written(path, seed, shift, data="cifar10"):
    folder = EvidenceFolder(path)
    folder.describe({"network": "resnet20", "seed": seed, "data": data, "key": "k"})
    cells = pd.DataFrame({"groups": 3, "rho": [0.1, 0.0, -0.1], "ari": [0.0, 0.01, 0.03], "p": [0.5, 0.2, 0.9]})
    cells["rho"] += shift
    folder.finish(folder.draw(Section("alignment", "?", {"alignment": cells}, alignment_claims(cells))), key="k")
    claim = Claim("hulls grow", "grows", Estimate(shift, shift - 0.1, shift + 0.1), above=0.0)
    table = pd.DataFrame({"layer": ["conv1"], "size": [1.0]})
    folder.finish(folder.draw(Section("hulls", "?", {"hulls": table}, [claim])), key="k")
    folder.finish(SectionRecord("structure", skipped="of another network"), key="old")
    return path


def test_claims_over_runs_are_those_of_all_tables(tmp_path):
    folders = [written(tmp_path / "a", "1", 0.0), written(tmp_path / "b", "2", 0.4)]
    combined = combine_evidence(folders)
    cells = combined.tables["alignment"]["alignment"]
    assert list(cells.columns[:2]) == ["network", "seed"]
    assert cells.seed.tolist() == ["1"] * 3 + ["2"] * 3
    over = {record.name: record.claims for record in combined.over}
    assert list(over) == ["alignment"]  # hulls are judged network by network
    assert over["alignment"][0].estimate.value == pytest.approx(0.2)
    assert over["alignment"][0].estimate.lower == pytest.approx(0.0)  # models are drawn, not layers
    assert [run.label for run in combined.runs] == ["resnet20 (1)", "resnet20 (2)"]
    assert [[record.name for record in run.records] for run in combined.runs] == [["alignment", "hulls"]] * 2


def test_the_dashboard_shows_every_runs_verdict(tmp_path):
    folders = [written(tmp_path / "a", "1", 0.0), written(tmp_path / "b", "2", 0.4, data="cifar100")]
    pruning = SectionRecord("pruning", claims=(Claim("C5", "+8.0", Estimate(9.0, 1.0, 17.0), above=0.0),))
    combined = combine_evidence(folders, [pruning])
    assert [run.label for run in combined.runs] == ["resnet20 on cifar10", "resnet20 on cifar100"]
    html = combined_html(combined)
    hulls = html[html.index('<section id="hulls">') : html.index('<section id="pruning">')]
    assert [hulls.count(f">{verdict}</span>") for verdict in ("HOLDS", "UNDECIDED")] == [1, 1]
    assert 'data-label="resnet20 on cifar100"' in hulls
    assert ">HOLDS</span>" in html[html.index('<section id="pruning">') :]
    text = combined.markdown()
    assert "| pruning | C5 | +8.0 |  |  | 9.000 [1.000, 17.000] HOLDS |" in text
    assert "| hulls | hulls grow | grows | 0.000 [-0.100, 0.100] UNDECIDED | 0.400 [0.300, 0.500] HOLDS |  |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_runs_must_differ(tmp_path):
    with pytest.raises(TwoAxisError, match="at least one folder"):
        combine_evidence([])
    with pytest.raises(TwoAxisError, match="--training-seed"):
        combine_evidence([written(tmp_path / "a", "1", 0.0), written(tmp_path / "b", "1", 0.1)])
    with pytest.raises(TwoAxisError, match=r"found no run.json"):
        combine_evidence([tmp_path])
