"""Provenance: what every results file records about where its numbers come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from tp_twoaxis.runtime.serialization import write_bytes

RESULTS = Path(__file__).parent / "results"


def provenance(command: str, data: str) -> dict[str, str]:
    """Command, data, commit, torch, machine and date; a commit is dirty if anything but results differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent.parent
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {
        "command": command,
        "commit": commit,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "data": data,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, command: str, data: str, **results: Any) -> None:
    """Write ``results/<name>.json`` atomically, the provenance first."""
    RESULTS.mkdir(exist_ok=True)
    content = {"provenance": provenance(command, data), **results}
    write_bytes(RESULTS / f"{name}.json", f"{json.dumps(content, indent=1)}\n".encode())
