"""A coordinator that cheats, with its real keys and over its real link: running sites refuse, write down why, and stay.

Everything here goes through Flower and TLS to four `offsite client run` processes.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from offsite.client.home.redact import NOT_SIGNED, REFUSALS
from offsite.coordinator.rounds.round import RoundPlan, run_round, send_abort
from offsite.emulator.package.package_folder import TOKENIZER_FILES
from offsite.errors import TooFewSurvivors
from offsite.protos import codec
from offsite.protos.secagg_params import adapter_digest
from offsite.secagg.signed_bodies import read_announcement, write_announcement
from offsite.trust.identity import Identity
from tests.faults.conftest import Federation, wait_for
from tests.faults.hostile import HostileCoordinator, Tampered, stream_of

SITES = ("ash", "birch", "cedar", "elm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("cheated"), fed, sites=SITES)
    made.start_sites()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def coordinator(federation: Federation) -> Iterator[HostileCoordinator]:
    job = federation.job("hostile", rounds=3, training="spare_rounds = 40")
    with HostileCoordinator(federation, job) as made:
        assert made.ready() == SITES
        yield made


@pytest.fixture(autouse=True)
def nothing_left_unseen(federation: Federation) -> Iterator[None]:
    """After every attack there are as many debits as egress reports, and every refusal is in the audit log."""
    yield
    for site in SITES:
        assert len(federation.ledger(site)) == len(federation.audit(site, "egress"))


def left(federation: Federation) -> dict[str, int]:
    return {site: len(federation.audit(site, "egress")) for site in SITES}


def last_refusal(federation: Federation, site: str) -> str:
    lines = federation.audit(site, "letter refused") + federation.audit(site, "answered")
    return " ".join(str(line.get("reason")) for line in lines if line.get("reason"))


# letters


def test_a_replayed_letter_is_refused(coordinator: HostileCoordinator, federation: Federation) -> None:
    letter = coordinator.letter("ash", "offer", coordinator.offer("ash", coordinator.manifest))
    assert isinstance(coordinator.send("ash", "offer", letter), codec.OfferReply)
    reply = coordinator.send("ash", "offer", letter)
    assert isinstance(reply, codec.Refusal)
    assert reply.reason == REFUSALS["ProtocolViolation"]
    assert "drop this copy" in last_refusal(federation, "ash")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"identity": Identity.generate()}, "did not sign these bytes"),
        ({"recipient": "birch"}, "recipient='birch': 'ash' was expected"),
        ({"sender": "birch"}, "sender='birch': 'coordinator' was expected"),
        ({"federation": bytes(32)}, "federation=000000000000"),
    ],
)
def test_a_forged_letter_is_refused(coordinator: HostileCoordinator, changed: dict[str, Any], reason: str) -> None:
    offer = coordinator.offer("ash", coordinator.manifest)
    assert reason in coordinator.refused("ash", "offer", offer, **changed)


def test_a_letter_about_another_stage_is_refused(coordinator: HostileCoordinator) -> None:
    letter = coordinator.letter("ash", "unmask", codec.SignedBatch(()))
    reply = coordinator.send("ash", "offer", letter)
    assert isinstance(reply, codec.Refusal)
    assert "the letter inside is about 'unmask'" in coordinator.reason("ash")


@pytest.mark.parametrize("place", [3, 60, 200, -40, -1])
def test_a_letter_with_a_flipped_bit_is_refused(coordinator: HostileCoordinator, place: int) -> None:
    letter = bytearray(coordinator.letter("ash", "offer", coordinator.offer("ash", coordinator.manifest)))
    letter[place] ^= 4
    reply = coordinator.send("ash", "offer", bytes(letter))
    assert isinstance(reply, codec.Refusal)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_truncated_letter_is_refused(coordinator: HostileCoordinator, size: int) -> None:
    letter = coordinator.letter("ash", "offer", coordinator.offer("ash", coordinator.manifest))
    reply = coordinator.send("ash", "offer", letter[:size])
    assert isinstance(reply, codec.Refusal)
    assert reply.kind == "MalformedMessage"


# the job


def test_a_changed_job_with_a_good_letter_is_refused(coordinator: HostileCoordinator) -> None:
    """The letter is signed, but the signature of the manifest inside belongs to another manifest."""
    honest = coordinator.offer("ash", coordinator.manifest)
    for old, new in ((b'"epsilon":8.0', b'"epsilon":8.5'), (b'"rounds":3', b'"rounds":4')):
        assert old in honest.manifest
        changed = dataclasses.replace(honest, manifest=honest.manifest.replace(old, new))
        assert "did not sign these bytes" in coordinator.refused("ash", "offer", changed)


def test_owners_signatures_are_counted_and_checked(coordinator: HostileCoordinator) -> None:
    honest = coordinator.offer("ash", coordinator.manifest)
    fewer = dataclasses.replace(honest, owners=honest.owners[1:])
    reply = coordinator.ask("ash", "offer", fewer)
    assert isinstance(reply, codec.OfferReply)
    assert (reply.state, reply.detail) == ("waiting", NOT_SIGNED)
    swapped = tuple((site, honest.owners[0][1]) for site, _ in honest.owners)
    assert "has not signed" in coordinator.refused("ash", "offer", dataclasses.replace(honest, owners=swapped))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"release": "9.0.0"}, "release='9.0.0': this site runs offsite"),
        ({"epoch": 2}, "epoch=2: the owners signed"),
        ({"n_min": 2}, "n_min=2: the owners signed 3"),
        ({"accomplices": 0}, "accomplices=0: the owners signed 1"),
        ({"update_bound": 1e9}, "update_bound=1000000000.0: the owners signed"),
        ({"roster": (("ash", "00" * 32),)}, "the owners signed"),
        ({"metrics": ("loss",)}, "metric='loss'"),
        ({"learning_rate": "fast"}, "job learning_rate: must be a number from 1e-09 to 1e+09"),
        ({"rounds": -1}, "job rounds: must be a whole number"),
    ],
)
def test_a_job_beyond_what_was_agreed_is_refused(
    coordinator: HostileCoordinator, federation: Federation, changed: dict[str, Any], reason: str
) -> None:
    refusal = coordinator.refused("ash", "offer", coordinator.offer("ash", coordinator.job_like(**changed)))
    assert reason in refusal
    assert reason in last_refusal(federation, "ash")


def test_a_job_without_privacy_is_refused(coordinator: HostileCoordinator) -> None:
    for changed in ({"private": False}, {"epsilon": 9.0}, {"epsilon": 1e9}):
        terms = dataclasses.replace(coordinator.manifest.privacy, **changed)
        reason = coordinator.refused("ash", "offer", coordinator.offer("ash", coordinator.job_like(privacy=terms)))
        assert "private=false" in reason or "the owners signed 8.0" in reason


def test_not_a_number_in_a_job_is_refused(coordinator: HostileCoordinator) -> None:
    content = coordinator.manifest.to_bytes().replace(b'"epsilon":8.0', b'"epsilon":NaN')
    assert "does not parse" in coordinator.refused("ash", "offer", coordinator.offer("ash", content))


# training


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "non-finite"), (np.inf, "inf"), (1e30, "peak=1e+30"), (-1e9, "peak=1e+09")]
)
def test_an_adapter_that_nobody_would_train_from_is_refused(
    coordinator: HostileCoordinator, federation: Federation, value: float, reason: str
) -> None:
    before = left(federation)
    start = coordinator.start().copy()
    start[1] = value
    request = codec.TrainRequest(coordinator.manifest.digest(), 1, start)
    assert reason in coordinator.refused("ash", "train", request)
    assert left(federation) == before


def test_an_adapter_of_another_length_or_job_is_refused(coordinator: HostileCoordinator) -> None:
    job, start = coordinator.manifest.digest(), coordinator.start()
    assert "must be" in coordinator.refused("ash", "train", codec.TrainRequest(job, 1, start[:-1]))
    assert "not the job" in coordinator.refused("ash", "train", codec.TrainRequest(bytes(32), 1, start))
    assert "has rounds 1..3" in coordinator.refused("ash", "train", codec.TrainRequest(job, 4, start))


# secure aggregation


def trained(coordinator: HostileCoordinator) -> None:
    request = codec.TrainRequest(coordinator.manifest.digest(), 1, coordinator.start())
    for site in SITES:
        assert isinstance(coordinator.ask(site, "train", request), codec.TrainReply)


def opening(coordinator: HostileCoordinator, invited: tuple[str, ...]) -> codec.KeysRequest:
    plan = coordinator.plan()
    return codec.KeysRequest(1, plan.sequence, plan.nonce, adapter_digest(coordinator.start()), invited)


@pytest.mark.parametrize("invited", [("ash",), ("ash", "birch")])
def test_a_cohort_of_one_or_two_is_refused(
    coordinator: HostileCoordinator, federation: Federation, invited: tuple[str, ...]
) -> None:
    trained(coordinator)
    before = left(federation)
    refusal = coordinator.refused("ash", "keys", opening(coordinator, invited))
    assert f"invited={len(invited)}; 3 to 64 sites make a round" in refusal
    assert left(federation) == before


def cheat(coordinator: HostileCoordinator, stage: str, **how: Any) -> tuple[Tampered, str]:
    """Runs a round in which one stage is tampered with; it must have no sum. Returns what was seen, and why."""
    exchange = Tampered(coordinator.correspondence(), stage, **how)
    plan: RoundPlan = coordinator.plan()
    try:
        with pytest.raises(TooFewSurvivors) as ended:
            run_round(coordinator.manifest, plan, coordinator.start(), exchange)
    finally:
        send_abort(coordinator.correspondence(), SITES, "a test")
    return exchange, str(ended.value)


def reasons(coordinator: HostileCoordinator, replies: dict[str, bytes]) -> str:
    """The reasons of the sites that refused, from their own audit logs."""
    refused = [site for site, body in replies.items() if isinstance(codec.decode(body), codec.Refusal)]
    return " | ".join(coordinator.reason(site) for site in refused)


def test_a_roster_of_one_is_refused(coordinator: HostileCoordinator, federation: Federation) -> None:
    before = left(federation)

    def alone(payloads: dict[str, bytes]) -> dict[str, bytes]:
        batch = codec.decode(payloads["ash"])
        assert isinstance(batch, codec.SignedBatch)
        return {
            site: codec.encode(codec.SignedBatch(tuple(m for m in batch.messages if m.sender == site)))
            for site in payloads
        }

    exchange, why = cheat(coordinator, "shares", outgoing=alone)
    assert reasons(coordinator, exchange.seen["shares"]).count("keys=1 sites; this site needs 3") == 4
    assert "sites=0 after shares: 3 are needed" in why
    assert left(federation) == before


def test_two_rosters_have_no_common_sum(coordinator: HostileCoordinator, federation: Federation) -> None:
    """Two sites hear of four members, two of three: nobody can open the others' shares, and no update leaves."""
    before = left(federation)

    def split(payloads: dict[str, bytes]) -> dict[str, bytes]:
        batch = codec.decode(payloads["ash"])
        assert isinstance(batch, codec.SignedBatch)
        three = codec.encode(codec.SignedBatch(tuple(m for m in batch.messages if m.sender != "elm")))
        return payloads | {"cedar": three, "birch": three}

    exchange, _ = cheat(coordinator, "shares", outgoing=split)
    assert "masked" not in exchange.seen or "did not" in reasons(coordinator, exchange.seen["masked"])
    assert left(federation) == before


def test_two_survivor_sets_open_nothing(coordinator: HostileCoordinator) -> None:
    """With different survivors at the sites, no site gets the signatures that it needs before it gives a share."""

    def split(payloads: dict[str, bytes]) -> dict[str, bytes]:
        announced = codec.decode(payloads["ash"])
        assert isinstance(announced, codec.Announcement)
        transcript, digests = read_announcement(announced.body)
        fewer = {site: digest for site, digest in digests.items() if site != "elm"}
        other = codec.encode(codec.Announcement(write_announcement(transcript, fewer)))
        return payloads | {"cedar": other, "birch": other}

    exchange, why = cheat(coordinator, "survivors", outgoing=split)
    assert "unmask" not in exchange.seen or all(
        isinstance(codec.decode(body), codec.Refusal) for body in exchange.seen["unmask"].values()
    )
    assert why


def test_no_site_gives_both_shares_of_a_peer(coordinator: HostileCoordinator, federation: Federation) -> None:
    """A second set of survivors, after the first was signed, is refused; so is every unmasking after that."""
    caught: dict[str, bytes] = {}

    def remember(payloads: dict[str, bytes]) -> dict[str, bytes]:
        caught.update(payloads)
        return {}

    exchange, _ = cheat(coordinator, "unmask", outgoing=remember)
    announced = codec.decode(exchange.asked["survivors"]["ash"])
    assert isinstance(announced, codec.Announcement)
    transcript, digests = read_announcement(announced.body)
    fewer = {site: digest for site, digest in digests.items() if site != "elm"}
    second = codec.Announcement(write_announcement(transcript, fewer))
    for site in ("ash", "birch", "cedar"):
        assert coordinator.refused(site, "survivors", second)
        assert coordinator.refused(site, "unmask", caught[site])
    unmasked = [one for one in federation.audit("ash", "answered") if one["stage"] == "unmask" and "error" not in one]
    assert unmasked == []


def test_an_update_that_left_is_not_summed_again_with_others(coordinator: HostileCoordinator) -> None:
    """The round is lost after the upload; its update is gone, and a second cohort gets no update."""
    cheat(coordinator, "survivors", outgoing=lambda payloads: {})
    assert "no update of this round is waiting" in coordinator.refused(
        "ash", "keys", opening(coordinator, ("ash", "birch", "cedar"))
    )


def test_after_all_this_an_honest_round_has_a_sum(coordinator: HostileCoordinator, federation: Federation) -> None:
    exchange = Tampered(coordinator.correspondence(), "")
    result = run_round(
        coordinator.manifest, coordinator.plan(), coordinator.start(), exchange, coordinator.ledgers.learn
    )
    assert result.members == SITES
    assert np.isfinite(result.update).all()
    for site in SITES:  # the same question again gets the same bytes, another question nothing
        again = coordinator.ask(site, "unmask", exchange.asked["unmask"][site])
        assert codec.encode(again) == exchange.seen["unmask"][site]
        assert "no secure aggregation is open" in coordinator.refused(site, "unmask", codec.SignedBatch(()))


# the ledger


def test_a_ledger_that_was_set_back_is_noticed(coordinator: HostileCoordinator, federation: Federation) -> None:
    """A site is restored from yesterday's backup; the coordinator is honest here and has countersigned a newer head."""
    ledger = federation.site("elm") / "state" / "ledger-main.jsonl"
    newest = ledger.read_bytes()
    lines = newest.splitlines(keepends=True)
    assert len(lines) >= 2
    federation.kill("elm")
    ledger.write_bytes(b"".join(lines[:-1]))
    federation.start_site("elm")
    wait_for(lambda: "elm" in coordinator.link.node_ids())
    wait_for(lambda: coordinator.exchange.send("offer", {"elm": b""}))
    refusal = coordinator.refused("elm", "offer", coordinator.offer("elm", coordinator.manifest))
    assert "an old copy was restored" in refusal
    assert "an old copy was restored" in last_refusal(federation, "elm")
    federation.kill("elm")
    ledger.write_bytes(newest)
    federation.start_site("elm")
    wait_for(lambda: "elm" in coordinator.link.node_ids())
    assert coordinator.ready() == SITES


# packages; the sites leave the good job for these, so they come last


def packed(coordinator: HostileCoordinator) -> tuple[dict[str, Any], dict[str, bytes]]:
    folder = coordinator.setting.store.package
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, {name: (folder / name).read_bytes() for name in manifest["files"]}


def entry(content: bytes) -> dict[str, Any]:
    import hashlib

    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def put(manifest: dict[str, Any], files: dict[str, bytes], name: str, content: bytes) -> None:
    files[name] = content
    manifest["files"][name] = entry(content)


def _path_traversal(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    put(manifest, files, "../../escaped.txt", b"out")
    return "is not a plain file name"


def _absolute_path(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    put(manifest, files, "/tmp/escaped.txt", b"out")
    return "is not a plain file name"


def _pickle_beside(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    put(manifest, files, "pytorch_model.bin", b"cos\nsystem\n(S'touch /tmp/offsite-pickle'\ntR.")
    return "only weights, configuration and tokenizer files"


def _pickle_instead(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    put(manifest, files, "emulator.safetensors", b"cos\nsystem\n(S'touch /tmp/offsite-pickle'\ntR.")
    return "not a safetensors file"


def _code(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    put(manifest, files, "modeling_trap.py", b"raise SystemExit\n")
    return "only weights, configuration and tokenizer files"


def _remote_code(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    config = json.loads(files["config.json"]) | {"auto_map": {"AutoModelForCausalLM": "trap--modeling.Trap"}}
    put(manifest, files, "config.json", json.dumps(config).encode())
    return "no key may be one of"


def _bomb_of_blocks(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    config = json.loads(files["config.json"]) | {"num_hidden_layers": 50_000_000, "layer_types": None}
    put(manifest, files, "config.json", json.dumps(config).encode())
    return "asks for over"


def _bomb_of_widths(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    config = json.loads(files["config.json"]) | {"hidden_size": 1 << 26, "intermediate_size": 1 << 26}
    put(manifest, files, "config.json", json.dumps(config).encode())
    return "more memory than there is"


def _bomb_of_bytes(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    """A zip bomb in the form of a package: a petabyte is announced, and a few bytes come."""
    manifest["files"]["vocab.txt"] = {"sha256": "00" * 32, "bytes": 1 << 50}
    return "ends too early"


def _more_than_announced(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    put(manifest, files, "vocab.txt", b"one more")
    files["zzz"] = b"not announced"
    return "goes on after its last file"


def _million_tensors(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(1_000_000)}
    content = json.dumps(header).encode()
    put(manifest, files, "emulator.safetensors", len(content).to_bytes(8, "little") + content)
    return "is missing or was added"


def _not_finite(manifest: dict[str, Any], files: dict[str, bytes]) -> str:
    import tempfile

    from offsite.emulator.package.package_folder import tensor_sha256

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(files["emulator.safetensors"])
        tensors = load_file(path)
    name = next(one for one, value in tensors.items() if value.dtype == np.float32 and "#" not in one)
    tensors[name].reshape(-1)[0] = np.nan
    put(manifest, files, "emulator.safetensors", save(tensors))
    import torch

    manifest["tensors"][name] = tensor_sha256(torch.from_numpy(tensors[name]))
    return "a value is not finite"


PACKAGES = (
    _path_traversal,
    _absolute_path,
    _pickle_beside,
    _pickle_instead,
    _code,
    _remote_code,
    _bomb_of_blocks,
    _bomb_of_widths,
    _bomb_of_bytes,
    _more_than_announced,
    _million_tensors,
    _not_finite,
)


@pytest.mark.parametrize("trap", PACKAGES, ids=lambda trap: trap.__name__.strip("_"))
def test_a_hostile_package_is_refused(
    coordinator: HostileCoordinator, federation: Federation, trap: Callable[..., str]
) -> None:
    manifest, files = packed(coordinator)
    reason = trap(manifest, files)
    stream, digest = stream_of(manifest, files)
    tokenizer = _tokenizer_of(manifest)
    job = coordinator.job_like(emulator=digest, tokenizer=tokenizer)
    reply = coordinator.offered("ash", coordinator.offer("ash", job, coordinator.deliver_stream(stream, job)))
    assert (reply.state, reason in coordinator.reason("ash")) == ("refused", True), coordinator.reason("ash")
    assert not Path("/tmp/offsite-pickle").exists()
    assert not Path("/tmp/escaped.txt").exists()
    assert not list(federation.site("ash").rglob("escaped.txt"))
    packages = federation.site("ash") / "packages"
    assert [path.name for path in packages.iterdir() if path.suffix in (".partial", ".plain")] == []
    shutil.rmtree(packages / digest, ignore_errors=True)


def _tokenizer_of(manifest: dict[str, Any]) -> str:
    import hashlib

    lines = [f"{name} {manifest['files'][name]['sha256']}\n" for name in sorted(manifest["files"])]
    return hashlib.sha256("".join(line for line in lines if line.split()[0] in TOKENIZER_FILES).encode()).hexdigest()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"emulator": "ab" * 32}, "announced abab"),
        ({"tokenizer": "ab" * 32}, "the job manifest names abab"),
    ],
)
def test_another_emulator_or_tokenizer_than_announced_is_refused(
    coordinator: HostileCoordinator, changed: dict[str, Any], reason: str
) -> None:
    job = coordinator.job_like(**changed)
    delivery = coordinator.deliver(coordinator.setting.store.package, job)
    reply = coordinator.offered("ash", coordinator.offer("ash", job, delivery))
    assert (reply.state, reason in coordinator.reason("ash")) == ("refused", True), coordinator.reason("ash")


def test_another_adapter_schema_than_announced_is_refused(coordinator: HostileCoordinator) -> None:
    layout = coordinator.manifest.layout
    other = dataclasses.replace(layout, shapes=tuple((*shape[:-1], shape[-1] + 1) for shape in layout.shapes))
    job = coordinator.job_like(layout=other)
    delivery = coordinator.deliver(coordinator.setting.store.package, job)
    reply = coordinator.offered("ash", coordinator.offer("ash", job, delivery))
    assert reply.state == "refused"
    assert layout.digest().hex()[:16] in coordinator.reason("ash")
    assert other.digest().hex()[:16] in coordinator.reason("ash")


def test_a_key_that_is_sealed_to_another_site_does_not_open(coordinator: HostileCoordinator) -> None:
    job = coordinator.job_like(emulator="cd" * 32)
    delivery = coordinator.deliver(coordinator.setting.store.package, job)
    offer = coordinator.offer("ash", job, delivery, sealed_key=delivery.sealed["birch"])
    reply = coordinator.offered("ash", offer)
    assert (reply.state, "does not open" in coordinator.reason("ash")) == ("refused", True)


def test_after_all_this_the_site_still_takes_the_honest_job(coordinator: HostileCoordinator) -> None:
    assert coordinator.ready() == SITES
