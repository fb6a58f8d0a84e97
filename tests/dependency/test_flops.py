"""The counter against arithmetic written out by hand, published numbers and the other counters."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

from tp_twoaxis import TwoAxisError
from tp_twoaxis.dependency.flops import all_tensors, count_macs, measure_latency


class Mixed(nn.Module):
    """One of every kind of layer, on 3x16x16 images."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.transposed = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.unused = nn.Linear(7, 7)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 16 * 16, 10))

    def forward(self, x):
        x = F.relu(self.norm(self.strided(x)))
        return self.head(self.transposed(self.depthwise(self.grouped(x))))


MIXED = {
    "strided": 8 * 3 * 3 * 3 * 8 * 8,
    "grouped": 12 * (8 // 4) * 3 * 3 * 8 * 8,
    "depthwise": 12 * 1 * 5 * 5 * 8 * 8,
    "transposed": 12 * 6 * 2 * 2 * 8 * 8,  # every input pixel meets the whole kernel
    "head.1": 6 * 16 * 16 * 10,
}


def vit_macs(*, image, patch, width, heads_width, mlp, depth, classes):
    """A ViT by the book; ``heads_width`` is heads * dimension of a head, below ``width`` when pruned."""
    patches = (image // patch) ** 2
    tokens = patches + 1
    qkv_and_projection = 4 * tokens * width * heads_width
    attention = 2 * tokens * tokens * heads_width
    return (
        patches * 3 * patch**2 * width
        + depth * (qkv_and_projection + attention + 2 * tokens * width * mlp)
        + width * classes
    )


class Attention(nn.Module):
    """Self-attention whose heads may be narrower than the stream, as after pruning."""

    def __init__(self, width, heads, heads_width):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads_width)
        self.proj = nn.Linear(heads_width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_every_layer_kind_by_hand():
    count = count_macs(Mixed(), torch.zeros(1, 3, 16, 16))
    assert count.total == sum(MIXED.values())
    others = {"norm": 0, "unused": 0, "head.0": 0, "head": MIXED["head.1"], "": sum(MIXED.values())}
    assert count.by_module == {**MIXED, **others}
    assert count.params == sum(p.numel() for p in Mixed().parameters())


@pytest.mark.parametrize("batch", [2, 5])
def test_a_batch_counts_as_one_example(batch):
    assert count_macs(Mixed(), torch.zeros(batch, 3, 16, 16)) == count_macs(Mixed(), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(("name", "giga"), [("resnet18", 1.8141), ("mobilenet_v2", 0.3008), ("vit_b_16", 17.5638)])
def test_known_networks_at_224(name, giga):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
        x = torch.zeros(1, 3, 224, 224)
    assert count_macs(model, x).total / 1e9 == pytest.approx(giga, abs=5e-5)


def test_vit_b_16_equals_the_formula():
    with torch.device("meta"):
        model, x = torchvision.models.vit_b_16(weights=None), torch.zeros(2, 3, 224, 224)
    expected = vit_macs(image=224, patch=16, width=768, heads_width=768, mlp=3072, depth=12, classes=1000)
    count = count_macs(model, x)
    assert count.total == expected
    attention = 4 * 197 * 768 * 768 + 2 * 197 * 197 * 768
    block = "encoder.layers.encoder_layer_0"
    assert count.by_module[f"{block}.self_attention"] == attention
    assert count.by_module[f"{block}.self_attention.out_proj"] == 0  # runs inside its parent
    assert count.by_module[block] == attention + 2 * 197 * 768 * 3072


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_of_half_width_equals_the_formula(device):
    width, tokens, half = 64, 17, 32
    with torch.device(device):
        model, x = Attention(width, 4, half), torch.zeros(2, tokens, width)
    expected = 4 * tokens * width * half + 2 * tokens * tokens * half
    count = count_macs(model, x)
    assert count.total == expected
    assert count.by_module["qkv"] == 3 * tokens * width * half


def test_the_inference_fast_path_does_not_hide_work():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    expected = 4 * 7 * 32 * 32 + 2 * 7 * 7 * 32 + 2 * 7 * 32 * 64
    assert count_macs(layer, torch.zeros(1, 7, 32)).total == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_and_nested_modules_are_counted_by_object():
    shared = nn.Linear(4, 4)
    count = count_macs(nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()), shared), torch.zeros(1, 4))
    assert count.total == 3 * 16
    assert count.by_module == {"": 48, "0": 48, "1": 16, "1.1": 0}
    assert count.params == 4 * 4 + 4


def test_the_model_and_the_process_stay_as_they_were():
    torch.manual_seed(0)
    model = Mixed().train()
    model.head.eval()
    model.register_forward_hook(lambda module, *_: setattr(module, "last", torch.rand(1)))
    before, state = copy.deepcopy(model), torch.get_rng_state()
    count_macs(model, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not hasattr(model, "last")
    for (name, module), twin in zip(model.named_modules(), before.modules(), strict=True):
        assert module.training == twin.training, name
        assert vars(module).keys() == vars(twin).keys(), name
        assert len(module._forward_hooks) == len(twin._forward_hooks), name
    for got, wanted in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(got, wanted)


def test_state_returns_after_an_error():
    model = Mixed().train()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.zeros(1, 4, 16, 16))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()
    assert count_macs(model, torch.zeros(1, 3, 16, 16)).total == sum(MIXED.values())


def test_wrappers_are_looked_through():
    expected = count_macs(Mixed(), torch.zeros(1, 3, 16, 16))
    assert count_macs(DataParallel(Mixed()), torch.zeros(1, 3, 16, 16)) == expected
    assert count_macs(torch.compile(Mixed(), backend="eager"), torch.zeros(1, 3, 16, 16)) == expected


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x, y, scale=1.0):
        return scale * (self.a(x) + self.b(y))


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.zeros(2, 4), torch.zeros(2, 5)),
        [torch.zeros(2, 4), torch.zeros(2, 5), 2.0],
        {"x": torch.zeros(2, 4), "y": torch.zeros(2, 5)},
    ],
    ids=["tuple", "list", "keywords"],
)
def test_inputs_of_every_form(inputs):
    assert count_macs(TwoInputs(), inputs).total == 4 * 3 + 5 * 3
    assert measure_latency(TwoInputs(), inputs, batch_size=3, repeats=1, warmup=0) > 0


class OncePerBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.position, self.head = nn.Linear(1, 1), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x) + self.position(torch.zeros(1, 1))


def test_work_done_once_a_batch_is_refused_and_exact_for_one():
    with pytest.raises(TwoAxisError, match=r"each of 3 examples, got 19 MACs .* batch size 1"):
        count_macs(OncePerBatch(), torch.zeros(3, 3))
    assert count_macs(OncePerBatch(), torch.zeros(1, 3)).total == 7


@pytest.mark.parametrize("inputs", [(), {}, torch.tensor(1.0), torch.zeros(0, 3)])
def test_inputs_without_an_example_are_refused(inputs):
    with pytest.raises(TwoAxisError, match=r"example_inputs: expected a first tensor \[N, ...\]"):
        count_macs(nn.Linear(3, 2), inputs)


def test_latency_repeats_the_first_example():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, table):
            seen.append((x, table, self.training, torch.is_grad_enabled()))
            return x

    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    table = torch.zeros(7, 3)
    model = Spy().train()
    assert measure_latency(model, (x, table), batch_size=5, repeats=3, warmup=1) >= 0
    assert len(seen) == 4
    batch, passed, training, grad = seen[-1]
    assert torch.equal(batch, x[:1].expand(5, 3, 4, 4))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert passed is table
    assert (training, grad, model.training) == (False, False, True)


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_latency_refuses_empty_runs(numbers):
    with pytest.raises(TwoAxisError, match="expected at least"):
        measure_latency(nn.Linear(3, 2), torch.zeros(1, 3), *numbers)


def test_latency_refuses_meta():
    with pytest.raises(TwoAxisError, match="meta"):
        measure_latency(nn.Linear(3, 2, device="meta"), torch.zeros(1, 3, device="meta"), 1)


@dataclass
class Answer:
    scores: torch.Tensor
    hidden: tuple


def test_tensors_are_found_in_whatever_a_model_returns():
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert [len(t) for t in all_tensors({"a": [a, None], "b": Answer(b, (c, "name"))})] == [1, 2, 3]


def test_the_count_tells_the_shapes_of_all_outputs():
    class Two(nn.Module):
        def forward(self, x):
            return {"map": x, "rest": (x.mean((2, 3)), None)}

    batch = count_macs(Two(), torch.zeros(2, 3, 4, 4))
    assert batch.outputs == [(2, 3, 4, 4), (2, 3)]
    assert batch == count_macs(Two(), torch.zeros(1, 3, 4, 4))
