"""How rows at sampled positions rank channels, against rows at all positions and against other images.

On the two CIFAR-10 ResNet-20s, for 1,000, 5,000 and 20,000 images: Spearman correlation, mean over convolutions and
worst of them, between the scores of a calibration on every position and those of

- ``by image``: ``calibrate()`` as it is, one position of each stretch, drawn by a hash of the image;
- ``fixed``: the rule before it, the same positions in every image, 16, 4 and 1 of them;
- ``fixed, as many``: those of as many rows as ``by image`` takes;
- ``other images``: every position of as many other images (15,000 against the 20,000), the noise that there is anyway.

Cost is a ratio within the run: seconds of ``by image`` to those of ``fixed``, timed in turn on the same 1,024 images in
memory with as many positions as each takes of so many images, median over rounds; and of both to a plain forward pass.
About 40 minutes on one CPU core.

    python benchmarks/sampled_positions.py --data DIR/cifar10 --checkpoints DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from provenance import save
from rank_agreement import convolutions, rank_correlations
from torch import Tensor, nn

from tp_twoaxis import CalibrationStatistics, calibrate
from tp_twoaxis.data import ArrayDataset, open_dataset
from tp_twoaxis.models import build_model, load_weights
from tp_twoaxis.statistics import recorder
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.recorder import Recorder
from tp_twoaxis.statistics.sampling import stratified

IMAGES = (1000, 5000, 20000)
SCORES = ("capture", "hull", "low-overlap")
NETWORKS = {
    "conv_shortcut": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "option_a": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
BATCH, TIMED, ROUNDS = 128, 1024, 7


@contextmanager
def fixed_positions(fewest: int) -> Iterator[None]:
    """Sample the same positions of every image, each row with weight 1, as versions before this rule did."""

    def update(self: Recorder, moments: CoMoments, view: Tensor, count: int | None) -> None:
        if count is None or count >= view.shape[1]:
            moments.update(view)
            return
        chosen = stratified(view.shape[1], count)
        if view.stride(1) == 1 and view.stride(2) != 1:
            moments.update(view.transpose(1, 2).index_select(2, chosen).transpose(1, 2))
        else:
            moments.update(view.index_select(1, chosen))

    with patch.object(Recorder, "_update", update), patch.object(recorder, "FEWEST_POSITIONS", fewest):
        yield


def agreement(first: CalibrationStatistics, second: CalibrationStatistics) -> dict[str, dict[str, float]]:
    found = {}
    for score in SCORES:
        rho = rank_correlations(first, second, score, convolutions(first))
        found[score] = {"mean": round(sum(rho) / len(rho), 4), "worst": round(min(rho), 3)}
    return found


def compare(model: nn.Module, pool: ArrayDataset, images: int) -> Iterator[dict[str, Any]]:
    """Rows of the table for one network and one number of images."""

    def gather(rows: range, **options: Any) -> CalibrationStatistics:
        return calibrate(model, pool.loader(BATCH, rows), max_images=None, target=None, **options)

    own = range(images)
    everything = gather(own, positions="all")
    yield {"rows": "by image", "positions": wanted(images), **agreement(everything, gather(own))}
    for name, fewest in (("fixed", 1), ("fixed, as many", recorder.FEWEST_POSITIONS)):
        with fixed_positions(fewest):
            if name == "fixed" or images > IMAGES[0]:
                yield {"rows": name, "positions": wanted(images), **agreement(everything, gather(own))}
    others = range(images, min(2 * images, len(pool)))
    yield {
        "rows": "other images, all positions",
        "others": len(others),
        **agreement(everything, gather(others, positions="all")),
    }


def wanted(images: int) -> int:
    """Positions of an image that narrow layers take of so many images."""
    found = Recorder({}, expected_images=images)._wanted(64)
    assert found is not None
    return found


def cost(model: nn.Module, pool: ArrayDataset, images: int) -> dict[str, Any]:
    """Seconds of both rules and of plain forward passes, in turn."""
    batches = list(pool.loader(BATCH, range(TIMED)))

    def forward() -> None:
        with torch.no_grad():
            for x, _ in batches:
                model(x)

    def sampled() -> None:
        calibrate(model, batches, positions=wanted(images), progress=False)

    runs: dict[str, tuple[Any, Callable[[], None]]] = {
        "forward": (nullcontext, forward),
        "by image": (nullcontext, sampled),
        "fixed": (partial(fixed_positions, 1), sampled),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, (rule, run) in runs.items():
            with rule():
                start = time.perf_counter()
                run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)), 3)

    return {
        "images": images,
        "by image / fixed": ratio("by image", "fixed"),
        "by image / forward": ratio("by image", "forward"),
        "fixed / forward": ratio("fixed", "forward"),
    }


def both_splits(folder: str, mean: tuple[float, ...], std: tuple[float, ...]) -> ArrayDataset:
    """Training images, then test images: 35,000 to draw disjoint sets from."""
    parts = [open_dataset(folder, split=split, mean=mean, std=std) for split in ("train", "test")]
    first, second = (part for part in parts if isinstance(part, ArrayDataset))
    assert first.labels is not None
    assert second.labels is not None
    return ArrayDataset(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]), mean, std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the CIFAR-10 Parquet shards")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the safetensors files")
    parser.add_argument("--images", nargs="+", type=int, default=IMAGES, help="default: 1000 5000 20000")
    arguments = parser.parse_args()
    rows, costs = [], []
    for name, (mean, std) in NETWORKS.items():
        model = build_model(f"cifar_resnet20_{name}")
        load_weights(model, arguments.checkpoints / f"cifar10_resnet20_{name}.safetensors")
        model.eval()
        pool = both_splits(arguments.data, mean, std)
        for images in arguments.images:
            costs.append({"network": name, **cost(model, pool, images)})
            print(json.dumps(costs[-1]), flush=True)
            for row in compare(model, pool, images):
                rows.append({"network": name, "images": images, **row})
                print(json.dumps(rows[-1]), flush=True)
    save(
        "sampled_positions",
        "python benchmarks/sampled_positions.py --data DIR/cifar10 --checkpoints DIR",
        "CIFAR-10: 25,000 training and 10,000 test images, in the files' order",
        rows=rows,
        cost=costs,
    )


if __name__ == "__main__":
    main()
