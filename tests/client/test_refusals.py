"""No word of an exception crosses the wire: the coordinator hears constant sentences, the owner the reason."""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offsite import errors
from offsite.client.home.redact import DETAILS, FAULT, NO_MEMORY, REFUSALS, for_peer
from offsite.client.network.message_endpoint import SignedEndpoint
from offsite.protos import codec, signed_messages
from offsite.trust.identity import Identity
from tests.memory_federation import RunningSite, World, make_world

ROOT = Path(__file__).resolve().parents[2]
SECRET = "data set 'heart-patients': 5.31 of 8 is spent, record 'Mr Smith'"
OURS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.OffsiteError) and kind is not errors.OffsiteError
]
OTHERS = [RuntimeError, MemoryError, KeyError, OSError, ZeroDivisionError]
LOADING = (
    errors.DataError,
    errors.PrivacyRefusal,
    errors.DigestMismatch,
    errors.UnsupportedModel,
    RuntimeError,
    MemoryError,
)
STAGES = ("offer", "finish", "train", "keys", "update", "shares", "masked", "survivors", "unmask", "abort", "other")


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("refusals"))


@pytest.fixture
def site(world: World, tmp_path: Path) -> RunningSite:
    return RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)


def texts(message: codec.Message) -> list[str]:
    if isinstance(message, codec.Refusal):
        return [message.kind, message.reason]
    return [message.state, message.detail] if isinstance(message, codec.OfferReply) else []


def test_every_kind_of_error_has_one_sentence() -> None:
    assert {kind.__name__ for kind in OURS} | {FAULT} == set(REFUSALS)
    sentences = [*REFUSALS.values(), NO_MEMORY, *DETAILS]
    assert all(
        text.isascii() and text.isprintable() and not re.search(r"[0-9={}]", text.replace("SHA-256", ""))
        for text in sentences
    )
    assert codec.decode(codec.encode(codec.Refusal(FAULT, NO_MEMORY))) == codec.Refusal(FAULT, NO_MEMORY)


@pytest.mark.parametrize("stage", STAGES)
def test_no_word_of_an_exception_leaves_in_an_answer(site: RunningSite, stage: str) -> None:
    for kind in (*OURS, *OTHERS):

        def fail(*_: object, kind: type[Exception] = kind) -> bytes:
            raise kind(SECRET)

        site.service._dispatch = fail  # type: ignore[method-assign]
        answer = site.service.handle(stage, b"")
        message = codec.decode(answer)
        assert isinstance(message, codec.Refusal)
        name = kind.__name__ if kind in OURS else FAULT
        assert (message.kind, message.reason) == (name, NO_MEMORY if kind is MemoryError else REFUSALS[name])
        assert b"heart" not in answer
    assert "heart-patients" in (site.folder / "audit.jsonl").read_text()  # the owner reads it


@pytest.mark.parametrize("step", ["fetch", "open_session", "open_site", "reserve"])
def test_no_word_of_an_exception_leaves_while_a_job_is_loaded(
    world: World, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offsite.client.service import job_loading

    for kind in LOADING:

        def fail(*_: object, kind: type[Exception] = kind) -> Any:
            raise kind(SECRET)

        site = RunningSite(world, "ash", tmp_path / kind.__name__)
        changes: dict[str, Any] = {step: fail}
        if step == "reserve":
            monkeypatch.setattr(type(site.service._runtime), "reserve", fail)
        else:
            site.change(**changes)
        loader = job_loading.JobLoader(world.offer("ash"), world.manifest, site.service._runtime)
        loader._settled.set = loader._stopped.set  # type: ignore[method-assign]  # what may pass is not tried again
        loader.run()
        reply = for_peer(site.service._reply(loader.state, loader.detail))
        assert isinstance(reply, codec.OfferReply)
        name = kind.__name__ if kind in OURS else FAULT
        assert reply.detail == f"{name}: {NO_MEMORY if kind is MemoryError else REFUSALS[name]}"


@pytest.mark.parametrize("kind", OURS)
def test_no_word_of_an_exception_leaves_in_a_letter(tmp_path: Path, kind: type[Exception]) -> None:
    def fail(stage: str, body: bytes) -> bytes:
        raise kind(SECRET)

    coordinator, own, told = Identity.generate(), Identity.generate(), list[str]()
    endpoint = SignedEndpoint(
        "ash",
        own,
        coordinator=coordinator.public,
        federation=bytes(32),
        memory=tmp_path / "letters.json",
        handle=fail,
        on_refused=told.append,
    )
    letter = signed_messages.write(
        coordinator,
        bytes(32),
        sender=signed_messages.COORDINATOR,
        recipient="ash",
        stage="keys",
        number=1,
        body=b"body",
    )
    answer = endpoint.answer("keys", letter)
    assert b"heart" not in answer
    assert codec.decode(codec.decode_signed_message(answer).body) == codec.Refusal(
        kind.__name__, REFUSALS[kind.__name__]
    )
    assert told == [f"{kind.__name__}: {SECRET}"]


@pytest.mark.parametrize(
    "message",
    [
        codec.Refusal("Custom", SECRET),
        codec.Refusal("PolicyRefusal", SECRET),
        codec.Refusal(FAULT, SECRET),
        codec.OfferReply("refused", SECRET, 0, b""),
        codec.OfferReply("refused", f"PolicyRefusal: {SECRET}", 0, b""),
        codec.OfferReply("waiting", SECRET, 0, b""),
        codec.OfferReply("fetching", SECRET, 0, b""),
        codec.OfferReply("ready", SECRET, 0, b""),
    ],
)
def test_whatever_a_handler_says_only_the_table_crosses(site: RunningSite, message: codec.Message) -> None:
    site.service._dispatch = lambda *_: codec.encode(message)  # type: ignore[method-assign]
    told = codec.decode(site.service.handle("train", b""))
    known = {*REFUSALS, *REFUSALS.values(), NO_MEMORY, *DETAILS, *(f"{k}: {v}" for k, v in REFUSALS.items())}
    assert set(texts(told)) <= known | {"refused", "waiting", "fetching", "ready"}


# The source: where words could cross


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "client").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def calls(tree: ast.AST, wanted: Callable[[str], bool]) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and wanted(ast.unparse(node.func))]


def test_refusals_are_made_in_few_places_and_each_meets_the_table() -> None:
    """A new place that makes a refusal is held against this list; the words of all of them pass `for_peer`."""
    made = {path: len(found) for path, tree in sources() if (found := calls(tree, lambda f: f.endswith("Refusal")))}
    wire = {
        path: len(found) for path, tree in sources() if (found := calls(tree, lambda f: f == "codec.Refusal")) and found
    }
    assert wire == {
        "client/home/redact.py": 1,
        "client/network/message_endpoint.py": 1,  # inside for_peer
        "client/service/stage_handler.py": 2,  # before for_peer in `handle`
        "client/site/round_handler.py": 1,  # passes through `handle` of the stage handler
    }
    assert set(wire) <= set(made)
    replies = {path for path, tree in sources() if calls(tree, lambda f: f.endswith("OfferReply"))}
    assert replies == {"client/service/stage_handler.py"}
    endpoint = (ROOT / "client/network/message_endpoint.py").read_text()
    assert "for_peer(codec.Refusal(" in endpoint
    handler = ast.parse((ROOT / "client/service/stage_handler.py").read_text())
    (handle,) = [node for node in ast.walk(handler) if isinstance(node, ast.FunctionDef) and node.name == "handle"]
    assert len(calls(handle, lambda f: f == "for_peer")) == 1


def test_flowers_own_errors_have_constant_reasons() -> None:
    found = [call for _, tree in sources() for call in calls(tree, lambda f: f == "Error")]
    assert len(found) == 2
    for _, tree in sources():
        constants = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name)
        }
        for call in calls(tree, lambda f: f == "Error"):
            (reason,) = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
            value = constants[reason.id] if isinstance(reason, ast.Name) else reason
            assert isinstance(value, ast.Constant), ast.unparse(call)


def test_the_audit_log_of_a_refused_job_names_the_reason_once(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"epsilon_cap": 8.0})
    from tests.client.test_service import offered

    for _ in range(3):
        reply = offered(site, "refused")
        assert reply.detail == f"PrivacyRefusal: {REFUSALS['PrivacyRefusal']}"
    lines = [json.loads(line) for line in (site.folder / "audit.jsonl").read_text().splitlines()]
    (refused,) = [line["fields"] for line in lines if line["kind"] == "refused"]
    assert "with the whole job at delta=1e-06: the cap of data set 'main' is 8" in refused["reason"]
