"""How the comparison behind the default score adds up."""

import importlib.util
import sys
from pathlib import Path

import pytest

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


def unit(script, network, seed, dense, **accuracies):
    found = {name: dict.fromkeys(map(str, script.KEEP), accuracies.get(name, 0.1)) for name in script.CANDIDATES}
    best = max(accuracies, key=accuracies.get)
    return {"network": network, "seed": seed, "dense": dense, "accuracy": found, "best": best, "tied": ["capture"]}


def test_networks_weigh_alike_and_dense_accuracy_is_the_measure(script):
    units = [
        unit(script, "a", 1, 0.8, variance=0.6, capture=0.4),
        unit(script, "a", 2, 0.8, variance=0.4, capture=0.4),
        unit(script, "b", 1, 0.5, variance=0.3, capture=0.4),
    ]
    first, second, *rest = script.summary(units)
    assert (first["score"], second["score"]) == ("capture", "variance")
    # capture: a 0.5, b 0.8; variance: a (0.75 + 0.5) / 2, b 0.6
    assert first["retention"] == pytest.approx(0.65)
    assert second["retention"] == pytest.approx(0.6125)
    assert second["networks"] == {"a": [0.625, 0.125], "b": [0.6, 0.0]}
    assert first["rank"] == second["rank"] == 1.5
    assert {row["rank"] for row in rest} == {3.0}
    assert first["behind"] == [0.0, 0.0]
    # behind by -0.125 on a and by 0.2 on b: mean 0.0375, standard error of two
    assert second["behind"] == pytest.approx([-0.0375, 0.1625])
    assert (first["best_or_tied"], second["best_or_tied"]) == (3, 2)
    assert "| capture | 65.0 | 1.50 | 50.0 +- 0.0 | 80.0 +- 0.0 | 0.0 +- 0.0 | 3 |" in script.markdown([first], units)


def test_every_accuracy_is_in_the_csv(script):
    lines = script.accuracy_table([unit(script, "a", 1, 0.8, variance=0.6)]).splitlines()
    assert len(lines) == 1 + len(script.CANDIDATES) * len(script.KEEP)
    assert "a,1,variance,0.35,0.6,0.8" in lines


def test_the_vgg_has_a_quarter_of_every_width(script):
    widths = [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128]
    layers = sum(9 * before * after + 3 * after for before, after in zip([3, *widths], widths, strict=False))
    assert sum(p.numel() for p in script.vgg16_quarter().parameters()) == layers + 128 * 10 + 10
