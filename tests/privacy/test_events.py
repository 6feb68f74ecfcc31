"""privacy.events: the range of an event's numbers, and the merging of equal events."""

import math

import pytest

from offsite.errors import ConfigError
from offsite.privacy.events import Event, compose


def test_compose_adds_the_steps_of_equal_mechanisms_in_order():
    a, b = Event(1.0, 0.1, 3), Event(2.0, 0.1, 5)
    assert compose([a, b, a, Event(1.0, 0.2, 1), b]) == [Event(1.0, 0.1, 6), Event(2.0, 0.1, 10), Event(1.0, 0.2, 1)]
    assert compose([]) == []


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "name"),
    [
        (0.0, 0.1, 1, "noise_multiplier=0.0"),
        (-1.0, 0.1, 1, "noise_multiplier=-1.0"),
        (math.nan, 0.1, 1, "noise_multiplier=nan"),
        (math.inf, 0.1, 1, "noise_multiplier=inf"),
        (10**400, 0.1, 1, "noise_multiplier=1000"),
        (1.0, 0.0, 1, "sample_rate=0.0"),
        (1.0, 1.1, 1, "sample_rate=1.1"),
        (1.0, math.nan, 1, "sample_rate=nan"),
        (1.0, 0.1, 0, "steps=0"),
        (1.0, 0.1, 2.5, "steps=2.5"),
        (1.0, 0.1, True, "steps=True"),
    ],
)
def test_event_refuses_numbers_without_an_epsilon(noise, rate, steps, name):
    with pytest.raises(ConfigError, match=name):
        Event(noise, rate, steps)
