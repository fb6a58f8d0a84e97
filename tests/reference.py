"""Slow NumPy twins of the statistics, written from the formulas; nothing here calls the package.

A *row* is one (image, position) of what a layer writes; arrays are ``[images, positions, C]`` unless said otherwise.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn


def rows_of(output: np.ndarray, layer: nn.Module) -> np.ndarray:
    """Rows of a layer's output, copied out position by position."""
    if isinstance(layer, nn.MultiheadAttention):
        output = output if layer.batch_first else output.swapaxes(0, 1)
    if not isinstance(layer, nn.modules.conv._ConvNd):
        output = np.moveaxis(output, -1, 1)
    n, channels, *spatial = output.shape
    rows = np.empty((n, int(np.prod(spatial)), channels))
    for position, index in enumerate(np.ndindex(*spatial)):
        rows[:, position] = output[(slice(None), slice(None), *index)]
    return rows


def emitted(model: nn.Module, images: list[torch.Tensor], layers: dict[str, nn.Module]) -> dict[str, np.ndarray]:
    """Rows that each layer writes while the model sees the batches, caught the moment that they are written."""
    caught: dict[str, list[np.ndarray]] = {name: [] for name in layers}

    def catch(name):
        def hook(layer, inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            caught[name].append(rows_of(value.detach().cpu().double().numpy(), layer))

        return hook

    handles = [layer.register_forward_hook(catch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in images:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in caught.items()}


def received(model: nn.Module, images: list[torch.Tensor], layers: dict[str, nn.Module]) -> dict[str, np.ndarray]:
    """Rows that each layer reads, without the zeros of padding."""
    caught: dict[str, list[np.ndarray]] = {name: [] for name in layers}

    def catch(name):
        def hook(layer, inputs, named):
            value = (inputs or tuple(named.values()))[0]
            caught[name].append(rows_of(value.detach().cpu().double().numpy(), layer))

        return hook

    handles = [layer.register_forward_pre_hook(catch(name), with_kwargs=True) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in images:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in caught.items()}


def flat(rows: np.ndarray) -> np.ndarray:
    """``[images, positions, C]`` to ``[images * positions, C]``."""
    return rows.reshape(-1, rows.shape[-1])


def covariance(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Mean outer product of deviations from the mean, ``[D, E]``, of ``[n, D]`` and ``[n, E]``."""
    y = x if y is None else y
    dx, dy = x - x.mean(0), y - y.mean(0)
    return sum(np.outer(a, b) for a, b in zip(dx, dy, strict=True)) / len(x)


def correlation(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlations, ``[D, E]``; 0 where either side is constant."""
    y = x if y is None else y
    rho = np.zeros((x.shape[1], y.shape[1]))
    for k, j in np.ndindex(*rho.shape):
        a, b = x[:, k] - x[:, k].mean(), y[:, j] - y[:, j].mean()
        norm = np.sqrt((a @ a) * (b @ b))
        rho[k, j] = a @ b / norm if norm > 0 else 0.0
    return rho


def relative_error(actual, expected: np.ndarray, scale_rows: np.ndarray, scale_columns: np.ndarray) -> float:
    """Largest error of a covariance ``[D, E]``, each entry in units of its two standard deviations."""
    return float(np.max(np.abs(np.asarray(actual) - expected) / np.sqrt(np.outer(scale_rows, scale_columns))))


def task_variables(logits: np.ndarray, labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """All six task variables, image by image; each ``[n, 1]``, ``one_vs_rest`` ``[n, K]``."""
    out: dict[str, list[list[float]]] = {}
    for i, z in enumerate(logits.astype(np.float64)):
        ordered = sorted(z, reverse=True)
        values = {"predicted_margin": [ordered[0] - ordered[1]], "predicted_logit": [ordered[0]]}
        if labels is not None:
            y = int(labels[i])
            values["margin"] = [z[y] - max(v for j, v in enumerate(z) if j != y)]
            values["correct_logit"] = [z[y]]
            values["negative_loss"] = [z[y] - z.max() - np.log(np.sum(np.exp(z - z.max())))]
            values["one_vs_rest"] = [float(j == y) for j in range(len(z))]
        for name, value in values.items():
            out.setdefault(name, []).append(value)
    return {name: np.array(value) for name, value in out.items()}


def patches(x: np.ndarray, layer: nn.modules.conv._ConvNd) -> np.ndarray:
    """Unfolded zero-padded patches of a convolution's input ``[n, C_in, *spatial]``: ``[n, positions, C_in, taps]``.

    Written as loops over positions and kernel taps, for any number of dimensions, stride, padding and dilation.
    """
    size = x.shape[2:]
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in layer.padding)])
    span = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    out = [(n + 2 * p - s) // t + 1 for n, p, s, t in zip(size, layer.padding, span, layer.stride, strict=True)]
    taps = list(itertools.product(*(range(k) for k in layer.kernel_size)))
    result = np.empty((len(x), int(np.prod(out)), x.shape[1], len(taps)))
    for position, corner in enumerate(np.ndindex(*out)):
        for number, tap in enumerate(taps):
            at = [c * s + t * d for c, s, t, d in zip(corner, layer.stride, tap, layer.dilation, strict=True)]
            result[:, position, :, number] = x[(slice(None), slice(None), *at)]
    return result


def patch_power(x: np.ndarray, layer: nn.modules.conv._ConvNd) -> np.ndarray:
    """Signal power ``w_k' S_X w_k`` of every output channel from explicit patch covariances, [C]."""
    weight = layer.weight.detach().double().numpy()
    unfolded = patches(x, layer)
    inputs, outputs = x.shape[1] // layer.groups, len(weight) // layer.groups
    power = np.empty(len(weight))
    for group in range(layer.groups):
        of_group = unfolded[:, :, group * inputs : (group + 1) * inputs]
        s_x = covariance(of_group.reshape(-1, inputs * unfolded.shape[-1]))
        for k in range(group * outputs, (group + 1) * outputs):
            w = weight[k].reshape(-1)
            power[k] = w @ s_x @ w
    return power
