"""Images for statistics and others for lesions, which are never the same ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tp_twoaxis.cli.options import DataOptions


def calibration_and_held_out(
    source: DataOptions, others: DataOptions | None, held_out: int, *, score: bool = True
) -> tuple[Any, Any, list[str]]:
    """Images for the statistics and for the lesions, None where they are not needed; and what there is to note.

    Args:
        source: where images of the statistics are.
        others: where those of the lesions are, if not there too.
        held_out: how many images lesions are measured on; 0 without lesions.
        score: whether the statistics are still to be gathered.

    Raises:
        TwoAxisError: there is no such data.
    """
    import torch
    from torch.utils.data import Subset

    from tp_twoaxis.data import ArrayDataset, make_loader

    if not held_out:
        return source.loader() if score else None, None, []
    if others is not None:
        return source.loader() if score else None, others.loader(), []
    if not score:
        note = "images of the lesions may be among those of --stats"
        return None, replace(source, images=held_out).loader(), [note]
    drawn = held_out + (source.images or 0)
    dataset = replace(source, images=drawn).open()
    notes = []
    if len(dataset) < drawn:  # of few images both get a share
        held_out = min(held_out, len(dataset) // 2)
        notes.append(f"{source.data}: {len(dataset)} images, {held_out} of them for lesions")
    # what is drawn comes in the data's order, which is often by class
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(source.seed))
    rows = order[held_out:].sort().values, order[:held_out].sort().values
    if isinstance(dataset, ArrayDataset):
        loaders: list[Any] = [dataset.loader(source.batch_size, part) for part in rows]
    else:
        parts = (Subset(dataset, part.tolist()) for part in rows)
        loaders = [make_loader(part, source.batch_size, workers=source.workers) for part in parts]
    return loaders[0], loaders[1], notes
