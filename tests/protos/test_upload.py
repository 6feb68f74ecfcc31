"""The part of an adapter in a round's vector, by hand and by names; no entry of a sum comes from too few sites."""

import dataclasses
import itertools

import numpy as np
import pytest

from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.errors import PrivacyRefusal, RangeError
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.codec import KeysRequest
from offsite.protos.secagg_params import secagg_params
from offsite.protos.upload import (
    check_coverage,
    directions_of,
    mean_of,
    scatter_uploaded,
    select_uploaded,
    trained_mask,
)
from tests.client.test_policy import JOB

SITES = ("east", "north", "south", "west")
A, B = "h.0.lora_A.default.weight", "h.0.lora_B.default.weight"
LAYOUT = Layout((A, B, "h.0.norm"), ((2, 3), (4, 2), (2,)))
LORA = dataclasses.replace(
    JOB,
    roster=tuple((site, f"{place}a" * 32) for place, site in enumerate(SITES)),
    adapter=AdapterSpec("lora", rank=2, slots=("h.0",)),
    layout=LAYOUT,
    aggregation=AggregationTerms(alternate=True),
)
NESTED = dataclasses.replace(
    LORA,
    adapter=AdapterSpec("ffa_lora", rank=2, slots=("h.0",)),
    layout=Layout((B, "h.0.norm"), ((4, 2), (2,))),
    aggregation=AggregationTerms(ranks=(("south", 1),)),
)


def test_in_turn_a_round_holds_one_factor_and_what_is_no_factor() -> None:
    vector = np.arange(16, dtype=np.float32)
    for number, names, entries in ((1, (B, "h.0.norm"), [*range(6, 16)]), (2, (A, "h.0.norm"), [*range(6), 14, 15])):
        assert LORA.upload_layout(number).names == names
        assert LORA.upload_layout(number + 2) == LORA.upload_layout(number)
        assert LORA.upload_size(number) == len(entries)
        found = select_uploaded(LORA, number, vector)
        assert found.dtype == np.float32
        assert found.tolist() == entries
        whole = scatter_uploaded(LORA, number, np.stack([found, -found]).astype(np.float64))
        assert whole.shape == (2, 16)
        assert whole[0].tolist() == [float(entry) if entry in entries else 0.0 for entry in range(16)]
        assert (whole[1] == -whole[0]).all()
        with pytest.raises(RangeError, match="upload size=1"):
            scatter_uploaded(LORA, number, np.zeros(1))


def test_uploads_along_directions_of_several_sites_are_replayed_one_by_one() -> None:
    job = dataclasses.replace(
        JOB, local_steps=2, aggregation=AggregationTerms(individuals=True, directions=3, spacing=1e-3)
    )
    uploads = np.random.default_rng(0).normal(size=(2, 4, job.upload_size(1)))
    whole = scatter_uploaded(job, 1, uploads)
    assert whole.shape == (2, 4, job.layout.size)
    along = directions_of(job, 1)
    for place in itertools.product(range(2), range(4)):
        walked = sum(
            number * along.draw(index, job.layout.size) for index, number in enumerate(uploads[place].tolist())
        )
        np.testing.assert_allclose(whole[place], walked)
        np.testing.assert_array_equal(whole[place], scatter_uploaded(job, 1, uploads[place]))


def test_by_default_a_round_holds_the_adapter() -> None:
    assert JOB.upload_layout(1) == JOB.upload_layout(2) == JOB.layout
    vector = np.arange(JOB.layout.size, dtype=np.float32)
    assert (
        select_uploaded(JOB, 1, vector).tolist()
        == vector.tolist()
        == scatter_uploaded(JOB, 1, vector.astype(np.float64)).tolist()
    )


def test_the_terms_of_a_sum_have_the_length_of_the_rounds_vector() -> None:
    for number in (1, 2):
        request = KeysRequest(number, 1, bytes(32), bytes(32), SITES)
        assert secagg_params(LORA, request).length == LORA.upload_size(number)


def test_an_entry_is_divided_by_the_members_that_train_it() -> None:
    """Compared with a walk over every entry and every member."""
    draw = np.random.default_rng(0)
    for members in itertools.chain(itertools.combinations(SITES, 3), [SITES], [("south",)]):
        rows = {site: np.round(draw.normal(size=10), 3) for site in members}
        if "south" in rows:
            rows["south"][[1, 3, 5, 7]] = 0
        found = mean_of(NESTED, 1, np.sum(list(rows.values()), axis=0), members)
        for entry in range(10):
            second = entry < 8 and entry % 2 == 1
            trained = [rows[site][entry] for site in members if not (second and site == "south")]
            assert found[entry] == pytest.approx(sum(trained) / len(trained) if trained else 0.0)
    assert trained_mask(NESTED, 1, "south").tolist() == [True, False] * 4 + [True, True]
    assert trained_mask(NESTED, 1, "east").all()


def test_no_entry_is_the_sum_of_too_few() -> None:
    for members in itertools.chain.from_iterable(itertools.combinations(SITES, size) for size in range(1, 5)):
        count = np.sum([trained_mask(NESTED, 1, site) for site in members], axis=0)
        if ((count > 0) & (count < NESTED.n_min)).any():
            with pytest.raises(PrivacyRefusal, match="sites train so many columns"):
                check_coverage(NESTED, members)
        else:
            check_coverage(NESTED, members)
    check_coverage(LORA, ("east",))  # the number of sites in a sum is checked when the sum is opened
