"""Names of trials and of their files."""

from __future__ import annotations

import string

import pytest
from bench_cases import tiny_config

from tp_twoaxis import TwoAxisError
from tp_twoaxis.benchmark.methods import Method, Trial
from tp_twoaxis.benchmark.results import claim_folder, open_folder


def test_file_names_are_safe_and_unique():
    odd = [Method("my.module:make"), Method("my/module:make"), Method("my module:make"), Method("x" * 300)]
    trials = [Trial("timm:vit/b", seed, method, keep) for seed in (1, 2) for method in odd for keep in (0.5, 0.25)]
    names = [trial.file_name for trial in trials]
    assert len(set(names)) == len(trials)
    assert set("".join(names)) <= set(string.ascii_letters + string.digits + "_-+.")
    assert max(map(len, names)) < 140
    assert not any(name.startswith(".") for name in names)


def test_a_trial_with_nan_is_not_written(tmp_path):
    """JSON has no NaN, and a file that other programs cannot read is worse than none."""
    config = tiny_config(tmp_path)
    folder = claim_folder(tmp_path / "out", config)
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.write(config.trials()[0], {"accuracy": float("nan")})
    assert list((tmp_path / "out" / "cells").iterdir()) == []
    assert open_folder(tmp_path / "out").read_all() == []


def test_the_parent_folder_must_exist(tmp_path):
    with pytest.raises(TwoAxisError, match="could not be made a folder"):
        claim_folder(tmp_path / "no" / "out", tiny_config(tmp_path))
