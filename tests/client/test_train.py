"""The update of a training: the whole result of the mechanism, cut to the public bound, and never a refusal."""

import numpy as np
import pytest

from offsite.client.training.local_update import within


def test_an_update_is_cut_to_the_bound_and_the_cuts_are_counted() -> None:
    update, cuts = within(np.array([0.5, -2.0, 1.0, 3.0], dtype=np.float32), 1.0)
    assert update.tolist() == [0.5, -1.0, 1.0, 1.0]
    assert update.dtype == np.float32
    assert cuts == 2


@pytest.mark.parametrize("rate", [3e38, 1e30])
def test_a_step_that_overflows_is_no_answer_about_the_gradient(rate: float) -> None:
    """A coordinator that chose such a step would learn by a refusal whether a noised gradient passes a threshold."""
    with np.errstate(over="ignore"):
        steps = -np.float32(rate) * np.array([1.2, 1.0, -1.2, 1e-38], dtype=np.float32)
    update, cuts = within(steps, 1.0)
    assert update.tolist()[:3] == [-1.0, -1.0, 1.0]
    assert np.isfinite(update).all()
    assert cuts == 3 + (abs(steps[3]) > 1)


def test_what_is_no_number_is_nothing() -> None:
    update, cuts = within(np.array([np.nan, np.inf, -np.inf]), 2.0)
    assert update.tolist() == [0.0, 2.0, -2.0]
    assert cuts == 3
