"""What a pruned and unrepaired network must compute, from the dense one and the list of channels that left.

Nothing here reads the package's graph, groups or masks. A channel that left is NaN where it is written. A layer that
mixes channels reads zero instead, as if its weights for the channel were gone; a norm over channels runs over those
that are there. So the outputs are those of a network from which every reader lost exactly the channels that left, and
a reader that lost others gives itself away. Means and products over channels that are no layer are not followed.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

MIXING = (_ConvNd, nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


def run(model, inputs):
    """Run a model on a tensor, a tuple or a dict; list its output tensors."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            out = model(**inputs)
        else:
            out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return tensors(out)


def tensors(value):
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors(part)]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def expected_outputs(dense, removed, inputs):
    """Outputs of the dense network when some outputs of its layers are not there.

    Args:
        dense: the network before pruning, in evaluation mode.
        removed: layer name -> output channels that left it.
        inputs: a tensor, a tuple or a dict.
    """
    with ExitStack() as stack:
        for name, layer in dense.named_modules():
            if isinstance(layer, MIXING):
                stack.callback(layer.register_forward_pre_hook(_zeros, with_kwargs=True).remove)
            if isinstance(layer, nn.LayerNorm):
                stack.callback(layer.register_forward_hook(_norm_of_rest).remove)
            if isinstance(layer, nn.GroupNorm):
                stack.callback(layer.register_forward_hook(_group_norm_of_rest).remove)
            if removed.get(name):
                stack.callback(layer.register_forward_hook(_absent(removed[name])).remove)
        return run(dense, inputs)


def _zeros(layer, args, kwargs):
    return tree_map(
        lambda x: x.nan_to_num(0.0) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
    )


def _absent(channels):
    def hook(layer, args, out):
        first = out[0] if isinstance(out, tuple) else out
        first = first.clone()
        first.movedim(-len(layer.kernel_size) - 1 if isinstance(layer, _ConvNd) else -1, 0)[channels] = torch.nan
        return (first, *out[1:]) if isinstance(out, tuple) else first

    return hook


def _norm_of_rest(norm, args, out):
    (x,), width = args, norm.normalized_shape[-1]
    if len(norm.normalized_shape) > 1 or not x.isnan().any():
        return None
    axis = -1 if x.shape[-1] == width else 1
    x = x.movedim(axis, -1)
    there = ~x.isnan().reshape(-1, width).any(0)
    kept = F.layer_norm(x[..., there], (int(there.sum()),), *_affine(norm, there), norm.eps)
    filled = torch.full_like(x, torch.nan)
    filled[..., there] = kept
    return filled.movedim(-1, axis)


def _group_norm_of_rest(norm, args, out):
    (x,) = args
    if not x.isnan().any():
        return None
    there = ~x.isnan().movedim(1, 0).flatten(1).any(1)
    filled = torch.full_like(x, torch.nan)
    filled[:, there] = F.group_norm(x[:, there], norm.num_groups, *_affine(norm, there), norm.eps)
    return filled


def _affine(norm, there):
    return [None if p is None else p[there] for p in (norm.weight, norm.bias)]


def difference(found, expected):
    """Largest difference of two lists of outputs, relative to the size of each; infinite where shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    apart = 0.0
    for now, then in zip(found, expected, strict=True):
        if then.is_floating_point() and then.numel():
            apart = max(apart, float((now - then).abs().max() / then.abs().max().clamp_min(1e-12)))
        elif not torch.equal(now, then):
            apart = float("inf")
    return apart if apart == apart else float("inf")
