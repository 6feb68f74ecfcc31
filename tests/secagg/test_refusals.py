"""Every row of "Must be refused" in the design page, with real messages, signed again wherever the attacker could.

`refuses` asserts the refusal, and that the member takes no further step and holds no secret any more.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from offsite.errors import ConfigError, OffsiteError, ProtocolViolation, RangeError, TooFewSurvivors
from offsite.secagg import agreement, shamir, signed_bodies
from offsite.secagg.collector import Collector
from offsite.secagg.signed_bodies import (
    KEYS,
    MASK_KEY,
    MASKED,
    SELF_MASK,
    SHARES,
    SURVIVORS,
    UNMASK,
    Keys,
    Signed,
    sign,
)
from offsite.trust.identity import Identity
from offsite.trust.wire import Writer

P = 2**255 - 19
LOW_ORDER = (
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
    P,
    P + 1,
)


def refuses(member, call, *, match=None, error=ProtocolViolation):
    with pytest.raises(error, match=match):
        call()
    assert repr(member).endswith("next='spent')")
    assert member._secrets == type(member._secrets)()
    for again in (lambda: member.masked([]), lambda: member.unmask([]), lambda: member.survivors(b"")):
        with pytest.raises(ProtocolViolation, match="while next=spent"):
            again()


def transcript(round_):
    return round_.collector._agreed.transcript


def signed_by(round_, site, step, body, *, context=None):
    return sign(round_.identities[site], step, transcript(round_) if context is None else context, site, body)


def some_keys():
    return Keys(*(agreement.public_of(agreement.new_scalar()) for _ in range(2)), bytes(32)).to_bytes()


def swap(items, old, new):
    return [new if each == old else each for each in items]


# substituted keys


@pytest.mark.parametrize("signer", ["coordinator", "colluder", "nobody"])
def test_substituted_keys(federation, signer):
    round_ = federation(5).until("shares")
    identity = {"coordinator": Identity.generate(), "colluder": round_.identities["e0"]}.get(signer)
    body = some_keys()
    old = round_.sent["keys"]["b0"]
    fake = sign(identity, KEYS, round_.terms.t0(), "b0", body) if identity else replace(old, body=body)
    roster = swap(round_.collector.roster(), old, fake)
    refuses(round_.members["a0"], lambda: round_.members["a0"].shares(roster), match="'b0' did not sign")
    with pytest.raises(ProtocolViolation, match="'b0' did not sign"):
        Collector(round_.terms).add_keys(fake)


def test_own_keys_substituted_or_left_out(federation):
    for roster in (lambda sent: sent[1:], lambda sent: [sent[1], *sent[1:]]):
        round_ = federation(5).until("shares")
        sent = roster(round_.collector.roster())
        refuses(round_.members["a0"], lambda member=round_.members["a0"], sent=sent: member.shares(sent))


def test_keys_of_a_site_that_was_not_invited(federation):
    round_ = federation(5).until("shares")
    extra = sign(Identity.generate(), KEYS, round_.terms.t0(), "zz", some_keys())
    roster = [*round_.collector.roster(), extra]
    refuses(round_.members["a0"], lambda: round_.members["a0"].shares(roster), match="not invited")
    with pytest.raises(ProtocolViolation, match="not invited"):
        federation(5).collector.add_keys(extra)


def test_one_key_used_for_two_sites_or_two_uses(federation):
    round_ = federation(5).until("shares")
    stolen = Keys.from_bytes(round_.sent["keys"]["b0"].body)
    twice = replace(Keys.from_bytes(some_keys()), channel=stolen.mask)
    same = replace(stolen, channel=stolen.mask)
    for keys in (stolen, twice, same):
        copied = signed_by(round_, "e0", KEYS, keys.to_bytes(), context=round_.terms.t0())
        roster = swap(round_.collector.roster(), round_.sent["keys"]["e0"], copied)
        with pytest.raises(ProtocolViolation, match="repeats a site or a key"):
            agreement.agree(round_.terms, roster)
        other = Collector(round_.terms)
        other.add_keys(round_.sent["keys"]["b0"])
        with pytest.raises(ProtocolViolation, match="repeats a key"):
            other.add_keys(copied)
    refuses(round_.members["a0"], lambda: round_.members["a0"].shares(roster))


# replay from another round or federation; changed model hash; stale manifest


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2},
        {"federation": "other"},
        {"epoch": 2},
        {"nonce": b"n" * 16},
        {"emulator": b"x" * 32},
        {"adapter": b"x" * 32},
        {"config": b"x" * 32},
        {"manifest": b"x" * 32},
        {"n_min": 4},
        {"accomplices": 0},
        {"clip": 2.0},
        {"length": 6},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_keys_signed_for_other_terms(federation, changes):
    """Replay, changed model hash and stale manifest: each is a difference in T0, which the signature covers."""
    round_ = federation(5).until("shares")
    other = replace(round_.terms, **changes)
    assert other.t0() != round_.terms.t0()
    old = round_.sent["keys"]["b0"]
    replayed = sign(round_.identities["b0"], KEYS, other.t0(), "b0", old.body)
    roster = swap(round_.collector.roster(), old, replayed)
    refuses(round_.members["a0"], lambda: round_.members["a0"].shares(roster), match="'b0' did not sign")
    with pytest.raises(ProtocolViolation, match="did not sign"):
        Collector(round_.terms).add_keys(replayed)


@pytest.mark.parametrize("name", ["emulator", "manifest"])
def test_member_with_another_model_or_manifest_stays_out(federation, name):
    round_ = federation(5)
    deceived = round_.member("a0", terms=replace(round_.terms, **{name: b"x" * 32}))
    message = deceived.keys(round_.updates["a0"])
    with pytest.raises(ProtocolViolation, match="'a0' did not sign"):
        round_.collector.add_keys(message)
    roster = round_.keys(["b0", "c0", "d0", "e0"])
    refuses(deceived, lambda: deceived.shares([message, *roster]))


@pytest.mark.parametrize("step", [SHARES, SURVIVORS, UNMASK])
def test_later_messages_replayed_from_the_round_before(federation, step):
    first = federation(5).until("unmask")
    first.unmask()
    sent, announcement = first.sent, first.announcement
    first.open(replace(first.terms, round=2))
    first.updates = {site: -update for site, update in first.updates.items()}
    member = first.members["a0"]
    if step == SHARES:
        first.until("masked")
        replayed = swap(first.collector.inbox("a0"), first.sent[SHARES]["b0"], sent[SHARES]["b0"])
        refuses(member, lambda: member.masked(replayed), match="'b0' did not sign")
    elif step == SURVIVORS:
        first.until("survivors")
        refuses(member, lambda: member.survivors(announcement), match="another transcript")
    else:
        first.until("unmask")
        refuses(member, lambda: member.unmask(list(sent[SURVIVORS].values())), match="did not sign")


def test_round_that_is_not_newer(federation):
    round_ = federation(5, round=7)
    round_.keys()
    for changes in ({}, {"round": 6}, {"epoch": 0, "round": 99}):
        member = round_.member("a0", terms=replace(round_.terms, **changes))
        refuses(member, lambda member=member: member.keys(round_.updates["a0"]), match="rounds only go up")


def test_messages_of_one_step_do_not_count_in_another(federation):
    round_ = federation(5).until("unmask")
    for step, body in ((SHARES, b""), (MASKED, bytes(32)), (SURVIVORS, bytes(32))):
        with pytest.raises(ProtocolViolation, match="did not sign"):
            signed_bodies.check(
                round_.terms.public_key("a0"), UNMASK, transcript(round_), signed_by(round_, "a0", step, body)
            )


# swapped ciphertexts; share for the wrong recipient


def reseal(round_, change):
    """Returns the inbox of a0 after e0 signed its shares message again with changed ciphertexts."""
    old = round_.sent[SHARES]["e0"]
    sealed = signed_bodies.read_sealed(old.body)
    change(sealed)
    return swap(round_.collector.inbox("a0"), old, signed_by(round_, "e0", SHARES, signed_bodies.write_sealed(sealed)))


def test_swapped_ciphertexts(federation):
    def change(sealed):
        sealed["a0"], sealed["b0"] = sealed["b0"], sealed["a0"]

    round_ = federation(5).until("masked")
    inbox = reseal(round_, change)
    refuses(round_.members["a0"], lambda: round_.members["a0"].masked(inbox), match="no share for recipient='a0'")


def test_swapped_ciphertexts_of_two_senders(federation):
    round_ = federation(5).until("masked")
    stolen = signed_bodies.read_sealed(round_.sent[SHARES]["d0"].body)["a0"]
    inbox = reseal(round_, lambda sealed: sealed.update(a0=stolen))
    refuses(round_.members["a0"], lambda: round_.members["a0"].masked(inbox), match="no share for recipient='a0'")


def test_swapped_senders_and_changed_bytes(federation):
    for change in (lambda old: replace(old, sender="d0"), lambda old: replace(old, body=old.body[:-1] + b"x")):
        round_ = federation(5).until("masked")
        old = round_.sent[SHARES]["e0"]
        inbox = swap(round_.collector.inbox("a0"), old, change(old))
        refuses(round_.members["a0"], lambda member=round_.members["a0"], inbox=inbox: member.masked(inbox))


def test_share_for_the_wrong_recipient(federation):
    """e0 seals under the right channel key, but for b0: recipient and sender are in key and associated data."""
    round_ = federation(5).until("masked")
    secret = round_.members["e0"]._secrets.channels["a0"]
    for sender, recipient, context in (("e0", "b0", None), ("d0", "a0", None), ("e0", "a0", bytes(32))):
        sealed = agreement.seal(secret, context or transcript(round_), sender, recipient, (1, 2))
        with pytest.raises(ProtocolViolation, match="no share for recipient='a0'"):
            agreement.unseal(secret, transcript(round_), "e0", "a0", sealed)
    inbox = reseal(round_, lambda all_: all_.update(a0=sealed))
    refuses(round_.members["a0"], lambda: round_.members["a0"].masked(inbox), match="no share for recipient='a0'")


def test_shares_message_that_leaves_a_peer_out(federation):
    round_ = federation(5).until("masked")
    inbox = reseal(round_, lambda sealed: sealed.pop("b0"))
    refuses(round_.members["a0"], lambda: round_.members["a0"].masked(inbox), match="for every peer")


def test_collector_refuses_shares_for_other_peers(federation):
    round_ = federation(5).until("shares")
    message = round_.members["a0"].shares(round_.collector.roster())
    sealed = signed_bodies.read_sealed(message.body)
    for change in (lambda s: s.pop("b0"), lambda s: s.update(zz=s["b0"]), lambda s: s.update(a0=s["b0"])):
        bad = dict(sealed)
        change(bad)
        with pytest.raises(ProtocolViolation, match="for every peer"):
            round_.collector.add_shares(signed_by(round_, "a0", SHARES, signed_bodies.write_sealed(bad)))
    with pytest.raises(ProtocolViolation, match="do not parse"):
        round_.collector.add_shares(signed_by(round_, "a0", SHARES, message.body + b"x"))
    round_.collector.add_shares(message)
    with pytest.raises(ProtocolViolation, match="already sent"):
        round_.collector.add_shares(message)


# two survivor sets; own id as dropped; second unmask


def announce(round_, digests):
    return signed_bodies.write_announcement(transcript(round_), digests)


def test_two_survivor_sets(federation):
    round_ = federation(7).until("survivors")
    member = round_.members["a0"]
    member.survivors(round_.announcement)
    fewer = announce(round_, {site: round_.collector._digests[site] for site in round_.sites[:5]})
    refuses(member, lambda: member.survivors(fewer), match="step=survivors while next=unmask")


def test_signatures_on_another_survivor_set(federation):
    round_ = federation(7).until("unmask")
    fewer = announce(round_, {site: round_.collector._digests[site] for site in round_.sites[:5]})
    member = round_.members["a0"]
    others = [signed_by(round_, site, SURVIVORS, hashlib.sha256(fewer).digest()) for site in round_.sites[2:]]
    mixed = [*others[:1], *(each for each in round_.collector.signatures() if each.sender not in ("c0",))]
    refuses(member, lambda: member.unmask(mixed), match="signed another survivor set")
    for message in (others[0], replace(others[0], sender="a0")):
        with pytest.raises(ProtocolViolation):
            federation_collector_takes_survivor(round_, message)


def federation_collector_takes_survivor(round_, message):
    round_.collector._stage = SURVIVORS
    round_.collector._signed.clear()
    round_.collector.add_survivors(message)


def test_signatures_of_a_site_outside_the_survivors(federation):
    round_ = federation(7).until("masked")
    round_.masked(round_.sites[:6])
    round_.survivors()
    outside = signed_by(round_, "g0", SURVIVORS, hashlib.sha256(round_.announcement).digest())
    member = round_.members["a0"]
    signatures = [*round_.collector.signatures(), outside]
    refuses(member, lambda: member.unmask(signatures), match="'g0' has no place")


def test_second_unmask(federation):
    round_ = federation(5).until("unmask")
    member, signatures = round_.members["a0"], round_.collector.signatures()
    answer = member.unmask(signatures)
    refuses(member, lambda: member.unmask(signatures), match="step=unmask while next=spent")
    round_.collector.add_unmask(answer)
    with pytest.raises(ProtocolViolation, match="already sent"):
        round_.collector.add_unmask(answer)


def test_own_id_as_dropped(federation):
    round_ = federation(7).until("survivors")
    digests = {site: round_.collector._digests[site] for site in round_.sites[1:]}
    member = round_.members["a0"]
    refuses(member, lambda: member.survivors(announce(round_, digests)), match="lack site='a0'")


def test_own_upload_exchanged_in_the_announcement(federation):
    round_ = federation(5).until("survivors")
    digests = {**round_.collector._digests, "a0": bytes(32)}
    member = round_.members["a0"]
    refuses(member, lambda: member.survivors(announce(round_, digests)), match="lack site='a0'")


def test_survivor_outside_the_set_the_site_saw(federation):
    round_ = federation(7).until("shares")
    round_.shares(round_.sites[:6])
    round_.masked()
    digests = {**round_.collector._digests, "g0": bytes(32)}
    member = round_.members["a0"]
    refuses(member, lambda: member.survivors(announce(round_, digests)), match="shares never came")


# same peer as survivor and dropped; duplicate ids


def test_same_peer_as_survivor_and_dropped(federation):
    round_ = federation(7).until("masked")
    round_.masked(round_.sites[:6])
    signatures = round_.survivors()
    answer = round_.members["a0"].unmask(signatures)
    released = signed_bodies.read_released(answer.body)
    kinds = {site: kind for site, (kind, _) in released.items()}
    assert kinds == {**dict.fromkeys(round_.sites[:6], SELF_MASK), "g0": MASK_KEY}
    share = next(iter(released.values()))[1]
    both = Writer().text("b0").field(SELF_MASK).field(shamir.to_bytes(share))
    both.text("b0").field(MASK_KEY).field(shamir.to_bytes(share))
    with pytest.raises(ProtocolViolation, match="twice or out of order"):
        round_.collector.add_unmask(signed_by(round_, "a0", UNMASK, both.done()))
    for site, kind in (("b0", MASK_KEY), ("g0", SELF_MASK), ("zz", SELF_MASK)):
        body = signed_bodies.write_released({**released, site: (kind, share)})
        with pytest.raises(ProtocolViolation, match="other shares than were asked"):
            round_.collector.add_unmask(signed_by(round_, "a0", UNMASK, body))
    round_.collector.add_unmask(answer)


def test_duplicate_ids_in_the_roster(federation):
    round_ = federation(5).until("shares")
    member, roster = round_.members["a0"], round_.collector.roster()
    refuses(member, lambda: member.shares([*roster, roster[1]]), match="repeats a site")
    again = Collector(round_.terms)
    again.add_keys(roster[0])
    with pytest.raises(ProtocolViolation, match="repeats"):
        again.add_keys(roster[0])
    with pytest.raises(ConfigError, match="out of order or twice"):
        replace(round_.terms, roster=(*round_.terms.roster[:4], round_.terms.roster[3]))


def test_duplicate_ids_in_the_inbox(federation):
    round_ = federation(5).until("masked")
    member, inbox = round_.members["a0"], round_.collector.inbox("a0")
    refuses(member, lambda: member.masked([*inbox, inbox[0]]), match="in the inbox twice")


def test_own_message_in_the_inbox(federation):
    round_ = federation(5).until("masked")
    member = round_.members["a0"]
    inbox = [*round_.collector.inbox("a0")[1:], round_.sent[SHARES]["a0"]]
    refuses(member, lambda: member.masked(inbox), match="or is this site")


def test_duplicate_ids_in_the_announcement(federation):
    round_ = federation(5).until("survivors")
    writer = Writer().field(transcript(round_))
    for site in ("a0", "a0", "b0", "c0", "d0"):
        writer.text(site).field(round_.collector._digests[site])
    member = round_.members["a0"]
    refuses(member, lambda: member.survivors(writer.done()), match="twice or out of order")


def test_duplicate_ids_in_the_signatures(federation):
    round_ = federation(5).until("unmask")
    member, signatures = round_.members["a0"], round_.collector.signatures()
    refuses(member, lambda: member.unmask([*signatures, signatures[0]]), match="repeat a site")


# bad share


def lie(round_, site, about):
    """Returns an answer of a site with one share off by one, signed by the site itself."""
    answer = round_.members[site].unmask(round_.collector.signatures())
    released = signed_bodies.read_released(answer.body)
    kind, share = released[about]
    released[about] = (kind, (share + 1) % shamir.ORDER)
    return signed_by(round_, site, UNMASK, signed_bodies.write_released(released))


@pytest.mark.parametrize("about", ["b0", "e0"], ids=["self-mask", "mask-key"])
def test_bad_share_is_caught_by_the_commitment_and_the_public_key(federation, about):
    round_ = federation(5).until("masked")
    round_.masked(round_.sites[:4])
    round_.survivors()
    for site in ("b0", "c0", "d0"):
        round_.collector.add_unmask(round_.members[site].unmask(round_.collector.signatures()))
    round_.collector.add_unmask(lie(round_, "a0", about))
    with pytest.raises(
        ProtocolViolation, match=f"site='{about}': the secret from 4 answers is not the announced secret"
    ):
        round_.collector.sum()


def test_bad_share_is_left_out_when_there_are_answers_to_spare(federation):
    round_ = federation(5).until("unmask")
    for site in round_.sites[1:]:
        round_.collector.add_unmask(round_.members[site].unmask(round_.collector.signatures()))
    round_.collector.add_unmask(lie(round_, "a0", "c0"))
    result = round_.collector.sum()
    assert round_.collector.faulty == ("a0",)
    truth = sum(update.astype(np.float64) for update in round_.updates.values())
    np.testing.assert_allclose(result.decoded, truth, atol=1e-7)


def test_share_out_of_the_field(federation):
    round_ = federation(5).until("unmask")
    released = signed_bodies.read_released(round_.members["a0"].unmask(round_.collector.signatures()).body)
    body = signed_bodies.write_released(released)
    place = body.index(shamir.to_bytes(released["b0"][1]))
    body = body[:place] + b"\xff" * 32 + body[place + 32 :]
    with pytest.raises(ProtocolViolation, match="out of the field"):
        round_.collector.add_unmask(signed_by(round_, "a0", UNMASK, body))


# low-order point


@pytest.mark.parametrize("point", LOW_ORDER)
def test_low_order_point(federation, point):
    round_ = federation(5).until("shares")
    good, raw = Keys.from_bytes(some_keys()), point.to_bytes(32, "little")
    for keys in (replace(good, channel=raw), replace(good, mask=raw)):
        bad = signed_by(round_, "e0", KEYS, keys.to_bytes(), context=round_.terms.t0())
        with pytest.raises(ProtocolViolation, match="'e0' sent a low-order point"):
            Collector(round_.terms).add_keys(bad)
    roster = swap(round_.collector.roster(), round_.sent["keys"]["e0"], bad)
    refuses(round_.members["a0"], lambda: round_.members["a0"].shares(roster), match="low-order")


# NaN/Inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.0000001, -2.0])
def test_update_with_a_value_that_may_not_be_sent(federation, value):
    round_ = federation(5)
    round_.updates["a0"][3] = value
    member = round_.members["a0"]
    refuses(member, lambda: member.keys(round_.updates["a0"]), match="outside the clip or not finite", error=RangeError)
    assert member._keys is None


@pytest.mark.parametrize(
    "update",
    [
        np.zeros(4, np.float32),
        np.zeros(5, np.float64),
        np.zeros((5, 1), np.float32),
        np.zeros(0, np.float32),
        [0.0] * 5,
    ],
)
def test_update_of_the_wrong_shape(federation, update):
    member = federation(5).members["a0"]
    refuses(member, lambda: member.keys(update), error=RangeError)
    assert member._keys is None


# second upload of one update


def test_second_upload_by_one_member(federation):
    round_ = federation(5).until("survivors")
    member = round_.members["a0"]
    refuses(member, lambda: member.masked(round_.collector.inbox("a0")), match="step=masked while next=survivors")


def test_second_upload_with_another_cohort(federation):
    round_ = federation(5).until("survivors")
    round_.open(replace(round_.terms, round=2))
    round_.until("masked")
    member = round_.members["a0"]
    refuses(member, lambda: member.masked(round_.collector.inbox("a0")), match="uploaded before")


def test_update_lost_before_its_upload_may_be_sent_in_the_next_round(federation):
    round_ = federation(5).until("masked")
    round_.open(replace(round_.terms, round=2))
    assert round_.run().members == round_.sites


def test_second_keys_by_one_member(federation):
    round_ = federation(5)
    member = round_.members["a0"]
    member.keys(round_.updates["a0"])
    refuses(member, lambda: member.keys(round_.updates["a0"]), match="step=keys while next=shares")


# fewer than t


def test_fewer_than_t_in_every_step_of_a_member(federation):
    def few(round_, step):
        member = round_.members["a0"]
        return {
            "shares": lambda: member.shares(round_.collector.roster()[:4]),
            "masked": lambda: member.masked(round_.collector.inbox("a0")[:3]),
            "survivors": lambda: member.survivors(
                announce(round_, {site: round_.collector._digests[site] for site in round_.sites[:4]})
            ),
            "unmask": lambda: member.unmask(round_.collector.signatures()[:4]),
        }[step]

    for step in ("shares", "masked", "survivors", "unmask"):
        round_ = federation(6).until(step)
        assert round_.terms.threshold == 5
        refuses(round_.members["a0"], few(round_, step), error=TooFewSurvivors, match="=4")


def test_fewer_than_t_answers_give_no_sum(federation):
    round_ = federation(6).until("unmask")
    with pytest.raises(TooFewSurvivors):
        round_.unmask(round_.sites[:4])
    round_.collector.add_unmask(round_.members["f0"].unmask(round_.collector.signatures()))
    assert round_.collector.sum().members == round_.sites


# uploads


def test_upload_that_is_not_the_signed_one(federation):
    round_ = federation(5).until("masked")
    message, vector = round_.members["a0"].masked(round_.collector.inbox("a0"))
    for other in (vector + np.uint32(1), vector[:-1], vector.astype(np.uint64), vector.view(np.int32)):
        with pytest.raises(ProtocolViolation, match="drop the upload"):
            round_.collector.add_masked(message, other)
    assert not round_.collector._total.any()
    round_.collector.add_masked(message, vector)
    with pytest.raises(ProtocolViolation, match="already sent"):
        round_.collector.add_masked(message, vector)


def test_member_is_invited_under_its_own_key_only(federation):
    round_ = federation(5)
    for site, identity in (("a0", round_.identities["b0"]), ("zz", Identity.generate())):
        with pytest.raises(ProtocolViolation, match="not invited under this key"):
            type(round_.members["a0"])(round_.terms, site, identity, round_.journals["a0"])


def test_refusals_name_no_secret(federation):
    round_ = federation(5).until("unmask")
    member = round_.members["a0"]
    secret = member._secrets.held["b0"]
    with pytest.raises(OffsiteError) as caught:
        member.unmask([Signed("b0", b"", bytes(64))])
    for text in (str(caught.value), repr(member), repr(round_.identities["a0"]), repr(member._secrets)):
        assert not any(f"{value}" in text or f"{value:x}" in text for value in secret)
    assert "***" in repr(round_.identities["a0"])
