"""Families and the leave-one-seed-out selector, by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from tp_twoaxis.benchmark.families import axis_of, axis_table, selector_summary, selector_table, sign_table
from tp_twoaxis.benchmark.family_figure import family_figure
from tp_twoaxis.benchmark.methods import Method
from tp_twoaxis.benchmark.tables import AucResult

AREAS = {
    "capture": {1: 0.80, 2: 0.60},
    "hull": {1: 0.70, 2: 0.80},
    "task-mi": {1: 0.50, 2: 0.55},
    "target-excess": {1: 0.60, 2: 0.40},
    "l1": {1: 0.65, 2: 0.62},
    "l2": {1: 0.60, 2: 0.64},
    "taylor": {1: 0.75, 2: 0.50},
}


def made(areas=AREAS):
    methods = {c: Method(c) for c in areas}
    trials = pd.DataFrame(
        [{"network": "net", "method": m.name, "criterion": c, "treatment": m.treatment} for c, m in methods.items()]
    )
    named = {methods[c].name: own for c, own in areas.items()}
    return AucResult(pd.DataFrame(), {"net": named}, {"net": (0.3, 0.7)}, []), trials


def test_axes_of_criteria():
    criteria = {
        "hull": "local",
        "cap-qgw": "local",
        "target-excess": "target",
        "hybrid": "both",
        "spectral-rs": "local",
        "spectral-rs(affinity='RS')": "both",
        "norm-local": "mixed",
        "norm-local(normalizer='max')": "mixed",
        "anticipating(levels=4)": "mixed",
        "l2": "baseline",
        "module:factory": "baseline",
    }
    assert {criterion: axis_of(criterion) for criterion in criteria} == criteria


def test_families_by_hand():
    table = axis_table(*made()).set_index("comparison")
    row = table.loc["best local - best target"]
    # hull's mean 0.75 beats capture's 0.70; task-mi's 0.525 beats target-excess's 0.50
    assert (row["first"], row["second"], row.seeds) == ("hull", "task-mi", 2)
    assert row.points == pytest.approx(100 * ((0.70 - 0.50) + (0.80 - 0.55)) / 2)
    assert row.low <= row.points <= row.high
    assert table.loc["best local - magnitude"].second == "l1"
    assert table.loc["best local - taylor"].points == pytest.approx(100 * (-0.05 + 0.30) / 2)
    assert "best local - l2" not in table.index
    assert set(table.treatment) == {"bn"}


def test_families_that_are_missing_are_left_out():
    assert axis_table(*made({"capture": {1: 0.5}})).empty
    assert axis_table(*made({"l2": {1: 0.5}, "task-mi": {1: 0.4}})).empty


def test_weights_and_logits_are_not_in_the_local_family():
    """The best of all is mixed; best local stays the best of those that look at a layer's outputs alone."""
    table = axis_table(*made({**AREAS, "norm-local": {1: 0.9, 2: 0.9}, "anticipating": {1: 0.95, 2: 0.95}}))
    rows = table.set_index("comparison")
    assert rows.loc["best local - best target", "first"] == "hull"
    assert (rows.loc["best mixed - best local", "first"], rows.loc["best mixed - best local", "second"]) == (
        "anticipating",
        "hull",
    )
    assert rows.loc["best mixed - best local"].points == pytest.approx(100 * (0.25 + 0.15) / 2)


def test_norm_and_local_against_magnitude_is_of_scores_alone():
    """Anticipation looks at logits, and the paper's mixed family does not; hybrids are those of that name."""
    more = {"norm-local": {1: 0.7, 2: 0.7}, "anticipating": {1: 0.95, 2: 0.95}, "hybrid": {1: 0.6, 2: 0.6}}
    more["spectral-rs(affinity='S')"] = {1: 0.99, 2: 0.99}
    rows = axis_table(*made({**AREAS, **more})).set_index("comparison")
    row = rows.loc["best norm and local - magnitude"]
    assert (row["first"], row["second"]) == ("norm-local", "l1")
    assert row.points == pytest.approx(100 * (0.05 + 0.08) / 2)
    assert rows.loc["best hybrid - best local", "first"] == "hybrid"
    assert rows.loc["best local - best target", "first"] == "hull"


def test_signs_are_counted_over_networks():
    axes = axis_table(*made())
    other = axes.assign(network="other", points=-axes.points)
    third = axes.assign(network="third", points=0.0)
    signs = sign_table(pd.concat([axes, other, third])).set_index("comparison")
    assert signs.index.tolist() == ["best local - best target", "best local - taylor"]
    assert signs[["positive", "networks"]].values.tolist() == [[1, 3], [1, 3]]
    assert signs.points.tolist() == pytest.approx([0.0, 0.0])
    gap = axes.set_index("comparison").points["best local - taylor"]
    half = 4.302653 * gap / 3**0.5  # Student's quantile of two degrees; the deviation of (-gap, 0, gap) is gap
    assert signs.high["best local - taylor"] == pytest.approx(half, rel=1e-5)
    one = sign_table(axes).set_index("comparison")
    assert one.networks.tolist() == [1, 1]
    assert one.low.isna().all()
    assert sign_table(axis_table(*made({"capture": {1: 0.5}}))).empty


def test_the_selector_is_summed_up_over_held_out_seeds():
    summary = selector_summary(selector_table(*made())).set_index("comparison")
    assert summary.loc["chosen - best target", ["positive", "held_out"]].tolist() == [2, 2]
    assert summary.points["chosen - best target"] == pytest.approx(7.5)
    assert summary.loc["chosen - taylor", ["positive", "held_out"]].tolist() == [1, 2]
    assert summary.points["chosen - best local of the seed"] == pytest.approx(-15.0)
    assert summary.positive["chosen - best local of the seed"] == 0
    assert "chosen - chip" not in summary.index
    assert selector_summary(selector_table(*made({"capture": {1: 0.5}}))).empty


def test_the_figure_has_families_together_the_best_first():
    areas = {**AREAS, "norm-local": {1: 0.9, 2: 0.9}}
    trials = made(areas)[1]
    methods = trials.set_index("criterion").method
    rows = [["net", methods[c], sum(own.values()) / 2, 0.1, 0.9] for c, own in areas.items()]
    table = pd.DataFrame(rows, columns=["network", "method", "auc", "low", "high"])
    figure = family_figure(table, trials, "net")
    order = ["hull", "capture", "norm-local", "l1", "l2", "task-mi", "target-excess", "taylor"]
    # what all have in common stands in the title, once
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == order
    assert figure.axes[0].get_title(loc="left") == f"net, {trials.treatment.iloc[0]}"
    mixed = trials.assign(treatment=[f"t{i % 2}" for i in range(len(trials))])
    labels = family_figure(table, mixed, "net").axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [methods[c] for c in order]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["local", "norm or logits, and local", "magnitude", "target", "other baselines"]


def test_families_and_selector_compare_on_the_same_seeds():
    """Criteria that lack a hard seed, or an easy one, neither lead a family nor are chosen."""
    areas = {c: {**own, 3: 0.1} for c, own in AREAS.items()}
    areas["capture"] = {1: 0.80, 2: 0.60}  # the best mean, by lacking seed 3
    areas["target-excess"] = {1: 0.60}
    areas["l1"] = {2: 0.62, 3: 0.9}
    table = axis_table(*made(areas)).set_index("comparison")
    assert set(table.seeds) == {3}
    assert table.loc["best local - best target", ["first", "second"]].tolist() == ["hull", "task-mi"]
    assert table.loc["best local - magnitude"].second == "l2"
    chosen = selector_table(*made(areas))
    assert set(chosen.chosen) == {"hull"}
    assert chosen.held_out.tolist() == [1, 2, 3]
    assert (chosen.behind_oracle == 0).all()
    only = axis_table(*made({"capture": {1: 0.5}, "task-mi": {1: 0.4, 2: 0.4}}))
    assert only.empty


def test_the_selector_never_sees_the_held_out_seed():
    table = selector_table(*made()).set_index("held_out")
    # seed 2 decides for seed 1 and the other way round: both times the wrong one here
    assert table.chosen.to_dict() == {1: "hull", 2: "capture"}
    assert table.behind_oracle.to_dict() == pytest.approx({1: -10.0, 2: -20.0})
    assert table.over_target.to_dict() == pytest.approx({1: 10.0, 2: 5.0})
    assert table.over_taylor.to_dict() == pytest.approx({1: -5.0, 2: 10.0})
    assert table.over_chip.isna().all()


def test_one_seed_has_nothing_to_hold_out():
    assert selector_table(*made({"capture": {1: 0.5}, "hull": {1: 0.6}})).empty
