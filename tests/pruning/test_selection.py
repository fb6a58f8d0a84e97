"""Selection of a score: a fair trial on held-out images, of a model that stays as it is."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from cases import batches, conv_net

from tp_twoaxis import HullImportance, TwoAxisError, calibrate, prune_to_flops, select_score
from tp_twoaxis.importance.registry import expand_criteria
from tp_twoaxis.pruning.selection import _split
from tp_twoaxis.pruning.selection_result import SelectionRow, rank_candidates, tied_with_best
from tp_twoaxis.scores import SCORES

X = torch.zeros(1, 3, 8, 8)
select = partial(select_score, progress=False, flops=0.6)


def broken(stats):
    raise RuntimeError("no idea")


def test_the_default_candidates_are_the_scores_of_the_local_axis():
    assert {name for name, entry in SCORES.items() if entry.axis == "local"} == set(expand_criteria(["all-local"]))


def test_rows_are_what_pruning_by_hand_gives():
    net, loader = conv_net(), batches(48, 16)
    result = select(net, X, loader, ["capture", "l2"], flops=[0.7, 0.5], seed=4)
    calibration, held_out = _split(net, loader, None, 0.5, 4, False)
    stats = calibrate(net, calibration, progress=False)
    images, labels = (torch.cat(part) for part in zip(*((x.images, y) for x, y in held_out), strict=True))
    dense = net(images).detach().double().log_softmax(1)
    assert [(row.candidate, row.flops) for row in result.table] == [
        ("capture", 0.7),
        ("capture", 0.5),
        ("l2", 0.7),
        ("l2", 0.5),
    ]
    for row in result.table:
        pruned = copy.deepcopy(net)
        report = prune_to_flops(
            pruned, X, row.candidate, flops=row.flops, repair="bn", stats=stats, loader=calibration, progress=False
        )
        logits = pruned(images).detach().double()
        assert row.achieved == report.achieved
        assert row.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        divergence = torch.nn.functional.kl_div(logits.log_softmax(1), dense, log_target=True, reduction="batchmean")
        assert row.divergence == pytest.approx(float(divergence), rel=1e-4)
    assert result.dense == pytest.approx(float((dense.argmax(1) == labels).double().mean()))
    assert (result.measure, result.calibration_images, result.held_out_images) == ("accuracy", 24, 24)
    assert result.best == result.ranking()[0][0]


def test_the_model_is_untouched_and_the_winner_prunes_it():
    net, loader = conv_net().train(), batches(32, 16)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    result = select(net, X, loader, {"hull": "hull", "strong": partial(HullImportance, strength=1.0)})
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    report = prune_to_flops(net, X, result.importance(), flops=0.6, loader=loader, progress=False)
    assert report.achieved == pytest.approx(0.6, rel=0.05)


def test_without_labels_the_dense_network_judges():
    net, loader = conv_net(), [images for images, _ in batches(32, 16)]
    result = select(net, X, loader, ["variance", "taylor"], flops=1.0, repair=())
    assert (result.measure, result.dense, result.best) == ("agreement", 1.0, "variance")
    # nothing is removed at 1.0, so the copy agrees with the network in all
    assert (result.table[0].accuracy, result.table[0].divergence) == (1.0, pytest.approx(0.0, abs=1e-9))
    assert "label" in result.table[1].error


def test_a_failing_candidate_is_told_and_the_others_go_on():
    result = select(conv_net(), X, batches(32, 16), [broken, "capture"])
    assert result.best == "capture"
    assert result.table[0].error == "RuntimeError: no idea"
    text = str(result)
    assert any(
        line.startswith("broken") and "failed at 60%: RuntimeError: no idea" in line for line in text.splitlines()
    )
    assert text.splitlines()[2].startswith("capture")
    recorded = json.loads(result.to_json())
    assert (recorded["best"], recorded["table"][0]["accuracy"], recorded["table"][0]["error"]) == (
        "capture",
        None,
        "RuntimeError: no idea",
    )
    assert {"stats", "build"}.isdisjoint(recorded)


def test_all_failing_is_an_error_with_the_reasons():
    with pytest.raises(TwoAxisError, match=r"no candidate .* broken: RuntimeError: no idea; capture, l1: .*0\.001"):
        select(conv_net(), X, batches(32, 16), [broken, "capture", "l1"], flops=0.001)


def test_images_are_read_once_and_every_one_is_in_one_part():
    images, labels = torch.arange(40.0).view(40, 1), torch.arange(40)
    reads = []

    def loader():
        reads.append(1)
        yield from zip(images.split(16), labels.split(16), strict=True)

    calibration, held_out = _split(conv_net(), loader(), None, 0.25, 0, False)
    assert [len(x) for x, _ in calibration] == [16, 14]
    assert [len(x) for x, _ in held_out] == [10]
    seen = torch.cat([y for _, y in calibration + held_out])
    assert sorted(seen.tolist()) == list(range(40))
    assert all(torch.equal(x.images[:, 0].long(), y) for x, y in calibration + held_out)
    other = torch.cat([y for _, y in _split(conv_net(), loader(), None, 0.25, 1, False)[1]])
    assert set(other.tolist()) != set(held_out[0][1].tolist())
    # a generator can be read once only
    result = select(conv_net(), X, iter(batches(32, 16)), ["capture"])
    assert (result.calibration_images, result.held_out_images) == (16, 16)


def test_ranking_is_by_accuracy_then_divergence():
    def row(name, share, accuracy, divergence, error=None):
        return SelectionRow(name, share, share, accuracy, divergence, 1.0, error)

    rows = [
        *(row("a", share, 0.5, 0.3) for share in (0.7, 0.5)),
        *(row("b", share, 0.5, 0.2) for share in (0.7, 0.5)),
        *(row("c", 0.7 - 0.2 * i, accuracy, 9.0) for i, accuracy in enumerate((0.4, 0.8))),
        row("d", 0.7, 1.0, 0.0),
        row("d", 0.5, None, None, "failed"),
    ]
    assert [name for name, _, _ in rank_candidates(rows)] == ["c", "b", "a"]


def test_ties_are_judged_image_by_image():
    # 2 images of 400 apart, but always the same way round: 0.005 is less than two of its standard errors, 0.02 is not
    best = torch.ones(400)
    near, far = best.clone(), best.clone()
    near[:2], far[:8] = 0.0, 0.0
    assert tied_with_best({"best": best, "near": near, "far": far}, "best") == ["near"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["captur"]}, "expected one of capture, .*did you mean 'capture'"),
        ({"candidates": []}, "at least one"),
        ({"candidates": ["capture", "capture"]}, "twice"),
        ({"candidates": [3]}, "got 3"),
        ({"flops": 0.0}, "flops"),
        ({"flops": []}, "flops"),
        ({"held_out": 1.0}, "held_out"),
        ({"repair": ("nope",)}, "repair"),
        ({"target": "nope"}, "target"),
        ({"ignored_layers": ["nope"]}, "no layer 'nope'"),
        ({"loader": []}, "got 0"),
        ({"loader": batches(2, 2)}, "give more images"),
        ({"loader": [batches(8, 8)[0], batches(8, 8)[0][0]]}, "batch 1 comes without labels"),
        ({"loader": [(torch.zeros(4, 3, 8, 8), torch.zeros(4, 5))]}, "class indices"),
        ({"loader": [torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 9, 9)]}, "one shape"),
    ],
)
def test_bad_input(options, message):
    given = {"loader": batches(16, 8), "candidates": ["capture"], **options}
    with pytest.raises(TwoAxisError, match=message):
        select(conv_net(), X, given.pop("loader"), given.pop("candidates"), **given)
