"""The lists of names: complete, filtered, and as JSON."""

from __future__ import annotations

import json

from cli_cases import refused, succeed

from tp_twoaxis.importance import CRITERIA
from tp_twoaxis.known_names import MODELS, REPAIRS


def test_scores():
    lines = succeed("scores").stdout.splitlines()
    assert [line.split()[0].rstrip("*") for line in lines[1:-2]] == list(CRITERIA)
    assert lines[1].startswith("capture*")
    assert lines[-2] == "local is short for capture"
    payload = json.loads(succeed("scores", "best 8 peers", "--json").stdout)
    assert {row["name"] for row in payload["scores"]} == {"hull"}
    assert payload["scores"][0]["options"][:2] == ["strength", "peers"]
    assert "leave it out for all" in refused("scores", "nonsense")


def test_repairs():
    lines = succeed("repairs").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(REPAIRS)
    assert [row["name"] for row in json.loads(succeed("repairs", "--json").stdout)["repairs"]] == list(REPAIRS)


def test_models():
    assert succeed("models").stdout.split()[: len(MODELS)] == list(MODELS)
    assert succeed("models", "resnet50").stdout.split()[0] == "torchvision:resnet50"
