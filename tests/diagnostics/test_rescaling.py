"""Rescaling before BatchNorm: one function in float64, and rankings by hand."""

from __future__ import annotations

import copy

import pytest
import reference_alignment as slow
import torch
from alignment_cases import evidence_inputs
from cases import batches, conv_net
from torch import Tensor, nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.rescaling import (
    norm_pairs,
    observe,
    rescaled,
    rescaling_section,
    rescaling_tables,
)
from tp_twoaxis.models import cifar_mobilenet_v2, cifar_vgg16_bn


@pytest.mark.parametrize(
    ("network", "size"),
    [(conv_net(), 8), (cifar_vgg16_bn(5), 32), (cifar_mobilenet_v2(5), 32)],
    ids=["small", "vgg", "mobilenet"],
)
def test_the_function_stays_in_float64(network, size):
    network = copy.deepcopy(network).double().eval()
    images = batches(2, 2, size=size)[0][0].double()
    pairs = norm_pairs(network, [images])
    assert len(pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    other = rescaled(network, pairs, seed=3)
    with torch.no_grad():
        expected, found = network(images), other(images)
    assert float((found - expected).abs().max()) < 1e-9 * float(expected.abs().max())
    changed = [
        name for name in pairs if not torch.equal(other.get_submodule(name).weight, network.get_submodule(name).weight)
    ]
    assert changed == list(pairs)


def test_factors_are_powers_of_two_between_a_quarter_and_four():
    network = conv_net()
    pairs = norm_pairs(network, batches(2, 2))
    assert pairs == {"conv1": "bn1", "conv2": "bn2"}
    other = rescaled(network, pairs)
    scale = other.conv2.weight.detach().flatten(1)[:, 0] / network.conv2.weight.detach().flatten(1)[:, 0]
    exponents = scale.log2()
    assert -2.0 <= float(exponents.min()) < -1.0
    assert 1.0 < float(exponents.max()) <= 2.0
    assert torch.allclose(other.conv2.bias, network.conv2.bias * scale)
    assert torch.allclose(other.bn2.running_mean, network.bn2.running_mean * scale)
    eps = network.bn2.eps
    assert torch.allclose(other.bn2.running_var, scale**2 * (network.bn2.running_var + eps) - eps)
    assert torch.equal(other.reduce.weight, network.reduce.weight)  # no BatchNorm behind it


def test_variances_and_logits_are_the_networks():
    network, (images, _) = conv_net(), batches(24, 24)[0]
    seen = observe(network, [images[:16], images[16:]], ["conv1", "bn1"], 20)
    with torch.no_grad():
        convolved = network.conv1(images[:20])
        for name, output in (("conv1", convolved), ("bn1", network.bn1(convolved))):
            expected = output.double().transpose(0, 1).flatten(1).var(1, correction=0)
            assert seen.variances[name].numpy() == pytest.approx(expected.numpy(), rel=1e-5)
        assert seen.logits.numpy() == pytest.approx(network(images[:20]).numpy(), abs=1e-5)


def test_rankings_by_hand():
    inputs = evidence_inputs()
    before = {name: tensor.clone() for name, tensor in inputs.model.state_dict().items()}
    logits, ranks = rescaling_tables(inputs)
    assert ranks.layer.tolist() == ["conv1", "conv2"]
    other = rescaled(inputs.model, {"conv1": "bn1", "conv2": "bn2"})
    norms = [net.conv2.weight.detach().flatten(1).norm(dim=1).numpy() for net in (inputs.model, other)]
    assert ranks.norm[1] == pytest.approx(slow.kendall(*norms))
    assert ranks.norm[1] < 0.9
    assert ranks[["folded_norm", "normalised_variance"]].min().min() > 0.99
    assert logits.precision.tolist() == ["exact", "float32"]
    assert logits.relative_rms[0] < 1e-12
    assert logits.top1_agreement.tolist() == [1.0, 1.0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.model.state_dict().items())


def test_a_network_that_reads_the_convolution_elsewhere_is_refused():
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (self.bn(y) + y).mean((2, 3))

    with pytest.raises(NotApplicableError, match="elsewhere"):
        rescaling_tables(evidence_inputs(Tapped().eval()))


def test_networks_without_batch_norm_are_refused():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NotApplicableError, match="no BatchNorm"):
        rescaling_section(evidence_inputs(plain))


def test_the_section_needs_no_labels():
    network = conv_net()
    images = [x for x, _ in batches(64, 32)]
    inputs = EvidenceInputs(network, calibrate(network, images, target=None, progress=False), images, progress=False)
    section = rescaling_section(inputs)
    assert [claim.sentence.startswith("It") for claim in section.claims] == [False, True, True, True, True]
    assert section.drawings[0].draw().axes
