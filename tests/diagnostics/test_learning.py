"""The course of training: tables against SciPy, windows, seeds, the section on a small training, and refusals."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from cases import batches, conv_net
from scipy.stats import spearmanr

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.communities import community_table
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.learning import (
    hull_measures,
    layer_states,
    learning_claims,
    learning_drawings,
    learning_section,
    models_by_epoch,
    persistence_table,
    trajectory_table,
    velocity_table,
    windows,
)
from tp_twoaxis.diagnostics.learning_figures import draw_learning, mean_by_epoch
from tp_twoaxis.diagnostics.triplets import triplet_table
from tp_twoaxis.scores import local, target
from tp_twoaxis.training import finetune
from tp_twoaxis.training.snapshots import SnapshotWriter, read_snapshots

EPOCHS = (0, 1, 3, 6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning") / "kept"
    net, data = conv_net(), batches(104)
    writer = SnapshotWriter(folder, EPOCHS)
    finetune(net, data, epochs=6, lr=0.1, schedule="constant", on_epoch=writer, max_batches=None, progress=False)
    return net, data, read_snapshots(folder)


@pytest.fixture
def inputs(trained):
    net, data, snapshots = trained
    return EvidenceInputs(net, calibrate(net, data, progress=False), data, snapshots=dict(snapshots), progress=False)


def quantities(inputs, epoch, name):
    """I, R and M of a layer after an epoch, straight from the formulas."""
    net = conv_net()
    net.load_state_dict(inputs.snapshots[epoch])
    for norm in (net.bn1, net.bn2):
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    with torch.no_grad():
        for images, _ in inputs.calibration:
            net(images)
    net.eval()
    layer = calibrate(net, inputs.calibration, progress=False)[name]
    power = layer.variance.numpy()
    return {
        "I": 0.5 * np.log1p(power / np.median(power)),
        "R": local.peer_overlap(layer.correlation).numpy(),
        "M": target.task_information(layer.target_correlation()).numpy(),
    }


def test_tables_equal_their_slow_twins(inputs):
    depths = {"conv1": 0.0, "reduce": 1.0}
    states = layer_states(inputs, ["conv1", "reduce"])
    assert list(states) == list(EPOCHS)
    trajectory = trajectory_table(states, depths).set_index(["epoch", "layer"])
    velocity = velocity_table(states, depths).set_index(["window", "layer"])
    persistence = persistence_table(states, depths).set_index(["epoch", "layer", "quantity"])
    assert windows(EPOCHS) == {"early": (0, 3), "late": (3, 6)}
    for name in depths:
        by_epoch = {epoch: quantities(inputs, epoch, name) for epoch in EPOCHS}
        for epoch, now in by_epoch.items():
            assert trajectory.rho[epoch, name] == pytest.approx(spearmanr(now["I"], now["M"]).statistic)
            for symbol in "IRM" if epoch != 6 else "":
                expected = spearmanr(now[symbol], by_epoch[6][symbol]).statistic
                assert persistence.rho[epoch, name, symbol] == pytest.approx(expected)
        for window, (start, end) in windows(EPOCHS).items():
            moved = [by_epoch[end][symbol] - by_epoch[start][symbol] for symbol in "IM"]
            assert velocity.rho[window, name] == pytest.approx(spearmanr(*moved).statistic)
    assert 6 not in persistence.index.get_level_values("epoch")


def test_measures_are_of_channels_that_vary(inputs):
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[:4] = 0.0
    layer = calibrate(net, inputs.calibration, layers=["conv1"], progress=False)["conv1"]
    measures = hull_measures(layer)
    assert 1.0 <= measures["hull_size"] <= 10.0
    alone = copy.deepcopy(net)
    alone.conv1 = torch.nn.Conv2d(3, 12, 3, padding=1, bias=False)
    with torch.no_grad():
        alone.conv1.weight.copy_(net.conv1.weight[4:])
    alone.bn1, alone.forward = torch.nn.Identity(), lambda x: alone.conv1(x).mean((2, 3))
    without = calibrate(alone, inputs.calibration, layers=["conv1"], progress=False)["conv1"]
    assert hull_measures(without) == pytest.approx(measures)


def test_snapshots_are_of_the_trained_network_and_leave_the_model_alone(inputs):
    before = copy.deepcopy(inputs.model.state_dict())
    for epoch, model in models_by_epoch(inputs):
        assert model is not inputs.model
        kept = inputs.snapshots[epoch]
        assert all(torch.equal(kept[name], value) for name, value in model.named_parameters())
        assert torch.equal(kept["bn1.running_mean"], model.bn1.running_mean) is False
    assert all(torch.equal(before[name], value) for name, value in inputs.model.state_dict().items())


def test_the_section_and_what_is_added_to_it(inputs):
    section = learning_section(inputs, (hull_measures, lambda layer: {"images": float(layer.num_images)}))
    assert list(section.tables) == ["trajectory", "velocity", "persistence"]
    trajectory = section.tables["trajectory"]
    assert trajectory.images.unique().tolist() == [104.0]
    assert trajectory.layer.unique().tolist() == ["conv1", "conv2", "depthwise", "reduce"]
    coupled = section.claims[0].estimate.value
    assert coupled == pytest.approx(trajectory[trajectory.epoch == 0].rho.mean())
    assert len(section.claims) == 6  # those of what is added to the axes by default are left out
    assert [len(drawing.draw().axes) for drawing in section.drawings] == [3, 3]
    assert [drawing.name for drawing in learning_section(inputs, ()).drawings] == ["learning"]


def test_several_trainings_are_averaged_over_seeds(inputs):
    depths = {"conv1": 0.0, "reduce": 1.0}
    states = layer_states(inputs, ["conv1", "reduce"], ())
    tables = [f(states, depths) for f in (trajectory_table, velocity_table, persistence_table)]
    both = [pd.concat([t.assign(seed=1), t.assign(seed=2, rho=t.rho + 0.1)], ignore_index=True) for t in tables]
    means = mean_by_epoch(both[0], "rho")
    expected = tables[0].groupby("epoch").rho.mean()
    np.testing.assert_allclose(means["mean"], expected + 0.05)
    np.testing.assert_allclose(means["sem"], 0.05)
    assert len(draw_learning(*both).axes) == 3


def test_claims_over_trainings_have_intervals_over_trainings(inputs):
    section = learning_section(inputs)
    shifts = {"trajectory": 0.25, "velocity": 0.0, "persistence": 0.0}
    both = {
        name: pd.concat(
            [table.assign(network="n", seed=seed, rho=table.rho - seed * shifts[name]) for seed in range(3)]
        )
        for name, table in section.tables.items()
    }
    coupled, drop, *others = learning_claims(both)
    own = section.claims[0].estimate.value
    assert coupled.estimate.value == pytest.approx(own - 0.25)
    # of three models one alone is drawn in one of 27 resamples, more than the 2.5 % at either end
    assert (coupled.estimate.lower, coupled.estimate.upper) == pytest.approx((own - 0.5, own))
    assert coupled.note == "epoch 0, interval over 3 trainings"
    two = {name: table[table.seed < 2] for name, table in both.items()}
    assert learning_claims(two)[0].note == "epoch 0, interval over 8 layers"
    assert drop.estimate.value == pytest.approx(section.claims[1].estimate.value)  # a shift of all epochs cancels
    assert [claim.sentence for claim in others] == [claim.sentence for claim in section.claims[2:]]
    # trainings that were recorded at other epochs are judged all the same
    both["trajectory"].loc[both["trajectory"].seed == 1, "epoch"] += 1
    both["persistence"].loc[both["persistence"].seed == 1, "epoch"] += 1
    assert learning_claims(both)[0].note == "epoch 0 or 1, interval over 3 trainings"


def test_structure_is_followed_from_the_start(inputs):
    section = learning_section(inputs)
    trajectory = section.tables["trajectory"]
    net = copy.deepcopy(inputs.model)
    for epoch, model in models_by_epoch(inputs):
        net.load_state_dict(model.state_dict())
        stats = calibrate(net, inputs.calibration, progress=False)
        own = trajectory[trajectory.epoch == epoch].set_index("layer")
        gaps = community_table(stats, ["conv1", "reduce"]).set_index("layer").gap
        ratios = triplet_table(stats, ["conv1", "reduce"]).set_index("layer").ratio
        assert own.modularity_gap[["conv1", "reduce"]].tolist() == pytest.approx(gaps.tolist(), abs=1e-6)
        assert own.triplets[["conv1", "reduce"]].tolist() == pytest.approx(ratios.tolist(), rel=1e-6)
    claims = {claim.sentence: claim.estimate.value for claim in section.claims}
    by_epoch = trajectory.groupby("epoch").modularity_gap.mean()
    assert claims["the overlap graph is more modular than the excess graph before training already"] == pytest.approx(
        by_epoch[0]
    )
    assert claims["and so it is at every snapshot (where the difference is least)"] == pytest.approx(by_epoch.min())
    grown = trajectory.groupby("epoch").triplets.mean()
    assert claims["the excess of triplets over that of pairs grows with training"] == pytest.approx(grown[6] - grown[0])


def test_figures_of_several_networks_are_apart(inputs):
    section = learning_section(inputs)
    several = {
        name: pd.concat([t.assign(network=network, seed=seed) for network in "ab" for seed in (1, 2)])
        for name, t in section.tables.items()
    }
    drawings = learning_drawings(several)
    assert [drawing.name for drawing in drawings] == [
        "learning_a", "learning_structure_a", "learning_b", "learning_structure_b"
    ]  # fmt: skip
    assert drawings[2].caption.startswith("b. ")
    assert [len(drawing.draw().axes) for drawing in drawings[:2]] == [3, 4]


def test_windows_without_much_choice():
    assert windows([0, 1, 2, 5]) == {"early": (0, 2), "late": (2, 5)}
    assert windows([0, 5, 10, 25, 50, 100]) == {"early": (0, 5), "late": (50, 100)}


def test_refusals(inputs):
    snapshots = inputs.snapshots
    for wrong, message in (
        ({}, "got 0; train with --snapshots"),
        ({0: snapshots[0], 1: snapshots[1]}, "got 2"),
        ({**snapshots, 3: conv_net(width=8).state_dict()}, r"epoch 3 is of another network.*bn1.bias of shape \[16\]"),
        ({**snapshots, 1: {"conv1.weight": torch.zeros(1)}}, r"bn1.bias of shape \[16\], got nothing"),
    ):
        inputs.snapshots = wrong
        with pytest.raises(NotApplicableError, match=message):
            learning_section(inputs)
    inputs.snapshots = snapshots
    inputs.statistics = calibrate(inputs.model, inputs.calibration, target=None, progress=False)
    with pytest.raises(NotApplicableError, match="no task variable"):
        learning_section(inputs)
