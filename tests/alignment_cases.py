"""A small network with images, as sections of evidence are given it."""

from __future__ import annotations

from cases import batches, conv_net
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.evidence import EvidenceInputs


def evidence_inputs(network: nn.Module | None = None, images: int = 160, batch_size: int = 32) -> EvidenceInputs:
    """Four convolutions of 16, 16, 16 and 8 channels, two with a BatchNorm, on random images."""
    network = conv_net() if network is None else network
    calibration = batches(images, batch_size)
    statistics = calibrate(network, calibration, progress=False)
    return EvidenceInputs(network, statistics, calibration, progress=False)
