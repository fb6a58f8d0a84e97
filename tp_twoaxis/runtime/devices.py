"""Which device a network runs on, by name."""

from __future__ import annotations

import torch

from tp_twoaxis.errors import TwoAxisError, check_name, reason
from tp_twoaxis.known_names import DEVICES


def check_device(device: torch.device | str, what: str = "device") -> None:
    """Refuse a device that has no such name, or that this machine has not.

    Args:
        device: as torch names it, ``cuda:1``.
        what: where it was named, for the message.

    Raises:
        TwoAxisError: saying which there are.

    Example:
        >>> check_device("cpu")
        >>> check_device("cdua")
        Traceback (most recent call last):
        tp_twoaxis.errors.TwoAxisError: device: expected one of cpu, cuda, mps, xpu, got 'cdua'; did you mean 'cuda'?
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        check_name(what, str(device).partition(":")[0], DEVICES)
        raise TwoAxisError(
            f"{what}: expected a device of this machine, got {str(device)!r} ({reason(error, 120)}); cpu always works"
        ) from error
