"""Which score should be the default? Local scores, magnitude and other normalisers on trained networks of six families.

ImageNet's MobileNetV1-0.75 and EfficientNet-Lite0 and two third-party CIFAR-10 ResNet-20s have published weights;
VGG-16 at a quarter of its widths, a vision transformer and a ConvNeXt, both small, are trained here on CIFAR-10 where
their weights are missing. A network is pruned in one step to two shares of its MACs, its BatchNorms are re-estimated
where it has any, nothing is fine-tuned. It is judged by top-1 accuracy on training images that did not calibrate, and
that VGG, transformer and ConvNeXt were not trained on; no test image of CIFAR-10 is read. For ImageNet there is a
second set of images, of ten classes, that took no part in the choice.

    python benchmarks/default_score.py --data DIR --checkpoints DIR --trained DIR

``--data`` holds ``cifar10/`` (Parquet shards) and ``imagenet/`` (``sample.parquet`` and ``nette.parquet``: an image of
each class, and images of ten). A network and score that ``results/default_score.json`` holds already are skipped. On
one CPU core training takes ten minutes and the rest half an hour. Behind the results are weights of the same recipes
that were trained before this script, transformer and ConvNeXt in float32; on ImageNet some scores were left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from provenance import RESULTS, save
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from tp_twoaxis import CalibrationStatistics, calibrate, prune_to_flops
from tp_twoaxis.data import open_dataset
from tp_twoaxis.importance import make_importance
from tp_twoaxis.models.cifar_resnet import cifar_resnet20_conv_shortcut, cifar_resnet20_option_a
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.serialization import write_bytes

CANDIDATES = (
    "capture",
    "hull",
    "composite-local",
    "norm-local",
    "spectral-rs",
    "l2",
    "capture(normalizer='mean')",
    "hull(normalizer='mean')",
    "hull(normalizer='median')",
    "norm-local(normalizer='softmax')",
)
OURS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's mean and deviation as most people round them
CALIBRATE, JUDGE = 1024, 1000  # images of CIFAR-10: the first ones, and the last
HELD_OUT = 4000  # the last ones, which nothing is trained on here
IMAGENET = {"calibrate": ("sample", 0, 300), "judge": ("sample", 500, 800), "report": ("nette", 0, 300)}
Batches = list[tuple[Tensor, Tensor]]


def mobilenet_v1_075() -> nn.Module:
    """MobileNetV1 (Howard et al. 2017) at 0.75 of its widths, with Keras's padding and BatchNorm."""
    widths = [24, 48, 96, 96, 192, 192, *[384] * 6, 768, 768]
    layers: list[nn.Module] = []

    def add(read: int, written: int, size: int, stride: int, groups: int) -> None:
        layers.extend([nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else [])
        padding = 0 if stride == 2 else size // 2
        layers.append(nn.Conv2d(read, written, size, stride, padding, groups=groups, bias=False))
        layers.extend([nn.BatchNorm2d(written, eps=1e-3), nn.ReLU6()])

    add(3, 24, 3, 2, 1)
    for block in range(13):
        read, written = widths[block : block + 2]
        add(read, read, 3, 2 if block in (1, 3, 5, 11) else 1, read)
        add(read, written, 1, 1, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(768, 1000))


def vgg16_quarter() -> nn.Module:
    """VGG-16-BN for 32 x 32 pixels, every width a quarter of the original's: 0.92 million parameters."""
    from torchvision.models import vgg

    widths = [width if width == "M" else int(width) // 4 for width in vgg.cfgs["D"]]
    features = vgg.make_layers(widths, batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def vit_small() -> nn.Module:
    """Build a vision transformer of five blocks of 128 channels and four heads, on 16 patches of 8 x 8 pixels."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=5, num_heads=4, num_classes=10)


def convnext_small() -> nn.Module:
    """Build a ConvNeXt of ten blocks of 24 to 128 channels, with kernels of 5 x 5 and patches of 2 x 2 pixels."""
    from timm.models.convnext import ConvNeXt

    widths = {"depths": (2, 2, 4, 2), "dims": (24, 48, 96, 128)}
    return ConvNeXt(num_classes=10, patch_size=2, kernel_sizes=5, ls_init_value=0.1, **widths)


@dataclass(frozen=True)
class Network:
    """A network of the comparison.

    Attributes:
        factory: builds it.
        weights: file name in the folder of checkpoints; None where it is trained here.
        normalisation: mean and deviation of its images.
        keep: shares of the MACs.
        training: epochs and largest learning rate, by SGD where it is above 0.01 and by AdamW otherwise.
    """

    factory: Callable[[], nn.Module]
    weights: str | None = None
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = OURS
    keep: tuple[float, float] = (0.7, 0.5)
    training: tuple[int, float] = (0, 0.0)

    @property
    def on_imagenet(self) -> bool:
        """Whether it has ImageNet's classes."""
        return self.keep[0] == 0.8

    def load(self, weights: Path) -> nn.Module:
        """Build it with the weights of a safetensors file, channels last."""
        model = self.factory()
        model.load_state_dict(load_file(weights))
        return model.eval().to(memory_format=torch.channels_last)


KERAS = ((127 / 255,) * 3, (128 / 255,) * 3)
LITE0 = "tf_efficientnet_lite0"
NETWORKS = {
    "mobilenet_v1": Network(mobilenet_v1_075, "imagenet_mobilenet_v1_075", KERAS, (0.8, 0.65)),
    "efficientnet_lite0": Network(lambda: timm.create_model(LITE0), f"imagenet_{LITE0}", KERAS, (0.8, 0.65)),
    "resnet20_conv": Network(cifar_resnet20_conv_shortcut, "cifar10_resnet20_conv_shortcut"),
    "resnet20_a": Network(
        cifar_resnet20_option_a, "cifar10_resnet20_option_a", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ),
    "vgg16_quarter": Network(vgg16_quarter, training=(12, 0.1)),
    "vit_small": Network(vit_small, training=(6, 1e-3)),
    "convnext_small": Network(convnext_small, training=(6, 1e-3)),
}


def batches(spec: Path, normalisation: tuple[tuple[float, ...], ...], first: int, last: int, size: int) -> Batches:
    """Read images and labels of a Parquet file or folder, batched."""
    mean, std = normalisation
    images = open_dataset(str(spec), mean=mean, std=std, image_size=size)
    items = [images[index] for index in range(first, last)]
    pixels, labels = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    step = 50 if size > 64 else 250
    return list(zip(pixels.split(step), labels.split(step), strict=True))


def train(network: Network, path: Path, data: Path) -> None:
    """Train on all training images but the held-out ones: shifts, flips, label smoothing, one cycle of rates."""
    torch.manual_seed(0)
    model, (epochs, rate) = network.factory().to(memory_format=torch.channels_last), network.training
    count = len(open_dataset(str(data))) - HELD_OUT
    whole = batches(data, network.normalisation, 0, count, 32)
    x, y = torch.cat([images for images, _ in whole]), torch.cat([labels for _, labels in whole])
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    if rate > 0.01:
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * (count // 128), pct_start=0.2)
    for _ in range(epochs):
        for chosen in torch.randperm(count)[: count // 128 * 128].split(128):
            left, top = torch.randint(9, (2,)).tolist()
            images = F.pad(x[chosen], (4,) * 4)[:, :, top : top + 32, left : left + 32]
            images = images.flip(3) if torch.rand(()) < 0.5 else images
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    write_bytes(path, to_bytes({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}))


def right(model: nn.Module, judges: Batches) -> Tensor:
    """Find which of the judging images a model puts into their class, [n] bool."""
    with forward_pass(model, judges, what="judge", labels="required") as run:
        return torch.cat([run.logits(batch).argmax(1) == batch.labels for batch in run.batches])


@dataclass
class Case:
    """A trained network and its images: what judges and, on ImageNet, what reports."""

    model: nn.Module
    calibration: Batches
    judges: dict[str, Batches]

    def statistics(self) -> CalibrationStatistics:
        """Gather the statistics that all scores share."""
        return calibrate(self.model, self.calibration, max_images=None, progress=False)

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """Measure top-1 accuracy on each set of images."""
        return {name: round(float(right(model, images).double().mean()), 4) for name, images in self.judges.items()}


def open_case(network: Network, weights: Path, data: Path) -> Case:
    """Load a network and its images."""
    model = network.load(weights)
    if network.on_imagenet:
        parts = {
            name: batches(data / "imagenet" / f"{file}.parquet", network.normalisation, first, last, 224)
            for name, (file, first, last) in IMAGENET.items()
        }
        return Case(model, parts.pop("calibrate"), parts)
    cifar = data / "cifar10"
    count = len(open_dataset(str(cifar)))
    judges = batches(cifar, network.normalisation, count - HELD_OUT, count - HELD_OUT + JUDGE, 32)
    return Case(model, batches(cifar, network.normalisation, 0, CALIBRATE, 32), {"judge": judges})


def measure(case: Case, stats: CalibrationStatistics, candidate: str, share: float) -> dict[str, float]:
    """Prune a copy of the network, and measure it."""
    model = copy.deepcopy(case.model)
    has_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    prune_to_flops(
        model,
        case.calibration[0][0][:1],
        make_importance(candidate, stats=stats, model=model, loader=case.calibration, progress=False),
        flops=share,
        repair=("bn",) if has_norm else (),
        loader=case.calibration,
        max_images=None,
        progress=False,
    )
    return case.accuracies(model)


def summary(units: list[dict[str, Any]], judge: str = "judge") -> list[dict[str, Any]]:
    """Rank the candidates by what is left of the dense accuracy, mean over shares and then networks, the best first.

    Candidates that are not measured on every network come last, without a mean.
    """
    networks = list(dict.fromkeys(unit["network"] for unit in units if judge in unit["dense"]))
    rows = []
    for candidate in dict.fromkeys(unit["score"] for unit in units):
        own = {unit["network"]: unit for unit in units if unit["score"] == candidate and judge in unit["dense"]}
        left = {}
        for name, unit in own.items():
            found = [accuracy[judge] for accuracy in unit["accuracy"].values()]
            left[name] = sum(found) / len(found) / unit["dense"][judge]
        mean = sum(left.values()) / len(left) if len(left) == len(networks) else None
        rows.append({"score": candidate, "retention": mean, "networks": left})
    return sorted(rows, key=lambda row: -1.0 if row["retention"] is None else -1.0 - row["retention"])


def markdown(units: list[dict[str, Any]], judge: str = "judge") -> str:
    """Draw the accuracies for people: a row a candidate in the order of the summary, two columns a network."""
    order = list(NETWORKS)
    known = sorted({unit["network"] for unit in units if judge in unit["dense"]}, key=order.index)
    dense = {unit["network"]: unit["dense"].get(judge) for unit in units}
    heads = [f"{name} {share:g}" for name in known for share in NETWORKS[name].keep]
    lines = ["| score | left | " + " | ".join(heads) + " |", "| --- |" + " --- |" * (len(heads) + 1)]
    cells = [f"{100 * dense[name]:.1f}" for name in known for _ in NETWORKS[name].keep]
    lines.append("| dense | 100 | " + " | ".join(cells) + " |")
    for row in summary(units, judge):
        own = {unit["network"]: unit["accuracy"] for unit in units if unit["score"] == row["score"]}
        if not row["networks"]:
            continue
        found = [own.get(name, {}).get(str(share)) for name in known for share in NETWORKS[name].keep]
        cells = ["" if accuracy is None else f"{100 * accuracy[judge]:.1f}" for accuracy in found]
        mean = "" if row["retention"] is None else f"{100 * row['retention']:.1f}"
        lines.append(f"| {row['score']} | {mean} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(units: list[dict[str, Any]]) -> str:
    """Write both tables, with what they are of."""
    text = (
        "Top-1 accuracy in % at two shares of the MACs kept, one step, BatchNorm re-estimated, not fine-tuned. Left: "
        "accuracy over the dense network's, mean over the shares and then over the networks. On "
        f"{JUDGE} training images of CIFAR-10, and on 300 images of ImageNet's training set, a standard error of 1.6 "
        f"and 2.9 points at most:\n\n{markdown(units)}"
    )
    if any("report" in unit["dense"] for unit in units):
        others = markdown(units, "report")
        text += f"\nOn 300 other images of ImageNet, of ten classes, which no choice was made by:\n\n{others}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with cifar10/ and imagenet/")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the third-party safetensors files")
    parser.add_argument("--trained", required=True, type=Path, help="folder of the others' weights, trained if missing")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="default all")
    parser.add_argument("--scores", nargs="+", default=list(CANDIDATES), help="criterion expressions; default those")
    arguments = parser.parse_args()
    written = RESULTS / "default_score.json"
    units = json.loads(written.read_text())["units"] if written.exists() else []
    arguments.trained.mkdir(parents=True, exist_ok=True)
    for name in arguments.networks:
        network = NETWORKS[name]
        folder = arguments.trained if network.weights is None else arguments.checkpoints
        weights = folder / f"{network.weights or name}.safetensors"
        if network.weights is None and not weights.exists():
            train(network, weights, arguments.data / "cifar10")
        wanted = [c for c in arguments.scores if (name, c) not in {(unit["network"], unit["score"]) for unit in units}]
        if not wanted:
            continue
        case = open_case(network, weights, arguments.data)
        stats, dense = case.statistics(), case.accuracies(case.model)
        for candidate in wanted:
            start = time.perf_counter()
            accuracy = {str(share): measure(case, stats, candidate, share) for share in network.keep}
            seconds = round(time.perf_counter() - start, 1)
            print(f"{name:20} {candidate:34}", *accuracy.values(), f"{seconds} s", flush=True)
            unit = {"network": name, "score": candidate, "dense": dense, "accuracy": accuracy, "seconds": seconds}
            units.append(unit)
            save(
                "default_score",
                "python benchmarks/default_score.py --data DIR --checkpoints DIR --trained DIR",
                f"CIFAR-10: {CALIBRATE} training images to calibrate, {JUDGE} others to judge; ImageNet: {IMAGENET}",
                units=units,
            )
            write_bytes(RESULTS / "default_score.md", page(units).encode())
    print(page(units))


if __name__ == "__main__":
    main()
