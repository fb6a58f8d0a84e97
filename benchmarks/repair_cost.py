"""What repairs cost beside calibration: seconds, their ratio to ``calibrate()``, and peak memory.

Times one pass each of a plain no-grad forward, ``calibrate()``, ``calibrate(consumers=True)`` and
``calibrate(gradients=True)`` over the same images. Then every repair is run on a fresh copy of the network
pruned by ``--score``, and gathers its own statistics; its seconds are those of the report's phases, with
the measuring of errors and without. Peak memory is of the whole process (resident) while a part ran. Seconds are those
of the wall clock: run it on an idle machine.

    python benchmarks/repair_cost.py
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from provenance import save
from torch import Tensor, nn
from tqdm import tqdm

from tp_twoaxis import calibrate, prune_to_flops
from tp_twoaxis.importance.registry import make_importance
from tp_twoaxis.models import build_model
from tp_twoaxis.repair import REPAIRS

CLASSES = 10
PASSES = ("forward", "calibrate", "calibrate, consumers", "calibrate, gradients")
Batches = list[tuple[Tensor, Tensor]]


def reset_peak() -> None:
    """Let Linux count the peak of resident memory from here; elsewhere it stays that of the process so far."""
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5")


def peak_mib() -> int:
    """Peak of resident memory since :func:`reset_peak`, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20  # bytes on macOS


def plain(model: nn.Module, batches: Batches) -> None:
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def passes(model: nn.Module, batches: Batches, wanted: list[str]) -> list[dict[str, object]]:
    """Time the passes that everything else is compared with; ``calibrate`` always."""
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: plain(model, batches),
        "calibrate": lambda: calibrate(model, batches, max_images=None, progress=False),
        "calibrate, consumers": lambda: calibrate(model, batches, max_images=None, consumers=True, progress=False),
        "calibrate, gradients": lambda: calibrate(model, batches, max_images=None, gradients=True, progress=False),
    }
    plain(model, batches[:1])  # warm
    rows = []
    runs = {name: run for name, run in runs.items() if name in (*wanted, "calibrate")}
    for name, run in tqdm(runs.items(), desc="passes", leave=False):
        reset_peak()
        start = time.perf_counter()
        run()
        rows.append({"pass": name, "seconds": round(time.perf_counter() - start, 2), "peak MiB": peak_mib()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def repairs(
    model: nn.Module, batches: Batches, names: list[str], score: str, flops: float, calibration: float
) -> Iterator[dict[str, object]]:
    """Time each repair on a copy of its own."""
    stats = calibrate(model, batches, max_images=None, progress=False)
    for name in tqdm(names, desc="repairs", leave=False):
        network = copy.deepcopy(model)
        importance = make_importance(score, stats=stats)
        reset_peak()
        report = prune_to_flops(
            network,
            batches[0][0][:1],
            importance,
            flops=flops,
            repair=(name,),
            loader=batches,
            max_images=None,
            progress=False,
        )
        seconds = {phase: value for phase, value in report.seconds.items() if phase.split("/")[0] == "repair"}
        total = seconds["repair"]
        row = {
            "repair": name,
            "kept MACs": round(report.achieved, 4),
            "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
            "repair / calibrate": round(total / calibration, 3),
            "without measuring / calibrate": round((total - seconds.get("repair/measure", 0.0)) / calibration, 3),
            "peak MiB": peak_mib(),
            "notes": report.notes,
        }
        print(json.dumps(row), flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="as in `tp-twoaxis prune`; random weights")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--score", default="hull")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS), choices=REPAIRS)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(options.network, num_classes=CLASSES).eval()
    images = torch.randn(options.images, 3, options.size, options.size)
    labels = torch.randint(CLASSES, (options.images,))
    batches = list(zip(images.split(options.batch), labels.split(options.batch), strict=True))
    timed = passes(model, batches, options.passes)
    calibration = next(float(str(row["seconds"])) for row in timed if row["pass"] == "calibrate")
    repaired = []
    for row in repairs(model, batches, options.repairs, options.score, options.flops, calibration):
        repaired.append(row)
        save(
            "repair_cost",
            shlex.join(["python", "benchmarks/repair_cost.py", *sys.argv[1:]]),
            "random images, random weights",
            threads=torch.get_num_threads(),
            **vars(options) | {"passes": timed, "repairs": repaired},
        )


if __name__ == "__main__":
    main()
