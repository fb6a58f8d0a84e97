"""Methods by name: criteria of the package, of entry points and of modules."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
import torch_pruning as tp
from cases import batches, conv_net

from tp_twoaxis import LocalImportance, TargetImportance, TwoAxisError, calibrate, known_names, prune_to_flops
from tp_twoaxis.benchmark.methods import ALLOCATIONS, Method, UniformAllocation, cross
from tp_twoaxis.importance import (
    CRITERIA,
    Criterion,
    PruningState,
    criterion_names,
    find_criterion,
    make_importance,
)
from tp_twoaxis.importance.baselines.weight_criteria import RandomImportance
from tp_twoaxis.known_names import ALIASES, ENTRY_POINTS
from tp_twoaxis.scores.named_scores import DEFAULT_SCORE
from tp_twoaxis.statistics.gradients import accumulate_gradients


@pytest.fixture(scope="module")
def stats():
    return calibrate(conv_net(), batches(), progress=False)


def test_names_are_unique_over_a_full_cross():
    table = cross(["l1", "l2"], allocations=ALLOCATIONS, repairs=[(), ("bn",)], budgets=[0, 50, 200], steps=[1, 3])
    assert len({m.name for m in table}) == len({(m.criterion, m.treatment) for m in table}) == len(table) == 48
    assert Method("l2", repair=("bn",), finetune_batches=50, steps=3).name == "l2+bn+steps3+ft50"
    assert Method("l2", "uniform", (), steps=2).treatment == "uniform steps2"
    assert Method("l2", "uniform", (), 50).name == "l2/uniform+ft50"
    assert Method("l2", "uniform", (), 50).treatment == "uniform ft50"
    assert Method("l2", repair=()).treatment == "none"


def test_aliases_are_the_default_scores_of_their_axes(stats):
    assert {"local": LocalImportance(stats).score, "target": TargetImportance(stats).score} == ALIASES
    assert Method("local").checked() == Method(DEFAULT_SCORE).checked()
    assert find_criterion("target").name == "task-mi"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method("tailor"), r"capture.*module:factory.*got 'tailor'; did you mean 'taylor'"),
        (Method("l2", allocation="locale"), "global, uniform, got 'locale'"),
        (Method("l2", repair=("bm",)), "repair: expected one of bn.*got 'bm'"),
        (Method("l2", finetune_batches=-1), "finetune_batches: expected a whole number of at least 0"),
        (Method("l2", steps=0), "steps: expected a whole number of at least 1, got 0"),
        (Method("no.such.module:f"), r"importing 'no.such.module'.*install it"),
        (Method("bench_cases:own_scor"), "did you mean '?own_score"),
        (Method("bench_cases:CLASSES"), "function that makes an importance"),
    ],
)
def test_unknown_names_list_the_valid_ones(method, message):
    with pytest.raises(TwoAxisError, match=message):
        method.checked()


def test_factories_get_what_they_take(stats):
    own = find_criterion("bench_cases:own_score")
    assert own.needs == ("statistics",)
    made = own.build(PruningState(conv_net(), [], stats, seed=42))
    assert torch.equal(made.layer_scores("conv1"), stats["conv1"].variance.sqrt())
    drawn = find_criterion("bench_cases:by_seed")
    assert drawn.needs == ()
    assert drawn.build(PruningState(seed=9)).seed == 9
    with pytest.raises(TwoAxisError, match=r"expected an importance.*int"):
        find_criterion("bench_cases:not_callable").build(PruningState(seed=1))


def test_entry_points_register_factories_and_criteria(monkeypatch):
    points = [
        EntryPoint("mine", "bench_cases:by_seed", ENTRY_POINTS),
        EntryPoint("l2", "bench_cases:broken", ENTRY_POINTS),
        EntryPoint("lost", "no_such_module:f", ENTRY_POINTS),
        EntryPoint("plug", "bench_cases:PLUG", ENTRY_POINTS),
    ]
    monkeypatch.setattr(known_names, "entry_points", lambda group: points if group == ENTRY_POINTS else [])
    assert criterion_names() == [*CRITERIA, "mine", "lost", "plug"]
    assert isinstance(find_criterion("mine").build(PruningState(seed=3)), RandomImportance)
    assert find_criterion("l2").build(PruningState(seed=3)).p == 2  # ours, not the plug-in's
    with pytest.raises(TwoAxisError, match=r"lost.*does not load"):
        find_criterion("lost")

    def taylor(state):
        accumulate_gradients(*state.images(labels=True), max_images=state.max_images, progress=False)
        return tp.importance.TaylorImportance()

    monkeypatch.setattr("bench_cases.PLUG", Criterion("labels", "gradients", taylor, ("labels",)), raising=False)
    net = conv_net()
    plug = find_criterion("plug")
    assert plug.needs == ("labels",)
    plug.build(PruningState(net, batches()))
    assert net.conv1.weight.grad is not None


def test_uniform_allocation_keeps_the_order_and_cuts_all_groups_alike():
    net, allocated = conv_net(), UniformAllocation(make_importance("l2"))
    # a tolerance that wide keeps the planner from filling up with single channels
    report = prune_to_flops(
        net, torch.zeros(1, 3, 8, 8), allocated, flops=0.4, repair=(), tolerance=0.5, progress=False
    )
    shares = [len(g.kept) / (len(g.kept) + len(g.removed)) for g in report.groups]
    assert max(shares) - min(shares) <= 1 / 8  # one channel of the narrowest group
    scores = torch.tensor([3.0, 3.0, -7.0, 100.0])
    ranked = UniformAllocation(lambda group: scores)(None)
    assert ranked.tolist() == [0.375, 0.625, 0.125, 0.875]
    assert UniformAllocation(lambda group: None)(None) is None
