"""Whole heads against channels of every head, and at which temperature the narrower ones do best.

A vision transformer is trained on the digits that come with scikit-learn, three times from other weights. Its attention
alone is pruned, to shares of the network's MACs under one threshold over all blocks; accuracy on digits held out,
without fine-tuning. ``rescaled`` is ``head-dims`` with queries multiplied by ``sqrt(width / old width)``, which undoes
that products are divided by a smaller root: exact where what leaves was zero.

    python benchmarks/attention_units.py

About six minutes on one CPU core.
"""

from __future__ import annotations

import copy
import json

import timm
import torch
from provenance import save
from torch import nn

from tp_twoaxis import TwoAxisImportance, calibrate, prune_to_flops
from tp_twoaxis.data import digits
from tp_twoaxis.pruning.pruning_report import PruningReport
from tp_twoaxis.training import finetune
from tp_twoaxis.training.evaluation import accuracy

SEEDS = (0, 1, 2)
SCORES = ("norm-local", "hull")
KEEP = (0.8, 0.7, 0.6)
REPAIRS = ((), ("ridge",), ("sequential",))
HEADS, WIDTH = 4, 64
EPOCHS = 120


def build() -> nn.Module:
    """A vision transformer on 8 x 8 pixels: 16 patches, four blocks, four heads of 16 channels."""
    return timm.models.vision_transformer.VisionTransformer(
        8, 2, in_chans=1, num_classes=10, embed_dim=WIDTH, depth=4, num_heads=HEADS, mlp_ratio=2.0
    )


def rescaled(network: nn.Module) -> nn.Module:
    """Divide the products of queries and keys by what they were divided by before."""
    network = copy.deepcopy(network)
    for block in network.blocks:
        attention, width = block.attn, block.attn.num_heads * block.attn.head_dim
        with torch.no_grad():
            for parameter in (attention.qkv.weight, attention.qkv.bias):
                parameter[:width] *= (width / WIDTH) ** 0.5
    return network


def main() -> None:
    rows = []
    dense = {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        network = build()
        recipe = {
            "epochs": EPOCHS,
            "max_batches": None,
            "lr": 0.1,
            "schedule": "cosine",
            "warmup": 0.1,
            "weight_decay": 1e-4,
        }
        finetune(network, digits("train", seed).loader(64, shuffle=True), progress=False, **recipe)
        test = digits("calibration", seed).loader(100)
        calibration = digits("train", seed).loader(100)
        dense[seed] = accuracy(network, test, progress=False)[0]
        print(f"seed {seed}: dense {dense[seed]:.4f}", flush=True)
        stats = calibrate(network, calibration, consumers=True, progress=False)
        example = next(iter(calibration))[0][:1]
        others = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and "qkv" not in n]
        for score in SCORES:
            for keep in KEEP:
                for repair in REPAIRS:
                    for unit in ("heads", "head-dims"):
                        pruned = copy.deepcopy(network)
                        report: PruningReport = prune_to_flops(
                            pruned, example, TwoAxisImportance(stats, score), flops=keep, repair=repair, stats=stats,
                            loader=calibration, ignored_layers=others, attention=unit,
                            progress=False,
                        )  # fmt: skip
                        row = {
                            "seed": seed,
                            "score": score,
                            "keep": keep,
                            "repair": "+".join(repair) or "none",
                            "attention": unit,
                            "achieved": round(report.achieved, 4),
                            "accuracy": round(accuracy(pruned, test, progress=False)[0], 4),
                            "left": [[b.attn.num_heads, b.attn.head_dim] for b in pruned.blocks],
                        }
                        if unit == "head-dims" and repair != ("sequential",):  # which is fitted to the other one
                            row["rescaled"] = round(accuracy(rescaled(pruned), test, progress=False)[0], 4)
                        rows.append(row)
                        print(json.dumps(row), flush=True)

    summary = []
    for keep in KEEP:
        for repair in dict.fromkeys(row["repair"] for row in rows):
            these = [row for row in rows if row["keep"] == keep and row["repair"] == repair]
            means = {"keep": keep, "repair": repair}
            for unit in ("heads", "head-dims"):
                own = [row["accuracy"] for row in these if row["attention"] == unit]
                means[unit] = round(sum(own) / len(own), 4)
            raw = [row["rescaled"] for row in these if "rescaled" in row]
            if raw:
                means["rescaled"] = round(sum(raw) / len(raw), 4)
            summary.append(means)
            print(json.dumps(means))
    save(
        "attention_units",
        "python benchmarks/attention_units.py",
        "digits of scikit-learn: 1,097 to train and calibrate, 300 others to judge",
        dense=dense,
        summary=summary,
        rows=rows,
    )


if __name__ == "__main__":
    main()
