"""What every entry of client.data.READERS promises."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from client.data import READERS, read
from errors import DataError, UnknownName

TEXTS = ["plain", 'commas, "quotes" and\nnew lines', "Grüße, 世界 \u2028 🙂", "x" * 200_000]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": 1, column: t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")


def write_csv(path, texts, column="text"):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", column], *[["1", text] for text in texts]])


def write_parquet(path, texts, column="text"):
    columns = {"id": pyarrow.array([1] * len(texts)), column: pyarrow.array(texts, pyarrow.string())}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_text(path, texts, column="text"):
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_bytes(text.encode())


FORMATS = {
    "jsonl": ("d.jsonl", write_jsonl),
    "csv": ("d.csv", write_csv),
    "parquet": ("d.parquet", write_parquet),
    "text": ("d", write_text),
}
each = pytest.mark.parametrize("reader", sorted(READERS))


@pytest.fixture
def written(tmp_path, reader):
    def write(texts, column="text"):
        name, writer = FORMATS[reader]
        writer(tmp_path / name, texts, column)
        return tmp_path / name

    return write


def test_every_reader_has_a_writer_here():
    assert set(FORMATS) == set(READERS)


@each
def test_texts_come_back_in_order_and_whole(reader, written):
    path = written(TEXTS)
    assert read(path, reader=reader, column=None) == TEXTS
    assert read(path, reader=None, column="text") == TEXTS
    assert read(str(path), reader=None, column=None) == TEXTS


@each
def test_blank_texts_are_left_out(reader, written):
    assert read(written(["a", " \t", "", "b"]), reader=reader, column=None) == ["a", "b"]


@each
@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text_is_an_error(reader, written, texts):
    with pytest.raises(DataError):
        read(written(texts), reader=reader, column=None)


@each
def test_an_empty_file_is_an_error(reader, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_bytes(b"")
    with pytest.raises(DataError):
        read(path, reader=reader, column=None)


@each
def test_a_missing_path_is_an_error(reader, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.jsonl", reader=reader, column=None)


@each
def test_a_wrong_column_names_the_columns_and_the_nearest(reader, written):
    with pytest.raises(DataError, match=r"column='texst'.*columns=.*text.*did you mean text"):
        read(written(TEXTS), reader=reader, column="texst")


@each
def test_bytes_that_are_not_utf8_are_an_error_without_content(reader, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"text\nsecret \xff\xfe\n")
    with pytest.raises(DataError) as caught:
        read(path, reader=reader, column=None)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@each
def test_another_column_may_hold_the_text(reader, written):
    if reader == "text":
        pytest.skip("plain text has one column")
    assert read(written(TEXTS, "body"), reader=None, column="body") == TEXTS


def test_an_unknown_reader_names_the_nearest(tmp_path):
    (tmp_path / "d.jsonl").write_text("{}")
    with pytest.raises(UnknownName, match="jsonl"):
        read(tmp_path / "d.jsonl", reader="json", column=None)
