r"""Repairs of real networks of 224 pixels, for several criteria and from more and more images.

ImageNet's MobileNetV1-0.75 and EfficientNet-Lite0 (third-party weights) are pruned in one step to two shares of their
MACs by several criteria, and repaired from the same images; nothing is fine-tuned. They are judged on the 1,000 images
of ten classes, decided among all 1,000: top-1 accuracy, and the distance of the logits from the dense network's,
squared, over their variance. None of these images took part in any choice. The other way round, from images of ten
classes to an image of each class, is a check: ``--source nette``.

    python benchmarks/repair_224.py --data DIR --checkpoints DIR
    python benchmarks/repair_224.py --data DIR --checkpoints DIR --networks mobilenet_v1 --shares 0.65 \
        --criteria hull --repairs sequential --images 32 96 224 568 1000
    python benchmarks/repair_224.py --data DIR --checkpoints DIR --shares 0.65 --criteria anticipating \
        --repairs sequential joint --source nette --images 1000

``--data`` holds ``imagenet/`` with ``sample.parquet`` (an image of each class, to calibrate and repair from) and
``nette.parquet`` (1,000 images of ten classes). Cells that ``results/repair_224.json`` holds already are skipped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from default_score import NETWORKS, Batches, batches
from resumable import ResumableCells
from torch import Tensor, nn

from tp_twoaxis import CalibrationStatistics, calibrate, prune_to_flops
from tp_twoaxis.importance import find_criterion
from tp_twoaxis.repair.repair_task import TRAINING_STEPS
from tp_twoaxis.runtime.forward import forward_pass

CRITERIA = ("l2", "taylor", "fpgm", "capture", "hull", "anticipating")
REPAIRS = ("bn", "sequential", "joint")
IMAGES, JUDGES = 500, 1000
JUDGING = {"sample": "nette", "nette": "sample"}
KEPT_NOTES = ("held back", "repair ran on", "distill")
METHOD = ("network", "share", "criterion", "repair")
USUAL = {"first": 0, "source": "sample", "steps": 1, "training_steps": 0}
KEY = (*METHOD, "images", *USUAL)


def logits_of(model: nn.Module, judges: Batches) -> Tensor:
    """Run a model on the judging images, [n, classes] float64."""
    with forward_pass(model, judges, what="judge") as run:
        return torch.cat([run.logits(batch).double() for batch in run.batches])


@dataclass
class Judges:
    """Images that took no part in any choice, and what the dense network says of them."""

    images: Batches
    dense: Tensor

    def judge(self, model: nn.Module) -> tuple[float, float]:
        """Measure top-1 accuracy in %, and the logits' squared distance from the dense network over their variance."""
        logits, labels = logits_of(model, self.images), torch.cat([labels for _, labels in self.images])
        error, power = (logits - self.dense).square().sum(), (self.dense - self.dense.mean(0)).square().sum()
        return round(100 * float((logits.argmax(1) == labels).double().mean()), 1), round(float(error / power), 3)


def measure(
    dense: nn.Module, cell: dict[str, Any], images: Batches, judges: Judges, stats: CalibrationStatistics | None
) -> dict[str, Any]:
    """Prune and repair a copy of the network, and judge it."""
    model, start = copy.deepcopy(dense), time.perf_counter()
    report = prune_to_flops(
        model,
        images[0][0][:1],
        cell["criterion"],
        flops=cell["share"],
        steps=cell["steps"],
        training_steps=cell["training_steps"] or TRAINING_STEPS,
        repair=cell["repair"],
        stats=stats,
        loader=images,
        max_images=None,
        max_memory=cell["max_memory"],
        progress=False,
    )
    seconds = round(time.perf_counter() - start, 1)
    top1, distance = judges.judge(model)
    return {
        **cell,
        "top1": top1,
        "distance": distance,
        "kept": round(report.achieved, 4),
        "seconds": seconds,
        "repair_seconds": round(report.seconds.get("repair", 0.0), 1),
        "notes": [note for note in report.notes if any(part in note for part in KEPT_NOTES)],
    }


def is_usual(cell: dict[str, Any]) -> bool:
    """Whether a cell is of the first images of the usual file, pruned in one step without training."""
    return all(cell[key] == value for key, value in USUAL.items())


def table(cells: list[dict[str, Any]], images: int) -> str:
    """Draw the cells of so many images for people: a row a criterion and repair, two columns a network."""
    own = [cell for cell in cells if cell["images"] == images and is_usual(cell)]
    heads = list(dict.fromkeys((cell["network"], cell["share"]) for cell in own))
    lines = ["| criterion | repair | " + " | ".join(f"{name} {share:g}" for name, share in heads) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(heads))
    for criterion, repair in itertools.product(CRITERIA, REPAIRS):
        found = {(c["network"], c["share"]): c for c in own if (c["criterion"], c["repair"]) == (criterion, repair)}
        texts = [f"{found[head]['top1']} ({found[head]['distance']:.2f})" if head in found else "" for head in heads]
        if any(texts):
            lines.append(f"| {criterion} | {repair} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def growth(cells: list[dict[str, Any]]) -> str:
    """Draw the cells that differ in their images alone."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in filter(is_usual, cells):
        groups.setdefault(tuple(cell[key] for key in METHOD), []).append(cell)
    lines = ["| network | share | criterion | repair | images: top-1 (distance) |", "| --- | --- | --- | --- | --- |"]
    for (network, share, criterion, repair), own in groups.items():
        if len(own) > 1:
            own.sort(key=lambda cell: int(cell["images"]))
            texts = [f"{cell['images']}: {cell['top1']} ({cell['distance']:.2f})" for cell in own]
            lines.append(f"| {network} | {share:g} | {criterion} | {repair} | {', '.join(texts)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def others(cells: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """Draw the cells of other images, of several steps, and with training."""
    heads = ["network", "share", "criterion", "repair", "images", "steps", "training steps"]
    heads += ["top-1", "% of dense", "distance"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for cell in cells:
        if not is_usual(cell):
            own = f"{cell['source']} {cell['first']} to {cell['first'] + cell['images'] - 1}"
            kept = f"{100 * cell['top1'] / dense[column(cell['network'], cell['source'])]:.1f}"
            values = [*(cell[key] for key in METHOD), own, cell["steps"], cell["training_steps"]]
            lines.append("| " + " | ".join(map(str, [*values, cell["top1"], kept, cell["distance"]])) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def column(network: str, source: str) -> str:
    """Name a dense network judged on the images that do not calibrate."""
    return network if source == USUAL["source"] else f"{network}, the other way round"


def page(cells: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """Write the tables, with what they are of."""
    known = ", ".join(f"{name} {accuracy} %" for name, accuracy in dense.items())
    text = (
        f"Top-1 accuracy in % on {JUDGES} images (standard error at most 1.6 points), and in brackets the distance of "
        f"the logits from the dense network's, squared, over their variance. Dense: {known}. Calibrated and repaired "
        f"from {IMAGES} other images of as many classes, one step, not fine-tuned:\n\n{table(cells, IMAGES)}"
    )
    more = growth(cells)
    rest = others(cells, dense)
    text += f"\nFrom more and more images:\n\n{more}" if more else ""
    return text + (f"\nOther images, several steps, training without labels:\n\n{rest}" if rest else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with imagenet/")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the third-party safetensors files")
    known = [name for name, network in NETWORKS.items() if network.on_imagenet]
    parser.add_argument("--networks", nargs="+", default=known, choices=known, help="default all")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.65, 0.8], help="of the MACs to keep")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), help="default those")
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS), help="default those")
    parser.add_argument("--images", nargs="+", type=int, default=[IMAGES], help="to calibrate and repair from")
    parser.add_argument("--first", type=int, default=USUAL["first"], help="of them in the file, for another draw")
    parser.add_argument("--source", default=USUAL["source"], choices=JUDGING, help="file of them; the other judges")
    parser.add_argument("--steps", type=int, default=USUAL["steps"], help="of pruning")
    parser.add_argument("--training-steps", type=int, default=TRAINING_STEPS, help="of the repair distill")
    parser.add_argument("--max-memory", type=float, default=4.0, help="GiB for activations of sequential and joint")
    arguments = parser.parse_args()
    source, first, steps = arguments.source, arguments.first, arguments.steps
    data = "1,000 images of sample.parquet and of nette.parquet: one to calibrate and repair from, the other to judge"
    cells = ResumableCells("repair_224", KEY, data, page)
    for name in arguments.networks:
        network = NETWORKS[name]
        dense = network.load(arguments.checkpoints / f"{network.weights}.safetensors")
        folder = arguments.data / "imagenet"
        held = batches(folder / f"{JUDGING[source]}.parquet", network.normalisation, 0, JUDGES, 224)
        judges = Judges(held, logits_of(dense, held))
        cells.dense[column(name, source)] = judges.judge(dense)[0]
        for count in arguments.images:
            images = batches(folder / f"{source}.parquet", network.normalisation, first, first + count, 224)
            stats = None
            wanted = itertools.product(arguments.repairs, arguments.shares, arguments.criteria)
            for repair, share, criterion in wanted:
                training = arguments.training_steps if "distill" in repair else 0
                cell = cells.missing(name, share, criterion, repair, count, first, source, steps, training)
                if cell is None:
                    continue
                found = find_criterion(criterion)
                shared = "statistics" in found.needs and not found.extras
                if stats is None and shared:
                    stats = calibrate(dense, images, target=None, max_images=None, progress=False)
                cell["max_memory"] = arguments.max_memory
                cells.add(measure(dense, cell, images, judges, stats if shared else None))
    print(cells.page())


if __name__ == "__main__":
    main()
