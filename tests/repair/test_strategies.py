"""The table of repairs, and how requests are read from it."""

import itertools

import pytest
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.repair import REPAIRS, check_repair, parse_repair, refits
from tp_twoaxis.repair.strategies import stages_of


def test_rows_stand_under_their_names():
    assert all(name == strategy.name and strategy.summary for name, strategy in REPAIRS.items())


@pytest.mark.parametrize("name", REPAIRS)
def test_containing_is_transitive_and_acyclic(name):
    strategy = REPAIRS[name]
    assert name not in strategy.contains
    for inner in strategy.contains:
        assert set(REPAIRS[inner].contains) < set(strategy.contains)
        assert name not in REPAIRS[inner].contains
        assert REPAIRS[inner].refits == strategy.refits
    assert strategy.start is None or strategy.start in strategy.contains


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ridge+bn", ("ridge", "bn")),
        ("bn,ridge", ("bn", "ridge")),
        (" ridge , bn ", ("ridge", "bn")),
        ("sequential", ("sequential",)),
        ("ridge+ridge", ("ridge",)),
        ("none", ()),
        ("", ()),
        ((), ()),
        (("none",), ()),
        (("ridge", "bn", "ridge"), ("ridge", "bn")),
        (["ridge+bn", "bias"], ("ridge", "bn", "bias")),
    ],
    ids=repr,
)
def test_requests_are_read(text, names):
    assert parse_repair(text) == names


def test_requests_that_cannot_be_read():
    with pytest.raises(TwoAxisError, match=r"repair: expected one of bn, .*distill or none, got 'glue'; choose one"):
        parse_repair("ridge+glue")
    with pytest.raises(TwoAxisError, match="got 'sequental'; did you mean 'sequential'"):
        parse_repair(("sequental",))
    with pytest.raises(TwoAxisError, match=r"repairs or none, got both in 'ridge\+none'"):
        parse_repair("ridge+none")


def test_of_two_repairs_of_weights_one_contains_the_other():
    # two that know nothing of each other would both make up for the same channels
    for one, other in itertools.combinations([name for name in REPAIRS if refits([name])], 2):
        assert one in REPAIRS[other].contains or other in REPAIRS[one].contains, (one, other)


def test_which_repairs_change_weights():
    assert (refits(("bn", "ridge")), refits(("bn",)), refits(())) == (True, False, False)


@pytest.mark.parametrize(
    ("repairs", "stages"),
    [
        (("bn",), ["bn"]),
        (("bias", "bn"), ["bias", "bn"]),
        (("bn", "ridge", "bias"), ["ridge", "bn"]),
        (("patch",), ["ridge", "patch"]),
        (("joint", "patch", "sequential"), ["ridge", "joint"]),
        ((), []),
    ],
)
def test_contained_repairs_do_not_run_and_batch_norm_runs_last(repairs, stages):
    assert [stage.name for stage in stages_of(repairs)] == stages


def test_what_needs_images_is_named():
    net = conv_net()
    stats = calibrate(net, batches(), consumers=True, progress=False)
    assert check_repair("ridge+bias", net, None, stats) == ("ridge", "bias")
    with pytest.raises(TwoAxisError, match=r"repair 'bn' needs images: pass loader=.*leave the network unrepaired"):
        check_repair("ridge+bn", net, None, stats)
    with pytest.raises(TwoAxisError, match="repair 'bias' needs to know what each layer reads"):
        check_repair("ridge+bias", net, None)
