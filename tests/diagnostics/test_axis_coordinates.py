"""Both axes of a cell against their slow twins, and cells that cannot be placed on them."""

from __future__ import annotations

import math

import pytest
import reference_alignment as slow
import reference_scores
import torch
from alignment_cases import evidence_inputs
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.axis_coordinates import cell_correlation, local_axis, target_axis, task_cells
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.models import cifar_mobilenet_v2, cifar_resnet18, cifar_vgg16_bn


def test_coordinates_are_of_the_varying_channels():
    network = conv_net()
    with torch.no_grad():
        network.conv1.weight[3] = 0.0
    layer = evidence_inputs(network).statistics["conv1"]
    active = layer.variance.numpy() > 0
    capture, overlap = local_axis(layer)
    assert len(capture) == 15
    twins = (
        reference_scores.capture(layer.variance.numpy()),
        reference_scores.peer_overlap(layer.correlation.numpy(), active),
    )
    for found, twin in zip((capture, overlap), twins, strict=True):
        assert found.numpy() == pytest.approx(twin[active], rel=1e-9)
    task_mi, excess = target_axis(layer, "correct_logit", partners=4)
    r, rho = layer.target_correlation("correct_logit").numpy(), layer.pooled_correlation.numpy()
    assert task_mi.numpy() == pytest.approx(reference_scores.task_information(r[active]), rel=1e-9)
    twin = reference_scores.target_excess(r[active], rho[active][:, active], partners=4)
    assert excess.numpy() == pytest.approx(twin, rel=1e-6, abs=1e-12)
    assert cell_correlation(capture, task_mi) == pytest.approx(slow.spearman(capture.numpy(), task_mi.numpy()))


def test_two_channels_have_no_correlation():
    assert math.isnan(cell_correlation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])))
    assert math.isnan(cell_correlation(torch.ones(4), torch.arange(4.0)))


def test_five_seeds_of_three_networks_are_425_cells_and_130400_channels():
    networks = [cifar_resnet18(100), cifar_vgg16_bn(100), cifar_mobilenet_v2(100)]
    convolutions = [module for network in networks for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert 5 * len(convolutions) == 425
    assert 5 * sum(layer.out_channels for layer in convolutions) == 130_400


def test_what_cannot_be_placed_is_refused_with_its_reason():
    network, images = conv_net(), batches(160, 32)

    def refused(batches, **options):
        statistics = calibrate(network, batches, progress=False, **options)
        with pytest.raises(NotApplicableError) as error:
            task_cells(EvidenceInputs(network, statistics, batches))
        return str(error.value)

    assert "no task variable" in refused(images, target=None)
    assert "at least 100 images" in refused(batches(40, 20))
    assert "one class" in refused([(x, torch.zeros_like(y)) for x, y in images])
    # without labels the predicted margin stands in
    unlabelled = [(x, None) for x, _ in images]
    statistics = calibrate(network, [x for x, _ in images], progress=False)
    assert len(task_cells(EvidenceInputs(network, statistics, unlabelled))) == 4


def test_cells_wider_than_there_are_images_are_left_out():
    network = nn.Sequential(nn.Conv2d(3, 128, 1), nn.Conv2d(128, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    inputs = evidence_inputs(network, images=120, batch_size=60)
    assert task_cells(inputs) == ["1"]
    wide = nn.Sequential(network[0], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NotApplicableError, match="more channels than there are images"):
        task_cells(evidence_inputs(wide, images=120, batch_size=60))
