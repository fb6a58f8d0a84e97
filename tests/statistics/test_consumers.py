"""calibrate(consumers=True): what layers read, against NumPy; merging, files, and what is left out."""

import numpy as np
import pytest
import reference
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import CalibrationStatistics, TwoAxisError, calibrate
from tp_twoaxis.runtime.layers import channel_layers
from tp_twoaxis.statistics import recorder


def run(model, loader, **options):
    return calibrate(model, loader, target=None, consumers=True, progress=False, **options)


class Keywords(nn.Module):
    """A linear layer that is given its input by name, and twice a batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(input=x) + self.embed(input=x * x)
        return self.head(torch.relu(x).mean(1))


MODELS = {
    "conv_net": (conv_net, (3, 8, 8)),
    "grouped and transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.ConvTranspose2d(8, 6, 3, groups=2)
        ),
        (4, 7, 9),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3, groups=3), nn.Conv1d(6, 4, 3, dilation=2)), (3, 17)),
    "keywords": (Keywords, (7, 6)),
}


def case(name, n=24):
    torch.manual_seed(0)
    factory, shape = MODELS[name]
    return factory().eval().double(), torch.randn(n, *shape).double() + torch.randn(n, *[1] * len(shape)).double()


@pytest.mark.parametrize("name", MODELS)
def test_inputs_equal_the_slow_twin(name):
    model, x = case(name)
    layers = channel_layers(model)
    stats = run(model, [x[:10], x[10:]], positions="all")
    assert stats.consumers
    for layer, rows in reference.received(model, [x], layers).items():
        flat = reference.flat(rows)
        assert stats[layer].num_input_rows == len(flat)
        assert stats[layer].input_covariance.dtype == torch.float64
        np.testing.assert_allclose(stats[layer].input_mean, flat.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats[layer].input_covariance, reference.covariance(flat), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_sampled_inputs_do_not_depend_on_batches_or_merge_order(name):
    model, x = case(name)
    whole = run(model, [x], positions=3)
    parts = [run(model, list(x[part].split(size)), positions=3) for part, size in ((slice(9, 24), 4), (slice(9), 9))]
    merged = parts[0].merge(parts[1])
    for layer in whole:
        assert merged[layer].num_input_rows == whole[layer].num_input_rows
        torch.testing.assert_close(merged[layer].input_mean, whole[layer].input_mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(merged[layer].input_covariance, whole[layer].input_covariance, rtol=1e-9, atol=1e-11)


def test_inputs_and_outputs_use_the_same_positions():
    # a 1x1 convolution without bias: outputs are a linear map of the inputs at the same positions
    model = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False)).double()
    stats = run(model, [torch.randn(8, 6, 9, 9).double()], positions=5)["0"]
    w = model[0].weight.detach()[:, :, 0, 0]
    torch.testing.assert_close(w @ stats.input_covariance @ w.T, stats.covariance)
    assert stats.num_input_rows == stats.num_rows == 40


def test_outputs_are_as_without_consumers():
    data = batches()
    plain = calibrate(conv_net(), data, progress=False)
    both = calibrate(conv_net(), data, consumers=True, progress=False)
    assert not plain.consumers
    for name in plain:
        assert torch.equal(plain[name].covariance, both[name].covariance)
    with pytest.raises(
        TwoAxisError, match=r"conv2: what the layer reads was not recorded; call calibrate\(consumers=T"
    ):
        _ = plain["conv2"].input_covariance
    with pytest.raises(TwoAxisError, match="differ in their recorded inputs"):
        plain.merge(both)


def test_a_file_holds_the_inputs(tmp_path):
    stats = calibrate(conv_net(), batches(), consumers=True, progress=False)
    stats.save(tmp_path / "a.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "a.safetensors")
    for name in stats:
        assert torch.equal(loaded[name].input_covariance, stats[name].input_covariance)
        assert torch.equal(loaded[name].input_mean, stats[name].input_mean)
    assert loaded.merge(stats)["fc"].num_input_rows == 96


def test_attention_and_very_wide_inputs_are_left_out(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    stats = run(Net(), [torch.randn(8, 5, 6)])
    assert stats["attention"].inputs is None
    assert stats["head"].num_input_rows == 40
    monkeypatch.setattr(recorder, "WIDEST_INPUT", 16)
    stats = run(conv_net(), [x for x, _ in batches()])
    assert [name for name in stats if stats[name].inputs is None] == ["fc"]


def test_non_finite_inputs_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)
            nn.init.zeros_(self.head.weight)

        def forward(self, x):
            return self.head(x.masked_fill(x > 1, torch.finfo(x.dtype).max) * 0 + x.sign() * 1e200)

    with pytest.raises(TwoAxisError, match="head: the layer's inputs are not finite"):
        run(Net().double(), [torch.randn(8, 3).double()])
