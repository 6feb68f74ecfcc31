"""A site that cheats, with its real keys: it is left out or bounded, the others have their sum, and nobody learns more.

Four `client run` processes over Flower and TLS, one of them hostile; the rounds are the coordinator's own.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from offsite.coordinator.rounds.round import RoundResult, run_round
from tests.faults.conftest import Federation
from tests.faults.hostile import HostileCoordinator

SITES = ("ash", "birch", "cedar", "elm")
HOSTILE, HONEST = "elm", ("ash", "birch", "cedar")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("cheating"), fed, sites=SITES)
    for site in HONEST:
        made.start_site(site)
    made.start(HOSTILE, str(made.site(HOSTILE)), module="tests.faults.hostile_site")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def coordinator(federation: Federation) -> Iterator[HostileCoordinator]:
    """An honest coordinator; its class can do more."""
    job = federation.job("cheated", rounds=3, training="spare_rounds = 40")
    with HostileCoordinator(federation, job) as made:
        assert made.ready() == SITES
        yield made


def round_with(coordinator: HostileCoordinator, mode: str) -> RoundResult:
    (coordinator.federation.site(HOSTILE) / "hostile.txt").write_text(mode)
    coordinator.bad.clear()
    return run_round(coordinator.manifest, coordinator.plan(), coordinator.start(), coordinator.correspondence())


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("truncated", "was it cut off"),
        ("flipped", "did not sign these bytes"),
        ("replayed", "it is an answer to an earlier letter"),
        ("as birch", "sender='birch': 'elm' was expected"),
    ],
)
def test_a_letter_that_is_not_the_sites_own_answer_is_dropped(
    coordinator: HostileCoordinator, mode: str, reason: str
) -> None:
    result = round_with(coordinator, mode)
    assert result.members == HONEST
    assert [(one.site, one.stage) for one in result.refused] == [(HOSTILE, "masked")]
    assert reason in coordinator.bad[0]


@pytest.mark.parametrize(
    ("mode", "stage", "reason"),
    [
        ("other vector", "masked", "signed the hash of another upload"),
        ("nan", "keys", "outside the range"),
        ("huge", "keys", "outside the range"),
        ("weight", "train", "not in canonical form"),
    ],
)
def test_what_may_not_be_sent_costs_its_site_the_round(
    coordinator: HostileCoordinator, mode: str, stage: str, reason: str
) -> None:
    result = round_with(coordinator, mode)
    assert result.members == HONEST
    assert [(one.site, one.stage) for one in result.refused] == [(HOSTILE, stage)]
    assert reason in result.refused[0].reason


def test_a_billionfold_update_counts_as_the_bound_and_no_more(coordinator: HostileCoordinator) -> None:
    """Scaled by 1e9, and with the site's own checks taken out: the ring holds the bound that all agreed on."""
    honest = round_with(coordinator, "")
    heavy = round_with(coordinator, "heavy")
    assert honest.members == heavy.members == SITES
    bound = coordinator.manifest.update_bound
    assert np.abs(heavy.update).max() <= bound
    others = np.abs(heavy.update) * 4 - bound  # the sum of the three honest sites, beside the bound of the fourth
    assert np.abs(others).max() <= 3 * bound
    assert np.median(np.abs(heavy.update)) == pytest.approx(bound / 4, rel=0.5)


def test_a_wrong_share_is_found_out_and_left_out(coordinator: HostileCoordinator) -> None:
    result = round_with(coordinator, "bad share")
    assert result.members == SITES
    assert np.abs(result.update).max() <= coordinator.manifest.update_bound


def test_the_others_kept_account_of_every_release(coordinator: HostileCoordinator) -> None:
    federation = coordinator.federation
    for site in HONEST:
        assert len(federation.ledger(site)) == len(federation.audit(site, "egress")) >= 11
