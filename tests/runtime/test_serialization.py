"""Files are there whole or not at all, read back whatever their first byte, and never unpickled."""

import errno
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tp_twoaxis import TwoAxisError
from tp_twoaxis.errors import FileFormatError
from tp_twoaxis.runtime.serialization import read_header, read_tensors, refuse_pickle, write_bytes, write_tensors

KIND = "tp-twoaxis/test"


def write(path, note="", **options):
    write_tensors(path, {"a": torch.arange(3.0)}, {"note": note}, **{"kind": KIND, "version": 2} | options)
    return path


def read(path, version=2):
    return read_tensors(path, kind=KIND, version=version)


@pytest.mark.parametrize("length", range(41))
def test_every_header_length_reads_back(tmp_path, length):
    tensors, header = read(write(tmp_path / "a", "x" * length))
    assert torch.equal(tensors["a"], torch.arange(3.0))
    assert header == {"note": "x" * length}


def test_a_sound_file_that_starts_like_a_pickle_is_read(tmp_path):
    """A file starts with its header's length, a multiple of 8: among 32 lengths one has 0x80 as its low byte."""
    starts = set()
    for step in range(32):
        path = write(tmp_path / "a", "x" * (8 * step))
        starts.add(path.read_bytes()[:1])
        assert read(path)[1]["note"] == "x" * (8 * step)
    assert b"\x80" in starts
    bare = int.from_bytes(path.read_bytes()[:8], "little") - 8 * 31
    path = write(tmp_path / "a", "x" * (int.from_bytes(b"PK", "little") - bare))
    assert path.read_bytes()[:2] == b"PK"
    assert len(read(path)[1]["note"]) > 19000


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.tensor([1, 2], dtype=torch.int64),
        torch.tensor([True, False]),
        torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        torch.tensor([1e-310, torch.inf], dtype=torch.float64),
    ],
)
def test_tensors_of_any_kind(tmp_path, tensor):
    write_tensors(tmp_path / "a", {"t": tensor}, {"x": [1, {"y": None}]}, kind=KIND, version=2)
    tensors, header = read(tmp_path / "a")
    assert tensors["t"].dtype == tensor.dtype
    assert torch.equal(tensors["t"], tensor)
    assert header == read_header(tmp_path / "a", kind=KIND, version=2) == {"x": [1, {"y": None}]}


def test_older_versions_are_read_and_newer_ones_are_not(tmp_path):
    write(tmp_path / "a")
    assert read(tmp_path / "a", version=3)[1] == {"note": ""}
    with pytest.raises(FileFormatError, match="format version 2, this release reads up to 1; update tp-twoaxis"):
        read(tmp_path / "a", version=1)
    with pytest.raises(FileFormatError, match="expected a file of format 'other', got 'tp-twoaxis/test'"):
        read_header(tmp_path / "a", kind="other", version=2)


# writing


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": ("pathlib.Path.replace",)}[where], fail)
    disk = isinstance(error, OSError)
    with pytest.raises(
        TwoAxisError if disk else KeyboardInterrupt, match="No space.*nothing was changed" if disk else None
    ):
        write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a"
    for content in (b"long old content", b"new", b""):
        write_bytes(str(path), content)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "a", b"x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_replaced_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    owner = path.stat().st_uid, path.stat().st_gid
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o7777 == mode
    assert (path.stat().st_uid, path.stat().st_gid) == owner


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only the superuser can give a file away")
def test_a_replaced_file_keeps_its_owner(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    os.chown(path, 12345, 23456)
    write_bytes(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, relative):
    store, place = tmp_path / "store", tmp_path / "place"
    store.mkdir()
    place.mkdir()
    target, link = store / "a-1", place / "a"
    link.symlink_to(os.path.join("..", "store", "a-1") if relative else target)
    for content in (b"first", b"second"):  # the link leads nowhere before the first
        write_bytes(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == link.read_bytes() == content
    assert [p.name for p in store.iterdir()] == ["a-1"]
    assert [p.name for p in place.iterdir()] == ["a"]
    write(link)
    assert link.is_symlink()
    assert read(target)[1] == {"note": ""}
    lost = place / "lost"
    lost.symlink_to(tmp_path / "missing" / "a")
    with pytest.raises(TwoAxisError, match=r"lost: the folder .*missing does not exist"):
        write_bytes(lost, b"x")


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(TwoAxisError, match=r"a: the folder .*missing does not exist; create it first"):
        write_bytes(tmp_path / "missing" / "a", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TwoAxisError, match=r"folder: could not be written .* nothing was changed"):
        write_bytes(tmp_path / "folder", b"x")
    with pytest.raises(TwoAxisError, match="could not be written"):
        write_bytes(tmp_path / ("a" * 300), b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# reading


def test_pickles_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "zip")
    (tmp_path / "pickle").write_bytes(pickle.dumps([1], protocol=2))
    for name in ("zip", "pickle"):
        with pytest.raises(FileFormatError, match="got a pickle"):
            refuse_pickle(tmp_path / name)
        with pytest.raises(FileFormatError, match="got a pickle"):
            read(tmp_path / name)
    (tmp_path / "text").write_bytes(b"text")
    refuse_pickle(tmp_path / "text")


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tp_twoaxis.runtime.serialization.safe_open", fail)
    with pytest.raises(FileFormatError, match=r"could not be read .*Permission denied.*check"):
        read(write(tmp_path / "a"))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:9] + data[10:]]
)
def test_damaged_files_are_refused(tmp_path, damage):
    path = write(tmp_path / "a")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileFormatError, match="cut short or corrupted"):
        read(path)


def test_a_header_that_is_not_json(tmp_path):
    for metadata in ({"version": "2", "header": "{"}, {"version": "two", "header": "{}"}, {"version": "2"}):
        save_file({"a": torch.zeros(1)}, tmp_path / "a", metadata={"format": KIND} | metadata)
        with pytest.raises(FileFormatError, match="corrupted"):
            read(tmp_path / "a")


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileFormatError, match="no such file"):
            read(path)


CHANGES = {
    "header": lambda metadata, tensors: metadata.update(header='{"note": "y"}'),
    "spaces in the header": lambda metadata, tensors: metadata.update(header='{"note":"x"}'),
    "older version": lambda metadata, tensors: metadata.update(version="1"),
    "tensors of another file": lambda metadata, tensors: tensors.update(a=torch.arange(1.0, 4.0)),
    "shape": lambda metadata, tensors: tensors.update(a=torch.arange(3.0)[:, None]),
    "kind of number": lambda metadata, tensors: tensors.update(a=torch.arange(3.0).view(torch.int32)),
    "name": lambda metadata, tensors: tensors.update(b=tensors.pop("a")),
    "further tensor": lambda metadata, tensors: tensors.update(b=torch.zeros(1)),
    "no checksum": lambda metadata, tensors: metadata.pop("checksum"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_header_and_tensors_are_under_one_checksum(tmp_path, change):
    path = write(tmp_path / "a", "x")
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {"a": file.get_tensor("a")}
    save_file(tensors, path, metadata=metadata)
    assert read(path)[1] == {"note": "x"}  # written again as it was
    before = dict(metadata)
    change(metadata, tensors)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(FileFormatError, match=r"checksum.*write it again"):
        read(path)
    if metadata != before:  # the header alone shows it
        with pytest.raises(FileFormatError, match="header"):
            read_header(path, kind=KIND, version=2)


def test_a_changed_number_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(4.0), "empty": torch.zeros(0)}, {}, kind="k", version=1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="its numbers do not match their checksum"):
        read_tensors(path, kind="k", version=1)
