r"""Where the seconds of a calibration and of a sequential repair go, beside a plain forward pass over the same images.

    python benchmarks/where_time_goes.py
    python benchmarks/where_time_goes.py --networks resnet50 --images 512

A stopwatch stands at the functions named below; the seconds of what one calls inside another count for the inner one
alone. Weights are random and images noise, as in ``speed.py``. ResNet-50 and ViT-B/16 calibrate with the 16 positions
an image that 1,024 images get; what is spent once for all images (``layouts``, the start of the sums) weighs more the
fewer images there are. ResNet-50 is also pruned to half its MACs by ``hull`` and repaired by ``sequential``. Parts that
``results/where_time_goes.json`` holds of other networks stay. Passes and calibrations alternate in five rounds; medians
are shown. About five minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from provenance import RESULTS, provenance, save
from speed import MANY_IMAGES, Bench

from tp_twoaxis import prune_to_flops
from tp_twoaxis.importance import make_importance
from tp_twoaxis.reconstruction.patch_fit import PatchFit
from tp_twoaxis.repair.lockstep import Lockstep
from tp_twoaxis.repair.output_corrector import OutputCorrector
from tp_twoaxis.repair.sequential import _OrderedRefit
from tp_twoaxis.runtime.serialization import write_bytes
from tp_twoaxis.statistics import calibration, recorder
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.pooling import PooledOutputs
from tp_twoaxis.statistics.recorder import Recorder
from tp_twoaxis.statistics.row_queue import RowQueue

ROUNDS = 5
Watched = tuple[tuple[Any, str, str], ...]
"""``(where it is defined, name, part that its seconds count for)``."""
CALIBRATION: Watched = (
    (calibration, "find_layouts", "layouts, once"),
    (Recorder, "_take", "hooks"),
    (PooledOutputs, "add", "exact means of all positions"),
    (recorder, "select_rows", "rows of sampled positions"),
    (RowQueue, "add", "rows of sampled positions"),
    (CoMoments, "update", "products"),
)
REPAIR: Watched = (
    (Lockstep, "_resume", "forward passes of both networks"),
    (_OrderedRefit, "_move_norm", "BatchNorms"),
    (PatchFit, "update", "rows and products of the fits"),
    (PatchFit, "solve", "solutions of the fits"),
    (OutputCorrector, "correct", "corrections at sums and rectifiers"),
)
Seconds = dict[str, float]


@contextmanager
def stopwatch(watched: Watched) -> Iterator[Seconds]:
    """Time functions while the context is open; the seconds of nested ones count once, for the inner one."""
    seconds: Seconds = defaultdict(float)
    inner: list[float] = []

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                seconds[part] += whole - inner.pop()
                if inner:
                    inner[-1] += whole

        return run

    with ExitStack() as stack:
        for owner, name, part in watched:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part)))
        yield seconds


def of_calibration(bench: Bench) -> tuple[float, Seconds]:
    """Measure a forward pass, and divide a calibration; ``forward and the rest`` is what no watched function takes."""
    forward: list[float] = []
    parts: dict[str, list[float]] = defaultdict(list)
    for number in range(ROUNDS + 1):
        start = time.perf_counter()
        bench.forward()
        between = time.perf_counter()
        with stopwatch(CALIBRATION) as seconds:
            bench.calibrate(positions=MANY_IMAGES.get(bench.name, "auto"))
        whole = time.perf_counter() - between
        if number:  # the first round warms up
            forward.append(between - start)
            for part, value in {"forward and the rest": whole - sum(seconds.values()), **seconds}.items():
                parts[part].append(value)
    return statistics.median(forward), {part: statistics.median(values) for part, values in parts.items()}


def of_repair(bench: Bench) -> Seconds:
    """Divide a repair by ``sequential`` after removal of half of the MACs."""
    importance = make_importance("hull", stats=bench.calibrate())
    options: dict[str, Any] = {"loader": bench.batches, "max_images": None, "progress": False}
    with stopwatch(REPAIR) as seconds:
        model = copy.deepcopy(bench.model)
        report = prune_to_flops(model, bench.example, importance, flops=0.5, repair="sequential", **options)
    phases = {name.removeprefix("repair/"): value for name, value in report.seconds.items() if "/" in name}
    rest = phases.pop("sequential") - sum(seconds.values())
    return {**seconds, "rest of the pass": rest, **phases}


def page(rows: list[dict[str, Any]]) -> str:
    """Draw a table for people."""
    lines = ["| network, images | what | part | seconds | of a forward pass |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['network']}, {row['images']} | {row['what']} | {part} | {value:.2f} | {value / row['forward']:.3f} |"
        for row in rows
        for part, value in row["parts"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = ["resnet50", "vit_b_16", "cifar_resnet56_option_a"]
    parser.add_argument("--networks", nargs="+", default=networks, choices=networks, help="default all")
    parser.add_argument("--images", type=int, help="default by network, 64 to 1,024")
    arguments = parser.parse_args()
    known = RESULTS / "where_time_goes.json"
    rows = json.loads(known.read_text())["rows"] if known.exists() else []
    for name in arguments.networks:
        bench = Bench(name, arguments.images, None, "cpu")
        forward, calibrated = of_calibration(bench)
        found = {"calibrate": calibrated}
        if name == "resnet50":
            found["sequential"] = of_repair(bench)
        rows = [row for row in rows if row["network"] != name]
        own = {
            "network": name,
            "images": bench.images,
            "forward": round(forward, 3),
            "commit": provenance("", "")["commit"],
        }
        for what, parts in found.items():
            rows.append({**own, "what": what, "parts": {part: round(value, 3) for part, value in parts.items()}})
        save("where_time_goes", "python benchmarks/where_time_goes.py", "noise", rows=rows)
        write_bytes(RESULTS / "where_time_goes.md", page(rows).encode())
    print(page(rows))


if __name__ == "__main__":
    main()
