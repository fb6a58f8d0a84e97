"""Pruned networks survive the disk bit for bit, in another process, and bad files are refused."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

from tp_twoaxis import TwoAxisError
from tp_twoaxis.errors import FileFormatError
from tp_twoaxis.pruning.checkpoint import FORMAT, VERSION, load_pruned, loading_notes, read_header, save_pruned
from tp_twoaxis.runtime.serialization import write_tensors


def resnet():
    return torchvision.models.resnet18(num_classes=7)


def resnet_channels_last():
    return resnet().to(memory_format=torch.channels_last)


def vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=7
    )


class NormNet(nn.Module):
    """Grouped and depthwise convolutions, several norms, a non-persistent buffer of a channel's width."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.mix = nn.Conv2d(16, 16, 1)
        self.norm = nn.GroupNorm(1, 16)
        self.head = nn.Linear(16, 7)
        self.register_buffer("offset", torch.linspace(0, 1, 7), persistent=False)

    def forward(self, x):
        x = self.depthwise(F.relu(self.bn(self.stem(x))))
        return self.head(self.norm(self.mix(x)).mean((2, 3))) + self.offset


FACTORIES = {"resnet": resnet, "resnet_channels_last": resnet_channels_last, "vit": vit, "norm_net": NormNet}


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pruned(name):
    """A network after Torch-Pruning removed about half of its channels, with statistics of its own."""
    torch.manual_seed(0)
    model, x = FACTORIES[name](), images()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.train()(x)
    tokens = [model.class_token, model.encoder.pos_embedding] if name == "vit" else []
    head = model.get_submodule({"vit": "heads.head", "norm_net": "head"}.get(name, "fc"))
    tp.pruner.MagnitudePruner(
        model,
        x,
        tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[head],
        round_to=4,
        num_heads={},
        unwrapped_parameters=[(parameter, 2) for parameter in tokens],
        in_channel_groups={},
        out_channel_groups={},
    ).step()
    if name == "vit":  # the residual stream, the attention in it and the MLPs
        model.hidden_dim = model.conv_proj.out_channels
        assert model.encoder.layers[0].self_attention.embed_dim == model.hidden_dim == 16
    if name == "resnet_channels_last":
        model.to(memory_format=torch.channels_last)
    return model.eval()


FRESH = """
import importlib.util, pathlib, sys, torch, safetensors.torch
spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
folder = pathlib.Path(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))
outputs = {}
with torch.no_grad():
    for name, factory in cases.FACTORIES.items():
        x = cases.images()
        if "channels_last" in name:
            x = x.to(memory_format=torch.channels_last)
        outputs[name] = cases.load_pruned(folder / f"{name}.safetensors", factory)(x)
safetensors.torch.save_file(outputs, folder / "outputs")
"""


def test_bit_identical_in_a_fresh_process(tmp_path):
    expected = {}
    for name, factory in FACTORIES.items():
        model = pruned(name)
        dense = sum(p.numel() for p in factory().parameters())
        assert sum(p.numel() for p in model.parameters()) < 0.8 * dense
        save_pruned(model, tmp_path / f"{name}.safetensors")
        x = images()
        if "channels_last" in name:
            x = x.to(memory_format=torch.channels_last)
        with torch.no_grad():
            expected[name] = model(x)
    arguments = [__file__, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, timeout=120)
    outputs = safetensors.torch.load_file(tmp_path / "outputs")
    for name, wanted in expected.items():
        assert torch.equal(outputs[name], wanted), name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"{n}.safetensors" for n in expected), "outputs"])


def test_structure_values_and_layout_return(tmp_path):
    model, path = pruned("resnet_channels_last"), tmp_path / "net.safetensors"
    save_pruned(DataParallel(torch.compile(model, backend="eager")), path)
    loaded = load_pruned(path, lambda: DataParallel(resnet()))
    assert str(loaded) == str(model)
    assert not loaded.training
    assert loaded.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for (name, got), (other, wanted) in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert got.stride() == wanted.stride(), name
        assert torch.equal(got, wanted), name


def test_report_and_header(tmp_path):
    class Report:
        def to_json(self):
            return '{"kept": 0.5}'

    path = tmp_path / "net.safetensors"
    save_pruned(nn.LayerNorm([3, 4]), path, Report())
    header = read_header(path)
    assert json.loads(header["report"]) == {"kept": 0.5}
    assert header["modules"][""] == {"class": "LayerNorm", "attributes": {"normalized_shape": [3, 4]}}
    save_pruned(nn.LayerNorm([3, 4]), path)
    assert read_header(path)["report"] is None


class Tied(nn.Module):
    def __init__(self, width=8, tie=True):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.block = nn.Linear(width, width)
        self.again = self.block
        if tie:
            self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.again(self.block(self.embed(x))))


@pytest.mark.parametrize("tie", [True, False])
def test_tied_parameters_are_tied_as_they_were(tmp_path, tie):
    model, path = Tied(6, tie).eval(), tmp_path / "net.safetensors"
    save_pruned(model, path)
    loaded = load_pruned(path, lambda: Tied(tie=not tie))
    assert (loaded.out.weight is loaded.embed.weight) is tie
    assert loaded.again.weight is loaded.block.weight
    assert len(safetensors.torch.load_file(path)) == (3 if tie else 4)
    x = torch.arange(11)
    assert torch.equal(loaded(x), model(x))


def test_views_of_one_memory_are_stored_apart(tmp_path):
    memory, path = torch.randn(2, 4), tmp_path / "net.safetensors"
    model = nn.ParameterList([nn.Parameter(memory[0]), nn.Parameter(memory[1]), nn.Parameter(memory.t())])
    save_pruned(model, path)
    loaded = load_pruned(path, lambda: nn.ParameterList([torch.zeros(4), torch.zeros(4), torch.zeros(4, 2)]))
    assert all(torch.equal(got, wanted) for got, wanted in zip(loaded, model, strict=True))
    assert loaded[2].stride() == (1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_return(tmp_path, dtype):
    model, path = NormNet().to(dtype).eval(), tmp_path / "net.safetensors"
    save_pruned(model, path)
    loaded = load_pruned(path, NormNet)
    assert loaded.head.weight.dtype == loaded.offset.dtype == dtype
    assert torch.equal(loaded(images().to(dtype)), model(images().to(dtype)))


def test_non_persistent_buffers_follow_the_network(tmp_path):
    model, path = NormNet().eval(), tmp_path / "net.safetensors"
    model.head, model.offset = nn.Linear(16, 5), torch.randn(5)
    save_pruned(model, path)
    loaded = load_pruned(path, NormNet)
    assert torch.equal(loaded.offset, model.offset)
    assert "offset" not in loaded.state_dict()
    assert torch.equal(loaded(images()), model(images()))


def test_recurrent_layers_use_the_loaded_weights(tmp_path):
    model, path = nn.LSTM(4, 3).eval(), tmp_path / "net.safetensors"
    save_pruned(model, path)
    x = torch.randn(2, 1, 4)
    assert torch.equal(load_pruned(path, lambda: nn.LSTM(4, 5))(x)[0], model(x)[0])


def test_a_bias_added_or_removed_by_repair(tmp_path):
    with_bias, without, path = (
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(3, 4, 1, bias=False),
        tmp_path / "net.safetensors",
    )
    save_pruned(with_bias, path)
    loaded = load_pruned(path, lambda: nn.Conv2d(3, 6, 1, bias=False))
    assert torch.equal(loaded.bias, with_bias.bias)
    assert loaded.bias.requires_grad
    save_pruned(without, path)
    assert load_pruned(path, lambda: nn.Conv2d(3, 6, 1)).bias is None


def test_the_factory_decides_on_training_and_may_be_meta(tmp_path):
    model, path = NormNet().eval(), tmp_path / "net.safetensors"
    model.settings = [3, 4]
    save_pruned(model, path)

    def factory():
        with torch.device("meta"):
            net = NormNet()
        net.stem.requires_grad_(False)
        net.settings = [9]
        return net

    state = torch.get_rng_state()
    loaded = load_pruned(path, factory)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.stem.weight.requires_grad
    assert loaded.head.weight.requires_grad
    assert loaded.settings == [3, 4]
    assert torch.equal(loaded(images()), model(images()))


def test_only_integers_that_are_structure_are_kept(tmp_path):
    model, path = nn.Identity(), tmp_path / "net.safetensors"
    vars(model).update(a=3, b=(1, 2), c=True, d=1.5, e=(1.5, 2), f="x", _g=4, h=(), i=(True, 1))
    save_pruned(model, path)
    assert read_header(path)["modules"][""]["attributes"] == {"a": 3, "b": [1, 2]}


class Scaled(nn.Linear):
    """An attribute that follows the width of heads, and one that does not."""

    def __init__(self, scale=0.25, drop=0.1):
        super().__init__(4, 2)
        self.scale, self.drop = scale, drop


def test_scales_of_attention_return_and_other_floats_do_not(tmp_path):
    save_pruned(Scaled(0.5, 0.0), tmp_path / "net.safetensors")
    loaded = load_pruned(tmp_path / "net.safetensors", Scaled)
    assert (loaded.scale, loaded.drop) == (0.5, 0.1)


def test_files_of_the_first_version_load(tmp_path, monkeypatch):
    monkeypatch.setattr("tp_twoaxis.pruning.checkpoint.VERSION", 1)
    net = nn.Linear(4, 2)
    save_pruned(net, tmp_path / "net.safetensors")
    monkeypatch.undo()
    assert torch.equal(load_pruned(tmp_path / "net.safetensors", lambda: nn.Linear(4, 3)).weight, net.weight)


class Later(nn.Linear):
    """Gets an attribute when it runs first."""

    def __init__(self):
        super().__init__(4, 2)
        self.counted, self.drop, self.flag = None, 0.5, True

    def forward(self, x):
        self.counted, self.grid = len(x), (1, len(x))
        return super().forward(x)


class Remembering(nn.Linear):
    """Computes something for a shape that it meets anew, as ultralytics' detection head; heads is its structure."""

    shape = None
    heads = 4

    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        if self.shape != x.shape:
            self.shape, self.factor = x.shape, torch.tensor(float(len(x)))
        return super().forward(x) * self.factor / self.heads


def test_what_a_forward_remembers_is_left_to_the_next_forward(tmp_path):
    path, net, x = tmp_path / "net.safetensors", Remembering(), torch.ones(3, 4)
    net.heads = 2
    net(x)
    save_pruned(net, path)
    loaded = load_pruned(path, Remembering)
    assert (loaded.shape, loaded.heads) == (None, 2)
    assert torch.equal(loaded(x), net(x))


def test_attributes_that_the_factory_s_modules_lack_are_refused(tmp_path):
    path, net = tmp_path / "net.safetensors", Later()
    net.drop, net.counted = 0, 3
    save_pruned(net, path)
    loaded = load_pruned(path, Later)
    assert (loaded.drop, loaded.counted) == (0, 3)
    net(torch.zeros(2, 4))
    save_pruned(net, path)
    with pytest.raises(TwoAxisError, match=r"the saved Later has grid = \(1, 2\), the factory's has no attribute grid"):
        load_pruned(path, Later)

    def factory():
        built = Later()
        built(torch.zeros(5, 4))
        return built

    loaded = load_pruned(path, factory)
    assert (loaded.grid, loaded.counted) == ((1, 2), 2)


@pytest.mark.parametrize("attributes", [{"forward": 3}, {"to": [1, 2]}, {"flag": 0}, {"in_features": [4]}, {"new": 1}])
def test_what_is_no_number_of_the_module_s_own_is_not_set(tmp_path, attributes):
    path = tmp_path / "bad.safetensors"
    header = {"modules": {"": {"class": "Later", "attributes": attributes}}, "aliases": {}, "empty": []}
    tensors = {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}
    write_tensors(path, tensors, header | {"strides": {}, "report": None}, kind=FORMAT, version=VERSION)
    built = []

    def factory():
        built.append(Later())
        return built[0]

    with pytest.raises(TwoAxisError, match=f"the saved Later has {next(iter(attributes))} = "):
        load_pruned(path, factory)
    assert vars(built[0]).keys() == vars(Later()).keys()


@pytest.mark.parametrize(
    ("attributes", "asked"),
    [
        ({"out_features": 3}, r"weight of shape \[3, 4\], got \[2, 4\]"),
        ({"in_features": 5, "out_features": 2}, r"weight of shape \[2, 5\]"),
        ({}, r"weight of shape \[9, 4\]"),
    ],
)
def test_attributes_that_contradict_the_tensors_are_refused(tmp_path, attributes, asked):
    path = tmp_path / "bad.safetensors"
    header = {"modules": {"": {"class": "Linear", "attributes": attributes}}, "aliases": {}, "empty": ["bias"]}
    tensors = {"weight": torch.zeros(2, 4)}
    write_tensors(path, tensors, header | {"strides": {}, "report": None}, kind=FORMAT, version=VERSION)
    with pytest.raises(FileFormatError, match=rf"module \(root\): its attributes .* ask for {asked}"):
        load_pruned(path, lambda: nn.Linear(4, 9))


def test_a_network_whose_attributes_are_stale_is_not_written(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    net[0].weight = nn.Parameter(net[0].weight[:5].detach())
    with pytest.raises(
        TwoAxisError, match=r"0: its attributes .*out_channels 8.* ask for weight of shape \[8, 3, 3, 3\]"
    ):
        save_pruned(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


class Transposed(nn.Linear):
    """Keeps its weight the other way round."""

    def __init__(self, width=6):
        super().__init__(4, width)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous())

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


def test_layers_with_shapes_of_their_own_return(tmp_path):
    net = Transposed(3)
    save_pruned(net, tmp_path / "net.safetensors")
    x = torch.randn(2, 4)
    assert torch.equal(load_pruned(tmp_path / "net.safetensors", Transposed)(x), net(x))


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_pruned(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), path)
    with pytest.raises(TwoAxisError, match=r"net.safetensors.*module missing from it: 1; extra in it: none"):
        load_pruned(path, lambda: nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(TwoAxisError, match=r"module missing from it: none; extra in it: 2"):
        load_pruned(path, lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.ReLU()))
    with pytest.raises(TwoAxisError, match=r"module 1: expected the saved class ReLU, the factory built GELU"):
        load_pruned(path, lambda: nn.Sequential(nn.Linear(3, 2), nn.GELU()))

    def with_buffer():
        net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        net.register_buffer("table", torch.zeros(2))
        return net

    with pytest.raises(TwoAxisError, match=r"parameter or buffer missing from it: none; extra in it: table"):
        load_pruned(path, with_buffer)


def test_factories_that_are_none(tmp_path):
    path = tmp_path / "net.safetensors"
    save_pruned(nn.Linear(3, 2), path)
    with pytest.raises(TwoAxisError, match="expected a function that builds the dense network, got Linear"):
        load_pruned(path, nn.Linear(3, 2))
    with pytest.raises(TwoAxisError, match=r"expected it to return an nn\.Module, got NoneType"):
        load_pruned(path, lambda: None)


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_pruned(nn.Linear(3, 2), path)
    before = path.read_bytes()
    with pytest.raises(TwoAxisError, match="weight: expected a tensor with values, got one on the meta device"):
        save_pruned(nn.Linear(3, 2, device="meta"), path)
    with pytest.raises(TwoAxisError, match=r"folder .*nowhere does not exist"):
        save_pruned(nn.Linear(3, 2), tmp_path / "nowhere" / "net.safetensors")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(TwoAxisError, match="No space left"):
        save_pruned(nn.Linear(4, 2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def whole_file(path):
    save_pruned(nn.Linear(64, 64), path)
    return path.read_bytes()


def write_with_header(path, **changes):
    """A well-formed file of ours with a changed recipe."""
    header = {"modules": {"": {"class": "Linear", "attributes": {}}}, "aliases": {}, "empty": ["bias"]}
    header |= {"strides": {}, "report": None} | changes
    write_tensors(path, {"weight": torch.zeros(2, 3)}, header, kind=FORMAT, version=1)


BAD_FILES = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "cut short or corrupted"),
    "header cut short": (lambda path: path.write_bytes(whole_file(path)[:40]), "cut short or corrupted"),
    "data cut short": (lambda path: path.write_bytes(whole_file(path)[:-8]), "cut short or corrupted"),
    "header corrupted": (
        lambda path: path.write_bytes(whole_file(path)[:8] + b"\xff" * 50 + whole_file(path)[58:]),
        "cut short or corrupted",
    ),
    "torch.save": (lambda path: torch.save(nn.Linear(3, 2).state_dict(), path), "pickle"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "pickle"),
    "foreign": (
        lambda path: safetensors.torch.save_file({"weight": torch.zeros(2)}, path),
        "expected a file of format 'tp-twoaxis/pruned', got None",
    ),
    "other kind": (
        lambda path: safetensors.torch.save_file({}, path, metadata={"format": "tp-twoaxis/statistics"}),
        "got 'tp-twoaxis/statistics'",
    ),
    "newer": (
        lambda path: safetensors.torch.save_file({}, path, metadata={"format": FORMAT, "version": str(VERSION + 1)}),
        "update tp-twoaxis",
    ),
    "no recipe": (
        lambda path: safetensors.torch.save_file({}, path, metadata={"format": FORMAT, "version": "1"}),
        "write it again",
    ),
}
BAD_RECIPES = {
    "alias of nothing": {"aliases": {"bias": "gone"}},
    "strides with gaps": {"strides": {"weight": [10**9, 1]}},
    "overlapping strides": {"strides": {"weight": [0, 1]}},
    "strides of another shape": {"strides": {"weight": [1]}},
    "private attribute": {"modules": {"": {"class": "Linear", "attributes": {"_forward_hooks": 1}}}},
    "attribute that is no number": {"modules": {"": {"class": "Linear", "attributes": {"forward": "x"}}}},
    "modules of another form": {"modules": ["Linear"]},
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(tmp_path, case):
    make, message = BAD_FILES[case]
    path = tmp_path / "bad.safetensors"
    make(path)
    for read in (read_header, lambda path: load_pruned(path, lambda: nn.Linear(64, 64))):
        with pytest.raises(FileFormatError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("changes", BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_damaged_recipes_are_refused(tmp_path, changes):
    path = tmp_path / "bad.safetensors"
    write_with_header(path)
    assert load_pruned(path, lambda: nn.Linear(3, 2)).bias is None  # the unchanged recipe is fine
    write_with_header(path, **changes)
    with pytest.raises(FileFormatError, match=r"bad\.safetensors: the recipe is incomplete or damaged .* again"):
        load_pruned(path, lambda: nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("net.safetensors", nn.Linear(2, 2)), "model: expected an nn.Module, got str; the order is save_pruned"),
        ((nn.Linear(2, 2), None), "path: expected the name of a file, got NoneType"),
        ((nn.Linear(2, 2).state_dict(), "net.safetensors"), "model: expected an nn.Module, got OrderedDict"),
        (
            (nn.Linear(2, 2), "net.safetensors", {"flops": 0.5}),
            "report: expected what prune_to_flops returned, got dict",
        ),
        ((nn.Linear(2, 2), "net.safetensors", None, True), "positional"),
    ],
)
def test_arguments_of_another_kind_are_refused(tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TwoAxisError, TypeError), match=part):
        save_pruned(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_card_needs_a_report(tmp_path):
    with pytest.raises(TwoAxisError, match="report: expected what prune_to_flops returned, got NoneType"):
        save_pruned(nn.Linear(2, 2), tmp_path / "net.safetensors", card=True)


def test_a_network_of_a_hub_is_told_what_loads_it():
    class Hub(nn.Linear):
        @classmethod
        def from_pretrained(cls): ...

    (note,) = loading_notes(nn.Sequential(Hub(2, 2), Hub(2, 2)))
    assert note.startswith("Hub: from_pretrained cannot load the pruned network")
    assert "load_pruned(path, factory)" in note
    assert loading_notes(resnet()) == []
