"""Stages as Flower records, over Flower's own wire form; and the bundle, which holds no code and never changes."""

import hashlib
import io
import subprocess
import sys
import tomllib
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import array
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Wire
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from offsite.errors import MalformedMessage
from offsite.protos import flower, flower_pieces
from offsite.protos.flower import BUNDLE, SHORT_BYTES, bundle, pack, unpack

ROOT = Path(__file__).resolve().parents[2]
SIZES = (0, 1, 3, 255, SHORT_BYTES - 1, SHORT_BYTES, SHORT_BYTES + 1, 3 * SHORT_BYTES + 5)


def over_the_wire(record: RecordDict) -> RecordDict:
    """Returns the record as it arrives at the other end of Flower."""
    return recorddict_from_proto(Wire.FromString(recorddict_to_proto(record).SerializeToString()))


def body(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("size", SIZES)
def test_a_stage_comes_back(size: int) -> None:
    record = pack("masked", body(size))
    assert unpack(over_the_wire(record)) == unpack(record) == ("masked", body(size))


@pytest.mark.parametrize("special", [b"\0", b"\0" * 70_000, b"\x93NUMPY\x01\x00", b"\xff\xfe"])
def test_bytes_that_mean_something_to_others_come_back(special: bytes) -> None:
    assert unpack(over_the_wire(pack("keys", special))) == ("keys", special)


@pytest.mark.parametrize("size", SIZES)
def test_long_bodies_are_one_array_and_short_ones_none(size: int) -> None:
    """Flower moves each array with requests of its own, so there must never be more than one array."""
    record = pack("masked", body(size))
    arrays = [array for one in record.array_records.values() for array in one.values()]
    assert len(arrays) == (size > SHORT_BYTES)
    assert all(array.shape == (size,) and array.dtype == "uint8" for array in arrays)
    assert sum(isinstance(value, bytes) for value in record.config_records["stage"].values()) == (size <= SHORT_BYTES)


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"stage": ConfigRecord({"body": b"x"})}),
        RecordDict({"stage": ConfigRecord({"name": "keys"})}),
        RecordDict({"stage": ConfigRecord({"name": "keys", "body": "text"})}),
        RecordDict({"stage": ConfigRecord({"name": "keys"}), "body": ArrayRecord()}),
        RecordDict({"stage": ArrayRecord()}),
    ],
)
def test_a_record_that_is_no_stage_is_a_key_error(record: RecordDict) -> None:
    """The executor answers a key error with an error of Flower's instead of calling the site."""
    with pytest.raises(KeyError):
        unpack(record)


def flat(data: bytes) -> RecordDict:
    array = Array("uint8", (1,), "numpy.ndarray", data)
    return RecordDict({"stage": ConfigRecord({"name": "keys"}), "body": ArrayRecord({"flat": array})})


def written(array: np.ndarray, **header: object) -> bytes:
    """Returns numpy's file of an array, with other words in its header."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": array.shape} | header)
    return file.getvalue() + array.tobytes()


def test_a_body_is_read_as_numpy_reads_it() -> None:
    for size in SIZES:
        array = np.frombuffer(body(size), dtype=np.uint8)
        assert unpack(flat(written(array))) == ("keys", np.load(io.BytesIO(written(array))).tobytes())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        written(np.zeros(8, np.uint8), shape=(1 << 40,)),
        written(np.zeros(8, np.uint8), shape=(7,)),
        written(np.zeros(8, np.uint8), shape=(2, 4)),
        written(np.zeros(8, np.uint8), descr="<f8", shape=(1,)),
        written(np.zeros(8, np.uint8), descr="|V1073741824", shape=(1,)),
        written(np.zeros(8, np.uint8), fortran_order=True),
        written(np.zeros(8, np.uint8))[:-1],
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_a_body_whose_header_names_other_bytes_is_refused_before_room_is_made(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage, match="not a flat array of exactly these bytes"):
            unpack(flat(data))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_bundle_holds_no_code() -> None:
    content, digest = bundle()
    assert digest == hashlib.sha256(content).hexdigest()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]
        project = tomllib.loads(archive.read("pyproject.toml").decode())
        listed = archive.read(".info/CONTENT").decode().splitlines()
    assert project == tomllib.loads(BUNDLE.decode())
    assert project["project"]["dependencies"] == []
    assert len(listed) == 1
    assert listed[0].split(",")[:2] == ["pyproject.toml", hashlib.sha256(BUNDLE).hexdigest()]


def test_the_bundle_is_the_same_in_another_process_and_time_zone() -> None:
    code = "from offsite.protos.flower import bundle; import sys; sys.stdout.write(bundle()[1])"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "77", "TZ": "Pacific/Chatham", "PATH": "", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert process.stdout == bundle()[1]


@pytest.mark.parametrize("size", [10_000, 79_000, 80_100, 160_000, 400_000])
def test_a_longer_message_has_longer_pieces_and_not_more(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 10 to 30 kB in the place of 1 to 4 MiB: the arithmetic is the same."""
    for name, value in (("PIECE", 10_000), ("MOST_PIECES", 8), ("LONGEST_PIECE", 30_000), ("SPARE_PIECES", 5)):
        monkeypatch.setattr(flower_pieces, name, value)
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(flower, "SHORT_BYTES", 100)
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 7, raising=False)
    message = Message(pack("masked", body(size)), dst_node_id=1, message_type="train")
    objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    assert max(map(len, objects.values())) < 1000 + min(max(10_000, size // 8 + 20), 30_000)
    assert len(objects) <= 5 + max(8, size // 30_000 + 1)
    incoming = flower_pieces.Incoming(message.object_id, get_object_tree(message), size + 200)
    incoming.collect(objects.__getitem__)
    assert unpack(incoming.message().content) == ("masked", body(size))
    less = flower_pieces.Incoming(message.object_id, get_object_tree(message), size // 2)
    if size > 30_000:
        with pytest.raises(MalformedMessage, match="at most"):  # a job of half the adapter takes none of it
            less.collect(objects.__getitem__)
