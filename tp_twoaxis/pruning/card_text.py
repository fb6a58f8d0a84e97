"""The text that goes with a pruned network to others: what was removed, how, what it cost, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.pruning_report import UNITS, PruningReport

GROUPS = 20
"""So many groups are listed, those that lost the largest shares."""


def model_card(
    report: PruningReport,
    *,
    name: str = "Network",
    file: str = "pruned.safetensors",
    factory: str = "build_dense_network",
    imports: str = "",
    accuracy: Mapping[str, Any] | None = None,
) -> str:
    """Write a model card, in Markdown with the header that model hubs read.

    Args:
        report: of :func:`~tp_twoaxis.prune_to_flops`.
        name: of the network.
        file: that :func:`~tp_twoaxis.save_pruned` writes.
        factory: how the dense network is built, as Python: ``torchvision.models.resnet50``.
        imports: what that needs: ``import torchvision``.
        accuracy: ``before`` and ``after``, shares in [0, 1], and if known ``images`` (how many) and ``split``; without,
            the card says that nothing was measured.

    Raises:
        TwoAxisError: the report is none, or the accuracy lacks one of both.

    Example:
        >>> from tp_twoaxis.pruning.pruning_report import Size
        >>> report = PruningReport("hull", 0.5, 0.498, Size(200, 80), Size(100, 50), [], {}, ["bn"], {})
        >>> print(model_card(report, name="ResNet-20", accuracy={"before": 0.926, "after": 0.875}))
        ---
        tags:
        - pruning
        ...
        Top-1 accuracy: 92.60 % before, 87.50 % after pruning and repair, without fine-tuning.
        ...
    """
    if not isinstance(report, PruningReport):
        raise TwoAxisError(f"report: expected what prune_to_flops returned, got {type(report).__name__}; pass that")
    sections = {
        "What was removed": _removed(report),
        "How": _how(report),
        "Accuracy": _accuracy(accuracy),
        "How to load it": _loading(file, factory, imports),
        "Notes": [f"- {note}" for note in report.notes],
    }
    lines = ["---", "tags:", "- pruning", "- torch-pruning", "- tp-twoaxis", "---", ""]
    lines += [f"# {name}, pruned to {report.achieved:.1%} of its {UNITS[report.budget]}"]
    for title, body in sections.items():
        if body:
            lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _removed(report: PruningReport) -> list[str]:
    rows = ["| | before | after | kept |", "| --- | --- | --- | --- |"]
    sizes = (("multiply-adds", report.before.macs, report.after.macs),)
    for what, before, after in (*sizes, ("parameters", report.before.params, report.after.params)):
        rows.append(f"| {what} | {before:,} | {after:,} | {after / max(before, 1):.1%} |")
    for batch, (before_ms, after_ms) in report.latency_ms.items():
        rows.append(f"| milliseconds, {batch} | {before_ms:.2f} | {after_ms:.2f} | {after_ms / before_ms:.1%} |")
    pruned = sorted((g for g in report.groups if g.removed), key=lambda g: len(g.kept) / len(g.kept + g.removed))
    if not pruned:
        return rows
    rows += ["", "| channels that leave together, by their first layer | kept |", "| --- | --- |"]
    rows += [
        f"| `{group.name}` | {len(group.kept)} of {len(group.kept + group.removed)} |" for group in pruned[:GROUPS]
    ]
    more = len(pruned) - GROUPS
    return [*rows, "", f"{more} more groups lost smaller shares."] if more > 0 else rows


def _how(report: PruningReport) -> list[str]:
    steps = f" in {report.steps} steps" if report.steps > 1 else ""
    repair = " + ".join(report.repair) or "none"
    return [
        f"tp-twoaxis {version('tp-twoaxis')} removed channels{steps} by the criterion `{report.importance}`; repair: "
        f"{repair}. Neither uses training."
    ]


def _accuracy(accuracy: Mapping[str, Any] | None) -> list[str]:
    if accuracy is None:
        return ["Not measured."]
    if missing := [key for key in ("before", "after") if key not in accuracy]:
        raise TwoAxisError(f"accuracy: expected before and after, {missing[0]} is missing; add it, or leave both out")
    images = f" on {accuracy['images']:,} images" if accuracy.get("images") else ""
    split = f" ({accuracy['split']})" if accuracy.get("split") else ""
    return [
        f"Top-1 accuracy{images}{split}: {100 * accuracy['before']:.2f} % before, {100 * accuracy['after']:.2f} % "
        "after pruning and repair, without fine-tuning."
    ]


def _loading(file: str, factory: str, imports: str) -> list[str]:
    return [
        "```python",
        *imports.splitlines(),
        "from tp_twoaxis import load_pruned",
        "",
        f'model = load_pruned("{file}", {factory})',
        "```",
        "",
        "`pip install tp-twoaxis`; nothing is unpickled. The file holds weights and widths; the network's code comes "
        f"from the factory, `{factory}`, which builds the dense network.",
    ]
