"""task.readers.tables: faults that only one format can have."""

import csv

import pyarrow
import pyarrow.parquet
import pytest

from offsite.errors import ConfigError, DataError
from offsite.task.readers.columns import Column, columns_for, columns_of
from offsite.task.readers.tables import READERS, SUFFIXES, read, read_for_job
from offsite.task.tasks import TASKS

TEXT = {"text": Column("text", str)}
LABELLED = {"text": Column("body", str), "label": Column("spam", object)}


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
        read(path, reader=None, columns=TEXT)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_jsonl_takes_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, "d.ndjson", '\ufeff{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read(path, reader=None, columns=TEXT) == [{"text": "a"}, {"text": "b"}]


def test_csv_rows_of_another_width_are_refused_by_line(tmp_path):
    path = write(tmp_path, "d.csv", "id,text\n1,fine\n2,secret, one comma too many\n")
    with pytest.raises(DataError, match="line=3 has 3 fields, must have 2, as the header") as caught:
        read(path, reader=None, columns=TEXT)
    assert "secret" not in str(caught.value)


def test_csv_with_an_open_quote_is_refused(tmp_path):
    with pytest.raises(DataError, match="not CSV"):
        read(write(tmp_path, "d.csv", 'text\n"secret'), reader=None, columns=TEXT)


def test_csv_leaves_the_field_limit_as_it_was(tmp_path):
    before = csv.field_size_limit()
    read(write(tmp_path, "d.csv", "text\na\n\nb\n"), reader=None, columns=TEXT)
    assert csv.field_size_limit() == before


def test_a_csv_without_header_does_not_show_its_first_record(tmp_path):
    record = "a private sentence that goes on for a good while"
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, "d.csv", f"{record}\nanother\n"), reader=None, columns=TEXT)
    assert record not in str(caught.value)


def test_an_open_quote_takes_no_other_record_with_it(tmp_path):
    """A record that opens a quote would else hold all that follows, or join with the record that closes it."""
    for broken in ('"secret', 'x,"secret', '"a"secret', "one,too many"):
        lines = ["id,text", "1,first", f"2,{broken}", "3,third", '4,"two', 'lines"', "5,last"]
        found = read_for_job(write(tmp_path, "d.csv", "\n".join(lines)), reader=None, columns=TEXT)
        assert [one["text"] for one in found] == ["first", "", "third", "two\nlines", "last"], broken
        assert len(found.faults) == 1
        assert "line=3" in found.faults[0]


@pytest.mark.parametrize("line", ["", "{", "[1]", "null", '{"body": "a"}', '{"body": "a", "spam": null}', "\udcff"])
def test_a_line_that_is_no_record_stays_a_record_without_content(tmp_path, line):
    path, lines = tmp_path / "d.jsonl", ['{"body": "a", "spam": 1}', line, '{"body": "b", "spam": 2}']
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    found = read_for_job(path, reader=None, columns=LABELLED)
    assert found == [{"text": "a", "label": 1}, {"text": "", "label": None}, {"text": "b", "label": 2}]
    assert [one.place for one in found] == ["line=1", "line=2", "line=3"]


def test_parquet_nulls_are_named_by_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"row=2 .*NoneType"):
        read(tmp_path / "d.parquet", reader=None, columns=TEXT)


def test_a_folder_is_read_by_name_and_other_files_are_refused(tmp_path):
    for name in ("b.txt", "a.txt", "README.md"):
        write(tmp_path, name, name)
    assert read(tmp_path, reader=None, columns=TEXT) == [{"text": "a.txt"}, {"text": "b.txt"}]
    write(tmp_path, "notes.md", "notes")
    with pytest.raises(DataError, match=r"has 2 \.txt files and 1 more \(\.md 1\); move these out of the folder"):
        read(tmp_path, reader=None, columns=TEXT)


@pytest.mark.parametrize("reader", ["jsonl", "csv", "parquet"])
def test_a_folder_where_a_file_is_needed_is_refused(tmp_path, reader):
    with pytest.raises(DataError):
        read(tmp_path, reader=reader, columns=TEXT)


def test_an_unknown_suffix_asks_for_a_reader(tmp_path):
    with pytest.raises(
        DataError, match="name a reader: arrow, csv, image_parquet, images, json, jsonl, npz, parquet, text, tsv"
    ):
        read(write(tmp_path, "d.xlsx", "x"), reader=None, columns=TEXT)


def test_a_suffix_is_found_in_any_case(tmp_path):
    assert read(write(tmp_path, "D.TXT", "x"), reader=None, columns=TEXT) == [{"text": "x"}]
    assert set(SUFFIXES.values()) == set(READERS) - {"images", "image_parquet"}


@pytest.mark.parametrize(
    ("kind", "cell", "value"),
    [(int, "12", 12), (list, '["a b", "c"]', ["a b", "c"]), (object, "ham", "ham"), (object, "3", "3")],
)
def test_a_csv_cell_is_read_as_the_type_that_the_task_wants(tmp_path, kind, cell, value):
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "more"], ["a", cell]])
    found = read(tmp_path / "d.csv", reader=None, columns=TEXT | {"more": Column("more", kind)})
    assert found == [{"text": "a", "more": value}]


@pytest.mark.parametrize(
    ("kind", "cell"), [(int, "secret"), (int, "true"), (int, "1.5"), (list, "secret"), (list, '"secret"')]
)
def test_a_csv_cell_of_another_type_is_named_by_line_and_never_shown(tmp_path, kind, cell):
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "more"], ["a", "[]" if kind is list else "1"], ["secret", cell]])
    with pytest.raises(DataError, match=r"line=3 column='more' holds .*, not a") as caught:
        read(tmp_path / "d.csv", reader=None, columns=TEXT | {"more": Column("more", kind)})
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("value", ["null", "1.5", '["secret"]', '{"secret": 1}'])
def test_a_label_is_a_name_or_a_whole_number(tmp_path, value):
    path = write(tmp_path, "d.jsonl", f'{{"body": "fine", "spam": 1}}\n{{"body": "secret", "spam": {value}}}\n')
    with pytest.raises(DataError, match=r"line=2 column='spam' holds \w+, not a name or a whole number") as caught:
        read(path, reader=None, columns=LABELLED)
    assert "secret" not in str(caught.value)


def test_records_know_their_line_also_behind_blank_ones(tmp_path):
    path = write(tmp_path, "d.csv", 'body,spam\n"two\nlines",1\n , 0\nlast,no\n')
    found = read(path, reader=None, columns=LABELLED)
    assert [(dict(one), one.place) for one in found] == [
        ({"text": "two\nlines", "label": "1"}, "line=3"),
        ({"text": "", "label": None}, "line=4"),
        ({"text": "last", "label": "no"}, "line=5"),
    ]


def test_columns_are_named_by_field():
    fields = {"text": str, "label": object}
    assert columns_of(fields, names={}) == {"text": Column("text", str), "label": Column("label", object)}
    assert columns_of(fields, column="body", names={"label": "spam"}) == LABELLED
    assert columns_of(fields, column="body", names={"text": "body", "label": "spam"}) == LABELLED
    with pytest.raises(ConfigError, match=r"column='body' and columns.text='other'"):
        columns_of(fields, column="body", names={"text": "other"})
    with pytest.raises(ConfigError, match=r"columns.lable: the task reads text, label; did you mean label"):
        columns_of(fields, names={"lable": "spam"})


def test_a_site_may_name_columns_for_all_its_tasks_at_once():
    names = {"prompt": "question", "messages": "talk", "text": "body"}
    assert columns_for("causal_lm", column="", names=names) == {"text": Column("body", str)}
    assert columns_for("chat", column="", names=names) == {"messages": Column("talk", list)}
    with pytest.raises(ConfigError, match=r"columns.promt: no task reads such a field; did you mean prompt"):
        columns_for("causal_lm", column="", names={"promt": "x"})
    assert all(next(iter(columns_for(task, column="main", names={}).values())).name == "main" for task in TASKS)
