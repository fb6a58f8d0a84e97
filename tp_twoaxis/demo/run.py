"""The experiment: train the networks, compare the methods in a sweep, write what came out."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import save

from tp_twoaxis.benchmark import BenchmarkConfig, DataConfig, NetworkConfig, cross, run_benchmark
from tp_twoaxis.benchmark.shared_work import LoadedNetwork, Shared
from tp_twoaxis.benchmark.tables import summary_table, trial_table
from tp_twoaxis.benchmark.trial import provenance
from tp_twoaxis.data import digits
from tp_twoaxis.demo.demo_page import render_demo
from tp_twoaxis.demo.network import one_thread, train
from tp_twoaxis.demo.result import DemoResult, binomial_error
from tp_twoaxis.diagnostics.channel_table import channel_table
from tp_twoaxis.diagnostics.channel_table import records as table_rows
from tp_twoaxis.errors import INSTALL, TwoAxisError
from tp_twoaxis.importance import find_criterion
from tp_twoaxis.pruning import prune_to_flops
from tp_twoaxis.pruning.recipe import BEST_REPAIR, SELECTING
from tp_twoaxis.runtime.model_state import fork_rng
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.runtime.serialization import Json, write_bytes

REPAIRS = ((BEST_REPAIR,), ("bn",))


@dataclass(frozen=True)
class Settings:
    """How much the demo does: networks trained, epochs each, criteria, shares of MACs to keep, largest first."""

    networks: int = 3
    epochs: int = 25
    criteria: tuple[str, ...] = (SELECTING, "l2", "taylor", "fpgm")
    targets: tuple[float, ...] = (0.5, 0.25, 0.15)


FULL = Settings()
QUICK = Settings(networks=1, epochs=4, criteria=(SELECTING, "l2"), targets=(0.5, 0.25))


def run_demo(out: Path, *, seed: int = 0, quick: bool = False, progress: bool = True) -> DemoResult:
    """Compare criteria and repairs on scikit-learn's handwritten digits; write ``report.html`` and ``results.json``.

    Trains three small residual networks, each on its own split of the images, prunes copies to shares of the
    MACs by the default criterion and by L2, Taylor and FPGM, repairs each with the default repair and with ``bn``
    alone, and tests. Nothing is fine-tuned, nothing is downloaded. About a minute and a half on one CPU core; the
    random state of torch, and its number of threads, are as before afterwards.

    Args:
        out: folder for the two files; created if missing, earlier files of these names are replaced.
        seed: of the first network and its split; the others count on from it. Equal seeds give equal
            numbers, but for the seconds.
        quick: one barely trained network and two criteria, to see that all works; its ranking means nothing.
        progress: show progress bars on stderr.

    Returns:
        Paths of the files, and the table.

    Raises:
        TwoAxisError: scikit-learn is missing, or the folder cannot be written.
    """
    start = time.perf_counter()
    if find_spec("sklearn") is None:  # it holds the images
        raise TwoAxisError(f"demo: needs scikit-learn, it is missing; {INSTALL}")
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TwoAxisError(f"{out}: expected a folder to write to, {error.strerror}; choose another") from error
    settings = QUICK if quick else FULL
    with fork_rng(), one_thread(), tempfile.TemporaryDirectory(prefix=".sweep-", dir=out) as folder:
        seconds = _train(Path(folder), range(seed, seed + settings.networks), settings.epochs, progress)
        config = sweep(Path(folder), list(seconds), settings)
        records = _measure(config, Path(folder) / "results", progress)
        channels = _channels(config)
    result: Json = {
        "format": "tp-twoaxis/demo",
        "version": 3,
        "quick": quick,
        "settings": dataclasses.asdict(settings),
        "test_images": records[0]["images"]["evaluated"],
        "dense": _dense(records, seconds),
        "runs": [_run(record) for record in records],
        "summary": table_rows(summarise(records)),
        "channels": channels,
        "provenance": _provenance(out, seed, quick, time.perf_counter() - start),
    }
    write_bytes(out / "results.json", json.dumps(result, indent=1).encode())
    write_bytes(out / "report.html", render_demo(result).encode())
    return DemoResult.of(out, result)


def sweep(folder: Path, seeds: list[int], settings: Settings) -> BenchmarkConfig:
    """Describe the comparison: every seed is a network with a split of its own, of which one part calibrates.

    Args:
        folder: of the networks' weights.
        seeds: of the networks.
        settings: criteria and shares of the MACs.

    Example:
        >>> len(sweep(Path("weights"), [0, 1, 2], FULL).trials())
        72
    """
    network = NetworkConfig(
        "digits",
        "tp_twoaxis.demo.network:DigitsResNet",
        "tp_twoaxis.data:digits",
        checkpoint=str(folder / "digits-{seed}.safetensors"),
    )
    # the split has 300 calibration images, and all of them are drawn
    data = DataConfig(train_split="calibration", calibration_images=300, batch_size=100, test_batch_size=200)
    methods = cross(settings.criteria, repairs=REPAIRS)
    return BenchmarkConfig((network,), methods, keep=settings.targets, seeds=tuple(seeds), data=data)


def _train(folder: Path, seeds: range, epochs: int, progress: bool) -> dict[int, float]:
    """Train a network for every seed and write its weights; seed -> seconds."""
    seconds = {}
    with progress_bar(total=len(seeds) * epochs, desc="train", unit="epoch", show=progress) as bar:
        for seed in seeds:
            start = time.perf_counter()
            network = train(digits("train", seed), epochs=epochs, seed=seed, tick=bar.update)
            seconds[seed] = time.perf_counter() - start
            write_bytes(folder / f"digits-{seed}.safetensors", save(network.state_dict()))
    return seconds


def _measure(config: BenchmarkConfig, folder: Path, progress: bool) -> list[Json]:
    """Run the sweep; its records."""
    summary = run_benchmark(config, folder, progress=progress and find_spec("rich") is not None)
    records = summary.folder.read_all()
    for record in records:
        if record["status"] == "failed":
            raise TwoAxisError(f"demo: {record['key']} failed: {record['error']['message']}")
    return records


def summarise(records: list[Json]) -> pd.DataFrame:
    """Average over the networks: a row for each method and target.

    Args:
        records: of all trials, none of which failed.

    Returns:
        Columns ``method, criterion, repair, target, achieved, accuracy, standard_error`` (binomial, from the number
        of test images alone, not from the networks), ``lowest, highest, seconds`` (to rank, prune and
        repair, whatever the target).
    """
    trials = trial_table(records)
    summary = summary_table(trials).rename(columns={"treatment": "repair", "keep": "target"})
    images = records[0]["images"]["evaluated"]
    errors = [binomial_error(p, n * images) for p, n in zip(summary.accuracy, summary.seeds, strict=True)]
    columns = ["method", "criterion", "repair", "target", "achieved", "accuracy", "standard_error"]
    seconds = summary.method.map(_method_seconds(records))
    return summary.assign(standard_error=errors, seconds=seconds)[[*columns, "lowest", "highest", "seconds"]]


def _method_seconds(records: list[Json]) -> dict[str, float]:
    """Give each method's mean seconds to rank and prune once and to repair, without calibration, which all share."""
    table = pd.DataFrame([{**record["method"], "seed": record["seed"], **_seconds(record)} for record in records])
    # what a criterion measures is measured in the first of its trials on a network
    rank = table.groupby(["criterion", "seed"]).rank_seconds.max().groupby("criterion").mean()
    own = table.groupby(["name", "criterion"]).repair_seconds.mean()
    return {name: float(rank[criterion] + repair) for (name, criterion), repair in own.items()}


def _channels(config: BenchmarkConfig) -> list[Json]:
    """Give every channel of the first network on both axes, and whether the default removes it at the first target."""
    seed = config.seeds[0]
    shared = Shared(LoadedNetwork(config, config.networks[0].name, seed, "cpu"), seed)
    model, importance, _ = shared.prepare(find_criterion(SELECTING))
    report = prune_to_flops(
        model, shared.network.example, importance, flops=config.keep[0], repair=(), max_images=None, progress=False
    )
    rows = table_rows(channel_table(shared.statistics()))
    return [{**row, "removed": row["channel"] in report.removed_channels.get(row["layer"], ())} for row in rows]


def _dense(records: list[Json], seconds: dict[int, float]) -> list[Json]:
    """Describe each network before pruning."""
    first = {record["seed"]: record for record in reversed(records)}
    return [
        {
            "seed": seed,
            "accuracy": first[seed]["accuracy"]["dense"],
            "macs": first[seed]["macs"]["dense"],
            "seconds": seconds[seed],
        }
        for seed in seconds
    ]


def _run(record: Json) -> Json:
    """Take what the page needs from a trial's record."""
    return {
        "method": record["method"]["name"],
        "criterion": record["method"]["criterion"],
        "repair": "+".join(record["method"]["repair"]),
        "seed": record["seed"],
        "target": record["keep"],
        "achieved": record["achieved"],
        "accuracy": record["accuracy"]["pruned"],
        "kept": record["kept_channels"],
        **_seconds(record),
    }


def _seconds(record: Json) -> dict[str, float]:
    seconds: dict[str, float] = record["seconds"]
    # statistics are shared; "repair/..." are parts of "repair"
    rank = [name for name in seconds if not re.search("^(evaluate|total|repair.*|.*statistics)$", name)]
    return {"rank_seconds": sum(seconds[name] for name in rank), "repair_seconds": seconds.get("repair", 0.0)}


def _provenance(out: Path, seed: int, quick: bool, seconds: float) -> dict[str, str]:
    made: dict[str, Any] = provenance("cpu")
    machine = made["machine"]
    return {
        "call": f"tp_twoaxis.demo.run_demo(Path({str(out)!r}), seed={seed}, quick={quick})",
        "command": made["command"],
        "data": "scikit-learn's digits: 1,797 grey images 8x8; split 1,097 / 300 / 400 (train, calibration, test)",
        **{package: str(number) for package, number in made["versions"].items()},
        **{package: version(package) for package in ("scikit-learn", "matplotlib", "pandas")},
        "machine": f"{machine['platform']}, {machine['processor']}, {machine['cores']} cores, 1 thread used",
        "seconds": f"{seconds:.1f}",
        "made": made["date"],
    }
