"""Which peers can stand in for each channel of a layer, and where the channel lies on both axes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.scores import local
from tp_twoaxis.scores.hull import Hulls, greedy_hulls
from tp_twoaxis.scores.named_scores import capture, target_excess, task_mi
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

PEERS = 8  # of a replacement (paper, appendix K.2)
LARGEST_HULL = 10  # the paper's cap
RIDGE = 1e-6  # relative to each peer's variance, that of the hulls


@dataclass(frozen=True)
class Prediction:
    """Best affine prediction of a channel from a few peers, ``y_k ~ intercept + sum_j weights_j y_j``.

    Attributes:
        channel: k.
        peers: the peers j, best first.
        weights: one a peer, in the units of the stored outputs.
        intercept: so that the prediction has the channel's mean.
        explained: share E_k of the channel's variance that it explains, in [0, 1].
    """

    channel: int
    peers: tuple[int, ...]
    weights: tuple[float, ...]
    intercept: float
    explained: float


@dataclass(frozen=True)
class ChannelProfile:
    """One channel on both axes, and its peers.

    Attributes:
        channel: k.
        constant: it never varies; then there is nothing to explain, and no peers.
        variance: P_k.
        capture: input capture I_k in nats.
        overlap: mean overlap R_k with its peers in nats.
        hull: the smallest set of peers that explains 90 % of what the 32 most correlated ones do, best first;
            at most 10.
        hull_explanation: share of the variance that the hull explains, E_k, in [0, 1].
        path: E_k of the first 1, 2, ... peers of ``order``.
        order: peers in the order of selection; the hull and the prediction's peers are its beginnings.
        prediction: from the best peers, for replacing the channel.
        task_mi: task information M_k in nats, or None without a target.
        target_excess: what it adds to a partner's task information, X_k in nats, or None.
        ranks: quantity -> share of the layer's other varying channels that lie below, ties counted half, in
            [0, 1]; empty for constant channels.
    """

    channel: int
    constant: bool
    variance: float
    capture: float
    overlap: float
    hull: tuple[int, ...]
    hull_explanation: float
    path: tuple[float, ...]
    order: tuple[int, ...]
    prediction: Prediction
    task_mi: float | None
    target_excess: float | None
    ranks: dict[str, float] = field(default_factory=dict)


def predict_from_peers(layer: LayerStatistics, peers: int = PEERS) -> list[Prediction]:
    """Regress every channel on its best peers, as in the paper's peer replacement (appendix K.2).

    The peers are the first of the greedy selection that makes the hulls (ours; the paper says "top"). The
    weights ``(S_PP + ridge)^-1 S_Pk`` come from the calibration's covariance, with a relative ridge of 1e-6.

    Args:
        layer: statistics of the layer.
        peers: at most so many, 1 to 10.

    Returns:
        One prediction a channel. A constant channel has no peers, its mean predicts it.

    Raises:
        TwoAxisError: ``peers`` is out of range.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Linear(8, 3)
        >>> with torch.no_grad(): net.weight[2], net.bias[2] = 2 * net.weight[0], 1.0
        >>> layer = calibrate(torch.nn.Sequential(net), [torch.randn(64, 8)], progress=False, target=None)["0"]
        >>> best = predict_from_peers(layer, peers=1)[2]
        >>> best.peers, round(best.weights[0], 3), round(best.explained, 3)
        ((0,), 2.0, 1.0)
    """
    return _predictions(layer, _hulls(layer, peers), peers)


def profile_channels(layer: LayerStatistics, peers: int = PEERS) -> list[ChannelProfile]:
    """Put every channel of a layer on both axes, with the peers that can replace it.

    Args:
        layer: statistics of the layer.
        peers: of the prediction that may replace a channel, 1 to 10.

    Returns:
        One profile a channel, in order.

    Raises:
        TwoAxisError: ``peers`` is out of range.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(4, (64,)))], progress=False)
        >>> profile = profile_channels(stats["1"])[2]
        >>> profile.channel, len(profile.order), sorted(profile.ranks)
        (2, 3, ['capture', 'hull_explanation', 'overlap', 'target_excess', 'task_mi'])
    """
    hulls = _hulls(layer, peers)
    active = layer.variance > 0
    values = {
        "capture": capture(layer),
        "overlap": local.peer_overlap(layer.correlation, active),
        "hull_explanation": hulls.explanation,
    }
    if layer.target is not None:
        values |= {"task_mi": task_mi(layer), "target_excess": target_excess(layer)}
    ranks = {name: _ranks(value, active) for name, value in values.items()}
    profiles = []
    for prediction in _predictions(layer, hulls, peers):
        k = prediction.channel
        varies = bool(active[k])
        order = _order(hulls, active, k)
        profiles.append(
            ChannelProfile(
                k,
                constant=not varies,
                variance=float(layer.variance[k]),
                capture=float(values["capture"][k]),
                overlap=float(values["overlap"][k]),
                hull=order[: int(hulls.size[k])],
                hull_explanation=float(values["hull_explanation"][k]),
                path=tuple(hulls.path[k, : len(order)].tolist()),
                order=order,
                prediction=prediction,
                task_mi=float(values["task_mi"][k]) if "task_mi" in values else None,
                target_excess=float(values["target_excess"][k]) if "target_excess" in values else None,
                ranks={name: float(rank[k]) for name, rank in ranks.items()} if varies else {},
            )
        )
    return profiles


def _hulls(layer: LayerStatistics, peers: int) -> Hulls:
    if not 1 <= peers <= LARGEST_HULL:
        raise TwoAxisError(f"peers: expected 1 to {LARGEST_HULL} of them, got {peers}")
    return greedy_hulls(layer.correlation, active=layer.variance > 0, max_size=LARGEST_HULL, ridge=RIDGE)


def _order(hulls: Hulls, active: Tensor, k: int) -> tuple[int, ...]:
    """Peers of a channel in the order of selection, without those that only fill the last columns."""
    others = int(active.sum()) - 1 if bool(active[k]) else 0
    return tuple(hulls.peers[k, :others].tolist())


def _predictions(layer: LayerStatistics, hulls: Hulls, peers: int) -> list[Prediction]:
    rho, deviation, mean = layer.correlation, layer.variance.sqrt(), layer.mean
    active = layer.variance > 0
    predictions = []
    for k in range(layer.num_channels):
        chosen = list(_order(hulls, active, k)[:peers])
        if not chosen:
            predictions.append(Prediction(k, (), (), float(mean[k]), 0.0))
            continue
        inner = rho[chosen][:, chosen] + RIDGE * torch.eye(len(chosen), dtype=rho.dtype)
        beta = torch.linalg.solve(inner, rho[chosen, k])
        weights = beta * deviation[k] / deviation[chosen]
        intercept = mean[k] - weights @ mean[chosen]
        explained = float((beta @ rho[chosen, k]).clamp(0.0, 1.0))
        predictions.append(Prediction(k, tuple(chosen), tuple(weights.tolist()), float(intercept), explained))
    return predictions


def _ranks(values: Tensor, active: Tensor) -> Tensor:
    """Share of the other varying channels below each, [C]; half where there is no other."""
    others = int(active.sum()) - 1
    if others < 1:
        return torch.full_like(values, 0.5)
    peers = values[active]
    below = (peers < values[:, None]).sum(1) + 0.5 * ((peers == values[:, None]).sum(1) - 1)
    return below / others
