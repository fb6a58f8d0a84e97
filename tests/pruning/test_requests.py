"""What is wrong with a request is said at once, by the same words in every function, before an image is read."""

import functools
import pickle

import pytest
import torch
from cases import batches, conv_net

from tp_twoaxis import (
    AnticipatingImportance,
    HullImportance,
    HybridImportance,
    LocalImportance,
    TargetImportance,
    TwoAxisError,
    TwoAxisImportance,
    calibrate,
    prune_to_flops,
    select_score,
)
from tp_twoaxis.importance import CRITERIA, find_criterion, layer_score, make_importance
from tp_twoaxis.scores.named_scores import DEFAULT_SCORE

X = torch.zeros(1, 3, 8, 8)
LOADER = batches(32, 16)


class Unread:
    """A loader that nobody may read."""

    def __iter__(self):
        pytest.fail("an image was read before the request was checked")

    def __len__(self):
        return 1


def prune(importance="hull", **options):
    return prune_to_flops(conv_net(), X, importance, **{"flops": 0.6, "loader": Unread(), "progress": False} | options)


def select(candidates=("hull",), **options):
    return select_score(conv_net(), X, Unread(), candidates, **{"progress": False} | options)


def message(call):
    with pytest.raises(TwoAxisError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("tailor", "did you mean 'taylor'"),
        ("captur", "did you mean 'capture'"),
        ("hull(strenght=1.0)", "did you mean 'strength'"),
        ("hull(1.0)", "expected a name, or options like"),
        ("tp_twoaxis.importance:HulImportance", "did you mean HullImportance"),
        ("no_such_module:factory", "importing 'no_such_module'"),
    ],
)
def test_the_same_message_of_an_unknown_criterion(expression, part):
    net = conv_net()
    messages = {
        message(call)
        for call in (
            lambda: prune(expression),
            lambda: select([expression]),
            lambda: find_criterion(expression),
            lambda: make_importance(expression, model=net, loader=Unread()),
            lambda: layer_score(expression),
        )
    }
    assert len(messages) == 1
    assert part in messages.pop()


@pytest.mark.parametrize("given", ["rigde", "joinnt", ("bn", "sequentail")])
def test_the_same_message_of_an_unknown_repair(given):
    messages = {message(call) for call in (lambda: prune(repair=given), lambda: select(repair=given))}
    assert len(messages) == 1
    assert "did you mean" in messages.pop()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"flops": 0.0}, "flops"),
        ({"flops": 1.5}, "flops"),
        ({"flops": "half"}, "flops"),
        ({"min_keep": -0.1}, "min_keep"),
        ({"min_keep": 2}, "min_keep"),
        ({"round_to": 0}, "round_to"),
        ({"round_to": 2.5}, "round_to"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"attention": "dims"}, "attention: expected one of heads, head-dims"),
        ({"ignored_layers": ["conv9"]}, "conv9"),
        ({"ignored_layers": "conv1"}, "pass a list"),
        ({"ignored_layers": 3}, "ignored_layers"),
        ({"repair": 3}, "repair: expected names"),
    ],
)
def test_numbers_and_names_are_checked_first(options, part):
    assert part in message(lambda: prune(**options))
    assert part in message(lambda: select(**options))


@pytest.mark.parametrize("steps", [0, -1, 2.5, "two"])
def test_steps_are_checked_first(steps):
    assert "steps" in message(lambda: prune(steps=steps))


def test_a_name_means_the_same_in_every_function():
    net = conv_net()
    stats = calibrate(net, LOADER, progress=False)
    kept = {}
    for name in ("local", DEFAULT_SCORE, "tp_twoaxis.importance:LocalImportance"):
        pruned = conv_net()
        report = prune_to_flops(pruned, X, name, flops=0.6, stats=stats, loader=LOADER, repair=(), progress=False)
        kept[name] = report.removed_channels
    assert kept["local"] == kept[DEFAULT_SCORE] == kept["tp_twoaxis.importance:LocalImportance"]
    result = select_score(net, X, LOADER, list(kept), flops=0.6, repair="ridge+bn", progress=False)
    assert [row.error for row in result.table] == [None] * 3
    assert len({(row.achieved, row.accuracy, row.divergence) for row in result.table}) == 1


@pytest.mark.parametrize("repair", ["bn", "ridge+bn", "none"])
@pytest.mark.parametrize(
    "name",
    [
        "anticipating",
        "capture(site='consumer')",
        "cap-qgw",
        "hybrid",
        "hybrid(allocation='cap-qgw', ranking='capture(site=\\'consumer\\')')",
    ],
)
def test_whatever_a_criterion_needs_is_gathered(name, repair):
    report = prune_to_flops(conv_net(), X, name, flops=0.7, loader=LOADER, repair=repair, progress=False)
    assert report.achieved == pytest.approx(0.7, rel=0.1)
    assert report.importance == name


@pytest.mark.parametrize("make", [TwoAxisImportance, LocalImportance, TargetImportance])
def test_an_importance_refuses_an_unknown_score_when_it_is_made(make):
    stats = calibrate(conv_net(), LOADER, progress=False)
    with pytest.raises(
        TwoAxisError, match="expected one of .*; did you mean 'hull'" if make is not TargetImportance else "got 'hul'"
    ):
        make(stats, "hul")


def test_importances_are_made_alike():
    stats = calibrate(conv_net(), LOADER, gradients=True, consumers=True, progress=False)
    for importance in (
        AnticipatingImportance(stats, levels=2, images=16, progress=False),
        LocalImportance(stats),
        HybridImportance(LocalImportance(stats), TwoAxisImportance(stats, "capture")),
    ):
        report = prune_to_flops(conv_net(), X, importance, flops=0.7, loader=LOADER, progress=False)
        assert report.achieved == pytest.approx(0.7, rel=0.1)


def any_name(s, seed=0):
    return HullImportance(s)


def with_keywords(stats, **options):
    return HullImportance(stats, **options)


def by_position(stats, /):
    return HullImportance(stats)


@pytest.mark.parametrize(
    "make", [HullImportance, functools.partial(HullImportance, strength=0.5), any_name, with_keywords, by_position]
)
def test_functions_of_statistics_of_every_signature(make):
    result = select_score(conv_net(), X, LOADER, {"theirs": make, "ours": "hull"}, flops=0.6, progress=False)
    assert [row.error for row in result.table] == [None, None]
    assert result.table[0].divergence == result.table[1].divergence


def test_a_function_of_something_else_is_refused():
    with pytest.raises(TwoAxisError, match="expected a function of some of stats, model, loader and seed"):
        prune_to_flops(conv_net(), X, f"{__name__}:needs_more", flops=0.6, loader=LOADER, progress=False)


def needs_more(stats, other):
    return HullImportance(stats)


def test_criteria_are_candidates_and_parts():
    criterion = find_criterion("hull(strength=1.0)")
    result = select_score(conv_net(), X, LOADER, [criterion], flops=0.6, progress=False)
    assert result.best == "hull(strength=1.0)"
    assert hash(criterion)
    with pytest.raises(TwoAxisError, match="hybrid: expected names or importances, got int"):
        HybridImportance("l2", 3)
    with pytest.raises(TwoAxisError, match="candidates: expected names"):
        select(None)


def test_no_repair_has_many_names():
    kept = {
        str(prune_to_flops(conv_net(), X, "l2", flops=0.6, repair=repair, progress=False).removed_channels)
        for repair in (None, "none", "", ())
    }
    assert len(kept) == 1


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_travel_to_other_processes(name):
    criterion = pickle.loads(pickle.dumps(find_criterion(name)))
    assert (criterion.name, criterion.needs) == (name, CRITERIA[name].needs)


def test_a_hybrid_needs_what_its_parts_need():
    assert set(find_criterion("hybrid").needs) == {"statistics", "labels"}
    assert set(find_criterion("hybrid(allocation='l2', ranking='cap-qgw')").needs) == {"statistics", "gradients"}
    assert find_criterion("hybrid(allocation='l2', ranking='l1')").needs == ()
    assert find_criterion("hybrid(allocation='random')").draws
    with pytest.raises(TwoAxisError, match="did you mean 'capture'"):
        find_criterion("hybrid(ranking='captur')")


def test_options_that_act_on_groups_are_no_options_of_a_layers_score():
    assert layer_score("hull(strength=1.0)").keywords == {"strength": 1.0}
    with pytest.raises(TwoAxisError, match=r"got site in .* which act on groups"):
        layer_score("capture(site='consumer')")
