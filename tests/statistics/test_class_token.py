"""Statistics of class tokens: which layers have them, what correlates with the task, and what stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import CalibrationStatistics, TwoAxisError, calibrate
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.statistics import calibrate_shards, pooled_samples

IMAGES, TOKENS, WIDTH = 40, 7, 6


class Transformer(nn.Module):
    """Patches by a convolution, a class token before them, a block, and a head that reads the class token."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.randn(WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.expand, self.reduce = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        self.batch_first = batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), 1, WIDTH), x], dim=1)
        x = x if self.batch_first else x.transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.reduce(torch.relu(self.expand(x)))
        return self.head(x[:, 0] if self.batch_first else x[0])


def made(batch_first: bool = True) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    net = Transformer(batch_first=batch_first).double()
    x, y = torch.randn(IMAGES, 3, 8, 12, dtype=torch.float64), torch.randint(4, (IMAGES,))
    return net, [(x[:25], y[:25]), (x[25:], y[25:])]


@pytest.mark.parametrize("batch_first", [True, False])
def test_first_tokens_correlate_with_the_task(batch_first: bool) -> None:
    net, loader = made(batch_first)
    caught: dict[str, list[torch.Tensor]] = {}
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: caught.setdefault(name, []).append(y[0] if isinstance(y, tuple) else y)
        )
        for name in ("attention", "expand", "head")
    ]
    with torch.no_grad():
        logits = torch.cat([net(x) for x, _ in loader])
    for handle in handles:
        handle.remove()
    labels = torch.cat([y for _, y in loader])
    rest = logits.scatter(1, labels[:, None], -torch.inf).max(1).values
    margin = (logits.gather(1, labels[:, None])[:, 0] - rest).numpy()
    stats = calibrate(net, loader, pooling="cls", positions="all", progress=False)
    for name, outputs in caught.items():
        outputs = [y[:, None] if y.ndim == 2 else y if batch_first else y.transpose(0, 1) for y in outputs]
        first = torch.cat([y[:, 0] for y in outputs]).detach().numpy()
        expected = [np.corrcoef(first[:, k], margin)[0, 1] for k in range(first.shape[1])]
        layer = stats[name]
        np.testing.assert_allclose(layer.target_correlation().numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(layer.pooled_correlation.numpy(), np.corrcoef(first.T), atol=1e-9)
        rows = torch.cat([y.flatten(0, 1) for y in outputs])
        torch.testing.assert_close(layer.mean, rows.mean(0).detach())  # means are over all tokens still


def test_maps_rows_and_the_local_axis_are_as_ever() -> None:
    net, loader = made()
    mean, cls = (calibrate(net, loader, pooling=pooling, progress=False) for pooling in ("mean", "cls"))
    assert torch.equal(mean["patches"].target_correlation(), cls["patches"].target_correlation())
    assert not torch.allclose(mean["expand"].target_correlation(), cls["expand"].target_correlation())
    for name in mean:
        assert torch.equal(mean[name].covariance, cls[name].covariance)
    images = batches()
    plain, same = (calibrate(conv_net(), images, pooling=pooling, progress=False) for pooling in ("mean", "cls"))
    assert torch.equal(plain["fc"].target_correlation(), same["fc"].target_correlation())


def test_files_and_later_passes_remember_and_kinds_do_not_merge(tmp_path) -> None:
    net, loader = made()
    stats = calibrate(net, loader, pooling="cls", progress=False)
    stats.save(tmp_path / "s.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "s.safetensors")
    assert {layer.pooling for layer in loaded.layers.values()} == {"cls"}
    assert torch.equal(loaded["expand"].mean, stats["expand"].mean)
    with pytest.raises(TwoAxisError, match="pooling"):
        stats.merge(calibrate(net, loader, progress=False))
    again = PruningState(net, loader, progress=False).like(loaded).statistics()
    assert torch.equal(again["expand"].target_correlation(), stats["expand"].target_correlation())
    merged = calibrate_shards(net, loader, shards=2, pooling="cls", progress=False)
    whole = merged[0].merge(merged[1])
    torch.testing.assert_close(whole["expand"].target_correlation(), stats["expand"].target_correlation())


def test_an_unknown_pooling_is_refused() -> None:
    net, loader = made()
    with pytest.raises(TwoAxisError, match=r"pooling.*mean, cls"):
        calibrate(net, loader, pooling="first", progress=False)


def test_samples_are_pooled_alike():
    net, loader = made()
    stats = calibrate(net, loader, pooling="cls", progress=False)
    samples = pooled_samples(net, loader, pooling="cls", progress=False)
    for name, layer in stats.layers.items():
        torch.testing.assert_close(samples.outputs[name].double().mean(0), layer.pooled.mean, rtol=1e-5, atol=1e-6)
    with pytest.raises(TwoAxisError, match="pooling: expected one of mean, cls"):
        pooled_samples(net, loader, pooling="first", progress=False)
