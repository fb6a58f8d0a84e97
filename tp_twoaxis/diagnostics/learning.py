"""When do the two axes part, and which settles first? The network after several epochs (paper, section 3.1, K.4)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import pandas as pd
from torch import Tensor, nn

from tp_twoaxis.diagnostics.axis_coordinates import cell_correlation, relative_depths, task_cells
from tp_twoaxis.diagnostics.channel_quantities import quantities_of
from tp_twoaxis.diagnostics.communities import modularity_gap
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.learning_figures import draw_learning, draw_measures
from tp_twoaxis.diagnostics.run_aggregates import FEWEST_MODELS, RUN, best_estimate, with_runs
from tp_twoaxis.diagnostics.triplets import layer_triplets
from tp_twoaxis.repair.batch_norm import reestimate_batch_norm
from tp_twoaxis.runtime.layers import spread_over_depth
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.scores.hull import greedy_hulls
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

LAYERS = 6
IMAGES = 2000
EARLY_EPOCH = 5
PARTED_EPOCH = 10
SYMBOLS = ("I", "R", "M")
AXES_COLUMNS = ("epoch", "layer", "depth", "channels", "rho")

Measure = Callable[[LayerStatistics], Mapping[str, float]]
"""From a layer's statistics to named numbers that are followed over training."""


def hull_measures(layer: LayerStatistics) -> dict[str, float]:
    """Mean size of the hulls, of what all peers explain, and share at the cap, of varying channels; NaN for none."""
    active = layer.variance > 0
    hulls = greedy_hulls(layer.correlation, active=active, reference="peers")
    return {
        "hull_size": float(hulls.size[active].double().mean()),
        "saturated": float(hulls.saturated[active].double().mean()),
    }


def structure_measures(layer: LayerStatistics) -> dict[str, float]:
    """How much more modular overlap is than target excess, and what triplets add over pairs; NaN for none.

    The modularity is left out where NetworkX is missing.
    """
    triplets = layer_triplets(layer)
    found = {"triplets": math.nan if triplets is None else triplets["ratio"]}
    return found | ({"modularity_gap": modularity_gap(layer)} if find_spec("networkx") else {})


MEASURES: tuple[Measure, ...] = (hull_measures, structure_measures)
"""What is followed beside the axes; names must differ."""
GROWING = {
    "hull_size": "mean hull size",
    "saturated": "share of saturated hulls",
    "triplets": "excess of triplets over that of pairs",
}


@dataclass(frozen=True)
class LayerState:
    """A layer after some epoch.

    Attributes:
        quantities: symbol -> [C], NaN for constant channels.
        measures: name -> number.
    """

    quantities: dict[str, Tensor]
    measures: dict[str, float]


def check_snapshots(inputs: EvidenceInputs) -> None:
    """Refuse snapshots that a course of training cannot be read from.

    Raises:
        NotApplicableError: there are fewer than three, or they are not of this network.
    """
    epochs = list(inputs.snapshots)
    if len(epochs) < 3:
        raise NotApplicableError(
            f"expected snapshots of a start, a middle and an end of training, got {len(epochs)}; "
            "train with --snapshots 0,1,2,5,10 and name their folder"
        )
    own = {name: tensor.shape for name, tensor in unwrap(inputs.model).state_dict().items()}
    for epoch, weights in inputs.snapshots.items():
        other = {name: tensor.shape for name, tensor in weights.items()}
        if wrong := [name for name in sorted({*own, *other}) if own.get(name) != other.get(name)]:
            shapes = [list(found[wrong[0]]) if wrong[0] in found else "nothing" for found in (own, other)]
            raise NotApplicableError(
                f"the snapshot of epoch {epoch} is of another network: expected {wrong[0]} of shape {shapes[0]}, "
                f"got {shapes[1]}; name the snapshots of this network's training"
            )


def models_by_epoch(inputs: EvidenceInputs) -> Iterator[tuple[int, nn.Module]]:
    """Give a copy of the network with each snapshot's weights, ascending; the same object every time.

    BatchNorm's statistics are estimated anew on the calibration images, 2,000 at most, at every epoch alike (ours; the
    paper does not say). Before training BatchNorm has seen no image and passes on what it reads, and in the first
    epochs its running means lag behind the weights: the network would not be the one that is trained.
    """
    model = copy.deepcopy(unwrap(inputs.model))
    for epoch in sorted(inputs.snapshots):
        model.load_state_dict(inputs.snapshots[epoch])
        reestimate_batch_norm(model, inputs.calibration, max_images=IMAGES, progress=inputs.progress)
        yield epoch, model


def layer_states(
    inputs: EvidenceInputs, layers: Sequence[str], measures: Sequence[Measure] = MEASURES
) -> dict[int, dict[str, LayerState]]:
    """Compute both axes of some layers after each snapshot's epoch, from the same images, 2,000 at most.

    Returns:
        Epoch -> layer -> state, ascending.

    Raises:
        NotApplicableError: see :func:`check_snapshots`.
    """
    check_snapshots(inputs)
    target = inputs.statistics.target
    states = {}
    for epoch, model in models_by_epoch(inputs):
        found = calibrate(
            model, inputs.calibration, layers=layers, target=target, max_images=IMAGES, progress=inputs.progress
        )
        states[epoch] = {
            name: LayerState(
                quantities_of(layer, SYMBOLS), {key: value for f in measures for key, value in f(layer).items()}
            )
            for name, layer in found.layers.items()
        }
    return states


def trajectory_table(states: Mapping[int, Mapping[str, LayerState]], depths: Mapping[str, float]) -> pd.DataFrame:
    """Both axes' coupling by epoch.

    Returns:
        A row an epoch and layer: epoch, layer, depth, channels that vary, ``rho`` of I with M, and all measures.
    """
    rows = [
        {
            "epoch": epoch,
            "layer": name,
            "depth": depths[name],
            "channels": int((~state.quantities["I"].isnan()).sum()),
            "rho": cell_correlation(state.quantities["I"], state.quantities["M"]),
            **state.measures,
        }
        for epoch, layers in states.items()
        for name, state in layers.items()
    ]
    return pd.DataFrame(rows)


def windows(epochs: Sequence[int]) -> dict[str, tuple[int, int]]:
    """First and last snapshot of the early and the late part of training.

    Early is from the first snapshot to the one nearest to epoch 5, late from the one nearest to half of the last epoch
    to the last (paper: 0 to 5 and 50 to 100); of two equally near ones the earlier.

    Args:
        epochs: ascending, three at least.

    Example:
        >>> windows([0, 1, 2, 5, 10, 20]), windows([0, 1, 2])
        ({'early': (0, 5), 'late': (10, 20)}, {'early': (0, 1), 'late': (1, 2)})
    """
    first, *inner, last = epochs
    early = min(inner, key=lambda epoch: abs(epoch - first - EARLY_EPOCH))
    late = min(inner, key=lambda epoch: abs(epoch - last / 2))
    return {"early": (first, early), "late": (late, last)}


def velocity_table(states: Mapping[int, Mapping[str, LayerState]], depths: Mapping[str, float]) -> pd.DataFrame:
    """Whether channels that move along one axis move along the other: rho of raw differences dI and dM.

    Returns:
        A row a window and layer: layer, depth, ``window``, ``start``, ``end``, ``rho``.
    """
    rows = []
    for window, (start, end) in windows(list(states)).items():
        for name in states[start]:
            before, after = states[start][name].quantities, states[end][name].quantities
            moved = cell_correlation(after["I"] - before["I"], after["M"] - before["M"])
            row = {"layer": name, "depth": depths[name], "window": window, "start": start, "end": end, "rho": moved}
            rows.append(row)
    return pd.DataFrame(rows)


def persistence_table(states: Mapping[int, Mapping[str, LayerState]], depths: Mapping[str, float]) -> pd.DataFrame:
    """How much of a quantity's last order is there after each epoch, ``rho(q_e, q_last)``.

    Returns:
        A row an epoch before the last, layer and quantity: epoch, layer, depth, quantity, rho.
    """
    *before, last = states
    rows = [
        {
            "epoch": epoch,
            "layer": name,
            "depth": depths[name],
            "quantity": symbol,
            "rho": cell_correlation(values, states[last][name].quantities[symbol]),
        }
        for epoch in before
        for name, state in states[epoch].items()
        for symbol, values in state.quantities.items()
    ]
    return pd.DataFrame(rows)


def learning_section(inputs: EvidenceInputs, measures: Sequence[Measure] = MEASURES) -> Section:
    """Answer when the axes part during training, and which settles first (H2).

    Six convolutions spread over depth are followed (fewer where there are no more).

    Args:
        inputs: with snapshots.
        measures: what is followed beside the axes.

    Raises:
        NotApplicableError: see :func:`check_snapshots` and
            :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.
    """
    depths = relative_depths(inputs.cells())
    states = layer_states(inputs, spread_over_depth(task_cells(inputs), LAYERS), measures)
    trajectory = trajectory_table(states, depths)
    velocity = velocity_table(states, depths)
    persistence = persistence_table(states, depths)
    tables = {"trajectory": trajectory, "velocity": velocity, "persistence": persistence}
    return Section(
        "learning",
        "Are the axes coupled before training, when do they part, and which settles first?",
        tables,
        learning_claims(tables),
        learning_drawings(tables),
        follows="Where local ranks settle before task ranks do (second panel), an unfinished training foretells which "
        "channels are replaceable: pruning early is then safer by the local axis.",
        fails="Of one training the intervals are over layers and say nothing of other seeds. Task information is about "
        "the model's own margin, and its mean is no measure of what the network knows. BatchNorm's statistics are "
        "estimated anew at every snapshot (ours): with those "
        "that an untrained network has stored, the first point is another.",
    )


def learning_drawings(tables: Mapping[str, pd.DataFrame]) -> list[Drawing]:
    """Draw the course of training, or of several trainings of each network.

    Args:
        tables: as for :func:`learning_claims`.
    """
    drawings = []
    own = {name: with_runs(table) for name, table in tables.items()}
    networks = own["trajectory"].network.unique()
    for network in networks:
        parts = {name: table[table.network == network] for name, table in own.items()}
        trajectory = parts["trajectory"]
        named = [c for c in trajectory.columns if c not in (*AXES_COLUMNS, *RUN) and trajectory[c].notna().any()]
        end, title = (f"_{network}", f"{network}. ") if len(networks) > 1 else ("", "")
        drawings.append(
            Drawing(
                f"learning{end}",
                partial(draw_learning, trajectory, parts["velocity"], parts["persistence"]),
                f"{title}{_CAPTION}",
            )
        )
        if named:
            drawings.append(
                Drawing(f"learning_structure{end}", partial(draw_measures, trajectory, named), f"{title}{_STRUCTURE}")
            )
    return drawings


def learning_claims(tables: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """Judge the course of training (H2, K.4).

    Args:
        tables: ``trajectory``, ``velocity`` and ``persistence`` of :func:`learning_section`; of several trainings below
            each other, with the columns ``network`` and ``seed``, intervals are over trainings where a network has
            three, otherwise over layers.
    """
    by_run = {name: dict(list(with_runs(table).groupby(RUN, sort=False))) for name, table in tables.items()}
    runs = [_one_course({name: own[run] for name, own in by_run.items()}) for run in by_run["trajectory"]]
    layers, epochs = pd.concat([found for found, _ in runs]), dict.fromkeys(found for _, found in runs)
    first, parted, middle = (" or ".join(dict.fromkeys(str(epoch[i]) for epoch in epochs)) for i in range(3))
    several = (layers.groupby("network").seed.nunique() >= FEWEST_MODELS).any()
    over = f"interval over {len(runs)} trainings" if several else f"interval over {len(layers)} layers"
    claims = [
        Claim(
            "before training, input capture and task information are strongly coupled",
            "strongly coupled",
            best_estimate(layers, "coupled"),
            above=0.0,
            note=f"epoch {first}, {over}",
        ),
        Claim(
            "within ten epochs the coupling drops",
            "drops by epoch 10",
            best_estimate(layers, "drop"),
            above=0.0,
            note=f"epoch {first} less epoch {parted}, {over}",
        ),
        Claim(
            "channels move along both axes together at first, and less so later",
            "0-5 above 50-100",
            best_estimate(layers, "slower"),
            above=0.0,
            note=f"early less late, {over}",
        ),
        Claim(
            "the order of input capture settles before that of task information",
            "I above M at epoch 50",
            best_estimate(layers, "settled"),
            above=0.0,
            note=f"rank correlation with the last epoch, at epoch {middle}, {over}",
        ),
    ]
    if "gap_first" in layers and layers.gap_first.notna().any():
        claims += [
            Claim(
                "the overlap graph is more modular than the excess graph before training already",
                "positive at initialization",
                best_estimate(layers, "gap_first"),
                above=0.0,
                note=f"epoch {first}, {over}",
            ),
            Claim(
                "and so it is at every snapshot (where the difference is least)",
                "remains so at convergence",
                best_estimate(layers, "gap_least"),
                above=0.0,
                note=f"of each training the epoch with the least mean over layers, {over}",
            ),
        ]
    for name, words in GROWING.items():
        if name in layers and layers[name].notna().any():
            claims.append(
                Claim(f"the {words} grows with training", "grows", best_estimate(layers, name), above=0.0, note=over)
            )
    return claims


def _one_course(tables: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, tuple[int, int, int]]:
    """What one training's claims are about, a row a layer; and the first epoch, the parted and the middle one."""
    trajectory, velocity, persistence = (tables[name] for name in ("trajectory", "velocity", "persistence"))
    epochs = sorted(set(trajectory.epoch))
    by_epoch = {epoch: part.set_index("layer") for epoch, part in trajectory.groupby("epoch")}
    first, last = by_epoch[epochs[0]], by_epoch[epochs[-1]]
    parted = min(epochs[1:], key=lambda epoch: abs(epoch - PARTED_EPOCH))
    middle = windows(epochs)["late"][0]
    speed = velocity.pivot_table(index="layer", columns="window", values="rho", dropna=False)
    settled = persistence[persistence.epoch == middle].pivot_table(
        index="layer", columns="quantity", values="rho", dropna=False
    )
    layers = pd.DataFrame(
        {
            **first[RUN],
            "coupled": first.rho,
            "drop": first.rho - by_epoch[parted].rho,
            "slower": speed.early - speed.late,
            "settled": settled.I - settled.M,
            **{name: last[name] - first[name] for name in GROWING if name in trajectory},
        }
    )
    if "modularity_gap" in trajectory:
        gaps = {epoch: part.modularity_gap for epoch, part in by_epoch.items()}
        least = min(gaps, key=lambda epoch: gaps[epoch].mean())
        layers = layers.assign(gap_first=gaps[epochs[0]], gap_least=gaps[least])
    return layers, (epochs[0], parted, middle)


_CAPTION = (
    "Over training, mean over layers with their standard error (over seeds, where there are several): rank correlation "
    "of input capture with task information; of each quantity with its order at the end; and, layer by layer, of the "
    "changes along both axes in an early and a late part of training."
)
_STRUCTURE = "How channels support each other, by epoch: mean over layers with its standard error."
