"""Why a channel may go or should stay: its peers, its task information, its lesion, and what the peers give back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from tp_twoaxis.diagnostics.lesions import Lesions, checked_channels, lesion, recovered_share
from tp_twoaxis.diagnostics.peers import PEERS, ChannelProfile, profile_channels
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.layers import channel_layers, out_channels_of
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics

Removal = Literal["mean", "zero"]
IN_ITS_PLACE = {"mean": "its mean", "zero": "zero"}
SHOWN = 5  # channels at either end of an overview
TOO_SMALL = "too small to tell"


@dataclass(frozen=True)
class Explanation:
    """A layer on both axes, and some of its channels in detail; ``print`` it, or see :meth:`to_json`.

    Attributes:
        layer: its name.
        kind: its class, for example ``"Conv2d"``.
        target: task variable of the target axis, or None.
        score_images: images behind the statistics.
        rows: (image, position) rows behind the covariances.
        peers: how many predict a channel that is replaced, at most.
        removal: what stands in a removed channel's place, ``"mean"`` or ``"zero"``.
        profiles: every channel of the layer, in order.
        channels: those that are explained in detail; none in an overview.
        lesions: what their lesions cost, or None in an overview.
        notes: what a reader must know.
    """

    layer: str
    kind: str
    target: str | None
    score_images: int
    rows: int
    peers: int
    removal: Removal
    profiles: list[ChannelProfile]
    channels: tuple[int, ...] = ()
    lesions: Lesions | None = None
    notes: list[str] = field(default_factory=list)

    def recovered(self, channel: int) -> float | None:
        """Share of the loss that the peers' prediction gives back; None: see :func:`recovered_share`."""
        if self.lesions is None:
            return None
        return recovered_share(self.lesions.find(channel, self.removal), self.lesions.find(channel, "peers"))

    def ends(self) -> tuple[list[ChannelProfile], list[ChannelProfile]]:
        """Channels that are easiest and hardest to replace, by the share that their hulls explain; constants left out.

        Returns:
            At most five of each, the extreme ones first, and no channel at both ends.
        """
        order = sorted((p for p in self.profiles if not p.constant), key=lambda p: -p.hull_explanation)
        count = min(SHOWN, (len(order) + 1) // 2)
        return order[:count], order[count:][::-1][:count]

    def sentences(self, channel: int) -> list[str]:
        """Describe in words what is known about a channel."""
        profile = self.profiles[channel]
        if profile.constant:
            text = [f"Channel {channel} never varies on the {self.score_images} images: a bias can replace it."]
        elif not profile.hull:
            text = [f"Channel {channel} has no peers that vary."]
        else:
            plural = "s" if len(profile.hull) > 1 else ""
            text = [
                f"{profile.hull_explanation:.0%} of channel {channel} can be predicted from {len(profile.hull)} "
                f"peer{plural} ({', '.join(map(str, profile.hull))}).",
                f"Its signal captures {profile.capture:.2f} nats of the layer's input, more than "
                f"{profile.ranks['capture']:.0%} of the other channels.",
            ]
            if profile.task_mi is not None:
                text.append(
                    f"By itself it tells {_nats(profile.task_mi)} nats about the {_words(self.target)}, more than "
                    f"{profile.ranks['task_mi']:.0%} of the others."
                )
        if self.lesions is not None:
            text += self._cost(channel, self.lesions)
        return text

    def _cost(self, channel: int, lesions: Lesions) -> list[str]:
        removed, replaced = lesions.find(channel, self.removal), lesions.find(channel, "peers")
        measure = "accuracy" if lesions.reference == "labels" else "agreement with the whole network"
        text = (
            f"Removing it ({IN_ITS_PLACE[self.removal]} in its place) {_change(removed.accuracy_drop)} of {measure} "
            f"and {removed.loss_increase:+.4f} ± {removed.standard_error:.4f} nats of loss on {lesions.images} images"
        )
        number = len(self.profiles[channel].prediction.peers)
        if number == 0:
            return [f"{text}."]
        peers = "its best peer" if number == 1 else f"its {number} best peers"
        share = self.recovered(channel)
        return [
            f"{text}; with the prediction of {peers} in its place it {_change(replaced.accuracy_drop)} and "
            f"{replaced.loss_increase:+.4f} nats.",
            f"The damage is {TOO_SMALL} what peers give back."
            if share is None
            else f"Its peers give back {share:.0%} of the loss.",
        ]

    def to_json(self) -> str:
        """Serialise everything; one JSON object. Numbers that are not finite become null."""
        payload = dataclasses.asdict(self)
        payload["explained"] = [
            {"channel": k, "recovered": self.recovered(k), "text": " ".join(self.sentences(k))} for k in self.channels
        ]
        return json.dumps(_finite(payload))

    def __str__(self) -> str:
        lines = [self.heading(), ""]
        if not self.channels:
            easy, hard = self.ends()
            lines += ["easiest to replace by their peers", *_overview_rows(easy), ""]
            lines += ["hardest to replace", *_overview_rows(hard)]
        for channel in self.channels:
            lines += [*self.sentences(channel), *_peer_rows(self.profiles[channel]), ""]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)]).rstrip()

    def heading(self) -> str:
        """One line about the layer and the images."""
        constant = sum(profile.constant for profile in self.profiles)
        text = f"{self.layer} ({self.kind}), {len(self.profiles)} channels"
        text += f", {constant} of them constant" if constant else ""
        text += f"; statistics of {self.score_images} images, target: {self.target or 'none'}"
        if self.lesions is not None:
            whole = self.lesions
            text += f"; lesions on {whole.images} images, loss {whole.loss:.4f} nats"
            text += f", accuracy {whole.accuracy:.1%}" if whole.reference == "labels" else ""
        return text


def explain(
    model: nn.Module,
    layer: str,
    loader: Iterable[Any] | None = None,
    *,
    stats: CalibrationStatistics | None = None,
    channels: int | Iterable[int] | None = None,
    removal: Removal = "mean",
    peers: int = PEERS,
    max_images: int | None = None,
    progress: bool = True,
) -> Explanation:
    """Explain which peers can replace channels of a layer, how well, and what that says of pruning them.

    Without ``channels`` the layer's overview: every channel on both axes, no lesions. With them also what the
    network loses without each, and with the peers' prediction in its place; see
    :func:`~tp_twoaxis.diagnostics.lesions.lesion` for its cost. The model comes back exactly as it was.

    Args:
        model: a trained classifier; wrappers are looked through.
        layer: name of a convolution, linear or attention layer.
        loader: images for lesions, and for the statistics where ``stats`` is None; it is then read twice.
            Yields ``(images, labels)`` or images; without labels damage is measured against the whole network's
            own predictions.
        stats: calibration of this model; from other images than the loader's, the recovered share is out of
            sample.
        channels: one output channel of the layer, or several.
        removal: what stands in a removed channel's place: ``"mean"``, which a bias can supply after pruning,
            or ``"zero"``.
        peers: how many predict a channel, at most; 1 to 10. The paper has 8 (appendix K.2).
        max_images: of the loader, at most; None reads it to its end.
        progress: show progress bars on stderr.

    Raises:
        TwoAxisError: no such layer or channel; a loader is needed and there is none; or see
            :func:`~tp_twoaxis.calibrate` and :func:`~tp_twoaxis.diagnostics.lesions.lesion`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
        >>> with torch.no_grad(): _ = net[1].weight[5].copy_(2 * net[1].weight[2])
        >>> loader = [(torch.randn(256, 3, 2, 2), torch.randint(4, (256,)))]
        >>> result = explain(net, "1", loader, channels=5, progress=False)
        >>> result.profiles[5].hull, round(result.profiles[5].hull_explanation, 3)
        ((2,), 1.0)
        >>> result.sentences(5)[0]
        '100% of channel 5 can be predicted from 1 peer (2).'
    """
    if removal not in IN_ITS_PLACE:
        raise TwoAxisError(f"removal: expected mean or zero, got {removal!r}")
    network = unwrap(model)
    module = channel_layers(network, [layer])[layer]
    wanted = [] if channels is None else checked_channels(channels, out_channels_of(module), layer)
    notes = []
    if loader is None and (stats is None or wanted):
        what = "lesions" if wanted else "statistics"
        raise TwoAxisError(f"loader: expected images to gather {what} from, got none; pass a loader")
    if stats is None and loader is not None:
        stats = calibrate(network, loader, layers=[layer], max_images=max_images, progress=progress)
        if wanted:
            notes.append("the statistics are of the images that lesions are measured on; pass others for a fair test")
    assert stats is not None
    stats.verify(network, [layer])
    overview = explain_statistics(stats, layer, peers=peers)
    lesions = None
    if wanted and loader is not None:
        lesions = lesion(
            network,
            loader,
            layer,
            wanted,
            (removal, "peers"),
            stats=stats,
            peers=peers,
            max_images=max_images,
            progress=progress,
        )
        if lesions.reference != "labels":
            notes.append("there are no labels: loss and agreement are with the classes that the whole network predicts")
    return replace(overview, removal=removal, channels=tuple(wanted), lesions=lesions, notes=[*notes, *overview.notes])


def explain_statistics(stats: CalibrationStatistics, layer: str, *, peers: int = PEERS) -> Explanation:
    """Give a layer's overview without the network: from statistics of it as it was.

    Args:
        stats: calibration statistics that hold the layer.
        layer: its name.
        peers: how many predict a channel, at most; 1 to 10.

    Raises:
        TwoAxisError: the statistics hold no such layer, or ``peers`` is out of range.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
        >>> stats = calibrate(net, [torch.randn(64, 3, 2, 2)], progress=False)
        >>> explain_statistics(stats, "1").heading()
        '1 (Linear), 6 channels; statistics of 64 images, target: predicted_margin'
    """
    entry = stats[layer]
    few = entry.num_rows < 10 * entry.num_channels
    note = f"{entry.num_rows} rows are few for {entry.num_channels} channels: explained shares come out too high"
    return Explanation(
        layer,
        entry.kind,
        stats.target,
        entry.num_images,
        entry.num_rows,
        peers,
        "mean",
        profile_channels(entry, peers),
        notes=[note] if few else [],
    )


def _change(drop: float) -> str:
    return f"{'costs' if drop >= 0 else 'gains'} {abs(100 * drop):.1f} points"


def _nats(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _words(target: str | None) -> str:
    return (target or "").replace("_", " ")


def _overview_rows(profiles: list[ChannelProfile]) -> list[str]:
    rows = ["channel  predicted  from peers                        capture      task  (nats)"]
    for p in profiles:
        shown = ", ".join(map(str, p.hull[:6])) + (", ..." if len(p.hull) > 6 else "")
        task = "-" if p.task_mi is None else _nats(p.task_mi)
        rows.append(f"{p.channel:7}{p.hull_explanation:11.0%}  {len(p.hull):2}: {shown:27}{p.capture:8.2f}{task:>10}")
    return rows


def _peer_rows(profile: ChannelProfile) -> list[str]:
    if not profile.order:
        return []
    rows = ["   peer  predicted so far    weight in the prediction"]
    weights = dict(zip(profile.prediction.peers, profile.prediction.weights, strict=True))
    for place in range(max(len(profile.hull), len(weights))):
        peer = profile.order[place]
        mark = " (hull)" if place < len(profile.hull) else ""
        weight = f"{weights[peer]:+.3f}" if peer in weights else "-"
        rows.append(f"{peer:7}{profile.path[place]:18.1%}{weight:>14}{mark}")
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
