"""An explanation as a picture and as one HTML file that opens offline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.explain import IN_ITS_PLACE, TOO_SMALL, Explanation
from tp_twoaxis.diagnostics.html_page import Picture, Table, png_bytes, render, table
from tp_twoaxis.diagnostics.peers import ChannelProfile
from tp_twoaxis.diagnostics.plots import plot_layer


def explanation_figure(explanation: Explanation) -> Figure:
    """Draw the layer on both axes, the explained channels marked; the peers too where there is one channel.

    Raises:
        TwoAxisError: the statistics have no target, so there is no second axis.

    Example:
        >>> import torch
        >>> from tp_twoaxis.diagnostics.explain import explain
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
        >>> loader = [(torch.randn(64, 3, 2, 2), torch.randint(6, (64,)))]
        >>> explanation_figure(explain(net, "1", loader, channels=2, progress=False)).axes[0].get_title(loc="left")
        '1'
    """
    channels = explanation.channels
    peers = explanation.profiles[channels[0]].hull if len(channels) == 1 else ()
    return plot_layer(profile_table(explanation), marked=channels, peers=peers)


def profile_table(explanation: Explanation) -> pd.DataFrame:
    """Every channel of the layer, one row each, with the column names of a channel table.

    Example:
        >>> import torch
        >>> from tp_twoaxis.diagnostics.explain import explain
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
        >>> table = profile_table(explain(net, "1", [torch.randn(64, 3, 2, 2)], progress=False))
        >>> table.channel.tolist(), table.hull_size.dtype.kind
        ([0, 1, 2, 3, 4, 5], 'i')
    """
    rows = [
        {
            "layer": explanation.layer,
            "channel": p.channel,
            "variance": p.variance,
            "capture": p.capture,
            "overlap": p.overlap,
            "hull_size": len(p.hull),
            "hull_explanation": p.hull_explanation,
            "peers": ", ".join(map(str, p.hull)),
            "task_mi": math.nan if p.task_mi is None else p.task_mi,
            "target_excess": math.nan if p.target_excess is None else p.target_excess,
        }
        for p in explanation.profiles
    ]
    return pd.DataFrame(rows)


def explanation_html(explanation: Explanation, *, removed: Iterable[int] = (), back: str | None = None) -> str:
    """Build the document: words, the two axes, peers with weights, lesions, and all channels of the layer.

    Args:
        explanation: of a layer.
        removed: channels that a pruning removed; an overview then shows these instead of the extreme ones.
        back: address of the page that links to this one.

    Returns:
        A complete HTML document that refers to nothing outside itself but ``back``.

    Example:
        >>> import torch
        >>> from tp_twoaxis.diagnostics.explain import explain
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
        >>> html = explanation_html(explain(net, "1", [torch.randn(64, 3, 2, 2)], progress=False))
        >>> html.startswith("<!DOCTYPE html>"), "http" in html
        (True, False)
    """
    return render(
        "explain.html",
        title=f"{explanation.layer} explained",
        explanation=explanation,
        back=back,
        channels=[_channel_part(explanation, channel) for channel in explanation.channels],
        in_its_place=IN_ITS_PLACE[explanation.removal],
        lesions=None if explanation.lesions is None else table(_lesion_table(explanation)),
        overview=None if explanation.channels else _overview(explanation, sorted(removed)),
        everything=_rows(explanation, explanation.profiles),
        version=version("tp-twoaxis"),
    )


def _channel_part(explanation: Explanation, channel: int) -> dict[str, Any]:
    profile = explanation.profiles[channel]
    caption = f"{explanation.layer}: its channels on both axes, channel {channel} ringed, squares around its peers."
    return {
        "number": channel,
        "sentences": explanation.sentences(channel),
        "picture": _picture(explanation, caption, marked=(channel,), peers=profile.hull),
        "peers": table(_peer_table(profile), "{:.3f}") if profile.order else None,
    }


def _overview(explanation: Explanation, removed: Sequence[int]) -> dict[str, Any]:
    caption = f"{explanation.layer}: its channels on both axes" + (", rings around removed ones." if removed else ".")
    easy, hard = explanation.ends()
    parts = {"Easiest to replace": easy, "Hardest to replace": hard}
    if removed:
        title = f"Removed: {len(removed)} of {len(explanation.profiles)} channels, the hardest to replace first"
        gone = [explanation.profiles[channel] for channel in removed]
        parts = {title: sorted(gone, key=lambda profile: profile.hull_explanation)}
    return {
        "picture": _picture(explanation, caption, removed=removed),
        "tables": [(title, _rows(explanation, some)) for title, some in parts.items()],
    }


def _picture(explanation: Explanation, caption: str, **marks: Sequence[int]) -> Picture | None:
    if explanation.target is None:
        return None
    return Picture(png_bytes(plot_layer(profile_table(explanation), **marks)), caption)


def _peer_table(profile: ChannelProfile) -> pd.DataFrame:
    weights = dict(zip(profile.prediction.peers, profile.prediction.weights, strict=True))
    shown = profile.order[: max(len(profile.hull), len(weights))]
    return pd.DataFrame(
        {
            "peer": shown,
            "predicted, %": [f"{100 * share:.1f}" for share in profile.path[: len(shown)]],
            "weight": [weights.get(peer, math.nan) for peer in shown],
            "in the hull": ["yes" if peer in profile.hull else "" for peer in shown],
        }
    )


def _lesion_table(explanation: Explanation) -> pd.DataFrame:
    lesions = explanation.lesions
    assert lesions is not None
    rows = []
    for channel in explanation.channels:
        removed, replaced = lesions.find(channel, explanation.removal), lesions.find(channel, "peers")
        share = explanation.recovered(channel)
        rows.append(
            {
                "channel": channel,
                "loss, removed": f"{removed.loss_increase:+.4f} ± {removed.standard_error:.4f}",
                "loss, replaced": f"{replaced.loss_increase:+.4f} ± {replaced.standard_error:.4f}",
                "given back": TOO_SMALL if share is None else f"{share:.0%}",
                "points, removed": _points(removed.accuracy_drop),
                "points, replaced": _points(replaced.accuracy_drop),
            }
        )
    return pd.DataFrame(rows)


def _points(drop: float) -> str:
    """A change of accuracy in points; zero without a minus."""
    return f"{round(-100 * drop, 1) + 0.0:+.1f}"


def _rows(explanation: Explanation, profiles: list[ChannelProfile]) -> Table:
    shown = profile_table(explanation).loc[[p.channel for p in profiles]]
    columns = {
        "channel": "channel",
        "hull_explanation": "predicted by peers",
        "hull_size": "peers",
        "peers": "which",
        "capture": "capture, nats",
        "overlap": "overlap, nats",
        "task_mi": "task information, nats",
        "target_excess": "with a partner, nats",
    }
    return table(shown[list(columns)].rename(columns=columns), "{:.3f}")
