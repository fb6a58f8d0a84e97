"""Orders of channels, apart from how large their scores are."""

from __future__ import annotations

import torch
from torch import Tensor


def assign_by_rank(values: Tensor, ranking: Tensor) -> Tensor:
    """Hand sorted values out in another order: the highest ranked channel gets the largest, and so on.

    How many channels a threshold removes is then decided by the values, which ones by the ranking.

    Args:
        values: [C].
        ranking: [C], larger ranks higher; equal ranks go by the channel's own value.

    Returns:
        [C], a permutation of ``values``.

    Example:
        >>> assign_by_rank(torch.tensor([10.0, 20.0, 30.0]), torch.tensor([0.9, 0.1, 0.5])).tolist()
        [30.0, 10.0, 20.0]
    """
    order = values.argsort(stable=True)
    order = order[ranking.to(values.device)[order].argsort(stable=True)]
    return torch.empty_like(values).scatter_(0, order, values.sort().values)


def annealed_quantiles(early: Tensor, late: Tensor, *, removed: float = 0.0) -> Tensor:
    """Order channels by a criterion that changes while they leave, from ``early`` to ``late``.

    Channels leave one at a time, each time the one of lowest ``(1 - t) early + t late``, where t is the share that
    has left before. A channel's quantile is its place in that order.

    Args:
        early: [C], larger keeps while nothing is removed yet.
        late: [C], larger keeps at the end.
        removed: share that had been removed before, in [0, 1): t runs from there to 1.

    Returns:
        [C] in (0, 1]: the first to leave has 1/C, the last 1.

    Example:
        >>> annealed_quantiles(torch.tensor([0.0, 1.0, 1.1]), torch.tensor([9.0, 2.0, 1.0])).tolist()
        [0.333..., 1.0, 0.666...]
    """
    count = len(early)
    left = torch.ones(count, dtype=torch.bool)
    quantiles = torch.zeros(count, dtype=torch.float64)
    for step in range(count):
        t = removed + (1.0 - removed) * step / count
        current = torch.where(left, (1.0 - t) * early + t * late, torch.inf)
        first = int(current.argmin())
        left[first] = False
        quantiles[first] = (step + 1) / count
    return quantiles
