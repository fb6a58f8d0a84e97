"""Does a network train well whose channels are kept from sharing what they carry? The paper's pilot, appendix O.

For each lambda a network is trained from the same weights and batches on ``cross-entropy + lambda mean_l R_l``: R_l is
the mean overlap, in nats, of 64 reference channels with 128 channels of layer l, drawn anew for each batch that has the
penalty, every second one; l are at most six convolutions spread over depth. Measured are top-1 accuracy on the test
images, and R of the trained network on 2,000 training images, over all channels of the same layers.

The paper trains ResNet-18 on CIFAR-100 for 100 epochs (SGD 0.1, momentum 0.9, cosine):

    python benchmarks/decorrelation.py --data DIR/cifar100 --classes 100 --label-column fine_label --device cuda

A lambda that is in --out already is not trained again, and an interrupted training goes on from its last epoch. One
training is some ten minutes on a GPU; ``--model cifar_resnet20_conv_shortcut --epochs 5 --images 5000`` is a trial for
a CPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from tp_twoaxis import calibrate
from tp_twoaxis.data import make_loader, open_dataset
from tp_twoaxis.models import build_model
from tp_twoaxis.runtime.serialization import write_bytes
from tp_twoaxis.scores import peer_overlap
from tp_twoaxis.training import find_recipe, finetune, training_batches
from tp_twoaxis.training.decorrelation import Decorrelation
from tp_twoaxis.training.evaluation import accuracy

LAMBDAS = "0,0.01,0.1,1"
OVERLAP_IMAGES = 2000


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="images with splits train and test")
    parser.add_argument("--label-column", help="of Parquet files")
    parser.add_argument("--classes", type=int, help="outputs of the network; default its own")
    parser.add_argument("--model", default="cifar_resnet18")
    parser.add_argument("--lambdas", default=LAMBDAS, help="weights of the penalty, separated by commas")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, help="training images to draw; default all")
    parser.add_argument("--test-images", type=int, help="test images to draw; default all")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("decorrelation.json"))
    return parser.parse_args(arguments)


def train_one(options: argparse.Namespace, weight: float) -> dict[str, Any]:
    """Train with one lambda, and measure."""

    def images(split: str, number: int | None) -> Any:
        return open_dataset(
            options.data, split=split, num_images=number, seed=options.seed, label_column=options.label_column
        )

    train, test = images("train", options.images), images("test", options.test_images)
    torch.manual_seed(options.seed)
    model = build_model(options.model, num_classes=options.classes).to(options.device)
    recipe = replace(find_recipe("paper", options.model, options.device), epochs=options.epochs)
    loader = training_batches(train, options.batch_size, device=options.device, seed=options.seed)
    state = options.out.with_suffix(f".{weight:g}.state.safetensors")
    with Decorrelation(model, weight, seed=options.seed) as penalty:
        report = finetune(
            model,
            loader,
            max_batches=None,
            penalty=penalty,
            checkpoint=state,
            resume=True,
            seed=options.seed,
            **recipe.settings(),
        )
        layers = list(penalty.layers)
    share, count = accuracy(model, make_loader(test, 500))
    stats = calibrate(model, make_loader(train, 100, OVERLAP_IMAGES, seed=options.seed), layers=layers)
    overlaps = {}
    for name in layers:
        varying = stats[name].variance > 0
        overlaps[name] = float(peer_overlap(stats[name].correlation, varying)[varying].mean())
    state.unlink(missing_ok=True)
    return {
        "lambda": weight,
        "accuracy": share,
        "test_images": count,
        "mean_overlap": sum(overlaps.values()) / len(overlaps),
        "overlap": overlaps,
        "overlap_images": stats.num_images,
        "epochs": options.epochs,
        "seconds": round(report.seconds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    command = shlex.join(["python", "benchmarks/decorrelation.py", *(sys.argv[1:] if arguments is None else arguments)])
    trained = json.loads(options.out.read_text())["trainings"] if options.out.is_file() else []
    known = {entry["lambda"] for entry in trained}
    for weight in (float(number) for number in options.lambdas.split(",")):
        if weight in known:
            continue
        trained.append(train_one(options, weight))
        content = {"provenance": provenance(command, options.data), "trainings": trained}
        write_bytes(options.out, f"{json.dumps(content, indent=1)}\n".encode())
    for entry in trained:
        print(f"lambda {entry['lambda']:g}: accuracy {entry['accuracy']:.4f}, mean overlap {entry['mean_overlap']:.4f}")


if __name__ == "__main__":
    main()
