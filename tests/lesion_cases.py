"""Tables of removed channels that no network made."""

from __future__ import annotations

import numpy as np
import pandas as pd


def lesion_table(layers=("conv1", "conv2", "conv3"), channels=24, seed=0, **fixed):
    """Random scores and damages as of :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`."""
    rng = np.random.default_rng(seed)
    frames = []
    for place, layer in enumerate(layers):
        size = rng.integers(1, 11, channels)
        capture, support = rng.gamma(2.0, 0.3, channels), rng.uniform(0.3, 1.0, channels) / size
        damage = rng.normal(0.02, 0.03, channels)
        columns = {
            "layer": layer,
            "depth": place / max(len(layers) - 1, 1),
            "channel": range(channels),
            "constant": rng.uniform(size=channels) < 0.1,
            "norm": rng.uniform(0.5, 2.0, channels),
            "capture": capture,
            "overlap": rng.uniform(0.0, 0.2, channels),
            "hull_size": size,
            "compact_support": support,
            "compact_local": _z(support) - _z(capture),
            "task_mi": rng.exponential(0.02, channels),
            "peer_explanation": rng.uniform(0.0, 1.0, channels),
            "removal": "mean",
            "damage": damage,
            "damage_error": 0.005,
            "accuracy_drop": damage / 4,
            "peer_damage": damage * rng.normal(0.4, 0.5, channels),
        }
        frames.append(pd.DataFrame({**columns, **fixed}))
    return pd.concat(frames, ignore_index=True)


def _z(values):
    return (values - values.mean()) / (values.std() or 1.0)
