"""The names that are known without PyTorch are those of the tables, in their order."""

import subprocess
import sys
from typing import get_args

from tp_twoaxis import known_names
from tp_twoaxis.dependency.attention import AttentionUnit
from tp_twoaxis.diagnostics.evidence_sections import SECTIONS
from tp_twoaxis.diagnostics.explain import Removal
from tp_twoaxis.importance import CRITERIA
from tp_twoaxis.models.factory import BUILT_IN
from tp_twoaxis.pruning.config import Budget
from tp_twoaxis.repair import REPAIRS
from tp_twoaxis.scores.named_scores import DEFAULT_SCORE, SCORES
from tp_twoaxis.statistics.pooling import POOLINGS
from tp_twoaxis.statistics.targets import TARGETS
from tp_twoaxis.training import RECIPES
from tp_twoaxis.training.settings import Precision


def test_they_are_those_of_the_tables():
    assert tuple(CRITERIA) == known_names.CRITERIA
    assert tuple(SCORES) == known_names.SCORES
    assert known_names.ALIASES["local"] == DEFAULT_SCORE
    assert known_names.ALIASES["target"] in SCORES
    assert {axis for axes in known_names.FAMILIES.values() for axis in axes} == {c.axis for c in CRITERIA.values()}
    assert tuple(REPAIRS) == known_names.REPAIRS
    assert known_names.TARGETS == TARGETS
    assert known_names.POOLINGS == POOLINGS
    assert tuple(SECTIONS) == known_names.SECTIONS
    assert tuple(RECIPES) == known_names.RECIPES
    assert tuple(BUILT_IN) == known_names.MODELS
    assert get_args(Removal) == known_names.REMOVALS
    assert (*get_args(Precision), "none") == known_names.AMP
    assert get_args(Budget) == known_names.BUDGETS
    assert get_args(AttentionUnit) == known_names.ATTENTION_UNITS


def test_they_need_no_pytorch():
    code = "import sys, tp_twoaxis.known_names; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
