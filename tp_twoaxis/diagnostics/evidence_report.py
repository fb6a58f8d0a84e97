"""All evidence on a network: one section after the other, finished ones kept, what cannot be had skipped with why."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.evidence_sections import SECTIONS
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord
from tp_twoaxis.errors import FileFormatError, TwoAxisError, check_name
from tp_twoaxis.runtime.fingerprints import state_digest
from tp_twoaxis.runtime.image_rows import image_rows
from tp_twoaxis.runtime.model_state import unwrap

OnSection = Callable[[SectionRecord], None]


def gather_evidence(
    inputs: EvidenceInputs,
    folder: EvidenceFolder,
    *,
    sections: Iterable[str] | None = None,
    key: str = "",
    on_section: OnSection | None = None,
) -> list[SectionRecord]:
    """Compute sections and write each as soon as it is finished.

    Args:
        inputs: the network, its statistics and images.
        folder: where to write.
        sections: names; default all, in the paper's order.
        key: of :func:`evidence_key`. Sections that the folder holds with it are not computed again; "" computes all.
        on_section: called with each section when it is there.

    Returns:
        A record a section, in the paper's order. One that cannot be computed on this network or these images is
        skipped, with its reason, and the others are computed.

    Raises:
        TwoAxisError: there is no such section, or a file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> folder = EvidenceFolder(Path(tempfile.mkdtemp()))
        >>> records = gather_evidence(inputs, folder, sections=["alignment", "learning"])
        >>> [(record.name, record.skipped is None) for record in records]
        [('alignment', True), ('learning', False)]
    """
    records = []
    for name in section_names(sections):
        record = finished_section(folder, name, key)
        if record is None:
            record = _compute(name, inputs, folder, key)
        records.append(record)
        if on_section is not None:
            on_section(record)
    return records


def section_names(sections: Iterable[str] | None = None) -> list[str]:
    """Check names of sections and bring them into the paper's order.

    Args:
        sections: names; None for all.

    Raises:
        TwoAxisError: there is no such section; the message lists them.

    Example:
        >>> section_names(["hulls", "alignment"])
        ['alignment', 'hulls']
    """
    chosen = set(SECTIONS if sections is None else sections)
    for name in chosen:
        check_name("section", name, SECTIONS)
    return [name for name in SECTIONS if name in chosen]


def finished_section(folder: EvidenceFolder, name: str, key: str) -> SectionRecord | None:
    """Read a section that needs not be computed; None where it does."""
    try:
        record = folder.read(name, key=key) if key else None
    except FileFormatError:  # it is written anew
        return None
    return None if record is None or record.again else record


def evidence_key(
    model: nn.Module,
    calibration: Iterable[Any],
    held_out: Iterable[Any] | None = None,
    snapshots: Mapping[int, Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> str:
    """Hash what evidence depends on: weights, which images, snapshots, options, and this package's version.

    Args:
        model: its parameters and buffers count.
        calibration: a loader; which rows of its data set it reads counts, as far as it says.
        held_out: likewise.
        snapshots: epoch -> state dict.
        options: JSON-able, among them what names the data.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> evidence_key(net, [], seed=0) == evidence_key(net, [], seed=0) != evidence_key(net, [], seed=1)
        True
    """
    weights = {epoch: state_digest(state) for epoch, state in (snapshots or {}).items()}
    parts = [
        version("tp-twoaxis"),
        state_digest(unwrap(model).state_dict()),
        [_rows(calibration), _rows(held_out or ())],
        sorted(weights.items()),
        sorted(options.items()),
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _rows(loader: Iterable[Any]) -> list[int] | None:
    count = len(getattr(loader, "sampler", ()))
    rows = image_rows(loader, count) if count else None
    return None if rows is None else rows.tolist()


def _compute(name: str, inputs: EvidenceInputs, folder: EvidenceFolder, key: str) -> SectionRecord:
    start, cpu = time.perf_counter(), time.process_time()
    try:
        record = folder.draw(SECTIONS[name].compute(inputs))
    except TwoAxisError as reason:
        again = not isinstance(reason, NotApplicableError)
        return folder.finish(SectionRecord(name, skipped=str(reason), again=again, key=key))
    return folder.finish(
        record,
        key=key,
        seconds=round(time.perf_counter() - start, 2),
        cpu_seconds=round(time.process_time() - cpu, 2),
    )
