"""How the comparison behind the default score adds up, and the networks that it makes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))  # for the provenance beside it
    try:
        spec = importlib.util.spec_from_file_location("default_score", FOLDER / "default_score.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["default_score"] = module  # its dataclass looks its own module up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("default_score", None)


def unit(network, score, dense, *accuracies, report=None):
    shares = ("0.8", "0.65") if report else ("0.7", "0.5")
    found = {share: {"judge": accuracy} for share, accuracy in zip(shares, accuracies, strict=True)}
    if report:
        for share, accuracy in zip(shares, report, strict=True):
            found[share]["report"] = accuracy
    return {
        "network": network,
        "score": score,
        "dense": {"judge": dense, **({"report": 0.5} if report else {})},
        "accuracy": found,
    }


def test_networks_weigh_alike_and_dense_accuracy_is_the_measure(script):
    units = [
        unit("vgg16_quarter", "hull", 0.8, 0.6, 0.2),
        unit("vgg16_quarter", "capture", 0.8, 0.4, 0.4),
        unit("vit_small", "hull", 0.5, 0.3, 0.2),
        unit("vit_small", "capture", 0.5, 0.5, 0.4),
        unit("vit_small", "l2", 0.5, 0.5, 0.5),
    ]
    first, second, last = script.summary(units)
    assert (first["score"], second["score"], last["score"]) == ("capture", "hull", "l2")
    assert first["networks"] == {"vgg16_quarter": pytest.approx(0.5), "vit_small": pytest.approx(0.9)}
    assert first["retention"] == pytest.approx(0.7)
    assert second["retention"] == pytest.approx(0.5)
    assert last["retention"] is None  # the best on the one network that it has
    lines = script.markdown(units).splitlines()
    assert lines[0] == "| score | left | vgg16_quarter 0.7 | vgg16_quarter 0.5 | vit_small 0.7 | vit_small 0.5 |"
    assert lines[2] == "| dense | 100 | 80.0 | 80.0 | 50.0 | 50.0 |"
    assert lines[3] == "| capture | 70.0 | 40.0 | 40.0 | 50.0 | 40.0 |"
    assert lines[5] == "| l2 |  |  |  | 50.0 | 50.0 |"


def test_images_that_report_have_a_table_of_their_own(script):
    units = [
        unit("mobilenet_v1", "hull", 0.8, 0.6, 0.2, report=(0.25, 0.15)),
        unit("vit_small", "hull", 0.5, 0.3, 0.2),
    ]
    assert script.markdown(units, "report").splitlines()[2:] == [
        "| dense | 100 | 50.0 | 50.0 |",
        "| hull | 40.0 | 25.0 | 15.0 |",
    ]
    assert "which no choice was made by" in script.page(units)
    assert "which no choice was made by" not in script.page(units[1:])


def test_the_vgg_has_a_quarter_of_every_width(script):
    widths = [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128]
    layers = sum(9 * before * after + 3 * after for before, after in zip([3, *widths], widths, strict=False))
    assert sum(p.numel() for p in script.vgg16_quarter().parameters()) == layers + 128 * 10 + 10


def test_the_mobilenet_is_kerass(script):
    net = script.mobilenet_v1_075().eval()
    assert sum(p.numel() for p in net.parameters()) == 2_585_560  # Keras's 0.75 with its head, without running moments
    convolutions = [module for module in net if isinstance(module, torch.nn.Conv2d)]
    assert [c.groups == c.in_channels for c in convolutions[1::2]] == [True] * 13
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("name", ["vit_small", "convnext_small"])
def test_the_small_networks_run(script, name):
    assert script.NETWORKS[name].factory()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
