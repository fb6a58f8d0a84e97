r"""How many rows a narrow layer should be fitted on: accuracy after ``joint`` against the fewest rows of a fit.

Two third-party CIFAR-10 ResNet-20s are pruned to half of their MACs by ``hull`` and repaired by ``joint`` from 2,048
images, while layers are fitted on at least 2^14 ... 2^17 rows, positions of all images together. Accuracy is in % on
2,000 training images that take part in nothing else; no test image is read.

    python benchmarks/fit_rows.py --data DIR --checkpoints DIR

``--data`` holds ``cifar10/``. A few minutes on one CPU core.
"""

from __future__ import annotations

import copy
import time
from unittest import mock

from cifar_resnets import EXAMPLE, IMAGES, dense_networks, draw, option_parser
from few_images import accuracy
from provenance import save

from tp_twoaxis import prune_to_flops
from tp_twoaxis.reconstruction import patches

EXPONENTS = (14, 15, 16, 17)
SHARE, CRITERION, REPAIR, JUDGES = 0.5, "hull", "joint", 2000


def main() -> None:
    arguments = option_parser(__doc__).parse_args()
    rows = []
    for name, network, dense, folder in dense_networks(arguments):
        images = draw(folder, network, 0)
        judges = draw(folder, network, 0, range(IMAGES, IMAGES + JUDGES))
        for exponent in EXPONENTS:
            pruned, start = copy.deepcopy(dense), time.perf_counter()
            defaults = patches.ROWS_PER_NUMBER, 2**exponent
            with mock.patch.object(patches.positions_of, "__defaults__", defaults):
                prune_to_flops(pruned, EXAMPLE, CRITERION, flops=SHARE, repair=REPAIR, loader=images, progress=False)
            seconds = round(time.perf_counter() - start)
            row = {"network": name, "rows": 2**exponent, "top1": accuracy(pruned, judges), "seconds": seconds}
            rows.append(row)
            print(row, flush=True)
    command = "python benchmarks/fit_rows.py --data DIR --checkpoints DIR"
    save("fit_rows", command, "CIFAR-10, training images", rows=rows)


if __name__ == "__main__":
    main()
