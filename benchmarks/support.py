"""What happens to networks of many families when channels are removed: the table of ``docs/support.md``.

Networks of the tests (``tests/removal_cases.py``) and more of timm and torchvision, with random weights, lose channels
at random, without repair, and are compared with the oracle of the tests (``tests/removal_oracle.py``)::

    python benchmarks/support.py            # writes docs/support.md; four minutes on two cores
    python benchmarks/support.py swin vit   # prints the rows of networks with these words in their names
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.models as tv
from provenance import provenance
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from removal_cases import CASES, MAP, SMALL, Case  # noqa: E402
from removal_oracle import difference, expected_outputs, run  # noqa: E402

from tp_twoaxis import TwoAxisError, prune_to_flops  # noqa: E402
from tp_twoaxis.errors import UnreachableTargetError  # noqa: E402

SHARES = (0.75, 0.9, 0.97)
"""Shares of the MACs to keep: the next one where one cannot be reached."""


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


SEGMENTATION = {"weights": None, "weights_backbone": None, "num_classes": 4}
MORE = {
    "torchvision googlenet with auxiliary heads": Case(
        lambda: tv.googlenet(num_classes=5, aux_logits=True, init_weights=False), MAP
    ),
    "torchvision efficientnet_b0": Case(lambda: tv.efficientnet_b0(num_classes=5), SMALL),
    "torchvision deeplabv3_mobilenet": Case(
        lambda: tv.segmentation.deeplabv3_mobilenet_v3_large(**SEGMENTATION, aux_loss=True), MAP
    ),
    **{
        f"timm {name}": Case(timm_model(name, **options), shape)
        for name, shape, options in (
            ("tf_efficientnet_lite0", SMALL, {}),
            ("ghostnet_050", SMALL, {}),
            ("repvgg_a0", SMALL, {}),
            ("hrnet_w18_small", MAP, {}),
            ("dpn48b", SMALL, {}),
            ("res2net50_14w_8s", SMALL, {}),
            ("cspresnet50", SMALL, {}),
            ("nf_regnet_b0", SMALL, {}),
            ("nfnet_l0", SMALL, {}),
            ("levit_128s", MAP, {"img_size": 64}),
            ("mobilevit_xxs", MAP, {}),
            ("edgenext_xx_small", MAP, {}),
            ("fastvit_t8", MAP, {}),
            ("repghostnet_050", SMALL, {}),
            ("visformer_tiny", MAP, {"img_size": 64}),
            ("xcit_nano_12_p16_224", MAP, {}),
            ("coat_lite_tiny", MAP, {"img_size": 64}),
            ("skresnet18", SMALL, {}),
            ("legacy_seresnet18", SMALL, {}),
            ("gcresnext26ts", SMALL, {}),
            ("hgnet_tiny", SMALL, {}),
            ("starnet_s1", SMALL, {}),
            ("ese_vovnet19b_dw", SMALL, {}),
            ("selecsls42", SMALL, {}),
            ("efficientvit_b0", MAP, {}),
            ("efficientvit_m0", MAP, {"img_size": 64}),
            ("mobilenetv4_conv_small", MAP, {}),
            ("mobileone_s0", SMALL, {}),
            ("inception_next_atto", MAP, {}),
            ("xception41", MAP, {}),
        )
    },
}
MORE["timm resnet26t with CBAM"] = Case(timm_model("resnet26t", block_args={"attn_layer": "cbam"}), SMALL)


def random_scores(group: Any) -> torch.Tensor:
    size = len(group[0].idxs)
    return torch.rand(size, generator=torch.Generator().manual_seed(size))


def outcome_of(found: list[torch.Tensor], removed: dict[str, list[int]], dense: nn.Module, case: Case) -> str:
    inputs = case.inputs()
    if not removed:
        return "whole"
    if [t.shape for t in found] != [t.shape for t in run(dense, inputs)]:
        return "WRONG"
    if case.outcome == "runs":
        return "runs"
    return "right" if difference(found, expected_outputs(dense, removed, inputs)) < 1e-6 else "WRONG"


def row(name: str, case: Case) -> tuple[str, str, str, float, str]:
    """Prune one network; name, what happens, share of the MACs kept, seconds, first note or error."""
    net, dense, inputs = case.network(), case.network(), case.inputs()
    start, last = time.perf_counter(), ""
    for flops in SHARES:
        try:
            report = prune_to_flops(net, inputs, random_scores, flops=flops, tolerance=0.05, repair=(), progress=False)
        except UnreachableTargetError as error:
            last = str(error).split("ask for more; ", 1)[-1]
            continue
        except TwoAxisError as error:
            return name, "refused", "", time.perf_counter() - start, str(error)
        seconds = time.perf_counter() - start
        outcome = outcome_of(run(net, inputs), report.removed_channels, dense, case)
        count = f"{len(report.notes)} notes, such as: " if len(report.notes) > 1 else ""
        return name, outcome, f"{report.achieved:.2f}", seconds, count + report.notes[0] if report.notes else ""
    return name, "whole", "1.00", time.perf_counter() - start, last


PAGE = """\
# Which networks can be pruned

Made by `{command}` on {date}: {machine}, torch {torch}, timm {timm}. Small inputs, a batch of 2, double precision;
channels leave at random, and nothing is repaired. Do not edit it by hand.

- **right**: what is left computes what the dense network computes without the channels that left, to 1e-6, by an oracle
  that shares no code with the package. With a note: the layers that it names kept their channels.
- **runs**: outputs keep their shapes; an operation over channels that is no layer (a mean, attention's scale) keeps the
  oracle from saying more. Where channels arrive was verified as everywhere.
- **whole**: nothing could be removed, and the note says why.
- **refused**: an error with the layer, before anything changed.

{count} networks: {counts}.

| network | outcome | MACs kept | seconds | what is said |
| --- | --- | --- | --- | --- |
"""


def markdown(rows: list[tuple[str, str, str, float, str]]) -> str:
    """Write the page."""
    source = provenance("python benchmarks/support.py", "random weights and images")
    outcomes = Counter(outcome for _, outcome, *_ in rows)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    lines = []
    for name, outcome, macs, seconds, said in rows:
        text = re.sub(r"\s+", " ", said).replace("|", "\\|")
        text = text if len(text) < 264 else f"{text[:260]} ..."
        lines.append(f"| {name} | {outcome} | {macs} | {seconds:.1f} | {text} |\n")
    return PAGE.format(count=len(rows), counts=counts, timm=timm.__version__, **source) + "".join(lines)


def main() -> None:
    warnings.simplefilter("ignore")
    words = sys.argv[1:]
    rows = []
    for name, case in {**CASES, **MORE}.items():
        if not words or any(word in name for word in words):
            rows.append(row(name, case))
            print(*rows[-1][:3], f"{rows[-1][3]:.1f}s", rows[-1][4][:150], flush=True)
    if not words:
        page = ROOT / "docs" / "support.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(markdown(rows))
    if wrong := [row[0] for row in rows if row[1] == "WRONG"]:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
