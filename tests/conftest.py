"""Fixtures of several test files."""

from __future__ import annotations

import numpy as np
import pytest
from cli_cases import MODEL, succeed
from PIL import Image

from tp_twoaxis.runtime import progress_bar


@pytest.fixture(autouse=True)
def _lines_of_progress_begin_anew():
    """Each test is as long as a run of its own: lines that earlier tests are due are not printed in it."""
    progress_bar._clock.last = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A class folder of 8x8 images with train (40) and test (20), and statistics of 40 images."""
    root = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in range(5):
            classes = root / "images" / split / f"class{label}"
            classes.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(40 * label, 40 * label + 96, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(classes / f"{i}.png")
    result = succeed("calibrate", MODEL, "--data", root / "images", "--out", root / "stats.safetensors", "--json")
    (root / "calibrate.json").write_text(result.stdout)
    return root
