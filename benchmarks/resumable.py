"""Cells of a benchmark that are kept as they come, so that the same command goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from provenance import RESULTS, provenance

from tp_twoaxis.runtime.serialization import write_bytes

Cell = dict[str, Any]
Page = Callable[[list[Cell], dict[str, float]], str]
"""``(cells, dense) -> Markdown``"""


class ResumableCells:
    """``results/<name>.json``, and the table drawn from it beside it.

    Args:
        name: of the benchmark.
        key: names of what tells cells apart.
        data: they are of, for the provenance.
        page: draws the table.

    Attributes:
        cells: all of them, each with the commit that it is of.
        dense: network -> accuracy of the dense network.
    """

    def __init__(self, name: str, key: Sequence[str], data: str, page: Page) -> None:
        self._path, self._key, self._data, self._page = RESULTS / f"{name}.json", key, data, page
        self._command = f"python benchmarks/{name}.py --data DIR --checkpoints DIR"
        known = json.loads(self._path.read_text()) if self._path.exists() else {"dense": {}, "cells": []}
        self.cells: list[Cell] = known["cells"]
        self.dense: dict[str, float] = known["dense"]

    def missing(self, *values: Any) -> Cell | None:
        """Give a cell to measure, from the values of the key; None where there is one already."""
        if any(tuple(cell[name] for name in self._key) == values for cell in self.cells):
            return None
        return dict(zip(self._key, values, strict=True))

    def add(self, cell: Cell) -> None:
        """Keep a cell."""
        source = provenance(self._command, self._data)
        self.cells.append({**cell, "commit": source["commit"]})
        print(cell, flush=True)
        content = {"provenance": source, "dense": self.dense, "cells": self.cells}
        write_bytes(self._path, f"{json.dumps(content, indent=1)}\n".encode())
        write_bytes(self._path.with_suffix(".md"), self.page().encode())

    def page(self) -> str:
        """Draw the table."""
        return self._page(self.cells, self.dense)
