"""Trial removals: what fits fits, what does not is said in words, and the model comes back as it was."""

import pytest
import torch
from pruning_cases import Gram, assert_unchanged, everything
from removal_cases import CASES, HandNorm, Scaled
from torch import nn

from tp_twoaxis.dependency.graph import build_graph, prunable_groups
from tp_twoaxis.dependency.trial_removal import tensors_of_width, trial_removal

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tried(net, x=X):
    torch.manual_seed(0)
    groups = prunable_groups(build_graph(net.eval(), x), net, [])[0]
    before = everything(net)
    reason = trial_removal(groups, net, x)
    assert_unchanged(net, before)
    return reason


@pytest.mark.parametrize(
    "name", ["torchvision resnext", "timm vit", "U-Net", "GRU cell", "generator", "gated by chunk"]
)
def test_networks_without_operations_over_channels_come_out_exactly(name):
    case = CASES[name]
    assert tried(case.network().float(), torch.as_tensor(case.inputs()).float()) is None


@pytest.mark.parametrize("make", [Gram, lambda: nn.Sequential(nn.Conv2d(3, 16, 3), HandNorm(), nn.Conv2d(16, 4, 3))])
def test_operations_over_channels_are_told_from_channels_in_wrong_places(make):
    torch.manual_seed(0)
    assert tried(make()) is None


class Pixels(nn.Module):
    """Channels last, mixed by a mean so that no mark tells: Torch-Pruning takes them for channels first."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).flatten(1)
        return x - x.mean(1, keepdim=True)


def test_a_wrong_place_differs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(3), Pixels(), nn.Linear(72, 5))
    assert "differs from the dense network by" in tried(net)


def test_what_does_not_run_is_named_with_what_may_hold_the_width():
    reason = tried(Scaled("buffer"))
    assert reason.startswith("RuntimeError")
    assert "scale [1, 16, 1, 1] may hold its width" in reason


def test_an_output_that_would_shrink():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return x, self.b(x)

    assert tried(Both()) == "an output of the model would lose channels"


def test_tensors_near_the_failure_come_alone():
    net = nn.Sequential(Scaled("buffer"), Scaled("parameter"), nn.BatchNorm2d(16))
    assert tensors_of_width(net, {16}, "1") == ["1.scale [1, 16, 1, 1]"]
    assert tensors_of_width(net, {16}, "") == ["0.scale [1, 16, 1, 1]", "1.scale [1, 16, 1, 1]"]
    assert tensors_of_width(net, {5}, "1") == []
