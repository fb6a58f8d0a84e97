"""Models and criteria as ``module:attribute``, imported from installed packages or from the working directory."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tp_twoaxis.errors import TwoAxisError, reason


@contextmanager
def working_directory_on_path() -> Iterator[None]:
    """Run a block with modules of the working directory importable; console scripts do not have it on their path.

    Example:
        >>> with working_directory_on_path():
        ...     sys.path[0] == os.getcwd()
        True
    """
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def load_attribute(spec: str, what: str, *, otherwise: str = "") -> Any:
    """Import ``module:attribute``.

    Args:
        spec: a module, importable or in the working directory, and the name of something in it.
        what: kind of the thing, for the message: ``"model"``, ``"criterion"``.
        otherwise: end of the message when the module cannot be imported, such as the names without a colon.

    Raises:
        TwoAxisError: the module cannot be imported, or has no such attribute; near matches are listed.

    Example:
        >>> load_attribute("math:sqrt", "function")(4.0)
        2.0
        >>> load_attribute("math:sqr", "function")
        Traceback (most recent call last):
        tp_twoaxis.errors.TwoAxisError: function 'math:sqr': math has no 'sqr'; did you mean sqrt...
    """
    module_name, _, attribute = spec.partition(":")
    with working_directory_on_path():
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError, TypeError) as error:  # the latter two for names such as "" and ".x"
            raise TwoAxisError(
                f"{what} {spec!r}: importing {module_name!r} says {reason(error)}; run from its folder or install it"
                + (f"; {otherwise}" if otherwise else "")
            ) from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "check the spelling"
        raise TwoAxisError(f"{what} {spec!r}: {module_name} has no {attribute!r}; {hint}")
    return getattr(module, attribute)
