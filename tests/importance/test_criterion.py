"""Criteria: expressions read and never evaluated, and importances built anew for every state of the network."""

from functools import partial

import pytest
import torch
import torch_pruning as tp
from cases import batches, conv_net

from tp_twoaxis import CapQGWImportance, HybridImportance, TwoAxisError, TwoAxisImportance, calibrate
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance import (
    CRITERIA,
    Criterion,
    PruningState,
    as_criterion,
    criteria,
    find_criterion,
    make_importance,
)
from tp_twoaxis.importance.baselines.activation_criteria import VBPImportance
from tp_twoaxis.importance.criterion import (
    criterion_from_factory,
    criterion_from_importance,
    option_names,
    parse_expression,
)
from tp_twoaxis.scores.named_scores import cap_a, hull_refined

X = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def stats():
    return calibrate(conv_net(), batches(), consumers=True, gradients=True, progress=False)


def narrower():
    """The network that the statistics are of, after it lost channels, and a group of it."""
    net = conv_net()
    graph = tp.DependencyGraph().build_dependency(net, X)
    graph.get_pruning_group(net.conv1, tp.prune_conv_out_channels, [0, 3, 5]).prune()
    graph = tp.DependencyGraph().build_dependency(net, X)
    return net, graph.get_pruning_group(net.conv1, tp.prune_conv_out_channels, list(range(13)))


@pytest.mark.parametrize(
    "make",
    [
        TwoAxisImportance,
        partial(TwoAxisImportance, score="hull", site="consumer", group_reduction="max"),
        CapQGWImportance,
    ],
)
def test_a_copy_scores_what_is_left(stats, make):
    net, group = narrower()
    old = make(stats)
    with pytest.raises(StaleStatisticsError):
        old(group)
    new = old.build(PruningState(net, batches(), progress=False))
    assert type(new) is type(old)
    fresh = make(calibrate(net, batches(), consumers=True, gradients=True, progress=False))
    assert torch.equal(new(group), fresh(group))
    assert old.stats is stats
    with pytest.raises(StaleStatisticsError):
        old(group)


def test_an_importance_s_own_loader_counts(stats):
    net, _ = narrower()
    own = TwoAxisImportance(stats, loader=batches(32))
    assert own.build(PruningState(net, progress=False)).stats.num_images == 32
    given = PruningState(net, batches(), max_images=20, progress=False)
    assert TwoAxisImportance(stats).build(given).stats.num_images == 20
    with pytest.raises(TwoAxisError, match=r"expected .*loader=\.\.\. with labels, got neither"):
        TwoAxisImportance(stats).build(PruningState(net))


def test_what_is_gone_counts_at_the_side_that_is_scored(stats):
    state = PruningState(
        conv_net(),
        batches(),
        removed_outputs={"conv1": 0.25},
        removed_inputs={"conv1": 0.75},
        progress=False,
    )
    for site, share in (("producer", 0.25), ("consumer", 0.75)):
        importance = TwoAxisImportance(stats, "cap-a", site=site)
        first = importance.layer_scores("conv1")
        later = importance.build(state)
        assert torch.equal(later.layer_scores("conv1"), cap_a(importance.layer_statistics("conv1"), removed=share))
        assert torch.equal(importance.layer_scores("conv1"), first)
        assert torch.equal(later.layer_scores("conv2"), importance.layer_scores("conv2"))
    by_hand = TwoAxisImportance(stats, partial(cap_a, removed=0.1))
    assert torch.equal(by_hand.build(state).layer_scores("conv1"), by_hand.layer_scores("conv1"))
    plain = TwoAxisImportance(stats, "variance")
    assert torch.equal(plain.build(state).layer_scores("conv1"), plain.layer_scores("conv1"))


def test_hybrids_build_their_parts(stats):
    net, group = narrower()
    vbp = VBPImportance.calibrate(conv_net(), batches(), progress=False)
    hybrid = HybridImportance(vbp, TwoAxisImportance(stats, "cap-a"))
    state = PruningState(net, batches(), progress=False, removed_outputs={"conv1": 3 / 16})
    new = hybrid.build(state)
    assert torch.equal(new.allocation(group), VBPImportance.calibrate(net, batches(), progress=False)(group))
    assert new.ranking._removed == {"conv1": 3 / 16}
    assert (hybrid.allocation, hybrid.ranking._removed) == (vbp, {})
    assert vbp.statistics is not new.allocation.statistics


def test_others_are_called_again_or_built_anew():
    magnitude = tp.importance.MagnitudeImportance()
    dense, later = PruningState(conv_net()), PruningState(conv_net(), removed_outputs={"conv1": 0.5})
    given = criterion_from_importance(magnitude)
    assert given.build(dense) is given.build(later) is magnitude

    class Rebuilt:
        def __call__(self, group):
            return 0

        def build(self, state):
            return state

    rebuilt = Rebuilt()
    given = criterion_from_importance(rebuilt)
    assert given.build(dense) is rebuilt
    assert given.build(later) is later


def test_a_state_gathers_once_and_what_is_needed(stats):
    state = PruningState(conv_net(), batches(), progress=False)
    plain = state.statistics(also=("consumers",))
    assert plain.extras == ("consumers",)
    assert state.statistics("consumers") is state.statistics() is plain
    assert state.statistics("gradients").extras == ("gradients",)
    later = state.after_step({"conv1": 0.5}, {})
    assert (later.known_statistics, later.is_dense, state.is_dense) == (None, False, True)
    assert later.layers == list(plain)
    given = PruningState(conv_net(), stats=stats)
    assert given.statistics("gradients", "consumers") is stats
    state_of_few = PruningState(conv_net(), batches(), calibrate(conv_net(), batches(), progress=False))
    with pytest.raises(TwoAxisError, match=r"criterion 'anticipating': expected statistics with consumers, got some"):
        find_criterion("anticipating").build(state_of_few)
    with pytest.raises(TwoAxisError, match="statistics: expected one of gradients, consumers, got 'weights'"):
        state.statistics("weights")


def test_the_seed_is_the_states_unless_the_expression_has_one():
    random, state = find_criterion("random"), PruningState(seed=4)
    assert random.build(state).seed == 4
    assert random.seeded(5).build(state).seed == 5
    assert find_criterion("random(seed=3)").seeded(5).build(state).seed == 3
    assert find_criterion("l2").seeded(5).bound == {}


def test_whatever_ranks_becomes_a_criterion(stats):
    criterion = find_criterion("hull")
    assert as_criterion(criterion) is criterion
    assert isinstance(as_criterion("hull"), Criterion)
    importance = TwoAxisImportance(stats, "hull")
    assert as_criterion(importance).build(PruningState()) is importance
    assert as_criterion(importance).name == repr(importance)
    with pytest.raises(TwoAxisError, match="expected a Torch-Pruning importance or a criterion's name, got int"):
        as_criterion(3)


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
    assert parse_expression(spec) == (name, options)


@pytest.mark.parametrize(
    "spec",
    ["hull(", "hull(0.5)", "hull(b)", "hull(b=open('x'))", "hull(**x)", "hull(b=1)(c=2)", "hull(b=1) or 2", "a(b=1)c"],
)
def test_everything_else_is_refused(spec):
    with pytest.raises(TwoAxisError, match="could not read it"):
        parse_expression(spec)


def test_options_may_make_a_score_look_at_the_other_axis():
    names = ("spectral-rs", "spectral-rs(affinity='R')", "spectral-rs(affinity='S')", "spectral-rs(affinity='RS')")
    found = [find_criterion(name) for name in names]
    assert [criterion.axis for criterion in found] == ["local", "local", "both", "both"]
    assert [criterion.reads_task for criterion in found] == [False, False, True, True]
    state = PruningState(conv_net(), batches(), progress=False)
    assert find_criterion("spectral-rs").build(state).stats.target is None
    assert find_criterion("spectral-rs(affinity='S')").build(state).stats.target == "margin"


def test_options_reach_the_score_and_the_importance():
    stats = calibrate(conv_net(), batches(), progress=False)
    importance = make_importance("hull(strength=1.0, peers=2, normalizer='max')", stats=stats)
    expected = hull_refined(stats["conv2"], strength=1.0, peers=2)
    assert torch.equal(importance.layer_scores("conv2"), expected.double())
    assert importance.normalizer == "max"
    # a score keeps its normaliser and its allocation when its weights change
    assert "normalizer='median', allocation='capture'" in repr(make_importance("norm-local(norm=1.0)", stats=stats))
    hybrid = make_importance("hybrid(allocation='l1', ranking='hull')", stats=stats, model=conv_net(), loader=batches())
    assert "hull" in repr(hybrid.ranking)


def test_every_criterion_says_its_options():
    assert {"normalizer", "group_reduction"} <= set(CRITERIA["chip"].options) & set(CRITERIA["capture"].options)
    assert {"clusters", "gamma", "normalizer"} <= set(CRITERIA["cap-qgw"].options)
    assert option_names(lambda stats, seed, *rest, depth=1, **more: None) == ("depth",)
    with pytest.raises(TwoAxisError, match=r"criterion 'hull': option: expected one of .*strength.* got 'width'"):
        find_criterion("hull(width=2)")
    with pytest.raises(TwoAxisError, match="did you mean 'hull'"):
        find_criterion("hul(strength=2)")


def test_what_is_gone_reaches_importances_of_factories(stats):
    criterion = criterion_from_factory("mine", lambda stats: TwoAxisImportance(stats, "cap-a"))
    state = PruningState(conv_net(), batches(), stats)
    later = state.after_step({"conv1": 0.25}, {})
    assert criterion.build(state)._removed == {}
    assert criterion.build(later)._removed == {"conv1": 0.25}


def test_statistics_of_fewer_images_serve_those_who_need_no_more():
    net, loader = conv_net(), batches(48)
    state = PruningState(net, loader, progress=False)
    few = state.statistics("consumers", target=False, enough=20)
    assert few["conv1"].num_images == 20
    assert state.statistics(target=False, enough=20) is few
    whole = state.statistics(target=False)
    assert whole["conv1"].num_images == 48
    assert state.statistics("consumers", target=False, enough=10) is few
    assert state.statistics(target=False, enough=30) is whole
    bounded = PruningState(net, loader, max_images=16, progress=False)
    assert bounded.statistics(target=False, enough=20)["conv1"].num_images == 16
    assert bounded.statistics(target=False) is bounded.statistics(target=False, enough=20)


def test_anticipating_gathers_statistics_of_no_more_images_than_it_reads(monkeypatch):
    monkeypatch.setattr(criteria, "ENOUGH_IMAGES", 32)
    net, loader = conv_net(), batches(64)
    state = PruningState(net, loader, progress=False)
    importance = find_criterion("anticipating").build(state)
    assert importance.stats["conv1"].num_images == 32
