"""Tensors and a JSON header in one safetensors file: written atomically, read without unpickling."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tp_twoaxis.errors import FileFormatError, TwoAxisError, refuse_pickle_name

Json = dict[str, Any]


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that it is either there whole or not there at all.

    A file that is replaced keeps its permissions and, where the system allows it, its owner and group; of a symbolic
    link it is the target that is replaced. A new file has the permissions that the umask leaves.

    Raises:
        TwoAxisError: the folder does not exist or cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> write_bytes(folder / "a.txt", b"whole"); (folder / "a.txt").read_bytes()
        b'whole'
    """
    path = Path(path)
    target = Path(os.path.realpath(path))  # a link stays; one that leads nowhere yet gets its target
    if not target.parent.is_dir():
        raise TwoAxisError(f"{path}: the folder {target.parent} does not exist; create it first")
    temporary = None
    try:
        # the same folder, so that the final rename stays inside one file system and is atomic
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _take_permissions(temporary, target)
        temporary.replace(target)
    except OSError as error:
        raise TwoAxisError(f"{path}: could not be written ({error}); nothing was changed") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _take_permissions(temporary: Path, target: Path) -> None:
    """Give a file the permissions of the one that it replaces, or those of a new file."""
    try:
        old = target.stat()
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        return
    new = temporary.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with suppress(PermissionError):  # only the superuser gives files away
            os.chown(temporary, old.st_uid, old.st_gid)
    temporary.chmod(stat.S_IMODE(old.st_mode))


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], header: Json, *, kind: str, version: int) -> None:
    """Write tensors with a header that names the file's format and version, all under one checksum.

    Args:
        path: of the file, which is replaced as a whole.
        tensors: contiguous CPU tensors that share no storage.
        header: JSON-able values.
        kind: the file's format, for example ``"tp-twoaxis/statistics"``.
        version: the format's version; readers refuse newer ones.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "x.safetensors")
        >>> write_tensors(path, {"a": torch.ones(2)}, {"note": "hi"}, kind="demo", version=1)
        >>> tensors, header = read_tensors(path, kind="demo", version=1)
        >>> tensors["a"].tolist(), header["note"]
        ([1.0, 1.0], 'hi')
    """
    refuse_pickle_name(path)
    metadata = {"format": kind, "version": str(version), "header": json.dumps(header), "tensors": _digest(tensors)}
    write_bytes(path, save(tensors, metadata={**metadata, "checksum": _checksum(metadata)}))


def read_header(path: str | Path, *, kind: str, version: int) -> Json:
    """Read the header alone; see :func:`read_tensors` for what is refused. The tensors are not checked."""
    return _read(path, kind=kind, version=version, tensors=False)[1]


def read_tensors(path: str | Path, *, kind: str, version: int) -> tuple[dict[str, torch.Tensor], Json]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        FileFormatError: the file is missing, cut short, a pickle, another program's, of another kind, of a newer
            version, or its header or tensors are not those that were written.
    """
    return _read(path, kind=kind, version=version, tensors=True)


def is_pickle(path: str | Path) -> bool:
    """Whether a file's first bytes are those of a pickle or of a zip that ``torch.save`` writes."""
    with Path(path).open("rb") as file:
        start = file.read(9)
    # a safetensors file starts with its header's length in 8 bytes, by chance a pickle's first; then comes JSON
    return start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80")


def refuse_pickle(path: str | Path) -> None:
    """Raise when a file is a pickle or what ``torch.save`` writes; see :func:`is_pickle`.

    Raises:
        FileFormatError: it is one; the message shows the conversion.
    """
    if is_pickle(path):
        raise FileFormatError(
            f"{path}: expected a safetensors file, got a pickle (torch.save); pickles run code when they are read, "
            "so convert it once where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'x.safetensors')"
        )


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hash names, kinds, shapes and bytes: safetensors notices a file cut short, but not a number that changed."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(metadata: Mapping[str, str]) -> str:
    """Hash format, version, header and the tensors' hash: the header can be checked without the tensors."""
    parts = [metadata[key] for key in ("format", "version", "header", "tensors")]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _read(path: str | Path, *, kind: str, version: int, tensors: bool) -> tuple[dict[str, torch.Tensor], Json]:
    path = Path(path)
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found != kind:
                raise FileFormatError(
                    f"{path}: expected a file of format {kind!r}, got {found!r}; "
                    "it was written by another program or another command"
                )
            if int(metadata.get("version", 0)) > version:
                raise FileFormatError(
                    f"{path}: format version {metadata['version']}, this release reads up to {version}; "
                    "update tp-twoaxis"
                )
            header: Json = json.loads(metadata["header"])
            if "checksum" not in metadata:
                raise ValueError("it has no checksum of its header")
            if _checksum(metadata) != metadata["checksum"]:
                raise ValueError("its header does not match its checksum")
            read = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
            if tensors and _digest(read) != metadata["tensors"]:
                raise ValueError("its numbers do not match their checksum")
            return read, header
    except FileFormatError:
        raise
    except OSError as error:
        raise FileFormatError(f"{path}: could not be read ({error}); check the path and its permissions") from error
    except (SafetensorError, ValueError, KeyError) as error:
        refuse_pickle(path)
        raise FileFormatError(
            f"{path}: not readable as safetensors, cut short or corrupted ({error}); write it again"
        ) from error
