"""Which channels are removed for evidence, and one table of what each costs and how it looks on both axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from tp_twoaxis.diagnostics.channel_table import channel_table
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.lesions import lesion
from tp_twoaxis.diagnostics.peers import PEERS, predict_from_peers
from tp_twoaxis.scores.composite import compact_hull

CHANNELS = 64  # probed in a layer, at most

COLUMNS = {
    "layer": "name in the model",
    "depth": "place among the convolutions, 0 first to 1 last",
    "channel": "output channel of the layer",
    "constant": "it never varies on the calibration images",
    "norm": "weight norm |w_k|",
    "capture": "input capture I_k, nats",
    "overlap": "mean overlap with the peers R_k, nats",
    "hull_size": "peers in the replaceability hull |H_k|",
    "compact_support": "compact peer support K_k = E_k(H_k) / |H_k|",
    "compact_local": "the paper's safe-to-remove score z(K_k) - z(I_k), z over the layer's varying channels",
    "task_mi": "task information M_k, nats",
    "peer_explanation": "share of the variance that the best 8 peers predict E_k(P_8), 0..1",
    "removal": "what stands in a removed channel's place, mean or zero",
    "damage": "rise of the mean held-out loss without the channel, nats",
    "damage_error": "standard error of the damage over images, nats",
    "accuracy_drop": "share of the images",
    "peer_damage": "rise of the loss with the best 8 peers' prediction in its place, nats",
}
CELL = ("network", "seed", "layer")  # what tells cells apart; tables of one network have the layer alone


def probed_layers(cells: Sequence[str]) -> list[str]:
    """Choose the first, the middle (number n // 2 of n, counted from 0) and the last; fewer where they coincide.

    Example:
        >>> probed_layers(["a", "b", "c", "d"]), probed_layers(["a"])
        (['a', 'c', 'd'], ['a'])
    """
    return list(dict.fromkeys((cells[0], cells[len(cells) // 2], cells[-1])))


def probed_channels(count: int, seed: int = 0) -> list[int]:
    """Draw at most 64 of a layer's channels without replacement.

    Args:
        count: how many the layer has.
        seed: of the draw.

    Returns:
        Ascending; all of a layer that has no more than 64.

    Example:
        >>> probed_channels(3), len(probed_channels(512))
        ([0, 1, 2], 64)
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:CHANNELS].tolist())


def lesion_probe(inputs: EvidenceInputs, *, removal: Literal["mean", "zero"] = "mean") -> pd.DataFrame:
    """Remove channels of three convolutions one by one, and let their peers predict each (paper, appendix K.2).

    What is replaced is the layer's stored output, before BatchNorm (scale g, bias b, running mean m and deviation s).
    The mean in its place leaves about b behind BatchNorm, zero leaves ``b - g m / s``, which may be far from it. The
    paper does not say which it takes; the mean, what a bias can supply after pruning, is ours, and so is the drawing of
    the channels. Peers are the first 8 that greedy selection takes, their weights are of the calibration.

    Args:
        inputs: see :class:`~tp_twoaxis.diagnostics.evidence.EvidenceInputs`; all held-out images serve, in the paper
            1,000.
        removal: what stands in a removed channel's place.

    Returns:
        One row a channel with the columns :data:`COLUMNS`, layers from first to last.

    Raises:
        NotApplicableError: no held-out images, no convolution, no task variable, or nothing in these layers varies.
        TwoAxisError: see :func:`~tp_twoaxis.diagnostics.lesions.lesion`.

    Example:
        >>> from torch import nn
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)).eval()
        >>> images = [(torch.randn(32, 3, 4, 4), torch.randint(4, (32,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, images, progress=False)
        >>> lesion_probe(inputs)[["layer", "channel"]].values.tolist()
        [['0', 0], ['0', 1], ['0', 2], ['0', 3], ['0', 4], ['0', 5]]
    """
    cells = inputs.cells()
    if not inputs.held_out:
        raise NotApplicableError("lesions are measured on images that did not calibrate; expected held-out ones")
    if inputs.statistics.target is None:
        raise NotApplicableError("task information needs a task variable; calibrate with a target such as margin")
    held_out = [(_channels_last(images), labels) for images, labels in inputs.held_out]
    table = pd.concat([_layer_probe(inputs, held_out, cells, layer, removal) for layer in probed_layers(cells)])
    if bool(table.constant.all()):
        raise NotApplicableError(f"no probed channel of {', '.join(table.layer.unique())} varies")
    return table.reset_index(drop=True)


def _layer_probe(
    inputs: EvidenceInputs,
    held_out: list[tuple[Any, Tensor]],
    cells: list[str],
    name: str,
    removal: Literal["mean", "zero"],
) -> pd.DataFrame:
    layer = inputs.statistics[name]
    channels = probed_channels(layer.num_channels, inputs.seed)
    measured = lesion(
        inputs.model,
        held_out,
        name,
        channels,
        (removal, "peers"),
        stats=inputs.statistics,
        progress=inputs.progress,
    )
    removed = [measured.find(channel, removal) for channel in channels]
    table = channel_table(inputs.statistics, layers=[name])
    table = table.assign(
        depth=cells.index(name) / max(len(cells) - 1, 1),
        constant=table.variance == 0,
        norm=layer.weight_power.sqrt().numpy(),
        compact_support=table.hull_explanation / table.hull_size.clip(lower=1),
        compact_local=-compact_hull(layer).numpy(),
        peer_explanation=[prediction.explained for prediction in predict_from_peers(layer, PEERS)],
    )
    return table.iloc[channels].assign(
        removal=removal,
        damage=[entry.loss_increase for entry in removed],
        damage_error=[entry.standard_error for entry in removed],
        accuracy_drop=[entry.accuracy_drop for entry in removed],
        peer_damage=[measured.find(channel, "peers").loss_increase for channel in channels],
    )[list(COLUMNS)]


def _channels_last(images: Any) -> Any:
    """Lay images out as convolutions on CPUs read them: a ResNet-20 takes a tenth to a fifth less time."""
    if isinstance(images, Tensor) and images.ndim == 4:
        return images.contiguous(memory_format=torch.channels_last)
    return images


def by_cell(channels: pd.DataFrame) -> Iterator[tuple[dict[str, object], pd.DataFrame]]:
    """Walk through the cells of a table, or of several networks' tables together.

    Args:
        channels: from :func:`lesion_probe`; of several networks with columns ``network`` and ``seed``.

    Yields:
        What names the cell, its depth included, and those of its channels that vary.

    Example:
        >>> table = pd.DataFrame({"seed": [1, 1, 2], "layer": "conv1", "depth": 0.0, "constant": [True, False, False]})
        >>> [(names, len(part)) for names, part in by_cell(table)]
        [({'seed': 1, 'layer': 'conv1', 'depth': 0.0}, 1), ({'seed': 2, 'layer': 'conv1', 'depth': 0.0}, 1)]
    """
    keys = [name for name in CELL if name in channels]
    for values, part in channels[~channels.constant].groupby(keys, sort=False):
        yield {**dict(zip(keys, values, strict=True)), "depth": float(part.depth.iloc[0])}, part
