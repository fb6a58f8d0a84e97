"""Whether channels hand their place on an axis to those that read them (paper, section 3.3 and appendix L)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_sources import ChannelSource, channel_sources
from tp_twoaxis.diagnostics.axis_coordinates import cell_correlation, relative_depths, task_cells
from tp_twoaxis.diagnostics.channel_quantities import LOCAL, QUANTITIES, TARGET, quantities_of
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.propagation_figure import draw_propagation
from tp_twoaxis.diagnostics.run_aggregates import best_estimate
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.layers import weight_blocks
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.scores.composite import z_scores

PERMUTATIONS = 200
# cross-axis terms and the excess of equal types count as near 0 within this (ours; the paper's bounds are lost)
NEAR_ZERO = 0.1


def routing_weights(layer: nn.Module) -> Tensor:
    """Frobenius norm of the kernel from each input to each output channel, ``|W_kj|`` of equation 13.

    Returns:
        [C_out, C_in] float64, 0 between blocks of a grouped convolution.

    Example:
        >>> conv = nn.Conv2d(4, 2, 3, groups=2)
        >>> weights = routing_weights(conv)
        >>> weights.shape, int((weights > 0).sum())
        (torch.Size([2, 4]), 4)
    """
    norms: Tensor = weight_blocks(layer).double().norm(dim=3).cpu()
    blocks, outputs, inputs = norms.shape
    weights = norms.new_zeros(blocks, outputs, blocks, inputs)
    weights[torch.arange(blocks), :, torch.arange(blocks)] = norms
    return weights.reshape(blocks * outputs, blocks * inputs)


def routed(weights: Tensor, values: Tensor) -> Tensor:
    """What an output channel's sources have on average, ``sum_j |W_kj| m_j / sum_j |W_kj|`` (equation 13).

    Args:
        weights: [C_out, C_in], not negative.
        values: [C_in], NaN for inputs without a source, which neither sum counts.

    Returns:
        [C_out]; NaN where no weight is left.

    Example:
        >>> routed(torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.0, 1.0]]), torch.tensor([0.0, 1.0, math.nan])).tolist()
        [0.75, nan]
    """
    known = ~values.isnan()
    total = weights[:, known].sum(1)
    return torch.where(total > 0, weights[:, known] @ values[known] / total, math.nan)


@dataclass(frozen=True)
class Edge:
    """A convolution, and what it reads of calibrated layers.

    Attributes:
        layer: its name.
        sources: names of the layers that write what it reads.
        weights: [C_out, C_in], of :func:`routing_weights`.
        read: symbol -> [C_in], the mean of the producers' z-scores within their layers; NaN where an input has none.
        written: symbol -> [C_out], its own channels', NaN for constant ones.
    """

    layer: str
    sources: list[str]
    weights: Tensor
    read: dict[str, Tensor]
    written: dict[str, Tensor]


def propagation_edges(inputs: EvidenceInputs, symbols: Sequence[str] = tuple(QUANTITIES)) -> list[Edge]:
    """Find what each convolution reads, through norms, activations, pooling and sums.

    A convolution is one edge, whatever the number of layers that write into the sum that it reads: of such channels the
    producers' z-scores are averaged (ours). With one producer the z-scores change no rank. A depthwise convolution is a
    layer like any other; each of its channels has one source. The input of the network has none.

    Raises:
        NotApplicableError: there is no such convolution, the network could not be followed, or see
            :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.
    """
    first = next(iter(inputs.calibration), None)
    images = first[0] if isinstance(first, (tuple, list)) else first
    if not isinstance(images, Tensor):
        raise NotApplicableError("the network was to run on one tensor of images; its channels are not followed")
    cells = task_cells(inputs)
    try:
        sources = channel_sources(inputs.model, images)
    except TwoAxisError as error:
        raise NotApplicableError(str(error)) from error
    images_seen = inputs.statistics.num_images
    values = {
        name: quantities_of(layer, symbols)
        for name, layer in inputs.statistics.layers.items()
        if layer.num_channels <= images_seen
    }
    layers = dict(unwrap(inputs.model).named_modules())
    edges = []
    for name in cells:
        known = [source for source in sources.get(name, ()) if source.layer in values]
        if known:
            read = {symbol: _read(known, values, symbol) for symbol in symbols}
            names = [source.layer for source in known]
            edges.append(Edge(name, names, routing_weights(layers[name]), read, values[name]))
    if not edges:
        raise NotApplicableError("no convolution reads what another calibrated layer writes; expected at least two")
    return edges


def _read(sources: Sequence[ChannelSource], values: Mapping[str, dict[str, Tensor]], symbol: str) -> Tensor:
    z = []
    for source in sources:
        own = values[source.layer][symbol]
        scores = z_scores(own, ~own.isnan()).masked_fill(own.isnan(), math.nan)
        z.append(torch.where(source.channels >= 0, scores[source.channels.clamp_min(0)], math.nan))
    return torch.stack(z).nanmean(0)


def routing_table(edges: Sequence[Edge], depths: Mapping[str, float]) -> pd.DataFrame:
    """Rank correlation of what sources have with what their readers have, for all pairs of quantities.

    Returns:
        A row an edge and pair: layer, depth, sources, channels, ``source_quantity`` a, ``quantity`` b, and
        ``rho(m^a, m^b)`` over the layer's varying channels.
    """
    rows = [
        {
            "layer": edge.layer,
            "depth": depths[edge.layer],
            "sources": ", ".join(edge.sources),
            "channels": int((~own.isnan()).sum()),
            "source_quantity": a,
            "quantity": b,
            "rho": cell_correlation(routed(edge.weights, read), own),
        }
        for edge in edges
        for a, read in edge.read.items()
        for b, own in edge.written.items()
    ]
    return pd.DataFrame(rows)


def axis_contrast(table: pd.DataFrame) -> pd.DataFrame:
    """Means of each edge's correlations inside an axis and across.

    Args:
        table: of :func:`routing_table`; NaN is left out.

    Returns:
        A row an edge: layer, depth, ``local`` (I and R with I and R), ``target`` (M and X with M and X), ``cross``, and
        ``within_minus_cross``, the mean of the first two less the third.
    """
    axis = dict.fromkeys(LOCAL, "local") | dict.fromkeys(TARGET, "target")
    source, own = table.source_quantity.map(axis), table.quantity.map(axis)
    block = own.where(source == own, "cross").rename("block")
    means = table.groupby(["layer", "depth", block], sort=False).rho.mean().unstack("block").reset_index()
    means.columns.name = None
    means["within_minus_cross"] = (means.local + means.target) / 2 - means.cross
    return means.sort_values("depth", ignore_index=True)[
        ["layer", "depth", "local", "target", "cross", "within_minus_cross"]
    ]


def channel_types(capture: Tensor, information: Tensor) -> Tensor:
    """Quadrant of each channel at the medians of I and M: 0 to 3, -1 where either is NaN.

    Example:
        >>> channel_types(torch.tensor([1.0, 2.0, math.nan]), torch.tensor([5.0, 4.0, 3.0])).tolist()
        [1, 2, -1]
    """
    known = ~(capture.isnan() | information.isnan())
    if not bool(known.any()):
        return torch.full_like(capture, -1, dtype=torch.int64)
    above = [values > values[known].quantile(0.5) for values in (capture, information)]
    return torch.where(known, 2 * above[0].long() + above[1].long(), -1)


def type_table(edges: Sequence[Edge], depths: Mapping[str, float], *, seed: int = 0) -> pd.DataFrame:
    """How many channels are of their heaviest source's type, against permuted types.

    Returns:
        A row an edge: layer, depth, channels, ``same`` the share of equal types, ``chance`` its mean over 200
        permutations of the layer's types, ``excess`` their difference, ``p`` ``(1 + hits) / 201``.
    """
    rows = []
    for edge in edges:
        own = channel_types(edge.written["I"], edge.written["M"])
        read = channel_types(edge.read["I"], edge.read["M"])
        weights = edge.weights * (read >= 0)
        heaviest = read[weights.argmax(1)]
        used = (own >= 0) & (weights.sum(1) > 0)
        own, heaviest = own[used], heaviest[used]
        same = float((own == heaviest).double().mean())
        generator = torch.Generator().manual_seed(seed)
        drawn = [own[torch.randperm(len(own), generator=generator)] == heaviest for _ in range(PERMUTATIONS)]
        shares = torch.stack(drawn).double().mean(1)
        rows.append(
            {
                "layer": edge.layer,
                "depth": depths[edge.layer],
                "channels": len(own),
                "same": same,
                "chance": float(shares.mean()),
                "excess": same - float(shares.mean()),
                # a share is a number of channels over the same count, so that ties are exact up to rounding
                "p": (1 + int((shares >= same - 1e-12).sum())) / (1 + PERMUTATIONS),
            }
        )
    return pd.DataFrame(rows)


def propagation_section(inputs: EvidenceInputs) -> Section:
    """Answer whether the axes propagate from layer to layer (H3).

    Raises:
        NotApplicableError: see :func:`propagation_edges`.
    """
    edges = propagation_edges(inputs)
    depths = relative_depths(inputs.cells())
    routing = routing_table(edges, depths)
    contrast = axis_contrast(routing)
    types = type_table(edges, depths, seed=inputs.seed)
    tables = {"routing": routing, "contrast": contrast, "types": types}
    return Section(
        "propagation",
        "Do channels hand their place on an axis to the channels that read them?",
        tables,
        propagation_claims(tables),
        [Drawing("propagation", lambda: draw_propagation(routing, contrast), _CAPTION)],
        follows="Where ranks do not carry over, a layer's channels must be ranked from its own statistics; what was "
        "pruned before a layer tells little about which of its channels can go.",
        fails="A correlation of weighted means is no causal path. Where several layers write into a sum, or a gate "
        "multiplies, the sources' z-scores are averaged (ours).",
    )


def propagation_claims(tables: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """Judge the propagation of both axes (H3).

    Args:
        tables: ``contrast`` and ``types`` of :func:`propagation_section`; of several networks below each other, with
            the columns ``network`` and ``seed``, intervals are over models where a backbone has three, otherwise over
            edges.
    """
    contrast, types = tables["contrast"], tables["types"]
    near = f"bounds of {NEAR_ZERO} are ours; the paper's intervals are lost"
    return [
        Claim("the local axis propagates to itself", "", best_estimate(contrast, "local"), above=0.0),
        Claim("the target axis propagates to itself", "", best_estimate(contrast, "target"), above=0.0),
        Claim(
            "correlations within an axis are above those across",
            "above",
            best_estimate(contrast, "within_minus_cross"),
            above=0.0,
        ),
        Claim(
            "cross-axis terms are near 0",
            "near 0",
            best_estimate(contrast, "cross"),
            above=-NEAR_ZERO,
            below=NEAR_ZERO,
            note=near,
        ),
        Claim(
            "channel types are rebuilt in each layer: few more than by chance are of their heaviest source's type",
            "",
            best_estimate(types, "excess"),
            below=NEAR_ZERO,
            note=near,
        ),
    ]


_CAPTION = (
    "Above: rank correlation of what an output channel's sources have on average, weighted by the norms of its "
    "kernels, with what it has itself; mean over the network's convolutions. Below: the same by depth, averaged within "
    "the local axis, within the target axis, and across."
)
