"""Task information by nearest neighbours, without a distribution and without bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import cell_correlation, relative_depths
from tp_twoaxis.diagnostics.evidence import NotApplicableError
from tp_twoaxis.scores.target import task_information
from tp_twoaxis.statistics.pooled_samples import PooledSamples
from tp_twoaxis.statistics.store import CalibrationStatistics

NEIGHBOURS = 3


def ksg_information(outputs: Tensor, target: Tensor, *, neighbours: int = NEIGHBOURS, seed: int = 0) -> Tensor:
    """Estimate what each channel says about a target (Kraskov, Stögbauer & Grassberger 2004, their first estimator).

    ``psi(k) + psi(n) - mean psi(n_x + 1) - mean psi(n_y + 1)`` with n_x and n_y the images that are nearer in one of
    the two than the k-th neighbour is in both; scikit-learn's, which adds noise of 1e-10 against ties and clips at 0.

    Args:
        outputs: [n, C] pooled; channels must vary.
        target: [n].
        neighbours: k; few have less bias and more variance.
        seed: of the noise.

    Returns:
        [C] nats, not negative. About as noisy as ``sqrt(1 / n)``: 0.02 for 2,000 images, more than many channels say.

    Raises:
        NotApplicableError: not more images than neighbours, or a target of several columns.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(2000, 1, generator=generator)
        >>> y = 0.8 * x[:, 0] + 0.6 * torch.randn(2000, generator=generator)
        >>> abs(float(ksg_information(x, y)) - 0.5108) < 0.1  # -1/2 ln(1 - 0.8^2)
        True
    """
    if target.ndim != 1 or len(target) <= neighbours:
        raise NotApplicableError(
            f"expected a target [n] of more than {neighbours} images for {neighbours} neighbours, got "
            f"{list(target.shape)}"
        )
    found = mutual_info_regression(
        outputs.double().numpy(), target.double().numpy(), n_neighbors=neighbours, random_state=seed
    )
    return torch.from_numpy(found)


def ksg_table(
    statistics: CalibrationStatistics,
    samples: PooledSamples,
    channels: Mapping[str, Sequence[int]],
    *,
    neighbours: int = NEIGHBOURS,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the Gaussian task information with that by neighbours, layer by layer.

    Args:
        statistics: of the calibration, with a target.
        samples: pooled outputs of (the same) images.
        channels: layer -> channels that vary.
        neighbours: of the estimator.
        seed: of its noise.

    Returns:
        A row a layer: ``layer``, ``depth``, ``channels``, ``rho`` (Spearman of the two over channels, NaN below three),
        and means in nats, ``gaussian`` and ``ksg``.

    Raises:
        NotApplicableError: see :func:`ksg_information`.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> from tp_twoaxis.statistics import pooled_samples
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(64, 3, 6, 6), torch.randint(4, (64,)))]
        >>> stats, samples = calibrate(net, images, progress=False), pooled_samples(net, images, progress=False)
        >>> ksg_table(stats, samples, {"0": [0, 1, 3]})[["layer", "channels"]].values.tolist()
        [['0', 3]]
    """
    depths, target = relative_depths(list(channels)), samples.target_values()
    rows = []
    for name, chosen in channels.items():
        index = torch.as_tensor(list(chosen))
        gaussian = task_information(statistics[name].target_correlation()[index])
        found = ksg_information(samples.outputs[name][:, index], target, neighbours=neighbours, seed=seed)
        rows.append(
            {
                "layer": name,
                "depth": depths[name],
                "channels": len(index),
                "rho": cell_correlation(found, gaussian),
                "gaussian": float(gaussian.mean()),
                "ksg": float(found.mean()),
            }
        )
    return pd.DataFrame(rows)
