"""State is restored: modes, random numbers, structure after real pruning."""

import copy

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn.parallel import DataParallel

from tp_twoaxis.runtime.model_state import ModelSnapshot, eval_mode, fork_rng, train_mode, unwrap


def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def prune_half(model, x):
    """Remove half the channels of every group but the classifier's, by Torch-Pruning's dependency graph."""
    graph = tp.DependencyGraph().build_dependency(model, x)
    for group in graph.get_all_groups(ignored_layers=[model.fc], root_module_types=[nn.Conv2d]):
        group.prune(idxs=list(range(len(group[0].idxs) // 2)))


def structure(model):
    """Every module's simple attributes, and the identities of its tensors."""
    simple = (int, float, str, tuple, bool, type(None))
    return {
        name: (
            {k: v for k, v in vars(module).items() if isinstance(v, simple)},
            {k: id(v) for k, v in module._parameters.items()},
            {k: id(v) for k, v in module._buffers.items()},
            {k: id(v) for k, v in module._modules.items()},
        )
        for name, module in model.named_modules()
    }


def test_unwrap_nested_wrappers():
    net = small_net()
    assert unwrap(net) is net
    assert unwrap(DataParallel(torch.compile(DataParallel(net)))) is net


def test_eval_mode_restores_each_flag_and_the_grad_mode():
    net = small_net().train()
    net[1].eval()
    before = [module.training for module in net.modules()]
    with eval_mode(net):
        assert not any(module.training for module in net.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in net.modules()] == before
    with pytest.raises(RuntimeError, match="inside"), eval_mode(net):
        raise RuntimeError("inside")
    assert [module.training for module in net.modules()] == before
    assert torch.is_grad_enabled()
    with torch.no_grad():
        with eval_mode(net):
            pass
        assert not torch.is_grad_enabled()


def test_train_mode_restores_each_flag_and_the_grad_mode():
    net = small_net().eval()
    with torch.no_grad():
        with train_mode(net):
            assert all(module.training for module in net.modules())
            assert torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match="inside"), train_mode(net):
            raise RuntimeError("inside")
        assert not torch.is_grad_enabled()
    assert not any(module.training for module in net.modules())
    net.train()
    net[1].eval()
    before = [module.training for module in net.modules()]
    with train_mode(net):
        assert [module.training for module in net.modules()] == before
    assert [module.training for module in net.modules()] == before


def test_fork_rng_also_after_an_error():
    torch.manual_seed(3)
    state = torch.get_rng_state()

    @fork_rng()
    def draw_and_fail():
        torch.rand(100)
        raise RuntimeError("drawn")

    with pytest.raises(RuntimeError, match="drawn"):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), state)


def test_snapshot_undoes_pruning_of_resnet18():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    model.layer1[0].conv1.weight.requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = model.layer1.register_forward_hook(lambda *_: None)
    expected, before, size = model(x), structure(model), sum(p.numel() for p in model.parameters())
    snapshot = ModelSnapshot(model)

    prune_half(model, x)
    model.train()
    model.extra = nn.Identity()
    model.layer2[0].register_forward_pre_hook(lambda *_: None)
    assert sum(p.numel() for p in model.parameters()) < size / 2
    assert model.conv1.out_channels == 32

    for _ in range(2):
        snapshot.restore()
        assert structure(model) == before
        assert all(p.grad is grads[name] for name, p in model.named_parameters())
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert not model.layer2[0]._forward_pre_hooks
        assert torch.equal(model(x), expected)
    handle.remove()  # still bound to the live dict
    assert not model.layer1._forward_hooks


def test_snapshot_undoes_casts_and_data_assignment():
    model = small_net()
    snapshot, expected = ModelSnapshot(model), copy.deepcopy(model)
    weight = model[0].weight
    model.half()
    weight.data = weight.data[:2]
    model[1].running_mean.data = torch.zeros(3)
    snapshot.restore()
    assert model[0].weight is weight
    for got, wanted in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_snapshot_copies_no_tensor():
    model = small_net()
    snapshot = ModelSnapshot(model)
    with torch.no_grad():
        model[0].weight.zero_()
    snapshot.restore()
    assert model[0].weight.count_nonzero() == 0  # the documented limit: contents are shared
