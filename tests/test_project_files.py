"""Files for people and services around the package agree with the package."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project():
    if sys.version_info < (3, 11):
        pytest.skip("the standard library reads TOML since 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(name):
    return pytest.importorskip("yaml").safe_load((ROOT / name).read_text())


def test_the_citation_is_of_this_version(project):
    citation = load("CITATION.cff")
    assert citation["version"] == project["version"]
    assert citation["repository-code"] == project["urls"]["Source"]
    assert "2605.07086" in citation["preferred-citation"]["url"]


def test_public_ci_covers_what_is_promised(project):
    matrix = load(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    promised = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if "Python :: 3." in line]
    assert matrix["python"] == promised
    oldest = next(line for line in project["dependencies"] if line.startswith("torch>="))
    assert f"torch=={oldest.removeprefix('torch>=')}.*" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_issue_templates_are_forms():
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = load(path)
        assert {"name", "description", "body"} <= form.keys() or path.stem == "config"
