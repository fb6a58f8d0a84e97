"""Criteria with options, written as they would be called: ``composite-local(b=0.3, normalizer="gaussian")``."""

from __future__ import annotations

import ast
from typing import Any

from tp_twoaxis.errors import TwoAxisError


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a criterion's name from its options.

    Args:
        spec: a name, or a name with keyword arguments in parentheses; values are Python literals (numbers, strings,
            None, tuples of them). Nothing is evaluated.

    Returns:
        The name, and the options by keyword.

    Raises:
        TwoAxisError: the parentheses do not hold keyword arguments with literal values.

    Example:
        >>> parse_spec("hull"), parse_spec("hull(strength=1.0, normalizer='max')")
        (('hull', {}), ('hull', {'strength': 1.0, 'normalizer': 'max'}))
    """
    name, bracket, rest = spec.partition("(")
    if not bracket:
        return spec, {}
    try:
        # a stand-in for the name, which may hold hyphens and colons
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        if len(options) < len(call.keywords):
            raise ValueError
    except (ValueError, SyntaxError) as error:
        raise TwoAxisError(
            f"criterion {spec!r}: expected a name, or options like name(b=0.3, normalizer='mean'), could not read it"
        ) from error
    return name.strip(), options
