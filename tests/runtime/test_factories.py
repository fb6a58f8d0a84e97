"""``module:attribute`` from the working directory and from installed packages."""

import math
import sys

import pytest

from tp_twoaxis import TwoAxisError
from tp_twoaxis.runtime.factories import load_attribute, working_directory_on_path


def test_installed_modules_and_those_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "twoaxis_factory_case.py").write_text(
        "value = 7\ndef make(): import twoaxis_factory_helper as h; return h.x"
    )
    (tmp_path / "twoaxis_factory_helper.py").write_text("x = 8")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert load_attribute("math:pi", "number") == math.pi
    assert load_attribute("twoaxis_factory_case:value", "number") == 7
    make = load_attribute("twoaxis_factory_case:make", "number")
    assert sys.path == path
    with working_directory_on_path():
        assert make() == 8
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such_module_here:f",
            "criterion 'no_such_module_here:f': importing .* says ModuleNotFoundError: No module",
        ),
        (":f", "importing '' says .*; run from its folder or install it; known are a, b$"),
        (".x:f", "importing '.x' says"),
        ("math:sqrtt", r"criterion 'math:sqrtt': math has no 'sqrtt'; did you mean sqrt or isqrt\?"),
        ("math:zzz", "math has no 'zzz'; check the spelling"),
        ("math:", "math has no ''; check the spelling"),
    ],
)
def test_what_is_not_there(spec, message):
    path = list(sys.path)
    with pytest.raises(TwoAxisError, match=message):
        load_attribute(spec, "criterion", otherwise="known are a, b")
    assert sys.path == path


def test_the_path_is_restored_after_an_error():
    path = list(sys.path)
    with pytest.raises(RuntimeError, match="inside"), working_directory_on_path():
        raise RuntimeError("inside")
    assert sys.path == path
