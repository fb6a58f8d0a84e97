"""The sections of the evidence, in the paper's order: what each is about, and what it says of several networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pandas as pd

from tp_twoaxis.diagnostics.alignment import alignment_claims, alignment_section, alignment_summary, groups_table
from tp_twoaxis.diagnostics.axis_gradients import gradient_claims, gradients_section
from tp_twoaxis.diagnostics.calibration_growth import calibration_size_section, growth_claims
from tp_twoaxis.diagnostics.collapse import collapse_claims, collapse_section
from tp_twoaxis.diagnostics.controls import control_claims, controls_section
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, Section
from tp_twoaxis.diagnostics.hull_profile import hull_claims, hull_section
from tp_twoaxis.diagnostics.interventions import interventions_of, interventions_section
from tp_twoaxis.diagnostics.learning import learning_claims, learning_drawings, learning_section
from tp_twoaxis.diagnostics.magnitude_axes import magnitude_claims, magnitude_section
from tp_twoaxis.diagnostics.propagation import propagation_claims, propagation_section
from tp_twoaxis.diagnostics.rescaling import rescaling_claims, rescaling_section
from tp_twoaxis.diagnostics.structure_section import structure_claims, structure_section
from tp_twoaxis.diagnostics.target_robustness import mean_tables, partner_claims, target_choice_section, target_claims

Tables = Mapping[str, pd.DataFrame]


class SectionRow(NamedTuple):
    """A section of the evidence.

    Attributes:
        place: in the paper, for example "section 2.2, H1".
        compute: answers the question for one network.
        over_runs: judges tables of several networks below each other, with the columns ``network`` and ``seed``. A
            table that no run has is not among them.
        condensed: makes tables of these anew whose rows are no cells, under the names they have.
        drawn: figures of several networks.
    """

    place: str
    compute: Callable[[EvidenceInputs], Section]
    over_runs: Callable[[Tables], list[Claim]] = lambda tables: []
    condensed: Callable[[Tables], dict[str, pd.DataFrame]] = lambda tables: {}
    drawn: Callable[[Tables], list[Drawing]] = lambda tables: []


SECTIONS: dict[str, SectionRow] = {
    "alignment": SectionRow(
        "section 2.2, H1",
        alignment_section,
        lambda t: alignment_claims(t["alignment"]),
        lambda t: {
            "alignment_summary": alignment_summary(t["alignment"]),
            "alignment_groups": groups_table(t["alignment"]),
        },
    ),
    "collapse": SectionRow("sections 2.3 and 2.4", collapse_section, lambda t: collapse_claims(dict(t))),
    "structure": SectionRow("section 2.4, appendix K.1", structure_section, structure_claims),
    "hulls": SectionRow("section 2.4, appendix K.2", hull_section, lambda t: hull_claims(t["hulls"])),
    "learning": SectionRow("section 3.1, H2", learning_section, learning_claims, drawn=learning_drawings),
    "gradients": SectionRow("section 3.2, H2", gradients_section, gradient_claims),
    "propagation": SectionRow("section 3.3, H3", propagation_section, propagation_claims),
    "interventions": SectionRow(
        "section 4.1, H4", interventions_section, lambda t: interventions_of(t["lesion_channels"]).claims
    ),
    "calibration-size": SectionRow(
        "appendix D", calibration_size_section, lambda t: growth_claims(t["calibration_growth"])
    ),
    "controls": SectionRow(
        "appendix E", controls_section, lambda t: control_claims(t.get("label_permutation"), t.get("exact_power"))
    ),
    "target-choice": SectionRow(
        "appendix E",
        target_choice_section,
        lambda t: target_claims(t["targets"], t["target_pairs"]) + partner_claims(t["partners"]),
        mean_tables,
    ),
    "rescaling": SectionRow(
        "appendix E", rescaling_section, lambda t: rescaling_claims(t["rescaling_logits"], t["rescaling_ranks"])
    ),
    "magnitude": SectionRow(
        "appendices J and M", magnitude_section, lambda t: magnitude_claims(t["magnitude"], t["kept_half"])
    ),
}
"""Name -> section; to add one is a row here and its name in :mod:`tp_twoaxis.known_names`."""
