"""The two third-party CIFAR-10 ResNet-20s of several benchmarks: options, weights, and images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from default_score import NETWORKS, Batches, Network, batches
from torch import Tensor, nn

from tp_twoaxis.data import open_dataset
from tp_twoaxis.diagnostics.exact_power import PatchCovariance
from tp_twoaxis.runtime.forward import forward_pass

CIFAR_NETWORKS = ("resnet20_conv", "resnet20_a")
IMAGES, BATCH = 2048, 128  # to calibrate and repair from
EXAMPLE = torch.zeros(1, 3, 32, 32)


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser that knows where data and weights are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with cifar10/")
    parser.add_argument("--checkpoints", required=True, type=Path, help="folder of the third-party safetensors files")
    return parser


def dense_networks(arguments: argparse.Namespace) -> Iterator[tuple[str, Network, nn.Module, Path]]:
    """Load both: name, what is known of it, the network, and the folder of its images."""
    for name in CIFAR_NETWORKS:
        network = NETWORKS[name]
        weights = arguments.checkpoints / f"{network.weights}.safetensors"
        yield name, network, network.load(weights), arguments.data / "cifar10"


def test_images(folder: Path, network: Network) -> Batches:
    """Read all test images."""
    return batches(folder / "test-00000-of-00001.parquet", network.normalisation, 0, 10000, 32)


def draw(folder: Path, network: Network, seed: int, places: range = range(IMAGES)) -> Batches:
    """Draw training images to calibrate and repair from: those at some places of a random order."""
    mean, std = network.normalisation
    training = open_dataset(str(folder), mean=mean, std=std, image_size=32)
    chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[list(places)].tolist()
    x = torch.stack([training[index][0] for index in chosen]).contiguous(memory_format=torch.channels_last)
    y = torch.tensor([training[index][1] for index in chosen])
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def patch_covariances(
    dense: nn.Module, names: list[str], images: Batches, max_images: int | None = None
) -> dict[str, tuple[Tensor, int]]:
    """Gather the patch covariance of convolutions of one group, at all positions, and how many an image has."""
    found = {name: PatchCovariance(dense.get_submodule(name)) for name in names}
    positions: dict[str, int] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            positions[name] = output[0, 0].numel()
            found[name].update(inputs[0], positions[name])

        return record

    with forward_pass(dense, images, what="covariances", max_images=max_images) as run:
        for name in names:
            run.hook(dense.get_submodule(name), recorder(name))
        for _ in run:
            pass
    return {name: (own.covariance[0], positions[name]) for name, own in found.items()}
