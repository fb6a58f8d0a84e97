"""Wilson's interval, by hand."""

import math

import pytest
from reference_lesions import wilson

from tp_twoaxis.diagnostics.win_rate import win_rate


@pytest.mark.parametrize(("wins", "trials"), [(0, 1), (1, 1), (3, 7), (134, 223), (146, 146), (0, 93)])
def test_the_interval_is_wilsons(wins, trials):
    rate = win_rate(wins, trials)
    assert rate.value == wins / trials
    assert (rate.lower, rate.upper) == pytest.approx(wilson(wins, trials), abs=1e-12)


def test_no_trial_says_nothing():
    assert math.isnan(win_rate(0, 0).value)
    assert math.isnan(win_rate(0, 0).lower)
