"""Make the mistakes of a list, and write what the package says to each to docs/misuses.md.

python scripts/misuses.py
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

import tp_twoaxis
from tp_twoaxis.cli import main as command_line
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.training import finetune

PAGE = Path(__file__).parent.parent / "docs" / "misuses.md"
LONGEST = 400  # characters of a message: two lines of a wide terminal, three of a narrow one


class Misuse(NamedTuple):
    """A mistake in words, as it is typed, and a part of what must be said to it."""

    what: str
    code: str
    said: str


PRUNE = "tp-twoaxis prune net:build --data images --out small.safetensors"
MISUSES = {
    "Names and numbers on the command line": (
        Misuse("A misspelt command", "tp-twoaxis prnue", "'prune'"),
        Misuse("A misspelt option", f"{PRUNE} --flop 0.5", "--flops"),
        Misuse("An option that must be there is not", "tp-twoaxis prune net:build --out small.safetensors", "--data"),
        Misuse("A misspelt model", PRUNE.replace("net:build", "resnte50"), "did you mean resnet50"),
        Misuse("A misspelt function in a file of one's own", PRUNE.replace("build", "biuld"), "did you mean build"),
        Misuse("A function that fails", PRUNE.replace("build", "broken"), "no such layer"),
        Misuse("A misspelt criterion", f"{PRUNE} --score tailor", "did you mean 'taylor'"),
        Misuse("A misspelt option of a criterion", f"{PRUNE} --score 'hull(strenght=1)'", "did you mean 'strength'"),
        Misuse("A word where a criterion takes a number", f"{PRUNE} --score \"hull(strength='much')\"", "a number"),
        Misuse("A misspelt repair", f"{PRUNE} --repair rigde", "did you mean 'ridge'"),
        Misuse("A share in percent", f"{PRUNE} --flops 50", "above 0 and up to 1"),
        Misuse("A share in words", f"{PRUNE} --flops half", "'half'"),
        Misuse("A layer that the network has not", f"{PRUNE} --ignore conv9", "no layer 'conv9'"),
        Misuse("A misspelt device", f"{PRUNE} --device cdua", "did you mean 'cuda'"),
    ),
    "Images": (
        Misuse("A folder that is not there", PRUNE.replace("images", "nowhere"), "check the path"),
        Misuse("An empty folder", PRUNE.replace("images", "empty"), "found none"),
        Misuse("A split that the folder has not", f"{PRUNE} --split validation", "test, train"),
        Misuse("A misspelt data set", PRUNE.replace("images", "cifra10:/data"), "did you mean 'cifar10'"),
        Misuse("A file that holds no image", PRUNE.replace("images", "broken_image"), "class0/0.png"),
        Misuse("A file that holds no images", PRUNE.replace("images", "notes.txt"), "a Parquet file"),
        Misuse("Training without labels", "tp-twoaxis train net:build --data flat --out w.safetensors", "labels"),
        Misuse(
            "A test split of a folder without splits",
            f"{PRUNE.replace('images', 'flat')} --eval-split test",
            "--eval-data",
        ),
        Misuse("Accuracy on the images of the repair", f"{PRUNE} --eval-data images --eval-split train", "apart from"),
        Misuse("One number for three colours", f"{PRUNE} --mean 0.5", "3 numbers"),
    ),
    "Files": (
        Misuse("An output that exists", PRUNE.replace("small", "stats"), "--force"),
        Misuse("A folder that does not exist", PRUNE.replace("small", "no/such/small"), "create it first"),
        Misuse("A path through a file", PRUNE.replace("small", "notes.txt/small"), "notes.txt"),
        Misuse("A pickle's name", PRUNE.replace(".safetensors", ".pth"), "end it in .safetensors"),
        Misuse("Weights of another network", f"{PRUNE} --checkpoint other.pth", "mismatched"),
        Misuse("A pickle with code", f"{PRUNE} --checkpoint whole.pth", "nothing was"),
        Misuse("A file that was cut short", f"{PRUNE} --checkpoint cut.safetensors", "copy it anew"),
        Misuse("A file with a changed byte", f"{PRUNE} --stats changed.safetensors", "checksum"),
        Misuse("Statistics in the place of weights", f"{PRUNE} --checkpoint stats.safetensors", "--stats"),
        Misuse("Statistics of another network", f"{PRUNE} --stats other_stats.safetensors", "another model's"),
        Misuse("Published weights of a network of one's own", f"{PRUNE} --pretrained", "--checkpoint"),
        Misuse(
            "Published weights without network access",
            f"{PRUNE.replace('net:build', 'resnet18')} --pretrained",
            "download.pytorch.org",
        ),
        Misuse("YAML in the place of JSON", "tp-twoaxis bench --config sweep.yaml --out results", "write it as JSON"),
        Misuse("A misspelt key", "tp-twoaxis bench --config key.json --out results", "did you mean 'keep'"),
        Misuse("A word in the place of a number", "tp-twoaxis bench --config word.json --out results", "batch_size"),
        Misuse("A folder without results", "tp-twoaxis report empty", "tp-twoaxis bench"),
    ),
    "Networks and loaders in Python": (
        Misuse("A name in the place of a network", "calibrate('resnet18', loader)", "build_model('resnet18')"),
        Misuse("A state dict in its place", "calibrate(model.state_dict(), loader)", "load_state_dict"),
        Misuse("TorchScript", "calibrate(torch.jit.script(model), loader)", "scripted"),
        Misuse("A quantised network", "prune_to_flops(quantised, x, loader=loader)", "prune first"),
        Misuse("A network without values", "calibrate(model.to('meta'), loader)", "load them"),
        Misuse("Weights that are NaN", "calibrate(nan_model, loader)", "not finite"),
        Misuse("An empty loader", "calibrate(model, [])", "got none"),
        Misuse("A path in a loader's place", "calibrate(model, 'images/')", "open_dataset('images/')"),
        Misuse("One batch in its place", "calibrate(model, (images, labels))", "[(images, labels)]"),
        Misuse("A data set in its place", "calibrate(model, TensorDataset(images, labels))", "DataLoader"),
        Misuse("Bytes as they come from a file", "calibrate(model, [images.byte()])", "/ 255"),
        Misuse("NaN pixels", "calibrate(model, [images * float('nan')])", "NaN"),
        Misuse("Labels of other classes", "calibrate(model, [(images, labels + 100)])", "expected labels in [0, 5)"),
    ),
    "Pruning, saving and training in Python": (
        Misuse("Gradients without labels", "prune_to_flops(model, x, 'taylor', loader=[images])", "(images, labels)"),
        Misuse("No images", "prune_to_flops(model, x)", "repair='none'"),
        Misuse("Half precision, and an example that is not", "prune_to_flops(half, x, 'l2', repair='none')", "example"),
        Misuse("A target out of reach", "prune_to_flops(model, x, 'l2', flops=0.001, repair='none')", "min_keep"),
        Misuse("A path in the place of statistics", "LocalImportance('stats.safetensors')", ".load("),
        Misuse("Arguments in another order", "save_pruned('small.safetensors', model)", "the order is"),
        Misuse("The factory of another network", "load_pruned('pruned.safetensors', other)", "missing from it"),
    ),
}
TAKEN = (
    ("A model in training mode, which it is in afterwards too", "calibrate(model.train(), loader)"),
    ("Gradients switched off", "with torch.no_grad(): calibrate(model, loader, gradients=True)"),
    ("A model in `DataParallel`", "calibrate(torch.nn.DataParallel(model), loader)"),
    ("A model in half precision", "calibrate(half, loader)"),
    ("Images without labels", "calibrate(model, [images])"),
)

NET = """
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )


def other():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def broken():
    raise KeyError("no such layer")
"""


def main() -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, scratch(Path(folder)) as names:
        said = {misuse: answer(misuse.code, names) for group in MISUSES.values() for misuse in group}
    PAGE.write_text(page(said))
    print(f"{len(said)} misuses, {time.perf_counter() - start:.0f} seconds")


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[dict[str, Any]]:
    """Fill a folder, work in it without network access, and give the names that the code of misuses uses."""
    variables = {"TORCH_HOME": "torch", "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    before, place, modules = dict(os.environ), os.getcwd(), set(sys.modules)
    os.environ.update(variables)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        _fill_with_images()
        yield _names()
    finally:
        sys.path.remove(str(folder))
        for name in {"net"} & (set(sys.modules) - modules):
            del sys.modules[name]
        os.chdir(place)
        os.environ.clear()
        os.environ.update(before)


def _fill_with_images() -> None:
    random = np.random.default_rng(0)
    kinds = {"images/train": 8, "images/test": 4, "broken_image": 2}
    paths = [
        Path(kind, f"class{c}", f"{i}.png") for kind, count in kinds.items() for c in range(5) for i in range(count)
    ]
    for path in [*paths, *(Path("flat", f"{i}.png") for i in range(10))]:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    Path("broken_image/class0/0.png").write_text("not an image")
    Path("empty").mkdir()
    Path("notes.txt").write_text("remember the milk")
    Path("net.py").write_text(NET)
    network = {"name": "net", "model": "net:build", "data": "images"}
    Path("sweep.yaml").write_text("networks:\n  - name: net\n")
    Path("key.json").write_text(json.dumps({"networks": [network], "methods": ["l2"], "kepp": [0.5]}))
    Path("word.json").write_text(json.dumps({"networks": [network], "methods": ["l2"], "data": {"batch_size": "all"}}))


def _names() -> dict[str, Any]:
    """Make networks, loaders and files; the same numbers every time."""
    import net

    torch.manual_seed(0)
    model, other, images = net.build().eval(), net.other().eval(), torch.randn(40, 3, 8, 8)
    labels = torch.arange(40) % 5
    loader, x = [(images[:20], labels[:20]), (images[20:], labels[20:])], images[:1]
    nan_model, pruned = copy.deepcopy(model), copy.deepcopy(model)
    nn.init.constant_(nan_model[0].weight, float("nan"))
    stats = tp_twoaxis.calibrate(model, loader, progress=False)
    stats.save("stats.safetensors")
    tp_twoaxis.calibrate(other, loader, progress=False).save("other_stats.safetensors")
    report = tp_twoaxis.prune_to_flops(pruned, x, "l2", repair="none", progress=False)
    tp_twoaxis.save_pruned(pruned, "pruned.safetensors", report)
    torch.save(other.state_dict(), "other.pth")
    torch.save(model, "whole.pth")
    data = Path("stats.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:1000])
    Path("changed.safetensors").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    names = {name: getattr(tp_twoaxis, name) for name in tp_twoaxis.__all__}
    own = {"model": model, "images": images, "labels": labels, "loader": loader, "x": x, "stats": stats}
    networks = {"nan_model": nan_model, "quantised": quantised, "half": copy.deepcopy(model).half(), "other": net.other}
    others = {"torch": torch, "TensorDataset": torch.utils.data.TensorDataset, "finetune": finetune}
    return {**names, **own, **networks, **others}


def answer(code: str, names: dict[str, Any]) -> str:
    """Make a mistake; return what was said, after checks that nothing came of it.

    Raises:
        AssertionError: it was not refused, in another way than by a line, or something was written or changed.
    """
    model = names["model"]
    state, files = copy.deepcopy(model.state_dict()), _files()
    said = _refusal(code, {**names, "model": copy.deepcopy(model) if ".to(" in code else model})
    assert said is not None, f"{code}: was not refused"
    assert "\n" not in said, f"{code}: expected one line, got {said}"
    assert len(said) <= LONGEST, f"{code}: expected a line or two, got {len(said)} characters: {said}"
    assert _files() == files, f"{code}: files were left or changed"
    same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert same, f"{code}: weights were changed"
    assert not model.training, f"{code}: the mode changed"
    return said


def _refusal(code: str, names: dict[str, Any]) -> str | None:
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        if code.startswith("tp-twoaxis "):
            status = command_line(shlex.split(code)[1:])
            return errors.getvalue().strip().removeprefix("tp-twoaxis: error: ") if status == 2 else None
        try:
            exec(code, names)
        except TwoAxisError as error:
            return str(error)
    return None


def _files() -> set[tuple[str, int, int]]:
    paths = (path for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def page(said: dict[Misuse, str]) -> str:
    """Write the page."""
    lines = [
        "# What it says when something is wrong",
        "",
        f"{len(said)} mistakes, and the answer to each: what was expected, what came, what to do. On the command line "
        "an error is one line and status 2 (`TP_TWOAXIS_TRACEBACK=1` shows the traceback), in Python a `TwoAxisError`. "
        "`net.py` has `build` for a network of five classes, `images/` a folder for each class in `train` and `test`; "
        "`loader` is a list of `(images, labels)`, and `x` one image. "
        "After each of them every file and the model were compared with what they were before: nothing was changed, "
        "and nothing half-written was left.",
    ]
    for title, group in MISUSES.items():
        lines += ["", f"## {title}", "", "| mistake | answer |", "| --- | --- |"]
        lines += [f"| {misuse.what}<br>`{_cell(misuse.code)}` | {_plain(said[misuse])} |" for misuse in group]
    lines += ["", "## No mistakes", "", "These are taken as they are:", "", "| what | such as |", "| --- | --- |"]
    lines += [f"| {what} | `{code}` |" for what, code in TAKEN]
    return "\n".join([*lines, "", f"`python scripts/misuses.py` made this page, with {versions()}."]) + "\n"


def versions() -> str:
    """Say whose words are quoted on the page."""
    parts = (f"{name} {version(name).partition('+')[0]}" for name in ("torch", "typer", "pydantic"))
    return ", ".join([f"Python {platform.python_version()}", *parts])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _plain(text: str) -> str:
    """Keep Markdown from reading a message."""
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    main()
