"""Read our docstrings for the site: roles become links where their target is on it, and examples are code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|data|meth|attr):`(~?)([\w.]+)`")


def converted(text: str) -> str:
    """Turn Sphinx's roles into optional references, and ``Example:`` into griffe's name for it."""

    def link(role: re.Match[str]) -> str:
        path = role[2]
        shown = path.rpartition(".")[2] if role[1] else path
        return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'

    return re.sub(r"^(\s*)Example:$", r"\1Examples:", ROLE.sub(link, text), flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Converts each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Take in an object once it was read from its file."""
        if obj.docstring is not None:
            obj.docstring.value = converted(obj.docstring.value)
