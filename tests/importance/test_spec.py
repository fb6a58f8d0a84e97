"""Names with options: read, never evaluated."""

import pytest
import torch
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.importance.entry import option_names
from tp_twoaxis.importance.registry import IMPORTANCES, find_importance, make_importance
from tp_twoaxis.importance.spec import parse_spec
from tp_twoaxis.scores.registry import hull_refined


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("l2", "l2", {}),
        ("composite-local(a=1, b=-0.3)", "composite-local", {"a": 1, "b": -0.3}),
        ("module:factory(name='x', many=(1, 2.5), none=None)", "module:factory",
         {"name": "x", "many": (1, 2.5), "none": None}),
        ("hull()", "hull", {}),
    ],
)  # fmt: skip
def test_names_and_options(spec, name, options):
    assert parse_spec(spec) == (name, options)


@pytest.mark.parametrize(
    "spec",
    ["hull(", "hull(0.5)", "hull(b)", "hull(b=open('x'))", "hull(**x)", "hull(b=1)(c=2)", "hull(b=1) or 2", "a(b=1)c"],
)
def test_everything_else_is_refused(spec):
    with pytest.raises(TwoAxisError, match="could not read it"):
        parse_spec(spec)


def test_options_reach_the_score_and_the_importance():
    stats = calibrate(conv_net(), batches(), progress=False)
    importance = make_importance("hull(strength=1.0, peers=2, normalizer='max')", stats=stats)
    expected = hull_refined(stats["conv2"], strength=1.0, peers=2)
    assert torch.equal(importance.layer_scores("conv2"), expected.double())
    assert importance.normalizer == "max"
    # a score keeps its normaliser when its weights change
    assert make_importance("composite-local(overlap=1.0)", stats=stats).normalizer == "softmax"
    hybrid = make_importance("hybrid(allocation='l1', ranking='hull')", stats=stats, model=conv_net(), loader=batches())
    assert "hull" in repr(hybrid.ranking)


def test_every_criterion_says_its_options():
    assert {"normalizer", "group_reduction"} <= set(IMPORTANCES["chip"].options) & set(IMPORTANCES["capture"].options)
    assert {"clusters", "gamma", "normalizer"} <= set(IMPORTANCES["cap-qgw"].options)
    assert option_names(lambda stats, seed, *rest, depth=1, **more: None) == ("depth",)
    with pytest.raises(TwoAxisError, match=r"options among .*strength.* got 'width'"):
        find_importance("hull(width=2)")
    with pytest.raises(TwoAxisError, match="did you mean hull"):
        find_importance("hul(strength=2)")
