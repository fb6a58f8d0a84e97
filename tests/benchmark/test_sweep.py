"""Configs: there and back, digests, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
from bench_cases import tiny_config

from tp_twoaxis import TwoAxisError
from tp_twoaxis.benchmark import BenchmarkConfig, DataConfig, cross, load_config
from tp_twoaxis.benchmark.sweep import expand
from tp_twoaxis.importance import criterion_names

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONFIGS = sorted((BENCHMARKS / "configs").glob("*.json"))
MEASURED = sorted((BENCHMARKS / "results").glob("*/config.json"))
MINIMAL = {"networks": [{"name": "n", "model": "resnet18", "data": "d"}], "methods": ["l2"]}


def test_there_and_back():
    config = tiny_config(Path("d"), methods=cross(["local", "l2"], repairs=[(), ("bn",)], budgets=[0, 5]))
    again = BenchmarkConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.digest() == config.digest()
    assert len({t.key for t in config.trials()}) == len({t.file_name for t in config.trials()}) == 32
    stepped = dataclasses.replace(config, methods=cross(["local"], steps=[1, 3]))
    assert BenchmarkConfig.from_dict(json.loads(json.dumps(stepped.to_dict()))) == stepped
    assert BenchmarkConfig.from_dict({**MINIMAL, "keep": [1]}) == BenchmarkConfig.from_dict({**MINIMAL, "keep": [1.0]})


def test_digest_and_conditions():
    config = tiny_config(Path("d"))
    fewer = dataclasses.replace(config, keep=(0.7,))
    other = dataclasses.replace(config, data=DataConfig(calibration_images=25))
    assert len({config.digest(), fewer.digest(), other.digest()}) == 3
    assert config.conditions() == fewer.conditions() != other.conditions()
    assert config.extends(fewer)
    assert not fewer.extends(config)
    assert not other.extends(config)


def test_configs_without_a_choice_of_steps_keep_their_digest():
    config = BenchmarkConfig.from_dict({**MINIMAL, "methods": [{"criterion": "l2", "steps": 1}]})
    assert config == BenchmarkConfig.from_dict(MINIMAL)
    assert config.to_dict()["methods"] == [
        {"criterion": "l2", "allocation": "global", "repair": ["bn"], "finetune_batches": 0}
    ]


def test_configs_of_draws_by_seed_keep_their_digest():
    """Before there was a choice every seed drew its own images; that is what these digests stand for."""
    fixed, own = (BenchmarkConfig.from_dict({**MINIMAL, "data": {"calibration_draw": d}}) for d in ("fixed", "seed"))
    assert fixed == BenchmarkConfig.from_dict(MINIMAL)
    assert BenchmarkConfig.from_dict(own.to_dict()) == own
    assert fixed.digest() != own.digest()
    assert fixed.conditions() != own.conditions()
    values = own.to_dict()
    del values["data"]["calibration_draw"]
    text = json.dumps(values, sort_keys=True).encode()
    assert own.digest() == hashlib.blake2b(text, digest_size=12).hexdigest()


def test_crossed_methods():
    crossed = {"criteria": "all", "repair": [[], ["bn"]], "finetune_batches": [0, 200], "steps": [1, 3]}
    config = BenchmarkConfig.from_dict({**MINIMAL, "methods": crossed})
    assert len(config.methods) == 8 * len(criterion_names())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metods": []}, "got 'metods'"),
        ({"networks": [{"name": "n", "model": "m"}]}, "'data', it is missing"),
        ({"networks": [{"name": "n", "model": "m", "data": "d", "color": 1}]}, "got 'color'"),
        ({"networks": "n"}, "networks: expected a valid list, got 'n'"),
        ({"networks": MINIMAL["networks"] * 2}, "each once"),
        ({"methods": ["l2", "l2"]}, "each once"),
        ({"methods": []}, "one or more"),
        ({"methods": {"criterion": ["l2"]}}, "got 'criterion'"),
        ({"methods": ["l3"]}, "got 'l3'"),
        ({"keep": [0.5, 0.0]}, "keep.1: expected greater than 0, got 0.0"),
        ({"keep": [1.5]}, "less than or equal to 1"),
        ({"grid": "layers"}, "macs, channels"),
        ({"finetune_amp": "fp8"}, "finetune_amp: expected one of bf16, fp16, got 'fp8'"),
        ({"keep": "abc"}, "keep: expected a valid list"),
        ({"seeds": []}, "one or more"),
        ({"data": {"evaluate_on": "train"}}, "test, selection"),
        ({"data": {"evaluate_on": "selection"}}, "selection_images"),
        ({"data": {"batch_size": 0}}, "data.batch_size: expected greater than or equal to 1, got 0"),
        ({"data": {"calibration_draw": "fix"}}, "fixed, seed"),
        ({"data": 3}, "data: expected an object, got 3"),
        ({"data": {"batch_size": "many"}}, "data.batch_size: expected a valid integer, got 'many'"),
        ({"channels_last": "no"}, "channels_last: expected a valid boolean, got 'no'"),
        ({"finetune_lr": "fast"}, "finetune_lr: expected a valid number, got 'fast'"),
        ({"finetune_lr": [0.01, "fast"]}, "finetune_lr"),
        ({"finetune_lr": 0}, "finetune_lr: expected positive numbers, got 0"),
        ({"finetune_lr": []}, "finetune_lr: expected one or more"),
        ({"finetune_lr": [0.01, 0.001]}, "selection_images to choose one"),
        ({"finetune_lr": [0.01, 0.01], "data": {"selection_images": 9}}, "each once"),
        ({"networks": [{"name": 3, "model": "m", "data": "d"}]}, "networks.0.name: expected a valid string, got 3"),
        ({"methods": {"criteria": ["l2"], "steps": ["two"]}}, "methods.steps.0: expected a valid integer, got 'two'"),
        ({"methods": [{"criterion": "l2", "repair": "rigde"}]}, "did you mean 'ridge'"),
        ({"methods": [3]}, "methods.0: expected an object, got 3"),
        ({"keep": {1, 2}}, "what JSON can hold"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(TwoAxisError, match=message):
        BenchmarkConfig.from_dict({**MINIMAL, **changes})


def test_one_learning_rate_or_several():
    one = BenchmarkConfig.from_dict({**MINIMAL, "finetune_lr": 0.003})
    several = BenchmarkConfig.from_dict({**MINIMAL, "finetune_lr": [0.01, 0.003], "data": {"selection_images": 9}})
    assert one.learning_rates == (0.003,)
    assert several.learning_rates == (0.01, 0.003)
    assert BenchmarkConfig.from_dict(several.to_dict()) == several
    assert several.conditions() != dataclasses.replace(several, finetune_lr=0.01).conditions()
    judged = {"selection_images": 9, "evaluate_on": "selection"}
    with pytest.raises(TwoAxisError, match="test images to judge"):
        BenchmarkConfig.from_dict({**MINIMAL, "finetune_lr": [0.01, 0.003], "data": judged})


def test_bad_files(tmp_path):
    with pytest.raises(TwoAxisError, match="JSON config"):
        load_config(tmp_path / "none.json")
    for text, message in (("{", "JSON config"), ("[]", "JSON object")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(TwoAxisError, match=message):
            load_config(tmp_path / "c.json")


def test_environment_variables_are_expanded_late(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/x")
    assert expand("${SOMEWHERE}/cifar10") == "/x/cifar10"
    monkeypatch.delenv("SOMEWHERE")
    with pytest.raises(TwoAxisError, match=r"SOMEWHERE.*export"):
        expand("$SOMEWHERE/cifar10")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    assert config.data.selection_images > 0
    assert len(config.trials()) >= 10


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_configs_of_results_keep_their_digest_and_their_trials(path):
    config = load_config(path)
    assert config.digest() == json.loads(path.read_text())["_digest"]
    measured = pd.read_csv(path.parent / "cells.csv")
    keys = zip(measured.network, measured.seed, measured.method, measured.keep, strict=True)
    assert {f"{network}|{seed}|{method}|{keep:g}" for network, seed, method, keep in keys} <= {
        trial.key for trial in config.trials()
    }
