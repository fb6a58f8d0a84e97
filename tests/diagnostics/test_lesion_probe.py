"""Which channels are removed, and what is told of them."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from cases import batches, conv_net
from reference import emitted
from reference_lesions import losses, regression, without_channel
from reference_scores import capture, greedy_hull, peer_overlap, task_information
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.lesion_probe import COLUMNS, by_cell, lesion_probe, probed_channels, probed_layers
from tp_twoaxis.diagnostics.peers import predict_from_peers
from tp_twoaxis.models.factory import build_model


def made(net, held_out=None, **options):
    stats = calibrate(net, batches(96), positions="all", progress=False)
    held = batches(40, 16, seed=3) if held_out is None else held_out
    return EvidenceInputs(net, stats, batches(96), held, progress=False, **options)


def sharp_net():
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[3] = 0.0
        net.fc.weight.mul_(400.0)
        net.fc.bias.sub_(net(torch.cat([x for x, _ in batches(96)])).mean(0))
    return net


@pytest.fixture(scope="module")
def inputs():
    return made(sharp_net())


@pytest.fixture(scope="module")
def table(inputs):
    return lesion_probe(inputs)


def test_the_papers_networks_give_its_number_of_channels():
    total = 0
    for name in ("cifar_resnet18", "cifar_vgg16_bn", "cifar_mobilenet_v2"):
        with torch.device("meta"):
            net = build_model(name, num_classes=100)
        convs = {key: layer.out_channels for key, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
        layers = probed_layers(list(convs))
        assert len(layers) == 3
        total += 5 * sum(len(probed_channels(convs[layer])) for layer in layers)  # seeds
    assert total == 2_720


def test_layers_are_first_middle_and_last():
    assert probed_layers(list("abcde")) == ["a", "c", "e"]
    assert probed_layers(list("ab")) == ["a", "b"]


def test_channels_are_drawn_without_replacement():
    drawn = probed_channels(300)
    assert drawn == probed_channels(300) == sorted(set(drawn))
    assert len(drawn) == 64
    assert max(drawn) < 300
    assert drawn != probed_channels(300, seed=1)
    assert probed_channels(64, seed=5) == list(range(64))


@pytest.mark.parametrize("removal", ["mean", "zero"])
def test_damage_is_that_of_edited_weights(inputs, removal):
    """The layer itself writes the replacement, so BatchNorm behind it sees it as it is."""
    table = lesion_probe(inputs, removal=removal).set_index(["layer", "channel"])
    images, labels = (torch.cat(parts) for parts in zip(*inputs.held_out, strict=True))
    whole, right = losses(inputs.model, images, labels)
    assert table.damage.abs().max() > 0.01
    for name, k in [("conv1", 2), ("conv1", 11), ("depthwise", 7), ("reduce", 4)]:
        row, layer = table.loc[(name, k)], inputs.statistics[name]
        prediction = predict_from_peers(layer)[k]
        value = 0.0 if removal == "zero" else float(layer.mean[k])
        own, hits = losses(without_channel(inputs.model, name, k, value), images, labels)
        assert row.damage == pytest.approx((own - whole).mean(), rel=1e-3, abs=1e-4)
        assert row.damage_error == pytest.approx((own - whole).std(ddof=1) / np.sqrt(40), rel=1e-3, abs=1e-4)
        assert row.accuracy_drop == pytest.approx(right.mean() - hits.mean())
        if name != "depthwise":  # its rows cannot mix channels
            twin = without_channel(inputs.model, name, k, prediction.intercept, prediction.peers, prediction.weights)
            own, _ = losses(twin, images, labels)
            assert row.peer_damage == pytest.approx((own - whole).mean(), rel=1e-3, abs=1e-4)


def test_scores_are_those_of_the_formulas(inputs, table):
    rows = emitted(inputs.model, [x for x, _ in batches(96)], {"conv1": inputs.model.conv1})["conv1"].reshape(-1, 16)
    part = table[table.layer == "conv1"].set_index("channel")
    layer = inputs.statistics["conv1"]
    rho, active = layer.correlation.numpy(), np.ones(16, bool)
    expected = {
        "norm": inputs.model.conv1.weight.detach().double().flatten(1).norm(dim=1).numpy(),
        "capture": capture(rows.var(0)),
        "overlap": peer_overlap(rho, active),
        "task_mi": task_information(layer.target_correlation().numpy()),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(part[name], values, rtol=1e-4, atol=1e-7, err_msg=name)
    for k in range(16):
        _, path, _, size = greedy_hull(rho, k, active)
        assert part.hull_size[k] == size
        assert part.compact_support[k] == pytest.approx(path[size - 1] / size)
        peers = predict_from_peers(layer)[k].peers
        assert len(peers) == 8
        # the share that the best 8 peers explain is the R^2 of ordinary least squares on the rows
        assert part.peer_explanation[k] == pytest.approx(regression(rows, k, peers)[2], abs=1e-4)
    support, captured = part.compact_support, part.capture
    z = (support - support.mean()) / support.std(ddof=0) - (captured - captured.mean()) / captured.std(ddof=0)
    np.testing.assert_allclose(part.compact_local, z, rtol=1e-6, atol=1e-9)


def test_the_table_names_what_it_is_of(table):
    assert list(table) == list(COLUMNS)
    assert table.layer.unique().tolist() == ["conv1", "depthwise", "reduce"]
    assert table.groupby("layer", sort=False).depth.first().tolist() == pytest.approx([0.0, 2 / 3, 1.0])
    assert table.groupby("layer", sort=False).size().tolist() == [16, 16, 8]


def test_constant_channels_are_in_the_table_and_in_no_cell():
    net = sharp_net()
    with torch.no_grad():
        net.conv1.weight[5] = 0.0
    table = lesion_probe(made(net))
    assert table.query("constant")[["layer", "channel"]].values.tolist() == [["conv1", 5]]
    assert [len(part) for _, part in by_cell(table)] == [15, 16, 8]


def test_batches_do_not_matter_and_all_images_serve(inputs, table):
    other = lesion_probe(made(inputs.model, batches(40, 7, seed=3)))
    np.testing.assert_allclose(other.damage, table.damage, rtol=1e-3, atol=1e-5)
    fewer = lesion_probe(made(inputs.model, batches(40, 16, seed=3)[:1]))
    assert not np.allclose(fewer.damage, table.damage, rtol=1e-3, atol=1e-5)


def test_the_model_comes_back_as_it_was(inputs):
    before = copy.deepcopy(inputs.model.state_dict())
    lesion_probe(inputs)
    assert all(torch.equal(before[name], value) for name, value in inputs.model.state_dict().items())
    assert not any(part._forward_hooks or "forward" in part.__dict__ for part in inputs.model.modules())


def test_networks_together_are_cells_of_their_own(table):
    both = pd.concat([table.assign(network=name, seed=seed) for name, seed in (("a", 1), ("a", 2), ("b", 1))])
    cells = [names for names, _ in by_cell(both)]
    assert len(cells) == 9
    assert cells[3] == {"network": "a", "seed": 2, "layer": "conv1", "depth": 0.0}


def test_what_is_missing_is_said(inputs):
    with pytest.raises(NotApplicableError, match="images that did not calibrate"):
        lesion_probe(EvidenceInputs(inputs.model, inputs.statistics, inputs.calibration, None, progress=False))
    with pytest.raises(NotApplicableError, match="images that did not calibrate"):
        lesion_probe(EvidenceInputs(inputs.model, inputs.statistics, inputs.calibration, [], progress=False))
    free = calibrate(inputs.model, batches(48), target=None, progress=False)
    with pytest.raises(NotApplicableError, match="task variable"):
        lesion_probe(EvidenceInputs(inputs.model, free, batches(48), batches(16), progress=False))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(NotApplicableError, match="no convolution"):
        lesion_probe(made(flat))
    dead = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    nn.init.zeros_(dead[0].weight)
    with pytest.raises(NotApplicableError, match="no probed channel of 0 varies"):
        lesion_probe(made(dead))
