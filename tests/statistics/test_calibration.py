"""calibrate(): statistics equal their slow twins, the model comes back as it was, bad input is named."""

import copy
from collections import UserDict

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from cases import batches, conv_net
from scipy.stats import spearmanr
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.runtime import progress_bar
from tp_twoaxis.runtime.layers import channel_layers
from tp_twoaxis.statistics.targets import LABEL_FREE, TARGETS


def run(model, loader, **options):
    return calibrate(model, loader, progress=False, **options)


class Tokens(nn.Module):
    """Linear layers on [n, tokens, 6]."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.embed(x)).mean(1))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=batch_first), nn.Linear(6, 5)

    def forward(self, x):
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(y.mean(1 if self.attention.batch_first else 0))


def sequence(*layers, dimensions):
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dimensions](1)
    return nn.Sequential(*layers, nn.ReLU(inplace=True), pool, nn.Flatten(), nn.Linear(layers[-1].out_channels, 5))


MODELS = {
    "conv2d": (conv_net, (3, 8, 8)),
    "conv1d": (
        lambda: sequence(
            nn.Conv1d(3, 6, 3, stride=2, groups=3), nn.ReLU(inplace=True), nn.Conv1d(6, 4, 3, dilation=2), dimensions=1
        ),
        (3, 17),
    ),
    "conv3d": (
        lambda: sequence(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 2, groups=2), dimensions=3),
        (2, 4, 5, 3),
    ),
    "transposed": (
        lambda: sequence(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), dimensions=2),
        (3, 5, 5),
    ),
    "tokens": (Tokens, (7, 6)),
    "attention": (lambda: Attention(True), (7, 6)),
    "attention, tokens first": (lambda: Attention(False), (7, 6)),
}


def case(name, n=40, batch_size=16):
    """A model in eval mode and a loader for it."""
    factory, shape = MODELS[name]
    torch.manual_seed(0)
    model = factory().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator) + torch.randn(n, *([1] * len(shape)), generator=generator)
    y = torch.randint(5, (n,), generator=generator)
    return model, list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def test_the_correlation_of_a_wide_layer():
    layer, x = nn.Linear(6, 300).double(), torch.randn(40, 6).double()  # wider than one block of rows
    entry = calibrate(nn.Sequential(layer), [x], target=None, progress=False)["0"]
    rows = layer(x).detach().numpy()
    np.testing.assert_allclose(entry.correlation, reference.correlation(rows), atol=1e-9)
    np.testing.assert_allclose(entry.variance, rows.var(0), rtol=1e-9)


def assert_equals_twin(stats, model, loader, tolerance, logits=None):
    """Compare every public statistic with NumPy's on what the model itself emits."""
    layers = channel_layers(model)
    rows = reference.emitted(model, [x for x, _ in loader], layers)
    if logits is None:
        with torch.no_grad():
            logits = torch.cat([model(x) for x, _ in loader])
    labels = torch.cat([y for _, y in loader]).numpy()
    task = reference.task_variables(logits.double().numpy(), labels)
    assert list(stats) == list(layers)
    for name, entry in stats.layers.items():
        flat, pooled = reference.flat(rows[name]), rows[name].mean(1)
        spread = flat.var(0)
        assert (entry.num_rows, entry.num_images) == (len(flat), len(pooled))
        assert reference.relative_error(entry.covariance, reference.covariance(flat), spread, spread) < tolerance, name
        np.testing.assert_allclose(entry.variance, spread, rtol=tolerance)
        np.testing.assert_allclose(entry.correlation, reference.correlation(flat), atol=tolerance)
        assert np.max(np.abs(entry.mean.numpy() - pooled.mean(0)) / np.sqrt(spread)) < tolerance
        np.testing.assert_allclose(entry.pooled_correlation, reference.correlation(pooled), atol=tolerance)
        for variable in TARGETS:
            expected = reference.correlation(pooled, task[variable])
            expected = expected if variable == "one_vs_rest" else expected[:, 0]
            np.testing.assert_allclose(entry.target_correlation(variable), expected, atol=tolerance, err_msg=variable)
        layer = layers[name]
        weight = (layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer).weight.detach().double()
        if isinstance(layer, nn.ConvTranspose2d):  # [in, out / groups, ...]; here groups of equally many inputs
            weight = torch.cat([part.transpose(0, 1) for part in weight.chunk(layer.groups)])
        torch.testing.assert_close(entry.weight_power, weight.flatten(1).square().sum(1), rtol=1e-12, atol=0)


# right numbers


@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_the_slow_twin(name):
    model, loader = case(name)
    stats = run(model, loader, positions="all")
    assert (stats.num_images, stats.target) == (40, "margin")
    assert_equals_twin(stats, model, loader, 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_any_batch_size_agrees(name):
    model, loader = case(name, 20)
    model = model.double()
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    expected = run(model, [(x, y)], positions=3)
    assert expected[next(iter(expected))].num_rows == 20 * 3
    for batch_size in (1, 7, 16):
        found = run(model, list(zip(x.split(batch_size), y.split(batch_size), strict=True)), positions=3)
        for mine, theirs in zip(found._moments(), expected._moments(), strict=True):
            assert mine.count == theirs.count
            torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(mine.covariance, theirs.covariance, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, padding=1, stride=2),
        nn.Conv2d(4, 12, (3, 1), groups=2, padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(4, 8, 3, groups=4, padding=1),
        nn.Conv1d(4, 9, 3, stride=2, padding=2),
        nn.Conv3d(4, 6, 2, groups=2),
    ],
    ids=str,
)
def test_streaming_rayleigh_quotient_equals_the_unfolded_patches(conv):
    """Control C4 of the paper: Var(Y_k) is w_k' S_X w_k, without any patch covariance."""
    shape = {1: (16,), 2: (6, 7), 3: (3, 4, 3)}[len(conv.kernel_size)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, *shape, generator=generator)
    x = x + x.roll(1, -1) + torch.randn(12, 1, *[1] * len(shape), generator=generator)
    entry = run(conv, [x[:5], x[5:]], target=None, positions="all")[""]
    power = reference.patch_power(x.double().numpy(), conv)
    np.testing.assert_allclose(entry.variance, power, rtol=1e-6)
    weight_power = conv.weight.detach().double().flatten(1).square().sum(1).numpy()
    exact = power / weight_power
    assert spearmanr(exact, entry.variance / entry.weight_power).statistic > 0.999


def test_images_of_several_sizes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    loader = [(x.double(), y) for size in (8, 11, 6) for x, y in batches(8, 8, size=size, seed=size)]
    entry = run(net, loader, positions="all")["0"]
    with torch.no_grad():
        rows = [reference.rows_of(net[0](x).numpy(), net[0]) for x, _ in loader]
    flat, pooled = np.concatenate([reference.flat(part) for part in rows]), np.concatenate([r.mean(1) for r in rows])
    assert entry.num_rows == 8 * (36 + 81 + 16)
    np.testing.assert_allclose(entry.covariance, reference.covariance(flat), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(entry.mean, pooled.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(entry.pooled_correlation, reference.correlation(pooled), atol=1e-9)


def test_a_bfloat16_model_gives_the_statistics_of_what_it_emits():
    model, loader = case("conv2d")
    model = model.bfloat16()
    stats = run(model, loader, positions="all")  # float32 images go through the model's dtype
    assert_equals_twin(stats, model, [(x.bfloat16(), y) for x, y in loader], 1e-5)
    assert model.conv1.weight.dtype == torch.bfloat16


def test_autocast_gives_the_statistics_of_what_the_model_emits():
    model, loader = case("conv2d")
    with torch.autocast("cpu", torch.bfloat16):
        stats = run(model, loader, positions="all")
        with torch.no_grad():
            logits = torch.cat([model(x) for x, _ in loader])
        assert logits.dtype == torch.bfloat16
        assert_equals_twin(stats, model, loader, 1e-5, logits)
    exact = run(model, loader, positions="all")
    assert not torch.equal(stats["conv1"].covariance, exact["conv1"].covariance)


def test_constant_channels_and_classes_that_do_not_occur_have_correlation_zero():
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[3] = 0
        net.conv2.bias[3] = 0.1
    loader = [(x, y.clamp(max=3)) for x, y in batches(40, 7)]
    stats = run(net, loader, positions="all")
    entry = stats["conv2"]
    others = [k for k in range(16) if k != 3]
    assert entry.variance[3] == 0
    assert (entry.variance[others] > 0).all()
    for rho in (entry.correlation, entry.pooled_correlation):
        assert rho[3, 3] == 1
        assert not rho[3, others].any()
        assert not rho[others, 3].any()
    assert entry.target_correlation()[3] == 0
    assert not entry.target_correlation("one_vs_rest")[:, 4].any()
    assert entry.target_correlation("one_vs_rest")[others, 0].all()


def test_a_constant_target_has_correlation_zero_also_over_several_flushes():
    # the mean of equal numbers is rounded, so their scatter is 1e-32 and not 0
    net = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 3)).double()
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.copy_(torch.tensor([0.1, 0.3, 0.7]))
    x = torch.randn(1200, 3, generator=torch.Generator().manual_seed(0)).sort(0).values
    stats = run(net, [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(111)])
    for variable in TARGETS:
        assert not stats["0"].target_correlation(variable).any(), variable


# loaders


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: (x, y, "path"),
        lambda x, y: {"pixel_values": x, "labels": y},
        lambda x, y: {"image": x, "label": y},
        lambda x, y: UserDict(pixel_values=x, labels=y),
    ],
)
def test_batches_of_any_common_form(form):
    loader = batches()
    expected = run(conv_net(), loader)
    found = run(conv_net(), [form(x, y) for x, y in loader])
    for mine, theirs in zip(found._moments(), expected._moments(), strict=True):
        assert torch.equal(mine.scatter, theirs.scatter)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"images": x}])
def test_images_alone(form):
    loader = [form(x) for x, _ in batches()]
    stats = run(conv_net(), loader)
    assert stats.target == "predicted_margin"
    expected = run(conv_net(), batches())
    for variable in LABEL_FREE:
        torch.testing.assert_close(
            stats["conv2"].target_correlation(variable), expected["conv2"].target_correlation(variable)
        )
    with pytest.raises(TwoAxisError, match=r"'margin' was not recorded \(recorded: predicted_margin"):
        stats["conv2"].target_correlation("margin")
    assert run(conv_net(), loader, target="predicted_logit").target == "predicted_logit"


def test_an_empty_batch_in_between_is_passed_over():
    loader = batches()
    loader.insert(1, (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)))
    assert run(conv_net(), loader).num_images == 48


def test_max_images_cuts_a_batch_and_reads_no_further():
    drawn = []

    def loader():
        for batch in batches(48, 16):
            drawn.append(1)
            yield batch

    stats = run(conv_net().double(), loader(), max_images=20)
    assert len(drawn) == 2
    assert stats.num_images == stats["fc"].num_images == 20
    first = [(x[:20], y[:20]) for x, y in batches(48, 48)]
    expected = run(conv_net().double(), first, max_images=None)
    torch.testing.assert_close(stats["conv2"].covariance, expected["conv2"].covariance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        stats["conv2"].target_correlation(), expected["conv2"].target_correlation(), rtol=1e-9, atol=1e-12
    )
    assert run(conv_net(), batches(48, 16), max_images=None).num_images == 48
    assert run(conv_net(), batches(48, 16), max_images=32).num_images == 32


def test_progress_is_on_stderr_and_only_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "INTERVAL", 0.0)
    run(conv_net(), batches())
    assert capsys.readouterr() == ("", "")
    x, y = batches(48, 48)[0]
    calibrate(conv_net(), DataLoader(TensorDataset(x, y), batch_size=16), max_images=20)
    out, err = capsys.readouterr()
    assert out == ""
    assert "calibrate: image 16 of 20" in err


class Unsized:
    def __iter__(self):
        return iter(batches())

    def __len__(self):
        raise NotImplementedError


def test_a_loader_without_a_length_runs():
    assert run(conv_net(), Unsized()).num_images == 48
    assert run(conv_net(), (batch for batch in batches())).num_images == 48


# memory


def test_accumulators_do_not_grow_with_the_images():
    def numbers(n):
        stats = run(conv_net(), batches(n, 16))
        return sum(m.mean.numel() + m.other_mean.numel() + m.scatter.numel() for m in stats._moments())

    assert numbers(16) == numbers(160)


# models


def same(stats, expected):
    assert list(stats) == list(expected)
    for mine, theirs in zip(stats._moments(), expected._moments(), strict=True):
        assert torch.equal(mine.mean, theirs.mean)
        assert torch.equal(mine.scatter, theirs.scatter)


def test_compiled_and_data_parallel_wrappers_are_looked_through():
    expected = run(conv_net(), batches())
    same(run(torch.compile(conv_net(), backend="eager"), batches()), expected)
    same(run(DataParallel(conv_net()), batches()), expected)
    same(run(DataParallel(torch.compile(conv_net(), backend="eager")), batches()), expected)


def test_what_was_compiled_in_place_or_inside_still_shows_its_layers():
    """Code that was traced before the hooks came would never call them."""
    expected = run(conv_net(), batches())
    whole, part = conv_net(), conv_net()
    whole.compile(backend="eager")
    part.conv2 = torch.compile(part.conv2, backend="eager")
    with torch.no_grad():
        for net in (whole, part):
            net(batches()[0][0])
    same(run(whole, batches()), expected)
    found = run(part, batches())
    assert list(found) == ["conv1", "conv2._orig_mod", "depthwise", "reduce", "fc"]
    assert torch.equal(found["conv2._orig_mod"].covariance, expected["conv2"].covariance)
    assert whole._compiled_call_impl is not None


def test_a_distributed_wrapper_is_looked_through(monkeypatch):
    if not dist.is_available():
        pytest.skip("torch without distributed")
    expected = run(conv_net(), batches(), positions="all")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stats = run(DistributedDataParallel(conv_net()), batches(), positions="all")
        same(stats, expected)
        assert stats.all_reduce() is stats
        assert stats.num_images == 48
        for mine, theirs in zip(stats._moments(), expected._moments(), strict=True):
            torch.testing.assert_close(mine.scatter, theirs.scatter, rtol=1e-12, atol=1e-12)
    finally:
        dist.destroy_process_group()


class Wrapped(nn.Module):
    """Returns its logits inside something."""

    def __init__(self, form):
        super().__init__()
        self.net, self.form = conv_net(), form

    def forward(self, x):
        return self.form(self.net(x))


class Output:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "form",
    [
        lambda z: (z, None),
        lambda z: [z],
        lambda z: {"loss": None, "logits": z},
        Output,
        lambda z: (Output(z),),
    ],
)
def test_logits_inside_an_output(form):
    assert_close = torch.testing.assert_close
    found, expected = run(Wrapped(form), batches()), run(conv_net(), batches())
    assert_close(found["net.fc"].target_correlation(), expected["fc"].target_correlation())


@pytest.mark.parametrize("form", [lambda z: None, lambda z: (), lambda z: "logits", lambda z: {"out": z}])
def test_an_output_without_logits(form):
    with pytest.raises(TwoAxisError, match="expected logits from Wrapped, got"):
        run(Wrapped(form), batches())


@pytest.mark.parametrize("form", [lambda z: (z[:, :3], z), lambda z: [z, z.repeat(1, 4)]])
def test_logits_beside_something_that_could_be_logits(form):
    message = r"expected logits from Wrapped, got a tuple with \[16, \d+\], \[16, \d+\], of which any .*target=None"
    for options in ({}, {"target": None, "gradients": True}):
        with pytest.raises(TwoAxisError, match=message):
            run(Wrapped(form), batches(), **options)
    assert run(Wrapped(form), batches(), target=None).num_images == 48
    assert run(Wrapped(lambda z: (z, 2 * z)), batches()).target == "margin"  # heads of the same classes


def test_a_model_that_is_no_classifier():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(TwoAxisError, match=r"batch 0: expected class logits \[n, K >= 2\].*target=None"):
        run(net, batches())
    stats = run(net, batches(), target=None)
    assert (stats.target, list(stats), stats["0"].cross) == (None, ["0", "2"], None)
    with pytest.raises(TwoAxisError, match="none: it ran with target=None"):
        stats["0"].target_correlation()
    masks = [(x, torch.zeros(len(x), 6, 6)) for x, _ in batches()]  # labels of another task are not looked at
    assert run(net, masks, target=None).num_images == 48


def test_a_transformer_layer_runs_its_parts_and_not_one_fused_call():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), nn.Flatten(), nn.Linear(42, 5)).eval()
    _, loader = case("tokens")
    assert list(run(net, loader)) == ["0.self_attn", "0.linear1", "0.linear2", "2"]


def test_chosen_layers():
    stats = run(conv_net(), batches(), layers=["fc", "conv2"])
    assert list(stats) == ["conv2", "fc"]
    assert "conv1" not in stats
    with pytest.raises(TwoAxisError, match="no statistics of layer 'conv1'; there are: conv2, fc"):
        stats["conv1"]


def test_a_layer_that_does_not_run():
    net = conv_net()
    net.spare = nn.Linear(2, 2)
    assert "spare" not in run(net, batches())
    with pytest.raises(TwoAxisError, match="layers: spare did not run in the forward pass; leave them out"):
        run(net, batches(), layers=["conv1", "spare"])


# everything as it was


class BrokenError(Exception):
    pass


def observe(net):
    """Everything of a model and the process that calibration borrows."""
    modules = dict(net.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [dict(getattr(module, kind)) for kind in sorted(vars(module)) if kind.endswith("_hooks")]
            for name, module in modules.items()
        },
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "parameters": {name: (id(p), id(p.grad), p.requires_grad, p.dtype) for name, p in net.named_parameters()},
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("accident", [None, "loader", "iter", "model", "interrupt", "statistics"])
def test_the_model_and_the_random_state_come_back(accident):
    net = conv_net()
    net.insert = nn.Dropout(0.5)
    net.train()
    net.bn2.eval()
    net.conv2.requires_grad_(False)
    net(batches()[0][0]).sum().backward()
    net.conv1.register_forward_hook(lambda *_: None)
    if accident in ("model", "interrupt"):
        error = BrokenError("broken") if accident == "model" else KeyboardInterrupt()
        calls = []

        def fail(*_):
            calls.append(torch.rand(1))
            if len(calls) == 4:  # two small runs find the batch in what layers write
                raise error

        net.reduce.register_forward_hook(fail)

    class Loader:
        def __iter__(self):
            if accident == "iter":
                raise BrokenError("broken")
            for index, batch in enumerate(batches()):
                torch.rand(3)  # a shuffling loader takes random numbers
                if accident == "loader" and index == 1:
                    raise BrokenError("broken")
                yield batch if accident != "statistics" or index < 2 else batch[0]

    state, gradients = copy.deepcopy(net.state_dict()), [copy.deepcopy(p.grad) for p in net.parameters()]
    before, random = observe(net), torch.get_rng_state()
    message = {
        None: None,
        "loader": "loader: batch 1 raised BrokenError: broken; the model is as it was",
        "iter": "loader: batch 0 raised BrokenError: broken",
        "model": r"ConvNet does not run on batch 1 of shape \[16, 3, 8, 8\] \(BrokenError: broken\); .* as it was",
        "interrupt": None,
        "statistics": "batch 2 comes without labels, earlier ones did not agree",
    }[accident]
    if accident is None:
        run(net, Loader())
    else:
        with pytest.raises(KeyboardInterrupt if accident == "interrupt" else TwoAxisError, match=message) as raised:
            run(net, Loader())
        if accident in ("loader", "iter", "model"):
            assert isinstance(raised.value.__cause__, BrokenError)
    assert torch.equal(torch.get_rng_state(), random)
    assert observe(net) == before
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert gradient is None if parameter.grad is None else torch.equal(parameter.grad, gradient)


def test_a_training_model_is_calibrated_in_eval_mode():
    net = conv_net()
    expected = run(net, batches())
    same(run(net.train(), batches()), expected)
    assert net.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_device_for_a_while():
    net, loader = conv_net().double(), [(x.double(), y) for x, y in batches()]
    identities = [id(p) for p in net.parameters()]
    expected = run(net, loader, positions="all")
    for found in (run(net, loader, positions="all", device="cuda"), run(conv_net().double().cuda(), loader)):
        for mine, theirs in zip(found._moments(), expected._moments(), strict=True):
            assert mine.scatter.device.type == "cpu"
            torch.testing.assert_close(mine.covariance, theirs.covariance, rtol=1e-9, atol=1e-11)
    assert [id(p) for p in net.parameters()] == identities
    assert {p.device.type for p in net.parameters()} == {"cpu"}


# bad input


def poisoned(value):
    x, y = batches(16, 16)[0]
    x = x.clone()
    x[3, 1, 2, 2] = value
    return [(x, y)]


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "loader: expected at least one batch of images, got none"),
        ([torch.zeros(0, 3, 8, 8)], {}, "expected at least one batch"),
        (poisoned(torch.nan), {}, "loader: batch 0 holds NaN or infinite pixels"),
        (batches(16, 16) + poisoned(torch.inf), {}, "loader: batch 1 holds NaN or infinite pixels"),
        ([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], {}, "expected float images .* got torch.uint8 in batch 0"),
        ([(x, y + 5) for x, y in batches()], {}, r"batch 0: expected labels in \[0, 5\), got 5 to"),
        ([(x, y - 1) for x, y in batches()], {}, r"batch 0: expected labels in \[0, 5\), got -1 to"),
        ([(x, y.float()) for x, y in batches()], {}, r"batch 0: expected labels as class indices \[16\], got torch.fl"),
        ([(x, y[:9]) for x, y in batches()], {}, r"class indices \[16\], got torch.int64 \[9\]"),
        ([(x, y[:9]) for x, y in batches()], {"max_images": 9}, r"class indices \[9\], got torch.int64 \[2\]"),
        ([(x, y[0]) for x, y in batches()], {"max_images": 9}, r"class indices \[9\], got torch.int64 \[\]"),
        ([(x, y[:, None]) for x, y in batches()], {}, r"class indices \[16\], got torch.int64 \[16, 1\]"),
        ([(x, y.tolist()) for x, y in batches()], {}, r"got \(Tensor, list\)"),
        ([(x.numpy(), y) for x, y in batches()], {}, r"got \(ndarray, Tensor\)"),
        ([{"z": x, "labels": y} for x, y in batches()], {}, "got a mapping with z: Tensor, labels: Tensor"),
        ([()], {}, r"batch 0, got tuple"),
        ([None], {}, "got NoneType"),
        ([torch.tensor(1.0)], {}, "expected tensors"),
        (3, {}, "loader: expected an iterable of batches, got int"),
        ([x for x, _ in batches()], {"target": "correct_logit"}, "target 'correct_logit' needs labels and batch 0"),
        ([x for x, _ in batches()], {"target": "one_vs_rest"}, "or choose one of predicted_margin, predicted_logit"),
        ([batches()[0], batches()[1][0]], {}, "batch 1 comes without labels, earlier ones did not agree"),
        ([batches()[0][0], batches()[1]], {}, "batch 1 comes with labels, earlier ones did not agree"),
        (batches(), {"target": "accuracy"}, "target: expected one of margin, .* got 'accuracy'"),
        (batches(), {"layers": ["conv9"]}, "no layer 'conv9'; near it: conv"),
        (batches(), {"layers": []}, "expected at least one layer name, got none"),
        (batches(), {"max_images": 0}, "max_images: expected a whole number of at least 1 or None, got 0"),
        (batches(), {"max_images": 1e3}, "max_images: expected a whole number of at least 1 or None, got 1000.0"),
        (batches(), {"positions": "few"}, "positions: expected 'auto', 'all' or a positive number, got 'few'"),
        ([torch.zeros(4, 5, 8, 8)], {}, r"ConvNet does not run on batch 0 of shape \[4, 5, 8, 8\] \(RuntimeError"),
    ],
)
def test_input_that_does_not_fit(loader, options, message):
    net = conv_net().train()
    with pytest.raises(TwoAxisError, match=message):
        run(net, loader, **options)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())


def test_a_model_without_layers_or_with_none_that_run():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x):
            return nn.functional.linear(x.mean((2, 3)), self.fc.weight, self.fc.bias)

    with pytest.raises(TwoAxisError, match="Sequential has no convolution, linear or attention layer"):
        run(nn.Sequential(nn.ReLU()), batches())
    with pytest.raises(TwoAxisError, match="none of the layers fc ran in the forward pass"):
        run(Idle(), batches())


def test_a_layer_that_runs_for_some_batches_only():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.extra = conv_net(), nn.Linear(5, 5)

        def forward(self, x):
            z = self.net(x)
            return self.extra(z) if len(x) == 16 else z

    for target in ("margin", None):
        with pytest.raises(TwoAxisError, match="extra: expected a layer to run in every batch or in none"):
            run(Sometimes(), batches(40, 16), target=target)


def test_logits_of_another_number_of_images():
    doubled = Wrapped(lambda z: z.repeat(2, 1))
    for loader in (batches(), [x for x, _ in batches()]):
        with pytest.raises(TwoAxisError, match=r"logits \[16, K\] of the 16 images of batch 0, got \[32, 5\]"):
            run(doubled, loader)


def test_a_layer_or_logits_that_are_not_finite():
    net = conv_net()
    with torch.no_grad():
        net.depthwise.weight[2] = torch.nan
    with pytest.raises(TwoAxisError, match="the model's logits are not finite on finite images"):
        run(net, batches())
    with pytest.raises(TwoAxisError, match="depthwise: the layer's outputs are not finite on finite images"):
        run(net, batches(), target=None)
