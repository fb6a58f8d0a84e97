"""Parts of one calibration on many ranks: what they must agree on, and their moments merged in one flat all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.distributed import collective_device, gather_over_ranks, sum_in_place
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.packing import pack, packed, packed_length, unpacked


class RankPart(NamedTuple):
    """What the statistics of a rank are besides numbers, which the others know before any numbers are added.

    Attributes:
        refusal: why they cannot be reduced, or None.
        identity: what must be the same on every rank, by its name; ``layers`` are none on a rank without images.
        header: as it stands in files.
        weight_powers: ``LAYER/weight_power`` -> [C].
        shapes: moments -> the shape of their scatter, and whether they pair two kinds of rows.
        image_rows: which rows of the data set its images are, or None.
    """

    refusal: str | None
    identity: dict[str, object]
    header: dict[str, Any]
    weight_powers: dict[str, Tensor]
    shapes: dict[str, tuple[torch.Size, bool]]
    image_rows: Tensor | None = None

    def without_images(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of a file with the same layers that has seen no images."""
        tensors = dict(self.weight_powers)
        for key, (shape, paired) in self.shapes.items():
            tensors |= pack(key, CoMoments(*shape) if paired else CoMoments(shape[0]))
        nothing = dict.fromkeys(self.shapes, 0)
        return {**self.header, "num_images": 0, "counts": nothing, "weights": nothing}, tensors


def common_form(parts: Sequence[RankPart]) -> RankPart:
    """Check that the statistics of all ranks merge, so that no rank waits for the numbers of one that raised.

    Args:
        parts: of all ranks, in their order; so that every rank comes to the same result.

    Returns:
        The part of the first rank with images.

    Raises:
        TwoAxisError: a rank's statistics cannot be reduced or differ from another's, or no rank has images.
    """
    for rank, part in enumerate(parts):
        if part.refusal is not None:
            raise TwoAxisError(f"all_reduce: rank {rank}: {part.refusal}")
    filled = {rank: part.identity for rank, part in enumerate(parts) if part.identity["layers"]}
    if not filled:
        raise TwoAxisError("all_reduce: no rank has images; check the data path and split")
    first, expected = next(iter(filled.items()))
    for rank, identity in filled.items():
        if different := [what for what in expected if identity[what] != expected[what]]:
            raise TwoAxisError(
                f"all_reduce: ranks {first} and {rank} hold statistics that differ in their {', '.join(different)}; "
                "give every rank the same model, options, and kind of images, all with labels or all without"
            )
    return parts[first]


@torch.inference_mode(mode=False)  # the moments can then be updated outside of the caller's inference mode too
@torch.no_grad()
def reduce_moments(moments: Sequence[CoMoments], group: dist.ProcessGroup | None = None) -> None:
    """Replace moments by those of the rows of all ranks; every rank ends with the same numbers.

    Every rank first learns the weights ``n_r`` and means ``m_r`` of the others, and so the mean ``m`` of all rows. What
    it then adds to the all-reduce is its scatter around that mean, ``S_r + n_r (m_r - m)(m_r - m)'``: sums of these
    lose nothing to cancellation, however far the mean is from zero.

    Args:
        moments: of the same widths in the same order on every rank; without rows where a rank has no images.
        group: the ranks; default all. Without a process group the moments stay as they are.

    Example:
        >>> moments = CoMoments(2)
        >>> moments.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> reduce_moments([moments])
        >>> moments.count, moments.mean.tolist()
        (2, [1.0, 2.0])
    """
    if not moments or not (dist.is_available() and dist.is_initialized()):
        return
    widths = [len(part.mean) + (len(part.other_mean) if part.paired else 0) for part in moments]
    own = torch.cat([mean for part in moments for mean in _means(part)]).cpu()
    by_rank = gather_over_ranks(([(part.count, part.weight) for part in moments], own), group)
    sizes = [tuple(map(sum, zip(*ranks, strict=True))) for ranks in zip(*(sizes for sizes, _ in by_rank), strict=True)]
    weights = torch.tensor([[weight for _, weight in sizes] for sizes, _ in by_rank], dtype=torch.float64)
    common = _common_means(
        torch.stack([means for _, means in by_rank]), weights.repeat_interleave(torch.tensor(widths), dim=1)
    )
    # one buffer for all scatters, filled in place
    flat = own.new_empty(sum(map(packed_length, moments)), device=collective_device(group))
    pieces = torch.split(flat, [packed_length(part) for part in moments])
    for part, piece, shift in zip(moments, pieces, torch.split(own - common, widths), strict=True):
        piece.copy_(packed(_shifted(part, shift), paired=part.paired))
    sum_in_place(flat, group=group)
    for part, (count, weight), piece, mean in zip(moments, sizes, pieces, torch.split(common, widths), strict=True):
        width, other_width = part.scatter.shape
        part.count, part.weight = int(count), weight
        part.mean.copy_(mean[:width])
        part.scatter.copy_(unpacked(piece, width, other_width if part.paired else None))
        if part.paired:
            part.other_mean.copy_(mean[width:])


def _means(part: CoMoments) -> list[Tensor]:
    return [part.mean, part.other_mean] if part.paired else [part.mean]


def _common_means(means: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the ranks, [R, M] -> [M]; measured from the first rank with rows, so equal means stay."""
    first = means.gather(0, (weights > 0).byte().argmax(0, keepdim=True))
    total = weights.sum(0)
    return first[0] + ((means - first) * weights).sum(0) / torch.where(total > 0, total, 1.0)


def _shifted(part: CoMoments, shift: Tensor) -> Tensor:
    """Scatter around means that are ``shift`` below the part's own."""
    left = shift[: len(part.mean)].to(part.mean.device)
    right = shift[len(part.mean) :].to(part.mean.device) if part.paired else left
    return torch.addr(part.scatter, left, right, alpha=part.weight)
