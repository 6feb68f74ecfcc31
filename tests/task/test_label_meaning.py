"""task.labels and task.label_numbers: one meaning for each value, and both readings where there are two."""

from types import SimpleNamespace

import pytest

from offsite.errors import DataError, UnsupportedModel
from offsite.task.label_agreement import numbers_beside_names, only_numbers
from offsite.task.label_names import LabelName, by_table
from offsite.task.label_numbers import whole
from offsite.task.labels import IGNORED, Labels, names_of
from offsite.task.records import LenientRecords, Row

STARS = ["1", "2", "3", "4", "5"]


def labels(*names, **more):
    return Labels(SimpleNamespace(id2label=dict(enumerate(names)), problem_type=None, **more))


def forms(number):
    """Returns a whole number in every form in which a file can hold it."""
    return [number, float(number), str(number), f"{number}.0"]


def test_a_number_has_one_meaning_whatever_the_format_of_its_file():
    for names in (STARS, ["no", "yes", "maybe"], ["0", "1", "2"], ["-1", "0", "1"], ["10", "20"], ["01", "02", "03"]):
        found = labels(*names)
        for number in range(-2, 25):
            assert len({found.number(form) for form in forms(number)}) == 1, (names, number)


def test_names_that_are_numbers_are_read_by_name():
    assert [labels(*STARS).number(value) for value in (0, 1, 2, 5, "1", "5", 5.0, 6)] == [None, 0, 1, 4, 0, 4, 4, None]
    assert [labels("-1", "0", "1").number(value) for value in (-1, 0, 1, "-1", 2)] == [0, 1, 2, 0, None]
    assert [labels("01", "02", "10").number(value) for value in (1, "01", "1", 10, 0)] == [0, 0, 0, 2, None]
    assert [labels("2019", "2020").number(value) for value in (2019, 2020.0, 0, 1)] == [0, 1, None, None]


def test_names_without_numbers_are_numbered_by_place():
    assert [labels("neg", "pos").number(value) for value in (0, 1, "1", 1.0, 2, -1, "01")] == [
        0,
        1,
        1,
        1,
        None,
        None,
        None,
    ]
    assert [labels("LABEL_0", "LABEL_1").number(value) for value in (0, "1", "LABEL_1")] == [0, 1, 1]
    assert labels("0", "1", "2").number(2) == 2


@pytest.mark.parametrize(
    ("names", "value", "readings"),
    [
        (["1", "0"], 1, ["'0'", "'1'"]),  # the names are the places in another order: no value shows which is meant
        (["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], "2", ["'2'", "'10'"]),  # in the order of texts
        (["no", "2", "yes"], 2, ["'2'", "'yes'"]),
        (["1 star", "2 stars", "3 stars"], 1, ["'1 star'", "'2 stars'"]),
        (["class_0", "class_1", "class_10", "class_2"], 2.0, ["'class_2'", "'class_10'"]),
        (["G1", "G2", "G3"], "2", ["'G2'", "'G3'"]),
    ],
)
def test_a_number_with_two_readings_is_refused_with_both(names, value, readings):
    found = labels(*names)
    for form in forms(int(value)):
        assert found.number(form) is None
    with pytest.raises(DataError, match=r"^line=3 field='label': must not be a number: here \d+ could mean") as caught:
        found.of([Row({"label": value}, "line=3")], "label")
    assert "labels of site.toml, or data.labels" in str(caught.value)
    example = int(str(caught.value).split("here ")[1].split()[0])
    assert len([name for name in names if f"{name!r} in place" in str(caught.value)]) == 2
    if example == int(value):
        assert all(reading in str(caught.value) for reading in readings)
    assert [found.number(LabelName(name, "folder")) for name in names] == list(range(len(names)))


def test_booleans_are_read_by_name():
    assert [labels("true", "false").number(value) for value in (True, False, "True", "true")] == [0, 1, 0, 0]
    assert [labels("False", "True").number(value) for value in (True, False, "FALSE")] == [1, 0, 0]
    for names in (("no", "yes"), ("0", "1"), ("LABEL_0", "LABEL_1"), ("true", "True")):
        assert [labels(*names).number(value) for value in (True, False)] == [None, None]
    with pytest.raises(DataError, match="a boolean is read by name, and no label is named true or false"):
        labels("no", "yes").of([{"label": True}], "label")


def test_what_is_no_whole_number_is_none():
    values = [0.5, float("nan"), float("inf"), True, None, "", "1e3", "1.5", "٣", "0x1", " 1", "+1", [1], "-0"]
    assert [whole(value) for value in values] == [None] * len(values)


def test_names_have_one_unicode_form_and_their_own_case():
    found = labels("Müller", "Zoë")
    assert [found.number(name) for name in ("Mu\u0308ller", "M\u00fcller", "müller")] == [0, 0, None]
    assert names_of(SimpleNamespace(id2label={0: "Zoe\u0308", 1: "b"})) == ["Zo\u00eb", "b"]
    with pytest.raises(UnsupportedModel, match="two or more different names"):
        names_of(SimpleNamespace(id2label={0: "Zoe\u0308", 1: "Zo\u00eb"}))


def test_a_model_whose_two_tables_contradict_each_other_is_refused():
    with pytest.raises(UnsupportedModel, match="label='a' has the number 0 in id2label and another in label2id"):
        names_of(SimpleNamespace(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0}))
    for numbers in ({"a": 0, "b": 1}, {"LABEL_0": 0, "LABEL_1": 1}, {}, None):
        assert names_of(SimpleNamespace(id2label={0: "a", 1: "b"}, label2id=numbers)) == ["a", "b"]


UNSEEN = ["pos ", " pos", "pos\u00a0", "\ufeffpos", "p\u200bos", "pos\r", "\tpos", "\uff50os", "pos\x00"]
NEAR = [
    ("Neg", "neg"),
    ("POS", "pos"),
    ("nag", "neg"),
    (" 1", "pos"),
    ("1.0 ", "pos"),
    ("\ufeff0", "neg"),
    ("\uff11", "pos"),
]


@pytest.mark.parametrize(("value", "hint"), [*NEAR, *((value, "pos") for value in UNSEEN)])
def test_an_unknown_text_names_the_nearest_label_and_not_itself(value, hint):
    with pytest.raises(
        DataError, match=rf"must be one of the model's 2 labels \(neg, pos\); did you mean {hint}; "
    ) as e:
        labels("neg", "pos").of([{"label": value}], "label")
    assert repr(value) not in str(e.value)
    records = LenientRecords([*[Row({"label": value}, "line=2")] * 150, {"label": "pos"}])
    assert labels("neg", "pos").of(records, "label") == [IGNORED] * 150 + [1]
    assert ["did you mean" in fault for fault in records.faults] == [True] * 100 + [False] * 50


def test_what_only_looks_like_a_label_is_refused_with_the_reason():
    """A label has one spelling, so that no two labels that differ in this way alone are taken for one."""
    for value in ("Pos", *UNSEEN):
        with pytest.raises(DataError, match="did you mean pos; case, spaces and invisible signs count; "):
            labels("neg", "pos").of([{"label": value}], "label")
    both = labels("pos", "Pos", "neg ")
    assert [both.number(value) for value in ("pos", "Pos", "neg ", "neg", "POS")] == [0, 1, 2, None, None]
    with pytest.raises(DataError, match="did you mean pos or Pos; "):
        both.of([{"label": "POS"}], "label")
    with pytest.raises(DataError, match="a boolean is read by name, and no label is named true or false"):
        labels("neg", "pos").of([{"label": "True "}], "label")
    with pytest.raises(DataError, match="did you mean true; case, spaces"):
        labels("false", "true").of([{"label": "True "}], "label")


def test_a_folder_is_named_with_the_nearest_label():
    with pytest.raises(DataError, match=r"field='label': folder='Normal' must be .*; did you mean normal; "):
        labels("normal", "other").of([{"label": LabelName("Normal", "folder", shown=True)}], "label")
    with pytest.raises(DataError, match=r"folder='train' must be .*the folder 'cat' in it is one, so give this folder"):
        labels("cat", "dog").of([{"label": LabelName("train", "folder", shown=True, inner=("cat",))}], "label")
    with pytest.raises(DataError, match=r"could be 'cat' or 'dog', because folders of both names hold the image"):
        labels("cat", "dog").of([{"label": LabelName("cat", "folder", shown=True, inner=("x", "dog"))}], "label")
    assert labels("cat", "dog").number(LabelName("cat", "folder", inner=("x", "y"))) == 0


def test_a_table_says_what_each_value_means():
    table = {"1": "good", "0.0": "bad", "true": "good", "Zoe\u0308": "bad"}
    values = [1, "1", 1.0, "1.0", 0, False, True, "good", "Zo\u00eb", [0, 1], 0.5, None]
    found = [by_table(value, table) for value in values]
    assert found[:9] == ["good"] * 4 + ["bad", "false", "good", "good", "bad"]
    assert found[9:] == [["bad", "good"], 0.5, None]
    model = labels("bad", "good")
    assert [model.number(value) for value in found[:9]] == [1, 1, 1, 1, 0, None, 1, 1, 0]
    assert labels("1", "0").number(by_table(1, {"1": "1"})) == 0
    with pytest.raises(DataError, match=r"labels='god' must be one of .*did you mean good"):
        model.of([{"label": by_table(3, {"3": "god"})}], "label")


def test_numbers_beside_names_are_told_to_somebody_who_sees_all_files():
    """The mixed kind of file is no warning about itself: each of its values has one meaning."""
    files = {
        "east": [{"label": 1}, {"label": "0"}, Row({"label": None}, "line=3", empty=True)],
        "north": [{"label": "neg"}, {"label": 1}],
        "south": [{"label": LabelName("1", "folder")}],
        "west": [{"text": "no label"}],
    }
    kinds = {owner: only_numbers(records) for owner, records in files.items()}
    assert kinds == {"east": True, "north": False, "south": False, "west": None}
    warning = numbers_beside_names(kinds, ["neg", "pos"])
    assert warning is not None
    assert "at east, and names at north, south; numbers are read in the model's order (0 = neg, 1 = pos)" in warning
    assert numbers_beside_names({"east": True, "west": None}, ["neg", "pos"]) is None
    assert numbers_beside_names({"north": False, "west": None}, ["neg", "pos"]) is None
    assert only_numbers([{"labels": [0, 1]}, {"labels": [2.0]}]) is True
    assert only_numbers([{"labels": [0, "O"]}]) is False
