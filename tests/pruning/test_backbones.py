"""The backbones that people prune, at full width and random weights: pruned to half, then used in every way."""

import copy

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn

from tp_twoaxis import load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.dependency.flops import count_macs

CLASSES = 10
SIZE = 64


def hugging_face_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=SIZE, num_hidden_layers=2, num_labels=CLASSES)
    return transformers.ViTForImageClassification(config)


# the twelve blocks of a ViT-B are alike: two of them, at full width, show what there is to see
BACKBONES = {
    "torchvision resnet18": lambda: tv.resnet18(num_classes=CLASSES),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=CLASSES),
    "torchvision resnet50": lambda: tv.resnet50(num_classes=CLASSES),
    "timm resnet50": lambda: timm.create_model("resnet50", num_classes=CLASSES),
    "torchvision vgg16_bn": lambda: tv.vgg16_bn(num_classes=CLASSES),
    "timm vgg16_bn": lambda: timm.create_model("vgg16_bn", num_classes=CLASSES),
    "torchvision mobilenet_v2": lambda: tv.mobilenet_v2(num_classes=CLASSES),
    "timm mobilenetv2_100": lambda: timm.create_model("mobilenetv2_100", num_classes=CLASSES),
    "torchvision convnext_tiny": lambda: tv.convnext_tiny(num_classes=CLASSES),
    "timm convnext_tiny": lambda: timm.create_model("convnext_tiny", num_classes=CLASSES),
    "torchvision vit_b_16": lambda: tv.VisionTransformer(SIZE, 16, 2, 12, 768, 3072, num_classes=CLASSES),
    "timm vit_base": lambda: timm.create_model("vit_base_patch16_224", img_size=SIZE, depth=2, num_classes=CLASSES),
    "timm deit_tiny": lambda: timm.create_model("deit_tiny_patch16_224", img_size=SIZE, num_classes=CLASSES),
    "torchvision alexnet": lambda: tv.alexnet(num_classes=CLASSES),
    "transformers vit_base": hugging_face_vit,
}


def build(name):
    torch.manual_seed(0)
    net = BACKBONES[name]().eval()
    return net, torch.randn(4, 3, SIZE, SIZE)


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("name", BACKBONES)
def test_half_of_the_macs(name, tmp_path):
    net, images = build(name)
    report = prune_to_flops(net, images[:1], "capture", flops=0.5, loader=[images], progress=False)
    assert abs(report.achieved - 0.5) <= 0.005
    assert count_macs(net, images[:1]).total == report.after.macs
    assert not [note for note in report.notes if "keeps" in note or "stays" in note]
    for group in report.groups:
        assert len(group.kept) >= 0.1 * (len(group.kept) + len(group.removed))

    save_pruned(net, tmp_path / "net.safetensors", report)
    with torch.no_grad():
        expected = logits(net(images))
        assert expected.shape == (len(images), CLASSES)
        assert torch.equal(logits(load_pruned(tmp_path / "net.safetensors", BACKBONES[name])(images)), expected)
        exported = torch.export.export(net, (images,)).module()
        torch.testing.assert_close(logits(exported(images)), expected)

    logits(net.train()(images)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm mobilenetv2_100", "timm deit_tiny"])
def test_onnx(name, tmp_path):
    onnx_reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    net, images = build(name)
    prune_to_flops(net, images[:1], "l2", flops=0.5, repair=(), progress=False)
    program = torch.onnx.export(net, (images,), dynamo=True, verbose=False)
    program.save(str(tmp_path / "net.onnx"))
    session = onnx_reference.ReferenceEvaluator(str(tmp_path / "net.onnx"))
    (got,) = session.run(None, {session.input_names[0]: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), net(images), rtol=1e-3, atol=1e-4)


def test_a_convnext_block_keeps_what_belongs_to_its_channels():
    net, images = build("timm convnext_tiny")
    dense = copy.deepcopy(net)
    for module in [*net.modules(), *dense.modules()]:
        if hasattr(module, "gamma"):
            with torch.no_grad():
                module.gamma.copy_(torch.arange(float(len(module.gamma))))  # a marker that says which channel
    report = prune_to_flops(net, images[:1], "l2", flops=0.5, repair=(), progress=False)
    for stage in range(4):
        block, old = net.stages[stage].blocks[0], dense.stages[stage].blocks[0]
        removed = set(report.removed_channels[f"stages.{stage}.blocks.0.conv_dw"])
        kept = [k for k in range(old.conv_dw.out_channels) if k not in removed]
        assert removed
        assert removed == set(report.removed_channels[f"stages.{stage}.blocks.0.mlp.fc2"])
        assert torch.equal(block.gamma, old.gamma[kept])
        assert torch.equal(block.conv_dw.weight, old.conv_dw.weight[kept])
        assert torch.equal(block.norm.weight, old.norm.weight[kept])


def test_hidden_channels_of_a_convnext_leave_as_if_nobody_read_them():
    torch.manual_seed(0)
    net = timm.create_model("convnext_atto", num_classes=CLASSES).eval()
    for module in net.modules():
        if hasattr(module, "gamma"):
            nn.init.ones_(module.gamma)  # 1e-6 at birth: the blocks would do nothing
    dense = copy.deepcopy(net)
    images = torch.randn(2, 3, SIZE, SIZE)
    others = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and not n.endswith("fc1")]
    options = {"ignored_layers": others, "repair": (), "progress": False}
    report = prune_to_flops(net, images[:1], "l2", flops=0.6, **options)
    assert report.removed_channels
    for name, removed in report.removed_channels.items():
        assert name.endswith("mlp.fc1")
        with torch.no_grad():
            dense.get_submodule(name.replace("fc1", "fc2")).weight[:, removed] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(net(images), dense(images), rtol=1e-4, atol=1e-5)


def test_mobilenet_expansions_lose_the_same_channels_in_all_three_layers():
    net, images = build("torchvision mobilenet_v2")
    dense = copy.deepcopy(net)
    report = prune_to_flops(net, images[:1], "l2", flops=0.5, repair=(), progress=False)
    checked = 0
    for name, module in dense.named_modules():
        if isinstance(module, tv.mobilenetv2.InvertedResidual) and len(module.conv) == 4:
            removed = report.removed_channels.get(f"{name}.conv.0.0", [])
            assert removed == report.removed_channels.get(f"{name}.conv.1.0", [])
            kept = [k for k in range(module.conv[0][0].out_channels) if k not in set(removed)]
            outputs = set(report.removed_channels.get(f"{name}.conv.2", []))
            rows = [k for k in range(module.conv[2].out_channels) if k not in outputs]
            new = net.get_submodule(name).conv
            assert torch.equal(new[1][0].weight, module.conv[1][0].weight[kept])
            assert torch.equal(new[2].weight, module.conv[2].weight[rows][:, kept])
            checked += bool(removed)
    assert checked > 5


def test_transformer_parameters_follow_the_width():
    net, images = build("timm deit_tiny")
    dense = copy.deepcopy(net)
    report = prune_to_flops(net, images[:1], "l2", flops=0.5, repair=(), progress=False)
    removed = set(report.removed_channels["patch_embed.proj"])
    kept = [k for k in range(192) if k not in removed]
    assert removed
    assert torch.equal(net.pos_embed, dense.pos_embed[..., kept])
    assert torch.equal(net.cls_token, dense.cls_token[..., kept])
    assert isinstance(net.norm, nn.LayerNorm)
    assert net.norm.normalized_shape == (len(kept),)
