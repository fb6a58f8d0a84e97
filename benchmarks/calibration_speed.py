"""What calibration costs, as ratios within one run: against plain forward, and against forward + backward.

Each round times, in turn and over the same batches: a plain no-grad forward pass, ``calibrate()`` with its
defaults, ``calibrate(positions="all")``, and forward + backward of the cross-entropy (what Taylor needs).
Reported are medians over the rounds of the ratios within a round, so that a drift of the machine's speed
cancels.

    python benchmarks/calibration_speed.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from provenance import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tp_twoaxis import calibrate
from tp_twoaxis.models import build_model

# network, image size, images, batch size
CASES = (
    ("cifar_resnet20_conv_shortcut", 32, 2048, 128),
    ("cifar_resnet20_option_a", 32, 2048, 128),
    ("resnet18", 224, 128, 32),
    ("resnet50", 224, 96, 32),
)


def plain(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def backward(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
    model.zero_grad()


def measure(
    name: str, size: int, images: int, batch: int, rounds: int, layout: torch.memory_format
) -> dict[str, object]:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10).eval().to(memory_format=layout)
    batches = [
        (torch.randn(batch, 3, size, size).to(memory_format=layout), torch.randint(10, (batch,)))
        for _ in range(images // batch)
    ]
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: plain(model, batches),
        "calibrate": lambda: calibrate(model, batches, progress=False),
        "calibrate, all positions": lambda: calibrate(model, batches, positions="all", progress=False),
        "forward + backward": lambda: backward(model, batches),
    }
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    runs["forward"]()
    for _ in tqdm(range(rounds), desc=name, leave=False):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)), 3)

    return {
        "network": name,
        "layout": str(layout).removeprefix("torch."),
        "size": size,
        "images": images,
        "batch": batch,
        "rounds": rounds,
        "calibrate / forward": ratio("calibrate", "forward"),
        "all positions / forward": ratio("calibrate, all positions", "forward"),
        "calibrate / (forward + backward)": ratio("calibrate", "forward + backward"),
        "median seconds": {key: round(statistics.median(values), 3) for key, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    names = [case[0] for case in CASES]
    parser.add_argument("--networks", nargs="+", default=names[:2], choices=names, help="default: the CIFAR networks")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        if case[0] in arguments.networks:
            for layout in (torch.contiguous_format, torch.channels_last):
                rows.append(measure(*case, arguments.rounds, layout))
                print(json.dumps(rows[-1]), flush=True)
    save("calibration_speed", "python benchmarks/calibration_speed.py", "random images, random weights", rows=rows)


if __name__ == "__main__":
    main()
