"""The SuperLink that peers reach: bodies that no honest site sends are refused, and no address or path is logged."""

import ssl
from pathlib import Path

import httpx
import pytest

from offsite.coordinator.network.superlink_session import SuperLinkPlace, SuperLinkSession
from offsite.protos.flower_pieces import OTHER_BYTES
from offsite.protos.guard import CONTENT, MAX_BODY_BYTES, MAX_OBJECT_BYTES
from tests.coordinator import test_link
from tests.coordinator.test_link import keys

pytestmark = pytest.mark.slow
place = test_link.place


def test_a_stranger_fills_no_memory_and_words_no_line_of_the_log(place: SuperLinkPlace, tmp_path: Path) -> None:
    context = ssl.create_default_context(cadata=place.ca.read_text())
    log = place.folder / "superlink.log"
    with (
        SuperLinkSession(place, keys(tmp_path, "ash"), largest=OTHER_BYTES),
        httpx.Client(verify=context, base_url=f"https://{place.local}") as peer,
    ):
        before = log.read_text()
        named = {"content-type": CONTENT.decode()}
        for path in ("/v1/fleet/push-object", "/v1/fleet/anything", "/docs/anything"):
            assert peer.post(path, content=b"x").status_code in range(400, 500)
            assert peer.post(path, content=b"x", headers=named).status_code in range(400, 500)
            assert peer.post(path, headers={"content-type": "anything"}).status_code in range(400, 500)
        for path, most in (("push-object", MAX_OBJECT_BYTES), ("push-messages", MAX_BODY_BYTES)):
            try:
                status = peer.post(f"/v1/fleet/{path}", content=bytes(most + 1), headers=named).status_code
            except httpx.TransportError:  # the server answered and closed while the peer still sends
                status = httpx.codes.REQUEST_ENTITY_TOO_LARGE
            assert status == httpx.codes.REQUEST_ENTITY_TOO_LARGE
        assert peer.get("/health").status_code == httpx.codes.OK
        after = log.read_text()[len(before) :]
        assert "anything" not in after
        assert "127.0.0.1:" not in after
