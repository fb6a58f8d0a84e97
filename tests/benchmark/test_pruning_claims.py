"""The paper's claims about pruning, from the benchmark's own comparison of families."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from tp_twoaxis import TwoAxisError
from tp_twoaxis.benchmark import pruning_claims as module
from tp_twoaxis.benchmark.families import COMPARISONS


def test_comparisons_become_claims(monkeypatch, tmp_path):
    rows = [
        ["net", "bn", "best local - best target", "hull", "task-mi", 8.0, 2.0, 14.0, 5],
        ["net", "bn", "best local - taylor", "hull", "taylor", 1.0, -2.0, 4.0, 5],
        ["net", "bn", "best local - lamp", "hull", "lamp", 1.0, -2.0, 4.0, 5],
    ]
    axes = pd.DataFrame(rows, columns=COMPARISONS)
    monkeypatch.setattr(module, "make_report", lambda folder: SimpleNamespace(axes=axes))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "config.json").write_text("{}")
    claims = module.pruning_claims([tmp_path / "results"])
    assert [(claim.sentence[:2], claim.verdict) for claim in claims] == [("C5", "HOLDS"), ("C6", "UNDECIDED")]
    assert claims[0].note == "hull less task-mi, points of area, 5 seeds"
    assert "(net, bn)" in claims[0].sentence
    assert module.pruning_claims([]) == []
    axes.to_csv(tmp_path / "axes.csv", index=False)  # of a report's folder
    assert module.pruning_claims([tmp_path]) == claims
    # an older report beside a config is not believed
    axes.head(0).to_csv(tmp_path / "results" / "axes.csv", index=False)
    assert module.pruning_claims([tmp_path / "results"]) == claims
    with pytest.raises(TwoAxisError, match=r"axes\.csv of a report; got neither"):
        module.pruning_claims([tmp_path / "elsewhere"])
