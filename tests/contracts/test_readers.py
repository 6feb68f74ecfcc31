"""The promises of every entry of task.readers.tables.READERS."""

import csv
import json

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from offsite.errors import DataError, UnknownName
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import READERS, check_readable, read, read_for_job, stream
from offsite.task.records import is_empty

TEXTS = ["plain", 'commas, "quotes" and\nnew lines', "Grüße, 世界 \u2028 🙂", "x" * 200_000]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": 1, column: t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")


def write_json(path, texts, column="text"):
    path.write_text(json.dumps([{"id": 1, column: t} for t in texts], ensure_ascii=False, indent=1), "utf-8")


def write_csv(path, texts, column="text", separator=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([["id", column], *[["1", text] for text in texts]])


def write_tsv(path, texts, column="text"):
    write_csv(path, texts, column, "\t")


def table_of(texts, column="text"):
    return pyarrow.table({"id": [1] * len(texts), column: pyarrow.array(texts, pyarrow.string())})


def write_parquet(path, texts, column="text"):
    pyarrow.parquet.write_table(table_of(texts, column), path)


def write_arrow(path, texts, column="text"):
    with pyarrow.ipc.new_stream(path, (table := table_of(texts, column)).schema) as file:
        file.write_table(table)


def write_text(path, texts, column="text"):
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_bytes(text.encode())


def write_npz(path, texts, column="text"):
    np.savez(path, **{"id": np.ones(len(texts), np.int64), column: np.array(texts, np.str_)})


def columns(name="text"):
    return columns_of({"text": str}, column=name, names={})


def records(texts):
    return [{"text": text} for text in texts]


FORMATS = {
    "jsonl": ("d.jsonl", write_jsonl),
    "json": ("d.json", write_json),
    "csv": ("d.csv", write_csv),
    "tsv": ("d.tsv", write_tsv),
    "arrow": ("d.arrow", write_arrow),
    "parquet": ("d.parquet", write_parquet),
    "text": ("d", write_text),
    "image_parquet": ("d.parquet", write_parquet),
    "npz": ("d.npz", write_npz),
}
WITHOUT_TEXT = {"images"}  # tests/client/test_images.py
each = pytest.mark.parametrize("reader", sorted(FORMATS))


@pytest.fixture
def written(tmp_path, reader):
    def write(texts, column="text"):
        name, writer = FORMATS[reader]
        writer(tmp_path / name, texts, column)
        return tmp_path / name

    return write


def test_every_reader_has_a_writer_here():
    assert set(FORMATS) | WITHOUT_TEXT == set(READERS)


@each
def test_texts_come_back_in_order_and_whole(reader, written):
    path = written(TEXTS)
    assert read(path, reader=reader, columns=columns()) == records(TEXTS)
    assert list(stream(path, reader=reader, columns=columns())) == records(TEXTS)
    check_readable(path, reader=reader)
    assert read(path, reader=None, columns=columns("text")) == records(TEXTS)
    assert read(str(path), reader=None, columns=columns()) == records(TEXTS)


@each
@pytest.mark.parametrize("how", [read, read_for_job])
def test_blank_texts_stay_as_empty_records(reader, written, how):
    found = how(written(["a", " \t", "", "b"]), reader=reader, columns=columns())
    assert found == records(["a", "", "", "b"])
    assert [is_empty(one) for one in found] == [False, True, True, False]


def spoil(path, reader):
    """Breaks the second of three records, as a program might that knows no format."""
    if reader == "text":
        (path / "1.txt").write_bytes(b"\xff secret")
    elif reader in ("jsonl", "json", "csv", "tsv"):
        path.write_bytes(path.read_bytes().replace(b"middle", b"\xff secret"))
    elif reader == "npz":
        lengths = np.array([2, 99, 2])
        np.savez(path, text=np.array(["one", "", "three"]), tokens=np.zeros((3, 2), np.int64), tokens_length=lengths)
    else:
        texts = pyarrow.array([b"one", b"\xff secret", b"three"], pyarrow.binary()).view(pyarrow.string())
        table = pyarrow.table({"text": texts})
        if reader == "arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
        else:
            pyarrow.parquet.write_table(table, path)


@each
def test_a_broken_record_is_an_error_for_its_owner_and_an_empty_record_in_a_job(reader, written):
    path = written(["one", "middle", "three"])
    spoil(path, reader)
    wanted = columns_of({"text": str} | ({"tokens": list} if reader == "npz" else {}), names={})
    with pytest.raises(DataError, match=r"(line|row|text)=[23]\b") as caught:
        read(path, reader=reader, columns=wanted)
    assert "secret" not in str(caught.value)
    found = read_for_job(path, reader=reader, columns=wanted)
    assert [one["text"] for one in found] == ["one", "", "three"]
    assert [is_empty(one) for one in found] == [False, True, False]
    assert found.faults == [str(caught.value)]


@each
def test_a_job_goes_on_with_records_that_are_all_empty(reader, written):
    """Whether there is one good record among them is an answer about one record."""
    assert [is_empty(one) for one in read_for_job(written(["", " "]), reader=reader, columns=columns())] == [True] * 2


@each
def test_a_file_without_rows_is_an_error_in_a_job_too(reader, written):
    with pytest.raises(DataError, match="has no row" if reader != "text" else "no .txt file"):
        read_for_job(written([]), reader=reader, columns=columns())


@each
@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text_is_an_error(reader, written, texts):
    with pytest.raises(DataError):
        read(written(texts), reader=reader, columns=columns())


@each
def test_an_empty_file_is_an_error(reader, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_bytes(b"")
    with pytest.raises(DataError):
        read(path, reader=reader, columns=columns())


@each
def test_a_missing_path_is_an_error(reader, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.jsonl", reader=reader, columns=columns())


@each
def test_a_wrong_column_names_the_columns_and_the_nearest(reader, written):
    with pytest.raises(DataError, match=r"column='texst'.*columns=.*text.*did you mean text"):
        read(written(TEXTS), reader=reader, columns=columns("texst"))


@each
def test_bytes_that_are_not_utf8_are_an_error_without_content(reader, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"text\nsecret \xff\xfe\n")
    with pytest.raises(DataError) as caught:
        read(path, reader=reader, columns=columns())
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@each
def test_another_column_may_hold_the_text(reader, written):
    if reader == "text":
        pytest.skip("plain text has one column")
    assert read(written(TEXTS, "body"), reader=None, columns=columns("body")) == records(TEXTS)


@each
def test_further_fields_come_with_their_record(reader, written):
    fields = columns_of({"text": str, "number": object}, names={"number": "id"})
    path = written(TEXTS)
    if reader == "text":
        with pytest.raises(DataError, match=r"column='id' is not in .*columns=text"):
            read(path, reader=None, columns=fields)
        return
    found = read(path, reader=None, columns=fields)
    assert [one["text"] for one in found] == TEXTS
    assert {str(one["number"]) for one in found} == {"1"}


@each
def test_every_record_has_a_place_of_its_own(reader, written):
    found = read(written(TEXTS), reader=None, columns=columns())
    assert len({one.place for one in found}) == len(TEXTS)


def test_an_unknown_reader_names_the_nearest(tmp_path):
    (tmp_path / "d.jsonl").write_text("{}")
    with pytest.raises(UnknownName, match="jsonl"):
        read(tmp_path / "d.jsonl", reader="jsnl", columns=columns())
