"""Finished sections of the evidence as files of one folder, from which pages are made and later runs go on.

A section is ``NAME.json`` (claims, captions, seconds), ``NAME-TABLE.csv`` and ``.parquet``, and ``NAME-FIGURE.png``.
The JSON is written last, each file whole or not at all: a section without it was not finished, and is not there.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from tp_twoaxis.diagnostics.evidence import Claim, Estimate, Section
from tp_twoaxis.diagnostics.html_page import png_bytes
from tp_twoaxis.errors import FileFormatError, TwoAxisError
from tp_twoaxis.runtime.serialization import write_bytes

FORMAT, VERSION = "tp-twoaxis/evidence", 1
RUN = "run.json"


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn: its name in the folder, and what it shows."""

    name: str
    caption: str


@dataclass(frozen=True)
class SectionRecord:
    """A section that was computed or skipped.

    Attributes:
        name: of the section.
        question: that it answers.
        claims: what the paper says, and what came out.
        figures: in their order.
        tables: their names.
        follows: what follows for pruning.
        fails: where this evidence does not reach.
        seconds: wall time of computing and drawing.
        cpu_seconds: of this process, all threads together.
        skipped: why it could not be computed; None where it was.
        again: whether to try again what was skipped: what is missing on a machine may be there another time.
        key: of model, images and options that it is of.
    """

    name: str
    question: str = ""
    claims: tuple[Claim, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[str, ...] = ()
    follows: str = ""
    fails: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    skipped: str | None = None
    again: bool = False
    key: str = ""


@dataclass(frozen=True)
class EvidenceFolder:
    """A folder of finished sections.

    Attributes:
        path: made when the first file is written.

    Example:
        >>> import tempfile
        >>> folder = EvidenceFolder(Path(tempfile.mkdtemp(), "report_tables"))
        >>> section = Section("hulls", "How many?", {"hulls": pd.DataFrame({"layer": ["conv1"], "size": [2.0]})})
        >>> record = folder.finish(folder.draw(section), key="a")
        >>> folder.read("hulls", key="a") == record, folder.read("hulls", key="b")
        (True, None)
        >>> folder.table(record, "hulls").values.tolist()
        [['conv1', 2.0]]
    """

    path: Path

    def draw(self, section: Section) -> SectionRecord:
        """Write a section's tables and figures; it is there once its record is written too, see :meth:`finish`.

        Raises:
            TwoAxisError: a file cannot be written.
        """
        self._make()
        (self.path / f"{section.name}.json").unlink(missing_ok=True)  # first: what stays is no longer whole
        for old in self.path.glob(f"{section.name}-*"):
            old.unlink()
        for name, table in section.tables.items():
            write_table(table, self.path / f"{section.name}-{name}")
        for drawing in section.drawings:
            write_bytes(self._file(section.name, drawing.name, "png"), png_bytes(drawing.draw()))
        return SectionRecord(
            section.name,
            section.question,
            tuple(section.claims),
            tuple(Figure(drawing.name, drawing.caption) for drawing in section.drawings),
            tuple(section.tables),
            section.follows,
            section.fails,
        )

    def finish(self, record: SectionRecord, **changes: Any) -> SectionRecord:
        """Write a record with some changes; from here on its section is there."""
        self._make()
        record = replace(record, **changes)
        content = {"format": FORMAT, "version": VERSION, **asdict(record)}
        text = json.dumps(_without_nan(content), indent=1, allow_nan=False)
        write_bytes(self.path / f"{record.name}.json", f"{text}\n".encode())
        return record

    def read(self, name: str, *, key: str | None = None) -> SectionRecord | None:
        """Read a section; None where it is not there, or is of another key.

        Raises:
            FileFormatError: the file is no such record.
        """
        file = self.path / f"{name}.json"
        if not file.is_file():
            return None
        content = _read_json(file)
        if key is not None and content.get("key") != key:
            return None
        try:
            claims = tuple(_claim(claim) for claim in content.pop("claims"))
            figures = tuple(Figure(**figure) for figure in content.pop("figures"))
            tables = tuple(content.pop("tables"))
            return SectionRecord(**content, claims=claims, figures=figures, tables=tables)
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{file}: expected a section of evidence, got something else ({error})") from error

    def records(self, names: Iterable[str], *, key: str | None = None) -> list[SectionRecord]:
        """Read the sections that are there, in the order of the names; see :meth:`read`."""
        found = (self.read(name, key=key) for name in names)
        return [record for record in found if record is not None]

    def table(self, record: SectionRecord, name: str) -> pd.DataFrame:
        """Read a table of a section."""
        return pd.read_parquet(self._file(record.name, name, "parquet"))

    def png(self, record: SectionRecord, figure: Figure) -> bytes:
        """Read a figure of a section."""
        return self._file(record.name, figure.name, "png").read_bytes()

    def describe(self, run: dict[str, Any]) -> None:
        """Write what the sections are of, JSON-able; ``network``, ``seed`` and ``data`` tell runs apart."""
        self._make()
        text = json.dumps({"format": FORMAT, "version": VERSION, **run}, indent=1)
        write_bytes(self.path / RUN, f"{text}\n".encode())

    @property
    def described(self) -> bool:
        """Whether it is said what the sections are of."""
        return (self.path / RUN).is_file()

    def description(self) -> dict[str, Any]:
        """Read what the sections are of.

        Raises:
            FileFormatError: the folder holds no evidence.
        """
        if not self.described:
            raise FileFormatError(
                f"{self.path}: expected a folder of tables that `tp-twoaxis diagnose` wrote beside its page, "
                f"found no {RUN}; name such a folder"
            )
        return _read_json(self.path / RUN)

    def _file(self, section: str, name: str, ending: str) -> Path:
        return self.path / f"{section}-{name}.{ending}"

    def _make(self) -> None:
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise TwoAxisError(f"{self.path}: the folder could not be made ({error}); choose another place") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = dict(json.loads(file.read_text()))
        kind, version = content.pop("format"), content.pop("version")
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{file}: expected a file of `tp-twoaxis diagnose`, could not read it: {error}"
        ) from error
    if kind != FORMAT or version > VERSION:
        raise FileFormatError(
            f"{file}: expected format {FORMAT!r} up to version {VERSION}, got {kind!r} of version {version}"
        )
    return content


def _claim(content: dict[str, Any]) -> Claim:
    numbers = (math.nan if value is None else float(value) for value in content.pop("estimate").values())
    return Claim(**content, estimate=Estimate(*numbers))


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_table(table: pd.DataFrame, stem: Path) -> None:
    """Write a table as ``STEM.csv`` and ``STEM.parquet``.

    Raises:
        TwoAxisError: a file cannot be written.
    """
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_bytes(stem.with_name(f"{stem.name}.parquet"), buffer.getvalue())
    write_bytes(stem.with_name(f"{stem.name}.csv"), table.to_csv(index=False).encode())
