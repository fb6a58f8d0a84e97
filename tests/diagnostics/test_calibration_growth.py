"""Parts of a calibration: nested, and each what a calibration of these images alone gives."""

from __future__ import annotations

import pandas as pd
import pytest
import reference_alignment as slow
import torch
from alignment_cases import evidence_inputs
from cases import batches, conv_net

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.axis_coordinates import local_axis, target_axis
from tp_twoaxis.diagnostics.calibration_growth import (
    RANKINGS,
    calibration_size_section,
    choose_images,
    growth_claims,
    growth_table,
    size_table,
)
from tp_twoaxis.diagnostics.evidence import NotApplicableError


def test_a_part_is_a_calibration_of_its_images():
    network = conv_net()
    inputs = evidence_inputs(network)
    table = growth_table(inputs, [48, 120, 160], draws=2)
    assert table.groupby("draw").images.unique().map(list).tolist() == [[160], [48, 120], [48, 120]]
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    images, labels = (torch.cat(parts) for parts in zip(*batches(160, 32), strict=True))
    chosen = order[:120]
    alone = calibrate(network, [(images[chosen], labels[chosen])], progress=False)
    for name in ("conv1", "reduce"):
        row = table[(table.draw == 1) & (table.images == 120) & (table.layer == name)].iloc[0]
        part = (*local_axis(alone[name]), target_axis(alone[name]).task_mi)
        whole = (*local_axis(inputs.statistics[name]), target_axis(inputs.statistics[name]).task_mi)
        for column, a, b in zip(RANKINGS, part, whole, strict=True):
            assert row[column] == pytest.approx(slow.spearman(a.numpy(), b.numpy()), abs=0.02)
    whole = table[table.draw == -1]
    assert whole[["ari", *RANKINGS]].to_numpy() == pytest.approx(1.0)


def test_a_channel_that_varies_in_the_whole_alone_is_not_compared():
    network = conv_net()
    inputs = evidence_inputs(network)
    with torch.no_grad():
        network.conv1.weight[3] = 0.0
    table = growth_table(inputs, [64], draws=1)
    assert table[table.layer == "conv1"][list(RANKINGS)].notna().all().all()


def test_choosing_images_keeps_batches_labels_and_several_inputs():
    pairs = [
        (((torch.arange(4.0), torch.ones(4)), torch.arange(4))),
        ((torch.arange(4.0, 6.0), torch.ones(2)), torch.ones(2)),
    ]
    (inputs, labels), *rest = choose_images(pairs, torch.tensor([5, 2]))
    assert (inputs.args[0].tolist(), labels.tolist(), rest) == ([2.0, 5.0], [2.0, 1.0], [])
    (alone,) = choose_images([torch.arange(3.0)], torch.tensor([1]))
    assert alone.images.tolist() == [1.0]


def test_sizes_are_means_of_draws():
    growth = growth_table(evidence_inputs(), [40, 80], draws=2)
    sizes = size_table(growth).set_index("images")
    assert sizes.index.tolist() == [40, 80, 160]
    draws = growth[growth.images == 40].groupby("draw").rho_capture.mean()
    assert sizes.loc[40, "rho_capture"] == pytest.approx(draws.mean())
    assert sizes.loc[40, "rho_capture_sd"] == pytest.approx(draws.std())
    claim = growth_claims(growth)[0]
    assert "80 of 160 images" in claim.sentence
    # the same layer of two networks is two cells
    two = pd.concat([growth.assign(network="a", seed=1), growth.assign(network="b", seed=1, rho_capture=0.0)])
    assert growth_claims(two)[0].estimate.value == pytest.approx(claim.estimate.value / 2)
    # one with fewer images counts with the largest part of its own
    fewer = growth.assign(network="b", seed=1, rho_capture=0.0, images=growth.images // 2)
    unequal = growth_claims(pd.concat([growth.assign(network="a", seed=1), fewer]))[0]
    assert unequal.estimate.value == pytest.approx(claim.estimate.value / 2)
    assert unequal.sentence.startswith("With the largest part of the images,")


def test_the_section_is_whole_or_refused():
    section = calibration_size_section(evidence_inputs())
    assert section.tables["calibration_sizes"].images.tolist() == [100, 160]
    assert section.drawings[0].draw().axes
    with pytest.raises(NotApplicableError, match="more than 100 images"):
        calibration_size_section(evidence_inputs(images=100))
