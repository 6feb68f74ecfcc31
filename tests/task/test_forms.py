"""task.readers.forms and csv_rows: columns inside of columns, ShareGPT's form, separators, double names."""

import csv
import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from offsite.errors import DataError
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import read, read_for_job
from offsite.task.record_fields import FIELDS
from tests.task.written import ALL, NESTED, as_arrow, as_jsonl, as_parquet, found

TEXT = {"text": str}
CHAT = FIELDS["chat"]


@pytest.mark.parametrize("write", NESTED)
def test_a_column_inside_of_others_has_a_name_with_points(tmp_path, write):
    rows = [{"id": 1, "doc": {"body": {"text": text}, "n": 5}} for text in ("a", "b")]
    assert found(write(tmp_path / "d", rows), TEXT, {"text": "doc.body.text"}) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"column='doc.boddy.text' is not in .*doc.* did you mean doc"):
        found(write(tmp_path / "d", rows), TEXT, {"text": "doc.boddy.text"})
    with pytest.raises(DataError, match=r"column='id.text' is not in "):
        found(write(tmp_path / "d", rows), TEXT, {"text": "id.text"})


@pytest.mark.parametrize("write", ALL)
def test_a_name_with_a_point_is_first_of_all_a_name(tmp_path, write):
    rows = [{"doc.text": "a", "x": "y"}]
    assert found(write(tmp_path / "d", rows), TEXT, {"text": "doc.text"}) == [{"text": "a"}]


@pytest.mark.parametrize("write", [as_parquet, as_arrow])
def test_a_name_that_means_two_columns_is_refused(tmp_path, write):
    path = write(tmp_path / "d", [{"doc.text": "a", "doc": {"text": "b"}}])
    with pytest.raises(DataError, match=r"column='doc.text' stands 2 times"):
        found(path, TEXT, {"text": "doc.text"})


def test_an_outer_value_of_null_is_a_broken_row(tmp_path):
    for write in (as_jsonl, as_parquet):
        path = write(tmp_path / "d", [{"doc": {"text": "a"}}, {"doc": None}, {"doc": {"text": "c"}}])
        records = read_for_job(path, reader=None, columns=columns_of(TEXT, names={"text": "doc.text"}))
        assert [record["text"] for record in records] == ["a", "", "c"]
        assert [("=2" in fault, "holds NoneType" in fault) for fault in records.faults] == [(True, True)]


def test_columns_by_dictionary_are_read_as_their_values(tmp_path):
    values = pyarrow.array(["a", "b", "a", "a"]).dictionary_encode()
    table = pyarrow.table({"text": values})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pyarrow.ipc.new_file(tmp_path / "d.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("d.parquet", "d.arrow"):
        assert [row["text"] for row in found(tmp_path / name, TEXT)] == ["a", "b", "a", "a"]


def test_columns_that_stand_there_come_before_a_form(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}], "conversations": []}]
    assert found(as_jsonl(tmp_path / "d", rows), CHAT) == [{"messages": rows[0]["messages"]}]


TALK = [("system", "be kind"), ("human", "hello"), ("gpt", "good day")]
MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
]


@pytest.mark.parametrize("write", ALL)
@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_conversations_of_sharegpt_become_messages(tmp_path, write, column):
    path = write(tmp_path / "d", [{column: [{"from": who, "value": what} for who, what in TALK]}])
    assert found(path, CHAT) == [{"messages": MESSAGES}]
    assert found(write(tmp_path / "d", [{column: MESSAGES}]), CHAT) == [{"messages": MESSAGES}]
    lists = {"from": [who for who, _ in TALK], "value": [what for _, what in TALK]}
    assert found(write(tmp_path / "d", [{"talk": [dict(zip(lists, row, strict=True)) for row in TALK]}]), CHAT, {
        "messages": "talk"}) == [{"messages": MESSAGES}]  # fmt: skip


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_arrow])
def test_messages_may_be_an_object_of_lists(tmp_path, write):
    """As Sequence features of the datasets library are stored."""
    sharegpt = {"from": [who for who, _ in TALK], "value": [what for _, what in TALK]}
    plain = {key: [message[key] for message in MESSAGES] for key in ("role", "content")}
    for talk in (sharegpt, plain):
        assert found(write(tmp_path / "d", [{"conversations": talk}]), CHAT) == [{"messages": MESSAGES}]


def test_further_keys_of_a_message_stay(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]}]
    assert found(as_jsonl(tmp_path / "d", rows), CHAT)[0]["messages"][1] == {
        "role": "assistant", "content": "b", "weight": 0}  # fmt: skip


def test_an_unknown_sender_is_a_broken_row(tmp_path):
    rows = [{"conversations": [{"from": "secret", "value": "a"}]}]
    with pytest.raises(DataError, match=r"line=1 has a message whose `from` is none of human, user, gpt") as caught:
        found(as_jsonl(tmp_path / "d", rows), CHAT)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_the_one_that_finds_the_columns(tmp_path, separator):
    rows = [["id", "text", "label"], ["1", "a, b; c | d", "x"], ["2", f"with {separator} in it", "y"]]
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    fields = {"text": str, "label": object}
    expected = [{"text": row[1], "label": row[2]} for row in rows[1:]]
    assert found(tmp_path / "d.csv", fields) == expected
    with pytest.raises(DataError, match=r"column='txt' is not in .*, columns=id, text, label; did you mean text"):
        found(tmp_path / "d.csv", {"txt": str})
    if separator == "\t":
        (tmp_path / "d.csv").rename(tmp_path / "d.tsv")
        assert found(tmp_path / "d.tsv", fields) == expected


def test_no_row_but_the_header_decides_about_the_separator(tmp_path):
    (tmp_path / "d.csv").write_text("text\na;b;c\nd\te\n")
    assert found(tmp_path / "d.csv", TEXT) == [{"text": "a;b;c"}, {"text": "d\te"}]


def test_a_separator_that_the_first_line_names_is_taken(tmp_path):
    (tmp_path / "d.csv").write_text("sep=;\r\nid;text\r\n1;a,b\r\n")
    records = read(tmp_path / "d.csv", reader=None, columns=columns_of(TEXT, names={}))
    assert [(dict(record), record.place) for record in records] == [({"text": "a,b"}, "line=3")]
    (tmp_path / "d.csv").write_text("sep=^\ntext^id\na^1\n")
    assert found(tmp_path / "d.csv", TEXT) == [{"text": "a"}]


def test_two_separators_that_find_the_columns_are_refused(tmp_path):
    (tmp_path / "d.csv").write_text("a;text|b\n1;2|3\n")
    assert_refused(tmp_path / "d.csv", "column='text' is not in")
    (tmp_path / "d.csv").write_text("a|text|b;text;c\n1\n")
    assert_refused(tmp_path / "d.csv", "with semicolons and bars as separators")


def assert_refused(path, match, fields=TEXT, names=None):
    with pytest.raises(DataError, match=match):
        found(path, fields, names)


def test_a_row_of_another_width_names_its_separator(tmp_path):
    (tmp_path / "d.csv").write_text("id;text\n1;a\n2;b;c\n")
    assert_refused(
        tmp_path / "d.csv", "line=3 has 3 fields, must have 2, as the header; quote texts that hold semicolons"
    )


@pytest.mark.parametrize("header", ["text,id,text", "text;text", "id\ttext\ttext"])
def test_two_columns_of_the_name_that_is_read_are_refused(tmp_path, header):
    (tmp_path / "d.csv").write_text(header + "\n" + header + "\n")
    assert_refused(tmp_path / "d.csv", "column='text' stands 2 times in data=.*; rename or remove all but one")
    with pytest.raises(DataError, match="stands 2 times"):  # the header is a fact about the file
        read_for_job(tmp_path / "d.csv", reader=None, columns=columns_of(TEXT, names={}))


def test_two_other_columns_of_one_name_do_no_harm(tmp_path):
    (tmp_path / "d.csv").write_text("x,text,x,\n1,a,2,\n")
    assert found(tmp_path / "d.csv", TEXT) == [{"text": "a"}]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_columns_of_one_name_in_a_schema_are_refused(tmp_path, suffix):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array([1])], names=["text", "text", "x"])
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    else:
        with pyarrow.ipc.new_file(tmp_path / "d.arrow", table.schema) as file:
            file.write_table(table)
    assert_refused(tmp_path / f"d.{suffix}", "column='text' stands 2 times")
    assert found(tmp_path / f"d.{suffix}", {"text": object}, {"text": "x"}) == [{"text": 1}]


@pytest.mark.parametrize("double", ['{"text": "a", "text": "b"}', '{"text": "a", "x": {"y": 1, "y": 1}}'])
def test_one_key_twice_in_an_object_is_a_broken_row(tmp_path, double):
    good = '{"text": "good"}'
    (tmp_path / "d.jsonl").write_text("\n".join([good, double, good]))
    (tmp_path / "d.json").write_text(f"[{good},\n{double},\n{good}]")
    for name in ("d.jsonl", "d.json"):
        assert_refused(tmp_path / name, "line=2 has an object with one key twice")
        records = read_for_job(tmp_path / name, reader=None, columns=columns_of(TEXT, names={}))
        assert [record["text"] for record in records] == ["good", "", "good"]


def test_a_line_without_the_column_is_named(tmp_path):
    path = as_jsonl(tmp_path / "d", [{"text": "a"}, {"txt": "b"}])
    assert_refused(path, r"column='text' is not in data=.* line=2, columns=txt; did you mean txt")


def test_a_broken_element_of_a_list_is_one_broken_row(tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(
        b'[{"text": "a"},\n {"text" "b", "x": [1, {"y": "],}\\""}]}, 5, null, "t",\n{"text": "c"} , {"text": 1}]'
    )
    records = read_for_job(path, reader=None, columns=columns_of(TEXT, names={}))
    assert [record["text"] for record in records] == ["a", "", "", "", "", "c", ""]
    assert [record.place for record in records][1:6] == ["row=2 line=2", "row=3 line=2", "row=4 line=2", "row=5 line=2",
                                                         "row=6 line=3"]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"text": "a"}\n{"text": "b"}', '[{"text": "a"}', '[{"text": "a"},]', '[,{"text": "a"}]', "[] []", "[]]",
     "[1", '["', '[{"text": "a"}}', 'x [{"text": "a"}]', '[{"text": "a"}] x', '"[1]"', "1"],
)  # fmt: skip
def test_what_is_no_list_is_refused_as_a_whole(tmp_path, content):
    (tmp_path / "d.json").write_text(content)
    for how in (read, read_for_job):
        with pytest.raises(DataError, match=r"is neither one JSON list|has no row"):
            how(tmp_path / "d.json", reader=None, columns=columns_of(TEXT, names={}))


def test_lists_are_cut_as_the_json_library_reads_them(tmp_path, monkeypatch):
    """Whatever the chunks are in which the file comes."""
    from offsite.task.readers import json_list

    rows = [
        {"text": '\\"]},[{' * number + "\\" * number, "x": [[number], {"]": ["\\\\", "ä\u2028"]}]}
        for number in range(1, 9)
    ]
    for indent in (None, 1):
        (tmp_path / "d.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8")
        for chunk in (1, 2, 3, 7, 50, 1000):
            monkeypatch.setattr(json_list, "CHUNK", chunk)
            fields = {"text": str, "x": list}
            assert found(tmp_path / "d.json", fields) == [{"text": row["text"], "x": row["x"]} for row in rows]
