"""client.data: what one format alone can get wrong."""

import csv

import pyarrow
import pyarrow.parquet
import pytest

from client.data import READERS, read
from errors import DataError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{secret: 1}", "not JSON"), ('["secret"]', "not a JSON object"), ('{"text": 5, "s": "secret"}', "holds int")],
)
def test_a_bad_jsonl_line_is_named_by_number_and_never_shown(tmp_path, line, reason):
    path = write(tmp_path, "d.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=f"line=3 .*{reason}") as caught:
        read(path, reader=None, column=None)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_jsonl_takes_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, "d.ndjson", '\ufeff{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read(path, reader=None, column=None) == ["a", "b"]


def test_csv_rows_of_another_width_are_refused_by_line(tmp_path):
    path = write(tmp_path, "d.csv", "id,text\n1,fine\n2,secret, one comma too many\n")
    with pytest.raises(DataError, match="line=3 has 3 fields, the header 2") as caught:
        read(path, reader=None, column=None)
    assert "secret" not in str(caught.value)


def test_csv_with_an_open_quote_is_refused(tmp_path):
    with pytest.raises(DataError, match="not CSV"):
        read(write(tmp_path, "d.csv", 'text\n"secret'), reader=None, column=None)


def test_csv_leaves_the_field_limit_as_it_was(tmp_path):
    before = csv.field_size_limit()
    read(write(tmp_path, "d.csv", "text\na\n\nb\n"), reader=None, column=None)
    assert csv.field_size_limit() == before


def test_a_csv_without_header_does_not_show_its_first_record(tmp_path):
    record = "a private sentence that goes on for a good while"
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, "d.csv", f"{record}\nanother\n"), reader=None, column=None)
    assert record not in str(caught.value)


def test_parquet_nulls_are_named_by_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"row=2 .*NoneType"):
        read(tmp_path / "d.parquet", reader=None, column=None)


def test_a_folder_is_read_by_name_and_other_files_are_left(tmp_path):
    for name in ("b.txt", "a.txt", "notes.md"):
        write(tmp_path, name, name)
    assert read(tmp_path, reader=None, column=None) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("reader", ["jsonl", "csv", "parquet"])
def test_a_folder_where_a_file_is_needed_is_refused(tmp_path, reader):
    with pytest.raises(DataError):
        read(tmp_path, reader=reader, column=None)


def test_an_unknown_suffix_asks_for_a_reader(tmp_path):
    with pytest.raises(DataError, match="name a reader: csv, jsonl, parquet, text"):
        read(write(tmp_path, "d.xlsx", "x"), reader=None, column=None)


def test_a_suffix_is_found_in_any_case(tmp_path):
    assert read(write(tmp_path, "D.TXT", "x"), reader=None, column=None) == ["x"]
    assert set(READERS) == {"jsonl", "csv", "parquet", "text"}
