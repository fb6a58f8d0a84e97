"""Names with options: read, never evaluated."""

import pytest

from tp_twoaxis import TwoAxisError
from tp_twoaxis.importance.spec import parse_spec


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("l2", "l2", {}),
        ("composite-local(a=1, b=-0.3)", "composite-local", {"a": 1, "b": -0.3}),
        ("module:factory(name='x', many=(1, 2.5), none=None)", "module:factory",
         {"name": "x", "many": (1, 2.5), "none": None}),
        ("hull()", "hull", {}),
    ],
)  # fmt: skip
def test_names_and_options(spec, name, options):
    assert parse_spec(spec) == (name, options)


@pytest.mark.parametrize(
    "spec",
    ["hull(", "hull(0.5)", "hull(b)", "hull(b=open('x'))", "hull(**x)", "hull(b=1)(c=2)", "hull(b=1) or 2", "a(b=1)c"],
)
def test_everything_else_is_refused(spec):
    with pytest.raises(TwoAxisError, match="could not read it"):
        parse_spec(spec)
