"""Stages as Flower records, and the bundle without code: the only forms in which our messages pass through Flower."""

import hashlib
import io
from functools import cache

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk

from offsite.errors import MalformedMessage
from offsite.protos import flower_pieces
from offsite.protos.messages import NAME

SHORT_BYTES = 1 << 16
_MAGIC = 10  # bytes of a .npy file up to its header: magic, version, and the header's length in the last two
NAME_STAGE = "name"  # asks a node for its site; the answer's bytes are the site's name

# Flower wants a bundle with every run. Ours holds no code; it only names apps. The names are those of an earlier layout
# of our modules and stay: sites accept a bundle by the SHA-256 of these bytes, and nothing loads an app by its name.
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
    """Returns the only bundle that sites accept, and its SHA-256 in hexadecimal; every process makes the same bytes."""
    from flwr.cli.build import build_fab_from_files

    content, _ = build_fab_from_files({"pyproject.toml": BUNDLE})
    return content, hashlib.sha256(content).hexdigest()


def pack(stage: str, body: bytes) -> RecordDict:
    """Returns the record of a stage: its name and its bytes, short bytes in place, long bytes as one flat uint8 array.

    Flower moves every array as several objects, each with a request of its own at every hop, so that 500 small tensors
    are 30 to 40 times slower than one flat array of the same bytes. Bytes in place cost no further object, but are not
    cut into pieces, which long bytes need.
    """
    if len(body) <= SHORT_BYTES:
        return RecordDict({"stage": ConfigRecord({"name": stage, "body": body})})
    # the bytes that numpy would write, without its further copies
    data = b"".join((_header(len(body)), body))
    flat = Array("uint8", (len(body),), "numpy.ndarray", data)
    record = RecordDict({"stage": ConfigRecord({"name": stage}), "body": ArrayRecord({"flat": flat})})
    if (piece := flower_pieces.piece_of(len(data))) > flower_pieces.PIECE:  # else Flower cuts
        view, kept = memoryview(data), record.array_records["body"]["flat"]  # the record keeps a copy of the array
        chunks = [ArrayChunk(view[start : start + piece]) for start in range(0, len(data), piece)]
        kept.__dict__["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
    return record


def unpack(record: RecordDict) -> tuple[str, bytes]:
    """Returns stage and bytes of a record.

    Raises:
      MalformedMessage: the stage has a name that no stage has; any other fault raises Flower's own exception.
    """
    config = record.config_records["stage"]
    stage, short = str(config["name"]), config.get("body")
    if len(stage) > NAME or not stage.isprintable():
        raise MalformedMessage(f"stage of {len(stage)} characters: no stage has such a name")
    if isinstance(short, bytes):
        return stage, short
    return stage, _content(record.array_records["body"]["flat"].data)


def _content(data: bytes) -> bytes:
    """Returns the bytes of a flat uint8 array in numpy's file format, whose header has to name exactly their number.

    numpy itself reserves what a header names, before it looks how many bytes follow.
    """
    begin = _MAGIC + int.from_bytes(data[_MAGIC - 2 : _MAGIC], "little")
    if data[:begin] != _header(len(data) - begin):
        raise MalformedMessage(f"body of {len(data)} bytes: not a flat array of exactly these bytes; drop the message")
    return data[begin:]


def _header(size: int) -> bytes:
    """Returns the header that numpy writes before `size` bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    return header.getvalue()
