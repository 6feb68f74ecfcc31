"""Sites that help the coordinator: the arithmetic for every size of a federation, and the attacks against real members.

The coordinator picks who is invited, so helpers count against all members; docs/secure-aggregation.md has the proof.
"""

from dataclasses import replace
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest

from offsite.errors import ConfigError, TooFewSurvivors
from offsite.secagg import ring, signed_bodies
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import SURVIVORS
from offsite.trust.collusion import fewest_in_sum, usual_accomplices, weaker_sentence

LARGEST, ENUMERATED = 64, 9  # members of a federation; invited sites whose sets of signers are listed one by one


def terms_of(invited, accomplices, n_min):
    digests = dict.fromkeys(("manifest", "emulator", "adapter", "config"), bytes(32))
    roster = tuple((f"s{place:02}", bytes([place]) * 32) for place in range(invited))
    return SecAggParams("f", 1, 1, bytes(16), **digests, roster=roster, n_min=n_min, accomplices=accomplices,
                        length=1, clip=1.0)  # fmt: skip


def federations():
    """Yields (members, accomplices) for every size, and for small federations every stronger and weaker number."""
    for members in range(3, LARGEST + 1):
        yield from (
            (members, accomplices)
            for accomplices in (range(members - 1) if members <= 16 else (usual_accomplices(members),))
        )


def shares_a_signer(invited, accomplices, threshold):
    """Says whether each two sets of signers share an honest site, by listing the honest sites of each set."""
    honest = range(invited - accomplices)
    sets = [frozenset(chosen) for chosen in combinations(honest, threshold - accomplices)]
    return all(first & second for first, second in combinations(sets, 2))


def test_every_cohort_of_every_federation():
    """Two survivor sets share an honest signer, and each sum holds two honest members, whoever is invited."""
    counted = 0
    for members, accomplices in federations():
        n_min = fewest_in_sum(accomplices)
        for invited in range(n_min, members + 1):
            terms = terms_of(invited, accomplices, n_min)
            threshold = terms.threshold
            counted += 1
            assert threshold <= terms.min_sites <= invited  # a round without losses can end
            assert terms.min_sites - accomplices >= 2
            assert threshold > accomplices  # helpers alone reconstruct nothing
            assert 2 * (threshold - accomplices) > invited - accomplices
            assert threshold > 2 * invited // 3
            if accomplices and invited <= ENUMERATED:
                assert shares_a_signer(invited, accomplices, threshold)
                if threshold - 1 > 2 * invited // 3:  # helpers decide, and one signature fewer would be too few
                    assert not shares_a_signer(invited, accomplices, threshold - 1)
    assert counted > 1500


@pytest.mark.parametrize("members", range(3, LARGEST + 1))
def test_smaller_sums_than_two_honest_members_are_no_terms(members):
    accomplices = usual_accomplices(members)
    for n_min in range(3, fewest_in_sum(accomplices)):
        with pytest.raises(ConfigError, match="n_min >= "):
            terms_of(members, accomplices, n_min)


def test_only_fewer_helpers_than_a_third_need_a_sentence():
    for members in range(3, LARGEST + 1):
        usual = members // 3
        assert not any(weaker_sentence(accomplices, members) for accomplices in range(usual, members))
        sentences = {weaker_sentence(accomplices, members) for accomplices in range(usual)}
        assert len(sentences) == usual
        assert "" not in sentences


def test_invited_helpers_do_not_open_a_site(federation):
    """Of ten sites the coordinator invites the victim and two helpers; by n_min = 3 alone their sum was open."""
    ward = federation(10, n_min=5)
    three = ward.terms.roster[:3]
    for n_min in (3, 4, 5):
        with pytest.raises(ConfigError, match="n_min="):
            replace(ward.terms, roster=three, n_min=n_min)


def test_owners_who_sign_for_no_helper_are_open_to_two(federation):
    """The same three sites where the owners signed for no helper: the victim's update, to the last ring step."""
    round_ = federation(3, accomplices=0)
    total = round_.run().ring
    for helper in round_.sites[1:]:
        total = total - ring.encode(
            round_.updates[helper], clip=1.0, members=3, randomness=round_.rounding(helper), length=5
        )
    victim = ring.encode(round_.updates["a0"], clip=1.0, members=3, randomness=round_.rounding("a0"), length=5)
    assert np.array_equal(total, victim)


def test_helpers_do_not_sign_two_survivor_sets_open(federation):
    """Seven of ten are invited, three help: five signatures on each of two sets, which floor(2n/3) + 1 let through."""
    round_ = federation(7, accomplices=3, n_min=5).until("survivors")
    digests, transcript = round_.collector._digests, round_.collector._agreed.transcript
    honest, helpers = round_.sites[:4], round_.sites[4:]
    for told, left_out in ((honest[:2], ()), (honest[2:], honest[:1])):
        kept = {site: digest for site, digest in digests.items() if site not in left_out}
        announcement = signed_bodies.write_announcement(transcript, kept)
        signatures = [round_.members[site].survivors(announcement) for site in told]
        body = sha256(announcement).digest()
        signatures += [
            signed_bodies.sign(round_.identities[site], SURVIVORS, transcript, site, body) for site in helpers
        ]
        assert len(signatures) == 2 * 7 // 3 + 1
        for site in told:
            with pytest.raises(TooFewSurvivors, match="signatures=5; 6 are needed"):
                round_.members[site].unmask(signatures)


@pytest.mark.parametrize("invited", [5, 6, 7, 8, 10])
def test_sites_lost_at_each_stage_of_a_cohort_of_ten(federation, invited):
    """The sum is right with as few sites as the terms allow, and no member goes on with one fewer, at each stage."""
    fewest = {5: 5, 6: 5, 7: 6, 8: 6, 10: 7}[invited]
    for step in ("keys", "shares", "masked", "survivors", "unmask"):
        round_ = federation(invited, accomplices=3, n_min=5)
        lost = round_.sites[fewest:]
        summed = round_.sites[:fewest] if step in ("keys", "shares", "masked") else round_.sites
        assert round_.run(dict.fromkeys(lost, step)).members == summed
        with pytest.raises(TooFewSurvivors, match=f"{fewest - 1}"):
            federation(invited, accomplices=3, n_min=5).run(dict.fromkeys(round_.sites[fewest - 1 :], step))
