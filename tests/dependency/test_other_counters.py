"""Torch-Pruning's and thop's counters give their own numbers, and leave the model alone without copying it."""

import copy

import pytest
import thop
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn.parallel import DataParallel

from tp_twoaxis.dependency import other_counters
from tp_twoaxis.dependency.other_counters import thop_macs, tp_macs


class Net(nn.Module):
    """Convolutions, a norm and a head; refuses to be copied."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 8 * 8, 10))

    def forward(self, x, scale=1.0):
        return self.head(self.grouped(self.norm(self.conv(x)).relu())) * scale


class Uncopied(Net):
    def __deepcopy__(self, memo):
        pytest.fail("the model was copied")


X = torch.zeros(2, 3, 16, 16)


def test_their_own_numbers():
    net = Net()
    assert tp_macs(net, X) == round(tp.utils.count_ops_and_params(net, X)[0])
    assert thop_macs(net, X) == round(thop.profile(copy.deepcopy(net), (X,), verbose=False)[0] / 2)
    assert tp_macs(DataParallel(net), X) == tp_macs(net, X)


@pytest.mark.parametrize(("name", "theirs", "others"), [("resnet18", 1.8222, 1.8240), ("mobilenet_v2", 0.3202, 0.3275)])
def test_known_networks_at_224(name, theirs, others):
    model, x = getattr(torchvision.models, name)(weights=None), torch.zeros(1, 3, 224, 224)
    assert tp_macs(model, x) / 1e9 == pytest.approx(theirs, abs=5e-5)
    assert thop_macs(model, x) / 1e9 == pytest.approx(others, abs=5e-5)


@pytest.mark.parametrize("inputs", [(X,), [X, 2.0], {"x": X, "scale": 2.0}], ids=["tuple", "list", "keywords"])
def test_inputs_of_every_form(inputs):
    assert thop_macs(Net(), inputs) == thop_macs(Net(), X)
    if not isinstance(inputs, dict):  # of keywords it does not find the batch size
        assert tp_macs(Net(), inputs) == tp_macs(Net(), X)


@pytest.mark.parametrize("counter", [tp_macs, thop_macs])
def test_the_model_is_neither_copied_nor_changed(counter, capsys):
    net = Uncopied().train()
    net.head.eval()
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    insides = {name: [list(v) for v in vars(m).values() if isinstance(v, dict)] for name, m in net.named_modules()}
    values = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert isinstance(counter(net, X), int)
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == before
    now = {name: [list(v) for v in vars(m).values() if isinstance(v, dict)] for name, m in net.named_modules()}
    assert now == insides
    assert all(torch.equal(tensor, values[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("counter", [tp_macs, thop_macs])
def test_the_model_returns_after_an_error(counter):
    net = Net().train()
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    with pytest.raises(RuntimeError):
        counter(net, torch.zeros(1, 4, 16, 16))
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert all(module.training and not module._forward_hooks for module in net.modules())
    assert counter(net, X) > 0


def test_attention_tells_which_of_the_two_is_installed():
    """Both ultralytics-thop, whose versions begin at 2, and thop install the module thop."""
    x, maintained = torch.zeros(1, 5, 8), not thop.__version__.startswith("0.")
    assert (thop_macs(nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x)) > 0) == maintained


def test_without_thop_there_is_no_number(monkeypatch):
    monkeypatch.setattr(other_counters, "find_spec", lambda _: None)
    assert thop_macs(nn.Linear(3, 2), torch.zeros(1, 3)) is None
