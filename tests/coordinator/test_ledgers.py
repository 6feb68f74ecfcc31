"""The coordinator's memory of the sites' ledgers: the newest heads, of a bounded number of ledgers per site."""

import logging
from pathlib import Path

import pytest

from offsite.coordinator.home.ledger_heads import MAX_LEDGERS, Ledgers
from offsite.errors import DataError
from offsite.protos.codec import LedgerHead
from offsite.trust.countersign import check_countersigned
from offsite.trust.identity import Identity

IDENTITY = Identity.from_bytes(bytes(32))


def head(ledger: int, count: int) -> LedgerHead:
    return LedgerHead(f"{ledger:064x}", count, f"{count:064x}")


def test_the_newest_head_is_kept_signed_and_found_again(tmp_path: Path) -> None:
    ledgers = Ledgers(tmp_path / "ledgers.json", IDENTITY)
    for count in (2, 5, 3):
        ledgers.learn("ash", head(1, count))
    ledgers.learn("ash", None)
    for one in (ledgers, Ledgers(tmp_path / "ledgers.json", IDENTITY)):
        (known,) = one.countersigned("ash")
        assert (known.ledger, known.count, known.head) == (head(1, 5).ledger, 5, head(1, 5).head)
        check_countersigned(IDENTITY.public, "ash", known.ledger, known.count, known.head, known.signature)
        assert one.countersigned("birch") == ()


def test_a_site_with_ever_new_ledgers_fills_no_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledgers = Ledgers(tmp_path / "ledgers.json", IDENTITY)
    with caplog.at_level(logging.WARNING):
        for number in range(3 * MAX_LEDGERS):
            ledgers.learn("ash", head(number, 1))
    assert len(caplog.records) == 1
    ledgers.learn("ash", head(0, 7))
    ledgers.learn("birch", head(999, 1))
    again = Ledgers(tmp_path / "ledgers.json", IDENTITY)
    assert [one.ledger for one in again.countersigned("ash")] == [head(n, 1).ledger for n in range(MAX_LEDGERS)]
    assert again.countersigned("ash")[0].count == 7
    assert len(again.countersigned("birch")) == 1


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "ledgers.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Ledgers(tmp_path / "ledgers.json", IDENTITY)
