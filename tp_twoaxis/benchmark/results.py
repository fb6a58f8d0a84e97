"""A results folder: the config of a sweep, and one JSON file a trial."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tp_twoaxis.benchmark.methods import Trial
from tp_twoaxis.benchmark.sweep import BenchmarkConfig, load_config
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.serialization import Json, write_bytes

FORMAT = "tp-twoaxis/cell"
VERSION = 1
CONFIG, CELLS = "config.json", "cells"


@dataclass(frozen=True)
class ResultsFolder:
    """A folder with ``config.json`` and ``cells/``; a trial is there whole or not at all.

    Attributes:
        path: the folder.
        config: what its trials were measured under.
    """

    path: Path
    config: BenchmarkConfig

    def file(self, trial: Trial) -> Path:
        """Where a trial's file is or will be."""
        return self.path / CELLS / trial.file_name

    def write(self, trial: Trial, record: Json) -> None:
        """Write a trial's file atomically.

        Raises:
            TwoAxisError: it could not be written, for example because the disk is full; then there is no file.
        """
        text = json.dumps(record, indent=1, allow_nan=False)
        write_bytes(self.file(trial), f"{text}\n".encode())

    def read(self, trial: Trial) -> Json | None:
        """Read a trial's record; None when it is not there yet.

        Raises:
            TwoAxisError: the file is no record of a trial, or one of other conditions.
        """
        path = self.file(trial)
        try:
            record: Json = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TwoAxisError(
                f"{path}: expected a trial's record, reading it failed: {error}; delete it and run again"
            ) from error
        if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version", 0) > VERSION:
            raise TwoAxisError(f"{path}: expected a {FORMAT} of version {VERSION}; it is another program's, remove it")
        if record["conditions"] != self.config.conditions() or record["key"] != trial.key:
            raise TwoAxisError(
                f"{path}: expected a trial of this folder's config, got one of another ({record['key']}, "
                f"conditions {record['conditions']}); it was copied here, remove it"
            )
        return record

    def read_all(self) -> list[Json]:
        """Read the records that are there, in the config's order."""
        return [record for trial in self.config.trials() if (record := self.read(trial)) is not None]


def claim_folder(path: str | Path, config: BenchmarkConfig, *, extend: bool = False) -> ResultsFolder:
    """Open a results folder for a config, or make it.

    Args:
        path: the folder; its parent exists.
        config: the sweep.
        extend: accept a folder whose config has a part of this one's networks, methods, keep and seeds and is
            otherwise equal, and write the larger config into it.

    Raises:
        TwoAxisError: the folder holds results of another config, or other things.

    Example:
        >>> import tempfile
        >>> from tp_twoaxis.benchmark import Method, NetworkConfig
        >>> config = BenchmarkConfig((NetworkConfig("r18", "resnet18", "images/"),), (Method("l2"),), seeds=(1,))
        >>> folder = claim_folder(tempfile.mkdtemp(), config)
        >>> open_folder(folder.path).config == config
        True
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        there = open_folder(path).config
        if there != config and not (extend and config.extends(there)):
            raise TwoAxisError(
                f"{path}: expected an empty folder or results of this config, got results of another one "
                f"({_differences(there, config)}); choose another folder"
                + ("" if extend or not config.extends(there) else ", or extend this one")
            )
        if there != config:
            _write_config(path, config)
    else:
        # a kill while the config was written leaves its temporary file
        if path.exists() and not (path.is_dir() and all(p.name.startswith(f".{CONFIG}.") for p in path.iterdir())):
            raise TwoAxisError(f"{path}: expected an empty folder or one of results, got neither; choose another")
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise TwoAxisError(f"{path}: could not be made a folder ({error}); choose another") from error
        _write_config(path, config)
    (path / CELLS).mkdir(exist_ok=True)
    return ResultsFolder(path, config)


def open_folder(path: str | Path) -> ResultsFolder:
    """Open an existing results folder.

    Raises:
        TwoAxisError: it is none.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise TwoAxisError(f"{path}: expected a folder that `tp-twoaxis bench` wrote, it has no {CONFIG}")
    return ResultsFolder(path, load_config(path / CONFIG))


def _write_config(path: Path, config: BenchmarkConfig) -> None:
    text = json.dumps({**config.to_dict(), "_digest": config.digest()}, indent=1)
    write_bytes(path / CONFIG, f"{text}\n".encode())


def _differences(there: BenchmarkConfig, config: BenchmarkConfig) -> str:
    old, new = there.to_dict(), config.to_dict()
    return "it differs in " + ", ".join(key for key in new if new[key] != old[key])
