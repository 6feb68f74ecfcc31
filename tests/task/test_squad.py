"""task.readers.squad_answers and squad_file: SQuAD's answers in rows, and SQuAD's own file of articles."""

import gzip
import json

import pyarrow
import pytest

from offsite.errors import DataError
from offsite.task.file_check import check_file
from offsite.task.findings import Findings
from offsite.task.readers import json_list
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import read, read_for_job
from offsite.task.record_fields import FIELDS
from offsite.task.records import is_empty
from tests.task.written import ALL, NESTED, as_csv, as_json, as_jsonl, as_parquet, found

QA = FIELDS["extractive_qa"]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True)}
CONTEXT = "The river runs."
SQUAD = [
    {"question": "what", "context": CONTEXT, "answers": {"text": ["river", "The river"], "answer_start": [4, 0]}},
    {"question": "who", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
    {"question": "does", "context": CONTEXT, "answers": {"text": ["runs"], "answer_start": [10]}},
]
BOTH = [{"text": "river", "answer_start": 4}, {"text": "The river", "answer_start": 0}]
ANSWERED = [
    {"question": "what", "context": CONTEXT, "answer": "river", "answer_start": 4, "answers": BOTH},
    {"question": "who", "context": CONTEXT, "answer": "", "answer_start": -1},
    {"question": "does", "context": CONTEXT, "answer": "runs", "answer_start": 10},
]


@pytest.mark.parametrize("write", ALL)
@pytest.mark.parametrize("named", [{}, {"answer": "answers"}, {"answer": "answers", "answer_start": "answers"}])
def test_answers_of_squad_are_the_first_answer_with_its_place_and_all_where_there_are_several(tmp_path, write, named):
    path = write(tmp_path / "d", SQUAD)
    records = read(path, reader=None, columns=columns_of(QA, names=named))
    assert [dict(record) for record in records] == ANSWERED
    assert not any(is_empty(record) for record in records)


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_parquet])
def test_answers_may_be_a_list_of_objects(tmp_path, write):
    listed = [
        {**row, "answers": [{"text": text, "answer_start": start} for text, start in
                            zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)]}
        for row in SQUAD
    ]  # fmt: skip
    assert found(write(tmp_path / "d", listed), QA) == ANSWERED


@pytest.mark.parametrize("write", NESTED)
def test_answers_may_be_two_columns_of_lists(tmp_path, write):
    names = {"answer": "answers.text", "answer_start": "answers.answer_start"}
    assert found(write(tmp_path / "d", SQUAD), QA, names) == ANSWERED
    flat = [{"question": row["question"], "context": CONTEXT, "answer": row["answers"]["text"],
             "answer_start": row["answers"]["answer_start"]} for row in SQUAD]  # fmt: skip
    assert found(write(tmp_path / "d", flat), QA) == ANSWERED


def test_a_text_that_looks_like_a_number_stays_a_text_beside_answers(tmp_path):
    rows = [{"question": "2020", "context": "true", "answers": {"text": [], "answer_start": []}}]
    expected = [{"question": "2020", "context": "true", "answer": "", "answer_start": -1}]
    assert found(as_csv(tmp_path / "d", rows), QA) == expected


IMPOSSIBLE = [
    {"answers": {"text": [], "answer_start": []}, "is_impossible": True},
    {"answers": {"text": [""], "answer_start": [-1]}, "is_impossible": True},
    {"answers": {"text": ["river"], "answer_start": [4]}, "is_impossible": False},
    {"answers": {"text": [], "answer_start": []}, "is_impossible": False},  # the answers decide, as in SQuAD's script
]


@pytest.mark.parametrize("write", ALL)
def test_a_question_that_is_impossible_has_no_answer(tmp_path, write):
    rows = [{"question": "what", "context": CONTEXT, **row} for row in IMPOSSIBLE]
    answers = [(row["answer"], row["answer_start"]) for row in found(write(tmp_path / "d", rows), QA)]
    assert answers == [("", -1), ("", -1), ("river", 4), ("", -1)]
    flat = [{"question": "what", "context": CONTEXT, "answer": "", "answer_start": 0, "is_impossible": True}]
    assert found(write(tmp_path / "d", flat), QA) == [ANSWERED[1] | {"question": "what"}]
    wrong = [rows[0], rows[2] | {"is_impossible": True}]
    with pytest.raises(
        DataError, match=r"=[23]( line=1)? says is_impossible, and has an answer; keep one of both"
    ) as caught:
        found(write(tmp_path / "d", wrong), QA)
    assert "river" not in str(caught.value)


def test_a_value_of_is_impossible_that_is_no_truth_is_a_broken_row(tmp_path):
    rows = [{"question": "what", "context": CONTEXT, "is_impossible": "perhaps", **ANSWERED[2]}]
    with pytest.raises(DataError, match=r"line=1 has another value of is_impossible than true or false") as caught:
        found(as_jsonl(tmp_path / "d", rows), QA)
    assert "perhaps" not in str(caught.value)


@pytest.mark.parametrize("answers", [[["a", 1], ["b", None]], [["a", 1], [7, 1]], [["a", 1], ["b", True]]])
def test_a_further_answer_of_another_type_is_a_broken_row(tmp_path, answers):
    texts, starts = zip(*answers, strict=True)
    rows = [SQUAD[0] | {"answers": {"text": texts, "answer_start": starts}}]
    with pytest.raises(DataError, match=r"line=1 has an answer that is no text with a whole number as its place"):
        found(as_jsonl(tmp_path / "d", rows), QA)


def test_a_plain_answer_at_minus_one_is_a_question_without_an_answer(tmp_path):
    plain = [ANSWERED[2], {**ANSWERED[2], "answer": "", "answer_start": -1}]
    for write in ALL:
        records = read(write(tmp_path / "d", plain), reader=None, columns=columns_of(QA, names={}))
        assert [dict(record) for record in records] == plain


@pytest.mark.parametrize(
    "answers",
    ["river", {"text": "river", "answer_start": 4}, {"text": ["river"]}, {"text": ["a"], "answer_start": []}, [4]],
)
def test_answers_of_another_form_are_named_by_line_and_never_shown(tmp_path, answers):
    path = as_jsonl(tmp_path / "d", [SQUAD[0], {**SQUAD[0], "answers": answers}])
    with pytest.raises(DataError, match=r"line=2 must have SQuAD's answers, {text: ") as caught:
        found(path, QA)
    assert "river" not in str(caught.value)


def test_plain_columns_come_before_answers(tmp_path):
    rows = [{**ANSWERED[2], "answers": {"text": ["other"], "answer_start": [1]}}]
    assert found(as_jsonl(tmp_path / "d", rows), QA) == ANSWERED[2:]


# SQuAD's own file


def asked(text, *answers, **more):
    return {"id": "5", "question": text, "answers": [{"text": t, "answer_start": s} for t, s in answers], **more}


ARTICLES = [
    {
        "title": "Rivers",
        "paragraphs": [
            {"context": CONTEXT, "qas": [asked("what", ("river", 4), ("The river", 0)), asked("who")]},
            {"context": "no question here", "qas": []},
            {"context": "Rain, [fell] {hard}.", "qas": [asked('"what"\\', ("[fell]", 6), is_impossible=False)]},
        ],
    },
    {"title": "Empty", "paragraphs": []},
    {"title": "Seas", "paragraphs": [{"context": "Salt.", "qas": [asked("taste", is_impossible=True)]}]},
]
ASKED = [
    ANSWERED[0],
    ANSWERED[1],
    {"question": '"what"\\', "context": "Rain, [fell] {hard}.", "answer": "[fell]", "answer_start": 6},
    {"question": "taste", "context": "Salt.", "answer": "", "answer_start": -1},
]
PLACES = [
    "row=1 article=1 paragraph=1 question=1",
    "row=2 article=1 paragraph=1 question=2",
    "row=3 article=1 paragraph=3 question=1",
    "row=4 article=3 paragraph=1 question=1",
]


def records_of(path):
    return read(path, reader=None, columns=columns_of(QA, names={}))


@pytest.mark.parametrize("indent", [None, 1])
def test_squads_own_file_has_a_record_for_each_question(tmp_path, indent):
    """Each line is that of the question in the file as the json library writes it."""
    path = tmp_path / "train-v2.0.json"
    path.write_text(json.dumps({"version": "v2.0", "data": ARTICLES}, indent=indent))
    records = records_of(path)
    assert [dict(record) for record in records] == ASKED
    lines = [number for number, line in enumerate(path.read_text().splitlines(), 1) if '"id"' in line]
    places = [record.place.partition(" line=") for record in records]
    assert [place for place, _, _ in places] == PLACES
    if indent is None:
        assert [line for *_, line in places] == ["1"] * 4
    else:
        assert [int(line) + 1 for *_, line in places] == lines


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_folder_of_such_files_is_read_as_shards(tmp_path, suffix):
    for name, articles in (("a", ARTICLES[:2]), ("b", ARTICLES[2:])):
        content = json.dumps({"data": articles, "version": "2"}).encode()
        (tmp_path / f"{name}.json{suffix}").write_bytes(PACK[suffix](content))
    records = records_of(tmp_path)
    assert [dict(record) for record in records] == ASKED
    assert records[3].place == f"file='b.json{suffix}' row=1 article=1 paragraph=1 question=1 line=1"


def test_the_list_of_articles_alone_paragraphs_alone_and_an_article_on_each_line(tmp_path):
    paragraphs = [paragraph for article in ARTICLES for paragraph in article["paragraphs"]]
    for content in (ARTICLES, paragraphs, {"data": paragraphs}):
        (tmp_path / "d.json").write_text(json.dumps(content))
        assert [dict(record) for record in records_of(tmp_path / "d.json")] == ASKED
        path = as_jsonl(tmp_path / "d", content if isinstance(content, list) else paragraphs)
        assert [dict(record) for record in records_of(path)] == ASKED
    assert records_of(path)[2].place == "line=3 question=1"
    path.write_text("\n".join(f"  {line} " for line in path.read_text().splitlines()))
    assert [dict(record) for record in records_of(path)] == ASKED
    assert records_of(tmp_path / "d.json")[2].place == "row=3 paragraph=3 question=1 line=1"


BROKEN_QUESTIONS = [
    ('"oops"', "is not a JSON object"),
    ('{"question" "what"}', "is not JSON"),
    ('{"question": "a", "question": "a"}', "one key twice"),
    ('{"question": "a", "x": [1, {"qas": [{}, {}], "y": "]"}]}', "column='answer' is not in"),
    ('{"question": "a", "answers": 5}', "must have SQuAD's answers"),
    ('{"question": 5, "answers": []}', "column='question' holds int"),
    ("", "is not JSON"),
    ('{"question": "a", "answers": [{"text": "river", "answer_start": 4}], "is_impossible": true}', "keep one of both"),
]


@pytest.mark.parametrize(("broken", "rule"), BROKEN_QUESTIONS)
def test_a_broken_question_is_one_broken_row_with_its_place(tmp_path, broken, rule):
    """The number of records does not follow from what a question holds."""
    good = json.dumps(asked("what", ("river", 4)))
    paragraph = f'{{"qas": [{good},\n{broken},\n{good}], "context": "{CONTEXT}"}}'
    (tmp_path / "d.json").write_text(f'{{"data": [{{"paragraphs": [{paragraph}], "title": "t"}}]}}')
    columns = columns_of(QA, names={})
    records = read_for_job(tmp_path / "d.json", reader=None, columns=columns)
    assert [is_empty(record) for record in records] == [False, True, False]
    (fault,) = records.faults
    assert "row=2 article=1 paragraph=1 question=2 line=" in fault
    assert rule in fault
    assert "river" not in fault


def test_a_paragraph_that_is_broken_breaks_its_questions_and_no_other(tmp_path):
    whole = json.dumps({"context": CONTEXT, "qas": [asked("what", ("river", 4))]})
    twice = (
        '{"context": "a", "qas": [{"question": "b", "answers": []}, {"question": "c", "answers": []}], "context": "d"}'
    )
    none = '{"qas": [{"question": "b", "answers": []}]}'
    bare = '{"context": "no questions"}'
    more = '{"context": "a", "qas": [{"question": "b", "answers": []}] [{"question": "c"}]}'
    (tmp_path / "d.json").write_text(f'{{"data": [{{"paragraphs": [{twice}, {whole}, {none}, {bare}, {more}]}}]}}')
    records = read_for_job(tmp_path / "d.json", reader=None, columns=columns_of(QA, names={}))
    assert [is_empty(record) for record in records] == [True, True, False, True, True, False, True]
    rules = ["one key twice", "one key twice", "column='context' is not in", "column='question' is not in"]
    rules.append("paragraph=5 question=2 line=1 is not a JSON object")
    assert all(rule in fault for rule, fault in zip(rules, records.faults, strict=True))


def test_a_rule_that_every_question_breaks_is_one_finding(tmp_path):
    """Each place differs in row, article, paragraph, question and line."""
    paragraphs = [
        {"context": "a", "qas": [{"query": text} for text in "bc"]},
        {"context": "d", "qas": [{"query": "e"}]},
    ]
    articles = [{"paragraphs": paragraphs}, {"paragraphs": paragraphs[1:]}]
    (tmp_path / "d.json").write_text(json.dumps({"data": articles}, indent=1))
    findings, columns = Findings(), columns_of(QA, names={})
    check_file(tmp_path / "d.json", reader=None, columns=columns, where="site=ash", findings=findings)
    (line,) = findings.errors
    assert line.startswith("site=ash: column='question' is not in data=")
    assert line.endswith(" (the same in all 4 records)")


def test_brackets_of_any_depth_are_skipped(tmp_path):
    for depth in (0, 1, 5, 6, 7, 8, 20):
        deep = json.loads("[" * depth + '{"]": "}"}' + "]" * depth)
        articles = [{**article, "deep": deep} for article in ARTICLES]
        articles[0]["paragraphs"][0]["qas"][0]["deep"] = deep
        assert [dict(record) for record in records_of(as_json(tmp_path / "d", articles))] == ASKED


def test_other_tasks_and_rows_with_the_columns_themselves_are_not_taken_apart(tmp_path):
    rows = [{"text": "a", "paragraphs": [{"qas": [{}, {}]}]}, {"text": "b", "qas": [1, 2]}]
    for path in (as_json(tmp_path / "d", rows), as_jsonl(tmp_path / "d", rows)):
        assert found(path, {"text": str}) == [{"text": "a"}, {"text": "b"}]
        assert found(as_json(tmp_path / "e", [ANSWERED[2] | {"qas": [1, 2]}]), QA) == [ANSWERED[2]]


# one list in an object


@pytest.mark.parametrize("key", ["data", "train", "records", "instances", "examples", "test", "validation"])
def test_a_list_in_an_object_is_the_list(tmp_path, monkeypatch, key):
    """Whatever stands beside the list, and whatever the chunks are in which the file comes."""
    rows = [{"text": '"]},[{' * number + "\\" * number, "x": [[number], {"]": ["\\"]}]} for number in range(1, 5)]
    beside = {"version": "1.0", "n": 4, "none": None, "info": {"data": [1, {"a": []}], "b": 2}, "tags": ["a", "]"]}
    for content in ({**beside, key: rows}, {key: rows, **beside}, {key: rows}):
        for indent in (None, 2):
            (tmp_path / "d.json").write_text(json.dumps(content, indent=indent))
            for chunk in (1, 7, 50, 10_000):
                monkeypatch.setattr(json_list, "CHUNK", chunk)
                assert found(tmp_path / "d.json", {"text": str, "x": list}) == rows
    assert found(tmp_path / "d.json", {"text": str})[0] == {"text": rows[0]["text"]}


@pytest.mark.parametrize("how", [read, read_for_job])
def test_two_lists_in_an_object_are_refused_with_both_names(tmp_path, how):
    for content, names in (
        ({"train": [{"text": "a"}], "test": [{"text": "b"}]}, "'train' and 'test'"),
        ({"data": [], "n": 1, "examples": [{"text": "b"}]}, "'data' and 'examples'"),
    ):
        (tmp_path / "d.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"has two lists of records, {names}; put each into a file of its own"):
            how(tmp_path / "d.json", reader=None, columns=columns_of({"text": str}, names={}))


ROW = '[{"text": "a"}]'
NO_LISTS = [
    '{"text": ["a", "b"], "label": [0, 1]}',
    '{"data": {"train": ' + ROW + "}}",
    '{"data": 5}',
    '{"data": ' + ROW + "} {}",
    '{"data": ' + ROW + "} x",
    '{"data": ' + ROW + "]",
    '{"data": ' + ROW,
    '{"data": ' + ROW + ", }",
    '{"data": ' + ROW + " x}",
    '{"data": ' + ROW + ' "x": 1}',
    '{"data": [{"text": "a"},]}',
    '{"data": [{"text": "a"}}}',
    '{"data" ' + ROW + "}",
    '{"x" 1, "data": ' + ROW + "}",
    '{"x": nonsense, "data": ' + ROW + "}",
    '{, "data": ' + ROW + "}",
    '{"x": 1,, "data": ' + ROW + "}",
    'x {"data": ' + ROW + "}",
    "[" + ROW + ', "data": ' + ROW + "}",
    '{"text": "a"}\n{"text": "b"}\n',
]


@pytest.mark.parametrize("content", NO_LISTS)
def test_what_holds_no_such_list_is_refused_as_a_whole(tmp_path, content):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(DataError, match="is neither one JSON list nor one object with the list under one of the keys "):
        read_for_job(tmp_path / "d.json", reader=None, columns=columns_of({"text": str}, names={}))


def test_an_empty_list_in_an_object_has_no_row(tmp_path):
    for content in ('{"data": []}', '{"data": [ ], "n": {}}'):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(DataError, match="has no row"):
            read_for_job(tmp_path / "d.json", reader=None, columns=columns_of({"text": str}, names={}))
