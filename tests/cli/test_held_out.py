"""Images for lesions are none of those for statistics."""

from __future__ import annotations

import dataclasses

import torch

from tp_twoaxis.cli.held_out import calibration_and_held_out
from tp_twoaxis.cli.options import DataOptions


def test_images_of_statistics_and_lesions_do_not_overlap(folder):
    def images(loader):
        return {tuple(image.flatten().tolist()) for batch, _ in loader for image in batch}

    source = DataOptions(data=str(folder / "images"), images=24, batch_size=7)
    score, lesions, notes = calibration_and_held_out(source, None, 10, score=True)
    first, second = images(score), images(lesions)
    assert (len(first), len(second), notes) == (24, 10, [])
    assert not first & second
    labels = torch.cat([y for _, y in lesions])
    assert len(labels.unique()) > 2
    large = dataclasses.replace(source, image_size=80)
    score, lesions, _ = calibration_and_held_out(large, None, 10, score=True)
    assert (sum(len(y) for _, y in score), sum(len(y) for _, y in lesions)) == (24, 10)
