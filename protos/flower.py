"""Stages as Flower records, and the bundle without code: the only forms in which ours pass through Flower."""

import hashlib
from functools import cache

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from offsite.errors import MalformedMessage
from offsite.protos.messages import NAME

SHORT_BYTES = 1 << 16
NAME_STAGE = "name"  # asks a node which site it is; its bytes are the site's name

# Flower wants a bundle with every run. Ours names the app that is installed at the site and holds no code.
BUNDLE = b"""\
[project]
name = "offsite"
version = "1.0.0"
description = "names the locally installed programs; holds no code"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "offsite"

[tool.flwr.app.components]
serverapp = "coordinator.flower_edge:app"
clientapp = "client.flower_edge:app"
"""


@cache
def bundle() -> tuple[bytes, str]:
    """Returns the one bundle that sites accept, and its SHA-256 in hexadecimal; the same bytes in every process."""
    from flwr.cli.build import build_fab_from_files

    content, _ = build_fab_from_files({"pyproject.toml": BUNDLE})
    return content, hashlib.sha256(content).hexdigest()


def pack(stage: str, body: bytes) -> RecordDict:
    """Returns a record of a stage: its name and its bytes, short ones in place, long ones as one flat uint8 array.

    Flower moves every array as several objects, each with a request of its own at every hop, so that 500 small tensors
    are 30 to 40 times slower than one flat array of the same bytes; bytes in place cost no object more, and are not cut
    into pieces, which long ones need.
    """
    if len(body) <= SHORT_BYTES:
        return RecordDict({"stage": ConfigRecord({"name": stage, "body": body})})
    flat = Array(np.frombuffer(body, dtype=np.uint8))
    return RecordDict({"stage": ConfigRecord({"name": stage}), "body": ArrayRecord({"flat": flat})})


def unpack(record: RecordDict) -> tuple[str, bytes]:
    """Returns stage and bytes of a record.

    Raises:
      MalformedMessage: its stage has no name of one; what else is wrong raises what Flower raises.
    """
    config = record.config_records["stage"]
    stage, short = str(config["name"]), config.get("body")
    if len(stage) > NAME or not stage.isprintable():
        raise MalformedMessage(f"stage of {len(stage)} characters: no stage has such a name")
    if isinstance(short, bytes):
        return stage, short
    return stage, record.array_records["body"]["flat"].numpy().tobytes()
