"""A site's refusals, with real messages: no answer releases more than was planned."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from offsite.client.site.round_handler import Site, answer
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.coordinator.rounds.round import RoundPlan, run_round
from offsite.errors import TooFewSurvivors
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.secagg_params import adapter_digest
from offsite.simulation.run_folder import Run, simulated_sessions
from offsite.task.examples import Examples


@pytest.fixture
def opened(fed: Path, tmp_path: Path) -> tuple[JobManifest, dict[str, Site], np.ndarray]:
    """The job, its four sites, and the adapter to start from."""
    settings, sha256 = read_config(fed)
    run = Run.create(settings, sha256, tmp_path / "run")
    job = run.open_job()
    session = simulated_sessions(run, job.manifest)["ash"]
    sites = {name: run.site(name, job.manifest, session) for name in job.manifest.sites}
    return job.manifest, sites, session.layout.read(session.model)


def refusal(site: Site, stage: str, message: codec.Message) -> str:
    reply = codec.decode(answer(site, stage, codec.encode(message)))
    assert isinstance(reply, codec.Refusal), reply
    return reply.reason


def test_no_more_updates_leave_than_the_noise_was_planned_for(
    opened: tuple[JobManifest, dict[str, Site], np.ndarray],
) -> None:
    """A lost round may be repeated with fresh noise, but it uses up one of the planned releases."""
    manifest, sites, start = opened
    exchange = MemoryExchange(
        {name: lambda stage, body, s=site: answer(s, stage, body) for name, site in sites.items()}
    )
    first = run_round(manifest, RoundPlan(1, 1, bytes(32), tuple(sites)), start, exchange)
    again = run_round(manifest, RoundPlan(1, 2, bytes(32), tuple(sites)), start, exchange)
    assert first.members == again.members == tuple(sorted(sites))
    assert not np.array_equal(first.update, again.update)
    with pytest.raises(TooFewSurvivors, match="planned for 2 and covers no more"):
        run_round(manifest, RoundPlan(2, 3, bytes(32), tuple(sites)), start, exchange)


def test_what_was_not_agreed_is_refused(opened: tuple[JobManifest, dict[str, Site], np.ndarray]) -> None:
    manifest, sites, start = opened
    site = sites["ash"]
    assert "not the job" in refusal(site, "train", codec.TrainRequest(bytes(32), 1, start))
    for number in (0, manifest.rounds + 1):
        assert "rounds 1..2" in refusal(site, "train", codec.TrainRequest(manifest.digest(), number, start))
    bad = np.full_like(start, np.nan)
    assert "non-finite" in refusal(site, "train", codec.TrainRequest(manifest.digest(), 1, bad))
    assert "must be" in refusal(site, "train", codec.TrainRequest(manifest.digest(), 1, start[:-1]))
    opening = codec.KeysRequest(1, 1, bytes(32), bytes(32), tuple(sorted(sites)))
    assert "no update" in refusal(site, "keys", opening)
    for stage, message in (("masked", codec.SignedBatch(())), ("survivors", codec.Announcement(b""))):
        assert "no secure aggregation is open" in refusal(site, stage, message)
    assert "takes TrainRequest" in refusal(site, "train", codec.TrainReply(1))
    assert "did you mean" in refusal(site, "trian", codec.TrainReply(1))


def test_no_private_record_decides_whether_the_gradients_are_right(
    opened: tuple[JobManifest, dict[str, Site], np.ndarray],
) -> None:
    """A site whose records have nothing to predict trains like any other: its update is noise."""
    manifest, sites, start = opened
    site = sites["ash"]
    examples = site._job.examples
    untargeted = Examples(examples.input_ids, torch.zeros_like(examples.attention_mask))
    site._job = dataclasses.replace(site._job, examples=untargeted)
    reply = codec.decode(answer(site, "train", codec.encode(codec.TrainRequest(manifest.digest(), 1, start))))
    assert reply == codec.TrainReply(1)
    assert site._pending is not None
    assert site._pending.update.std() > 0


@pytest.mark.parametrize("stage", ["keys", "shares", "survivors", "unmask"])
@pytest.mark.parametrize("count", [0, 2])
def test_a_site_that_sends_no_message_or_two_is_left_out(
    opened: tuple[JobManifest, dict[str, Site], np.ndarray], stage: str, count: int
) -> None:
    """The others have their sum without this site, or with its earlier message."""
    manifest, sites, start = opened

    def hostile(asked: str, body: bytes) -> bytes:
        reply = codec.decode(answer(sites["elm"], asked, body))
        if asked == stage and isinstance(reply, codec.SignedBatch):
            reply = codec.SignedBatch(reply.messages * count)
        return codec.encode(reply)

    honest = {name: lambda stage, body, s=site: answer(s, stage, body) for name, site in sites.items()}
    found = run_round(
        manifest, RoundPlan(1, 1, bytes(32), tuple(sites)), start, MemoryExchange(honest | {"elm": hostile})
    )
    assert [(one.site, one.stage) for one in found.refused] == [("elm", stage)]
    assert set(found.members) >= {"ash", "birch", "cedar"}


def test_an_update_that_is_trained_anew_is_not_sent_through_the_round_before(
    opened: tuple[JobManifest, dict[str, Site], np.ndarray],
) -> None:
    """Otherwise the ledger would describe another update than the update that left."""
    manifest, sites, start = opened
    site = sites["ash"]
    answer(site, "train", codec.encode(codec.TrainRequest(manifest.digest(), 1, start)))
    opening = codec.KeysRequest(1, 1, bytes(32), adapter_digest(start), tuple(sorted(sites)))
    assert isinstance(codec.decode(answer(site, "keys", codec.encode(opening))), codec.SignedBatch)
    answer(site, "train", codec.encode(codec.TrainRequest(manifest.digest(), 2, start)))
    assert "no secure aggregation is open" in refusal(site, "masked", codec.SignedBatch(()))
