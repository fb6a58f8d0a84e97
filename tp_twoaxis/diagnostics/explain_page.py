"""An explanation as a picture and as one HTML file that opens offline."""

from __future__ import annotations

import math
from html import escape
from importlib.metadata import version

import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.explain import IN_ITS_PLACE, TOO_SMALL, Explanation
from tp_twoaxis.diagnostics.html_page import image_element, page, png_bytes, table_element
from tp_twoaxis.diagnostics.peers import ChannelProfile
from tp_twoaxis.diagnostics.plots import plot_layer

READING = (
    "In the pictures each point is a channel. To the right: its signal captures more of the layer's input. Up: its "
    "mean response to an image says more about the task. Yellow: a few peers of the same layer can predict it, so "
    "that it can be replaced, whatever it says about the task."
)


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


def explanation_html(explanation: Explanation) -> str:
    """Build the document: words, the two axes, peers with weights, lesions, and all channels of the layer.

    Returns:
        A complete HTML document without references to anything outside itself.

    Example:
        >>> import torch
        >>> from tp_twoaxis.diagnostics.explain import explain
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
        >>> html = explanation_html(explain(net, "1", [torch.randn(64, 3, 2, 2)], progress=False))
        >>> html.startswith("<!DOCTYPE html>"), "http" in html
        (True, False)
    """
    name = escape(explanation.layer)
    sections = [
        f"<h1>{name}: what its peers can replace</h1>",
        f"<p class='soft'>{escape(explanation.heading())}</p>",
        *(f"<p class='note'>{escape(note)}</p>" for note in explanation.notes),
        f"<p class='soft'>{READING}</p>",
    ]
    for channel in explanation.channels:
        sections.append(f"<h2>Channel {channel}</h2>")
        sections += [f"<p>{escape(text)}</p>" for text in explanation.sentences(channel)]
        sections.append(_picture(explanation, channel))
        profile = explanation.profiles[channel]
        if profile.order:
            sections.append(
                f"<p class='soft'>Peers of channel {channel} in the order in which they add most. Predicted: share of "
                "its variance, in %, by this peer and those above. Weight: in the prediction that replaces it.</p>"
            )
            sections.append(table_element(_peer_table(profile), "{:.3f}"))
    if explanation.lesions is not None:
        sections += ["<h2>Lesions</h2>", _lesion_words(explanation), table_element(_lesion_table(explanation))]
    if not explanation.channels:
        easy, hard = explanation.ends()
        sections.append(_picture(explanation, None))
        for title, some in (("Easiest to replace", easy), ("Hardest to replace", hard)):
            sections += [f"<h2>{title}</h2>", table_element(_rows(explanation, some), "{:.3f}")]
    everything = table_element(_rows(explanation, explanation.profiles), "{:.3f}")
    sections += [
        f"<details><summary>All {len(explanation.profiles)} channels of the layer</summary>{everything}</details>",
        f"<p class='soft'>tp-twoaxis {escape(version('tp-twoaxis'))}; {explanation.score_images} images and "
        f"{explanation.rows} rows behind the statistics, up to {explanation.peers} peers in a prediction.</p>",
    ]
    return page(f"{explanation.layer} explained", sections)


def _picture(explanation: Explanation, channel: int | None) -> str:
    if explanation.target is None:
        return "<p class='soft'>No picture: the statistics hold no target, so there is no second axis.</p>"
    marked = () if channel is None else (channel,)
    peers = () if channel is None else explanation.profiles[channel].hull
    figure = plot_layer(profile_table(explanation), marked=marked, peers=peers)
    which = "all channels" if channel is None else f"channel {channel} marked"
    return image_element(png_bytes(figure), f"{explanation.layer} on both axes, {which}")


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


def _lesion_words(explanation: Explanation) -> str:
    lesions = explanation.lesions
    assert lesions is not None
    measure = "accuracy" if lesions.reference == "labels" else "agreement with the whole network's predictions"
    return (
        f"<p class='soft'>On {lesions.images} images. Removed: {IN_ITS_PLACE[explanation.removal]} in the channel's "
        f"place, before BatchNorm and activation; replaced: the prediction of its peers. Loss in nats, {measure} in "
        "points; both are changes against the whole network. Given back: share of the removed channel's loss.</p>"
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
                "points, removed": f"{-100 * removed.accuracy_drop:+.1f}",
                "points, replaced": f"{-100 * replaced.accuracy_drop:+.1f}",
            }
        )
    return pd.DataFrame(rows)


def _rows(explanation: Explanation, profiles: list[ChannelProfile]) -> pd.DataFrame:
    table = profile_table(explanation).loc[[p.channel for p in profiles]]
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
    return table[list(columns)].rename(columns=columns)
