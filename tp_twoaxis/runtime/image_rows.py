"""Which images of a data set a loader gives, as far as it says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset


def image_rows(loader: Iterable[Any], count: int) -> Tensor | None:
    """Find which rows of the data set the first ``count`` images of a loader are.

    Args:
        loader: a DataLoader of a map-style data set, or one of :mod:`tp_twoaxis.data`. Subsets are looked through, and
            so are data sets that have ``rows``, int64 [N], which rows of a larger one theirs are.
        count: images that were read.

    Returns:
        int64 [count] ascending; None where the loader is of another kind, or shuffles and was not read to its end.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> part = Subset(TensorDataset(torch.zeros(9, 3)), [7, 1, 5])
        >>> image_rows(DataLoader(part, batch_size=2), 3).tolist(), image_rows(DataLoader(part), 2).tolist()
        ([1, 5, 7], [1, 7])
        >>> image_rows([torch.zeros(3, 1)], 3) is None
        True
    """
    positions, ordered = _positions(loader)
    if positions is None or len(positions) < count or (len(positions) > count and not ordered):
        return None
    rows, dataset = positions[:count], getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        rows, dataset = torch.as_tensor(dataset.indices, dtype=torch.int64)[rows], dataset.dataset
    own = getattr(dataset, "rows", None)
    if isinstance(own, Tensor) and own.dtype == torch.int64 and own.shape == (len(dataset),):  # type: ignore[arg-type]
        rows = own[rows]
    return rows.sort().values


def joined_rows(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Join the rows of several parts of a calibration; None where those of a part are not known.

    Example:
        >>> joined_rows([torch.tensor([2, 8]), torch.tensor([5])]).tolist(), joined_rows([torch.tensor([1]), None])
        ([2, 5, 8], None)
    """
    known = []
    for rows in parts:
        if rows is None:
            return None
        known.append(rows)
    return torch.cat([torch.empty(0, dtype=torch.int64), *known]).sort().values


def _positions(loader: Iterable[Any]) -> tuple[Tensor | None, bool]:
    """Positions in the loader's data set, None where it does not say; and whether they come in this order."""
    if isinstance(loader, Iterator):  # may have been read from before
        return None, False
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, list):
        return torch.tensor(sampler, dtype=torch.int64), not getattr(loader, "shuffle", False)
    batches = getattr(loader, "batch_sampler", None)
    own_order = batches is None or (type(batches) is BatchSampler and batches.sampler is sampler)
    if not isinstance(loader, DataLoader) or not own_order:
        return None, False
    if type(sampler) is SequentialSampler:
        return torch.arange(len(sampler)), True
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
        return torch.arange(len(sampler)), False
    return None, False
