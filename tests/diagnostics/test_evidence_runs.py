"""Several networks together: tables below each other, claims over all, and each one's own verdict."""

from __future__ import annotations

import pandas as pd
import pytest

from tp_twoaxis import TwoAxisError
from tp_twoaxis.diagnostics.alignment import alignment_claims
from tp_twoaxis.diagnostics.evidence import Claim, Estimate, Section
from tp_twoaxis.diagnostics.evidence_runs import combine_evidence, combined_html
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord
from tp_twoaxis.diagnostics.hull_profile import JUDGED, hull_claims


def written(path, seed, shift, data="cifar10", network="resnet20"):
    folder = EvidenceFolder(path)
    folder.describe({"network": network, "seed": seed, "data": data, "key": "k"})
    cells = pd.DataFrame({"groups": 3, "rho": [0.1, 0.0, -0.1], "ari": [0.0, 0.01, 0.03], "p": [0.5, 0.2, 0.9]})
    cells = cells.assign(rho=cells.rho + shift, null_mean=0.0, silhouette_local=0.3, silhouette_target=0.4)
    folder.finish(folder.draw(Section("alignment", "?", {"alignment": cells}, alignment_claims(cells))), key="k")
    hulls = pd.DataFrame({"layer": ["a", "b", "c"], "depth": [0.0, 0.5, 1.0], "channels": 8, **JUDGED})
    hulls = hulls.assign(singleton=0.25 + shift, saturated=0.5, mean_size=[1.0, 2.0, 3.0 + shift])
    folder.finish(folder.draw(Section("hulls", "?", {"hulls": hulls}, hull_claims(hulls))), key="k")
    folder.finish(SectionRecord("structure", skipped="of another network"), key="old")
    return path


def test_claims_over_runs_are_those_of_all_tables(tmp_path):
    combined = combine_evidence([written(tmp_path / seed, seed, 0.2 * int(seed)) for seed in "012"])
    cells = combined.tables["alignment"]["alignment"]
    assert list(cells.columns[:2]) == ["network", "seed"]
    assert cells.seed.tolist() == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    over = {record.name: record.claims for record in combined.over}
    assert list(over) == ["alignment", "hulls"]
    # models are drawn, not layers: one of them alone in one of 27 resamples
    estimate = over["alignment"][0].estimate
    assert (estimate.value, estimate.lower, estimate.upper) == pytest.approx((0.2, 0.0, 0.4))
    assert over["hulls"][0].estimate.value == pytest.approx(0.45)
    assert over["hulls"][2].estimate.value == pytest.approx(1.0)
    assert [run.label for run in combined.runs] == [f"resnet20 ({seed})" for seed in "012"]
    assert [[record.name for record in run.records] for run in combined.runs] == [["alignment", "hulls"]] * 3
    summary = combined.tables["alignment"]["alignment_summary"]
    assert summary[summary.quantity == "rho"].over.tolist() == ["cells", "models"]  # not each run's below the others
    assert combined.by_network == {}


def test_networks_of_several_trainings_have_a_column(tmp_path):
    folders = [
        written(tmp_path / f"{network}{seed}", seed, 0.0, network=network)
        for network, seeds in (("resnet20", "012"), ("vgg16", "0123"), ("vit", "0"))
        for seed in seeds
    ]
    combined = combine_evidence(folders)
    # eight runs: those that a network's column stands for are left out
    assert list(combined.columns()) == ["vit", "resnet20", "vgg16", "over runs"]
    assert combined.tables["alignment"]["alignment_summary"].over.unique().tolist() == [
        "cells", "models", "without resnet20", "without vgg16", "without vit"
    ]  # fmt: skip
    few = combine_evidence([folders[0], folders[1], folders[-1]])
    assert list(few.columns()) == ["resnet20 (0)", "resnet20 (1)", "vit", "resnet20", "over runs"]
    html = combined_html(combined)
    assert 'data-label="vgg16"' in html
    assert 'data-label="vgg16 (0)"' not in html
    assert "<b>vgg16 (0)</b>" in html  # each run is still named with what it is of
    combined.write(tmp_path / "all_tables")
    read = pd.read_parquet(tmp_path / "all_tables" / "hulls-hulls.parquet")
    assert len(read) == 24
    assert pd.read_csv(tmp_path / "all_tables" / "hulls-hulls.csv").shape == read.shape
    (tmp_path / "file").write_text("")
    with pytest.raises(TwoAxisError, match="could not be made a folder"):
        combined.write(tmp_path / "file")


def test_the_dashboard_shows_every_runs_verdict(tmp_path):
    folders = [written(tmp_path / "a", "1", -0.25), written(tmp_path / "b", "2", 0.75, data="cifar100")]
    pruning = SectionRecord("pruning", claims=(Claim("C5", "+8.0", Estimate(9.0, 1.0, 17.0), above=0.0),))
    combined = combine_evidence(folders, [pruning])
    assert [run.label for run in combined.runs] == ["resnet20 on cifar10", "resnet20 on cifar100"]
    html = combined_html(combined)
    hulls = html[html.index('<section id="hulls">') : html.index('<section id="pruning">')]
    row = next(line for line in hulls.split("<tr>") if "one peer that replaces them" in line)
    assert [row.count(f">{verdict}</span>") for verdict in ("HOLDS", "UNDECIDED")] == [1, 2]
    assert 'data-label="resnet20 on cifar100"' in hulls
    assert ">HOLDS</span>" in html[html.index('<section id="pruning">') :]
    text = combined.markdown()
    assert "| pruning | C5 | +8.0 |  |  | 9.000 [1.000, 17.000] HOLDS |" in text
    assert "28-48 % | 0.000 [0.000, 0.324] UNDECIDED | 1.000 [0.676, 1.000] HOLDS | 0.500 [0.280, 0.720]" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_runs_must_differ(tmp_path):
    with pytest.raises(TwoAxisError, match="at least one folder"):
        combine_evidence([])
    with pytest.raises(TwoAxisError, match="--training-seed"):
        combine_evidence([written(tmp_path / "a", "1", 0.0), written(tmp_path / "b", "1", 0.1)])
    with pytest.raises(TwoAxisError, match=r"found no run.json"):
        combine_evidence([tmp_path])
