"""Model factories and names."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.models import (
    CifarResNet,
    available_models,
    build_model,
    cifar_resnet20_conv_shortcut,
    cifar_resnet20_option_a,
    load_weights,
)
from tp_twoaxis.models.cifar_resnet import PadShortcut

CHECKPOINTS = os.environ.get("TP_TWOAXIS_CHECKPOINTS")
needs_checkpoints = pytest.mark.skipif(
    not CHECKPOINTS, reason="TP_TWOAXIS_CHECKPOINTS does not name the folder of pretrained weights"
)
IMAGES = torch.zeros(2, 3, 16, 16)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norm values that a silenced or shifted channel would not survive unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def parts(removed, dense):
    """Channels that are gone from each batch norm, found by matching its weights."""
    norms = dict(removed.named_modules())
    for name, module in dense.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            yield module, ~torch.isin(module.weight.data, norms[name].weight.data)


@pytest.mark.parametrize(
    ("factory", "parameters", "buffers", "head"),
    [
        (cifar_resnet20_option_a, 269_722, 0, "linear"),
        (cifar_resnet20_conv_shortcut, 272_474, 2, "fc"),
    ],
)
def test_published_sizes_and_names(factory, parameters, buffers, head):
    model = factory()
    assert sum(p.numel() for p in model.parameters()) == parameters
    names = {name.rsplit(".", 1)[0] for name in model.state_dict()}
    blocks = {f"layer{s}.{i}.{part}" for s in (1, 2, 3) for i in range(3) for part in ("conv1", "bn1", "conv2", "bn2")}
    shortcuts = {f"layer{s}.0.downsample.{i}" for s in (2, 3) for i in range(buffers)}
    assert names == {"conv1", "bn1", head} | blocks | shortcuts
    assert model.unprunable_layers() == [model.get_submodule(head)]


def test_dense_option_a_is_the_definition():
    x = torch.randn(3, 16, 9, 8)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(PadShortcut(8)(x), expected)
    with torch.no_grad():
        assert torch.equal(PadShortcut(8)(x.half()), expected.half())


def test_option_a_trains_and_has_no_hidden_state():
    shortcut = PadShortcut(2)
    assert not list(shortcut.parameters())
    assert not shortcut.state_dict()
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    shortcut(x).sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 16  # 4 of 16 positions of 4 channels
    copy.deepcopy(shortcut)(x.detach())


def test_option_a_costs_nothing():
    with FlopCounterMode(display=False) as counter:
        cifar_resnet20_option_a()(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * 40_551_040  # 40.55 M multiply-adds: convolutions and head alone


@pytest.mark.parametrize("kind", ["pad", "conv"])
def test_every_group_of_torch_pruning_prunes_to_the_silenced_dense_network(kind):
    """Removal must equal setting the removed channels' batch norm output to zero in the dense network."""
    dense = randomised(CifarResNet(20, shortcut=kind))
    x = torch.randn(2, 3, 16, 16)
    groups = tp.DependencyGraph().build_dependency(dense, IMAGES)
    roots = [
        groups._module2name[group[0].dep.target.module]
        for group in groups.get_all_groups(ignored_layers=dense.unprunable_layers())
    ]
    assert len(roots) == (10 if kind == "pad" else 12)
    for root in {*roots, "layer2.0.conv2", "layer3.2.conv2"}:
        pruned, reference = copy.deepcopy(dense), copy.deepcopy(dense)
        graph = tp.DependencyGraph().build_dependency(pruned, IMAGES)
        layer = pruned.get_submodule(root)
        channels = layer.out_channels
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, [0, 3, channels // 2, channels - 1])
        assert graph.check_pruning_group(group)
        group.prune()
        gone = 0
        for norm, mask in parts(pruned, reference):
            norm.weight.data[mask] = 0
            norm.bias.data[mask] = 0
            gone += int(mask.sum())
        assert gone >= 4
        torch.testing.assert_close(pruned(x), reference(x), rtol=1e-4, atol=1e-4, msg=root)


def test_option_a_prunes_repeatedly_until_one_shared_channel_is_left():
    dense = randomised(cifar_resnet20_option_a())
    pruned, x = copy.deepcopy(dense), torch.randn(2, 3, 16, 16)
    graph = tp.DependencyGraph().build_dependency(pruned, IMAGES)
    for root, channel in [("layer3.0.conv2", 0), *[("conv1", 0)] * 15, ("layer2.1.conv2", 0)]:
        layer = pruned.get_submodule(root)
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, [channel]).prune()
    assert pruned.conv1.out_channels == 1
    assert pruned.layer2[0].downsample.front.num_features == 7
    # stage 2's own channels lie in the middle part of stage 3, so that its zeros lose the first removal only
    assert pruned.layer3[0].downsample.front.num_features == 15
    assert pruned.layer3[2].conv2.out_channels == 64 - 1 - 15 - 1
    for norm, mask in parts(pruned, dense):
        norm.weight.data[mask] = 0
        norm.bias.data[mask] = 0
    torch.testing.assert_close(pruned(x), dense(x), rtol=1e-4, atol=1e-4)


def test_plain_padding_is_mapped_wrongly_by_torch_pruning():
    """The reason for ZeroChannels: when this fails, Torch-Pruning has learned padding and F.pad will do."""

    class Plain(nn.Module):
        def forward(self, x):
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))

    model = cifar_resnet20_option_a()
    model.layer2[0].downsample = Plain()
    graph = tp.DependencyGraph().build_dependency(model, IMAGES)
    group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [3])
    wide = next(item for item in group if item.dep.target.module is model.layer2[0].conv2)
    assert wide.idxs == [3]  # channel 3 of the stem is channel 3 + 8 of stage 2


@pytest.mark.parametrize(("depth", "kind"), [(21, "pad"), (2, "pad"), (20, "projection")])
def test_unknown_shapes_of_resnet(depth, kind):
    with pytest.raises(TwoAxisError, match="expected"):
        CifarResNet(depth, shortcut=kind)


def test_depth_56():
    model = build_model("cifar_resnet56_option_a", num_classes=100)
    assert len(model.layer3) == 9
    assert model(IMAGES).shape == (2, 100)


def test_build_from_libraries():
    assert build_model("resnet18", num_classes=7).fc.out_features == 7
    assert type(build_model("torchvision:squeezenet1_1")).__module__.startswith("torchvision")
    model = build_model("timm:deit_tiny_patch16_224", num_classes=5)
    assert type(model).__module__.startswith("timm")
    assert model.head.out_features == 5
    assert type(build_model("resnet18d")).__module__.startswith("timm")


def test_build_from_factory(tmp_path, monkeypatch):
    (tmp_path / "my_twoaxis_nets.py").write_text(
        "from torch import nn\ntiny = lambda num_classes=3: nn.Linear(4, num_classes)\n"
        "def fixed(): return nn.Linear(1, 1)\ndef wrong(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build_model("my_twoaxis_nets:tiny").out_features == 3
    assert build_model("my_twoaxis_nets:tiny", num_classes=6).out_features == 6
    for spec, options, message in [
        ("my_twoaxis_nets:tinny", {}, "did you mean tiny"),
        ("my_twoaxis_nets:fixed", {"num_classes": 2}, "has no num_classes"),
        ("my_twoaxis_nets:wrong", {}, "got int"),
        ("my_twoaxis_nets:tiny", {"pretrained": True}, "load_weights"),
        ("no_such_module_here:f", {}, "No module named"),
        (":f", {}, "module:factory"),
    ]:
        with pytest.raises(TwoAxisError, match=message):
            build_model(spec, **options)


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("resnet5O", "resnet50"),
        ("cifar_resnet20", "cifar_resnet20_option_a"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("timm:deit_tiny_patch16_225", "timm:deit_tiny_patch16_224"),
        ("", "built-in name"),
        ("fasterrcnn_resnet50_fpn", "available_models"),
    ],
)
def test_unknown_names_list_near_ones(spec, near):
    with pytest.raises(TwoAxisError, match="module:factory") as error:
        build_model(spec)
    assert near in str(error.value)


def test_library_refusals_are_wrapped(monkeypatch):
    import torchvision

    def offline(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(TwoAxisError, match=r"torchvision:resnet18: .*network is unreachable") as error:
        build_model("resnet18", pretrained=True)
    assert "https://download.pytorch.org/models/resnet18-" in str(error.value)
    assert "give the file to --checkpoint (in Python: load_weights" in str(error.value)
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(TwoAxisError, match=r"https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k \(model"):
        build_model("timm:deit_tiny_patch16_224", pretrained=True)
    with pytest.raises(TwoAxisError, match="pretrained"):
        build_model("cifar_resnet20_option_a", pretrained=True)


def test_arguments_that_a_library_refuses_are_not_taken_for_a_missing_network():
    with pytest.raises(TwoAxisError, match="leave num_classes out"):
        build_model("resnet18", num_classes=3, pretrained=True)


def test_available_models_can_be_built_by_name():
    names = available_models()
    assert {"cifar_resnet20_conv_shortcut", "torchvision:resnet50", "timm:deit_tiny_patch16_224"} <= set(names)
    assert len(names) == len(set(names))
    assert "torchvision:fasterrcnn_resnet50_fpn" not in names


@needs_checkpoints
@pytest.mark.parametrize("kind", ["option_a", "conv_shortcut"])
def test_published_checkpoints_load_strictly(kind):
    path = Path(CHECKPOINTS, f"cifar10_resnet20_{kind}.safetensors")
    model = build_model(f"cifar_resnet20_{kind}")
    model.load_state_dict(load_file(path), strict=True)
    load_weights(build_model(f"cifar_resnet20_{kind}"), path)
