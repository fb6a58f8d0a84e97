"""A pruning as one HTML file: what was removed, who replaces it, how well, and what it cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from tp_twoaxis.diagnostics.explain import explain_statistics
from tp_twoaxis.diagnostics.explain_page import explanation_html
from tp_twoaxis.diagnostics.group_sensitivity import SensitivityReport
from tp_twoaxis.diagnostics.html_page import Picture, Table, png_bytes, render, table
from tp_twoaxis.diagnostics.sensitivity_figure import sensitivity_figure
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import DistortionCurves
from tp_twoaxis.pruning.pruning_report import UNITS, PruningReport
from tp_twoaxis.repair.repair_report import ConsumerRepair
from tp_twoaxis.runtime.serialization import write_bytes
from tp_twoaxis.statistics.store import CalibrationStatistics

SHOWN_INPUTS = 20  # removed inputs of a layer
SENSITIVITY = (
    "Distortion of the repaired network's logits, as a share of their variance, when a share of one group's channels "
    "is missing and nothing else; measured on the dense network to choose what is removed."
)


def write_pruning_page(
    report: PruningReport,
    path: str | Path,
    *,
    name: str = "network",
    accuracy: Mapping[str, Any] | None = None,
    stats: CalibrationStatistics | None = None,
) -> list[Path]:
    """Write what a pruning did as an HTML file that opens offline; with statistics also a page a layer, linked.

    Args:
        report: of :func:`~tp_twoaxis.prune_to_flops`.
        path: the file; replaced if it is there.
        name: of the network, for the title.
        accuracy: measured shares of right answers ``before`` and ``after``, on how many ``images`` of which ``split``.
        stats: of the dense network. Every layer that lost channels and is in them is explained on a page of its own, in
            a folder beside the file, ``report_layers`` beside ``report.html``, made if it does not exist.

    Returns:
        The files, ``path`` first.

    Raises:
        TwoAxisError: a file could not be written.

    Example:
        >>> import tempfile, torch
        >>> from tp_twoaxis import calibrate, prune_to_flops
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Linear(6, 4))
        >>> stats = calibrate(net, [torch.randn(64, 12)], progress=False)
        >>> report = prune_to_flops(net, torch.randn(1, 12), "l2", flops=0.5, repair=(), progress=False)
        >>> files = write_pruning_page(report, tempfile.mkdtemp() + "/report.html", stats=stats)
        >>> [f"{file.parent.name[-6:]}/{file.name}" for file in files[1:]]
        ['layers/1_1.html']
    """
    path = Path(path)
    explained = [] if stats is None else [layer for layer in report.removed_channels if layer in stats]
    folder, digits = layer_pages(path), len(str(len(explained)))
    # a model's own names may hold anything but dots
    safe = [re.sub(r"[^\w.-]", "_", layer) or "model" for layer in explained]
    files = {
        layer: folder / f"{number:0{digits}}_{part}.html"
        for number, (layer, part) in enumerate(zip(explained, safe, strict=True), start=1)
    }
    links = {layer: quote(f"{folder.name}/{file.name}") for layer, file in files.items()}
    pages = {path: pruning_html(report, name=name, accuracy=accuracy, links=links)}
    for layer, file in files.items():
        assert stats is not None
        removed = report.removed_channels[layer]
        pages[file] = explanation_html(explain_statistics(stats, layer), removed=removed, back=quote(f"../{path.name}"))
    if files:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise TwoAxisError(f"{folder}: could not be made a folder ({error}); choose another name") from error
    for file, html in pages.items():
        write_bytes(file, html.encode())
    return list(pages)


def layer_pages(path: Path) -> Path:
    """Name the folder of the layers' pages.

    Example:
        >>> layer_pages(Path("runs/report.html")).name
        'report_layers'
    """
    return path.with_name(f"{path.stem}_layers")


def pruning_html(
    report: PruningReport,
    *,
    name: str = "network",
    accuracy: Mapping[str, Any] | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """Build the page.

    Args:
        report: of a pruning.
        name: of the network.
        accuracy: as for :func:`write_pruning_page`.
        links: layer -> address of the page that explains it.

    Returns:
        A complete HTML document that refers to nothing outside itself but ``links``.
    """
    groups, curves = report.to_frame(), DistortionCurves(report.sensitivity)
    return render(
        "pruning.html",
        title=f"{name}, pruned",
        report=report,
        unit=UNITS[report.budget],
        sizes=table(_sizes(report)),
        accuracy=accuracy,
        known=groups.notna().any().to_dict(),
        groups=groups.to_dict("records"),
        removed=list(report.removed_channels.items()),
        links=links or {},
        readers=_readers(report.consumers) if report.consumers else None,
        details=[_inputs(reader) for reader in report.consumers if reader.removed],
        sensitivity=Picture(png_bytes(sensitivity_figure(SensitivityReport(curves))), SENSITIVITY) if curves else None,
        seconds=table(pd.DataFrame(report.seconds.items(), columns=["phase", "seconds"]), "{:.2f}"),
        version=version("tp-twoaxis"),
    )


def _sizes(report: PruningReport) -> pd.DataFrame:
    counts = [
        ("MACs of one example", report.before.macs, report.after.macs),
        ("parameters", report.before.params, report.after.params),
        ("MACs by Torch-Pruning's counter", report.before.tp_macs, report.after.tp_macs),
        ("MACs by thop's counter", report.before.thop_macs, report.after.thop_macs),
    ]
    rows = [
        (name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}")
        for name, before, after in counts
        if before is not None and after is not None
    ]
    rows += [
        (f"milliseconds, {what}", f"{before:.2f}", f"{after:.2f}", f"{after / before:.1%}")
        for what, (before, after) in report.latency_ms.items()
    ]
    return pd.DataFrame(rows, columns=["", "before", "after", "kept"])


def _readers(consumers: list[ConsumerRepair]) -> Table:
    rows = [
        {
            "layer": reader.layer,
            "inputs that stay": f"{reader.kept} of {reader.kept + len(reader.removed)}",
            "repaired by": reader.repair,
            "predicted": reader.explained,
            "error expected": reader.predicted,
            "error, alone": reader.measured,
            "error, in the network": reader.in_network,
            "why not as asked": reader.reason,
        }
        for reader in consumers
    ]
    return table(pd.DataFrame(rows).astype({name: float for name in rows[0] if "error" in name}), "{:.3f}")


def _inputs(reader: ConsumerRepair) -> dict[str, Any]:
    """The removed inputs of a layer that are predicted worst, and who predicts them."""
    order = sorted(reader.removed, key=lambda c: -1.0 if c.explained is None else c.explained)
    rows = [
        {
            "removed input": removed.channel,
            "predicted": "" if removed.explained is None else f"{removed.explained:.1%}",
            "mostly by (weight for unit variances)": ", ".join(f"{peer} ({w:+.2f})" for peer, w in removed.peers),
        }
        for removed in order[:SHOWN_INPUTS]
    ]
    return {"layer": reader.layer, "removed": len(reader.removed), "table": table(pd.DataFrame(rows))}
