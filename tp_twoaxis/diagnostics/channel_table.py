"""Every channel on both axes, as a pandas table: one row a channel."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import layer_score
from tp_twoaxis.runtime.serialization import write_bytes
from tp_twoaxis.scores import hull, local
from tp_twoaxis.scores.named_scores import (
    DEFAULT_SCORE,
    capture,
    evaluate,
    target_excess,
    target_redundancy,
    task_mi,
)
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.store import CalibrationStatistics

COLUMNS = {
    "layer": "name in the model",
    "channel": "output channel of the layer",
    "variance": "output variance P_k",
    "capture": "input capture I_k, nats",
    "overlap": "mean overlap with the peers R_k, nats",
    "hull_size": "peers in the replaceability hull |H_k|",
    "hull_explanation": "share of the variance that the hull predicts E_k, 0..1",
    "rayleigh_quotient": "input variance along the weight direction RQ_k",
    "task_mi": "task information M_k, nats",
    "target_excess": "task information with a partner beyond the better half X_k, nats",
    "target_redundancy": "Gaussian minimum-mutual-information redundancy, nats",
    "score": "the chosen score, larger keeps",
}
SUFFIXES = (".csv", ".parquet")


def channel_table(
    stats: CalibrationStatistics, score: str = DEFAULT_SCORE, *, layers: Iterable[str] | None = None
) -> pd.DataFrame:
    """Put every calibrated channel on both axes.

    Args:
        stats: from :func:`~tp_twoaxis.calibrate`.
        score: the name in ``tp_twoaxis.scores.SCORES`` that fills the last column.
        layers: restrict to these.

    Returns:
        A table with the columns :data:`COLUMNS`, layers in the model's order and channels ascending. The
        three columns of the target axis are NaN where the statistics hold no target.

    Raises:
        TwoAxisError: unknown score or layer, or a score of the target axis without a target.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(4, (64,)))], progress=False)
        >>> channel_table(stats, "task-mi")[["layer", "channel"]].values.tolist()
        [['1', 0], ['1', 1], ['1', 2], ['1', 3]]
    """
    layer_score(score)  # a typo is refused before anything is computed
    names = list(stats) if layers is None else list(layers)
    return pd.concat([_layer_table(stats[name], score) for name in names], ignore_index=True)


def _layer_table(layer: LayerStatistics, score: str) -> pd.DataFrame:
    variance, correlation = layer.variance, layer.correlation
    active = variance > 0
    hulls = hull.greedy_hulls(correlation, active=active)
    columns: dict[str, Any] = {
        "layer": layer.name,
        "channel": range(layer.num_channels),
        "variance": variance,
        "capture": capture(layer),
        "overlap": local.peer_overlap(correlation, active),
        "hull_size": hulls.size,
        "hull_explanation": hulls.explanation,
        "rayleigh_quotient": local.rayleigh_quotient(variance, layer.weight_power),
        "task_mi": math.nan,
        "target_excess": math.nan,
        "target_redundancy": math.nan,
    }
    if layer.target is not None:
        columns["task_mi"] = task_mi(layer)
        columns["target_excess"] = target_excess(layer)
        columns["target_redundancy"] = target_redundancy(layer)
    columns["score"] = evaluate(layer_score(score), layer)
    values = {
        name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value for name, value in columns.items()
    }
    return pd.DataFrame(values)[list(COLUMNS)]


def layer_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Condense a channel table to one row a layer.

    Args:
        table: from :func:`channel_table`.

    Returns:
        Layer, number of channels and of constant ones; then, of the channels that vary, means of both axes, the share
        that one peer replaces (hull of size 1), and Spearman's rank correlation of ``capture`` with ``task_mi``: near
        0 the two axes say different things; NaN where either is the same for all or missing. A layer whose channels
        are all constant has NaN throughout.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(4, (64,)))], progress=False)
        >>> layer_summary(channel_table(stats))[["layer", "channels", "constant"]].values.tolist()
        [['1', 4, 0]]
    """
    rows = []
    for name, channels in table.groupby("layer", sort=False):
        part = channels[channels.variance > 0]
        ranks = part[["capture", "task_mi"]].rank()
        # a constant column has no ranks to correlate; asking NumPy for them would warn
        varied = bool((ranks.nunique() > 1).all())
        rows.append(
            {
                "layer": name,
                "channels": len(channels),
                "constant": len(channels) - len(part),
                "capture": part.capture.mean(),
                "overlap": part.overlap.mean(),
                "hull_explanation": part.hull_explanation.mean(),
                "one_peer": (part.hull_size == 1).mean(),
                "task_mi": part.task_mi.mean(),
                "target_excess": part.target_excess.mean(),
                "rank_correlation": ranks.capture.corr(ranks.task_mi) if varied else math.nan,
            }
        )
    return pd.DataFrame(rows)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Turn a table into JSON-able rows; NaN and infinity become None.

    Example:
        >>> records(pd.DataFrame({"a": [1.5, float("nan")], "n": [1, 2]}))
        [{'a': 1.5, 'n': 1}, {'a': None, 'n': 2}]
    """
    rows: list[dict[str, Any]] = table.to_dict("records")
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]


def check_suffix(path: str | Path) -> None:
    """Refuse a table's file name before anything is computed.

    Raises:
        TwoAxisError: the name ends in none of :data:`SUFFIXES`.

    Example:
        >>> check_suffix("channels.csv")
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise TwoAxisError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}; rename it")


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV or Parquet, whole or not at all.

    Args:
        table: any table.
        path: the suffix decides: ``.csv`` or ``.parquet``.

    Raises:
        TwoAxisError: another suffix, pyarrow is missing, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "t.csv")
        >>> write_table(pd.DataFrame({"a": [1]}), path)
        >>> path.read_text().split()
        ['a', '1']
    """
    check_suffix(path)
    if Path(path).suffix.lower() == ".csv":
        write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode())
        return
    buffer = io.BytesIO()
    try:
        table.to_parquet(buffer, index=False)
    except ImportError as error:
        raise TwoAxisError('Parquet files need pyarrow, it is missing; pip install "tp-twoaxis[cli]"') from error
    write_bytes(path, buffer.getvalue())
