"""Run the command line inside the test process, and what it must look like when it refuses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from cases import conv_net
from typer.testing import CliRunner

from tp_twoaxis.cli.commands import app

MODEL = "cases:conv_net"
EXACT_MODEL = "cli_cases:double_net"
TESTS = str(Path(__file__).parent)


def double_net():
    """In float64, so that results do not depend on how images are cut into batches."""
    return conv_net().double()


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="tp-twoaxis")


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return result


def refused(*arguments):
    """Exit status 2, nothing on stdout, exactly one line on stderr; returns it."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.exception
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tp-twoaxis: error: ")
    return lines[0]


def two_ranks(*arguments):
    """Run a command as torchrun does with two processes; returns what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tp_twoaxis", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **launched, "PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    printed = []
    try:
        for process in processes:
            text, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            printed.append(text)
    finally:
        for process in processes:
            process.kill()
    return printed
