"""Torch-Pruning's own test files with our classes in the place of theirs: what passes.

Runs ``tests/test_torch_pruning_suite.py`` over ``test_pruner``, ``test_isomorphic``, ``test_score_normalization`` and
``test_regularization`` of a Torch-Pruning checkout, one criterion after the other, and writes what passed to
``results/torch_pruning_suite.json`` after each. What is there from the same release of Torch-Pruning is skipped, so
that an interrupted run goes on. About 80 s a criterion on one CPU core, 60 of them ``test_regularization``, which is
mostly Torch-Pruning's own walk through DenseNet-121.

    git clone --branch v1.6.1 https://github.com/VainF/Torch-Pruning
    python benchmarks/torch_pruning_suite.py --tests Torch-Pruning/tests
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from provenance import RESULTS, save

SUITE = Path(__file__).parent.parent / "tests" / "test_torch_pruning_suite.py"
sys.path.insert(0, str(SUITE.parent))

from torch_pruning_cases import NAMES  # noqa: E402  beside the suite, which is no package

FILES = ("test_pruner", "test_isomorphic", "test_score_normalization", "test_regularization")


def run(criterion: str, files: list[str], tests: Path, pixels: int) -> dict[str, str]:
    """Run some of the files for one criterion: the outcome of each."""
    start = time.perf_counter()
    environment = {
        **os.environ,
        "TP_TORCH_PRUNING_TESTS": str(tests.absolute()),
        "TP_TORCH_PRUNING_PIXELS": str(pixels),
        "TP_TORCH_PRUNING_CRITERIA": criterion,
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        chosen = f"own_files and ({' or '.join(files)})"
        options = ["-q", "-k", chosen, f"--junitxml={report}", "-p", "no:cacheprovider"]
        ended = subprocess.run([sys.executable, "-m", "pytest", str(SUITE), *options], env=environment, check=False)
        if not report.exists():
            raise SystemExit(f"{criterion}: pytest wrote no report, its exit status is {ended.returncode}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcome: dict[str, str] = {}
    for case in cases:
        file = next(file for file in files if case.attrib["name"].endswith(f"-{file}]"))
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome[file] = "passed" if problem is None else f"{problem.tag}: {problem.attrib.get('message', '')[:300]}"
    print(criterion, json.dumps(outcome), f"{time.perf_counter() - start:.0f} s", flush=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", required=True, type=Path, help="folder tests/ of a Torch-Pruning checkout")
    parser.add_argument("--criteria", help="only these, comma-separated; default all")
    parser.add_argument("--files", help="only these, comma-separated; default all four")
    parser.add_argument("--pixels", type=int, default=32, help="side of the images, 224 in Torch-Pruning's files")
    parser.add_argument("--again", action="store_true", help="also those whose outcome is there")
    arguments = parser.parse_args()
    release = version("torch-pruning")
    written = RESULTS / "torch_pruning_suite.json"
    known = json.loads(written.read_text()) if written.exists() else {}
    outcomes = known.get("outcomes", {}) if known.get("torch_pruning") == release else {}
    wanted = arguments.files.split(",") if arguments.files else FILES
    for criterion in arguments.criteria.split(",") if arguments.criteria else NAMES:
        known = {} if arguments.again else outcomes.get(criterion, {})
        files = [file for file in wanted if file not in known]
        if not files:
            continue
        outcomes[criterion] = outcomes.get(criterion, {}) | run(criterion, files, arguments.tests, arguments.pixels)
        ran = Counter(file for outcome in outcomes.values() for file in outcome)
        passed = Counter(file for outcome in outcomes.values() for file in FILES if outcome.get(file) == "passed")
        save(
            "torch_pruning_suite",
            "python benchmarks/torch_pruning_suite.py --tests Torch-Pruning/tests",
            f"noise of {arguments.pixels} pixels a side",
            torch_pruning=release,
            passed={file: f"{passed[file]} of {ran[file]}" for file in FILES},
            outcomes={name: outcomes[name] for name in NAMES if name in outcomes},
        )


if __name__ == "__main__":
    main()
