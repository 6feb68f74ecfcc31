"""task.readers.shards and data_file: folders of shards and compressed files, by the libraries that write them."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from offsite.errors import DataError
from offsite.task.readers import data_file
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import check_readable, read, read_for_job
from offsite.task.records import is_empty

COLUMNS = columns_of({"text": str}, names={})
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}
TEXTS = [f"text {number} ä" for number in range(7)]


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(texts):
    return pyarrow.table({"text": texts})


def write(path, texts):
    """Writes texts in the format of a path's suffix."""
    kind = path.suffixes[0]
    if kind == ".parquet":
        pyarrow.parquet.write_table(table(texts), path)
    elif kind == ".arrow":
        with pyarrow.ipc.new_file(path, table(texts).schema) as file:
            file.write_table(table(texts))
    elif kind == ".feather":
        pyarrow.feather.write_feather(table(texts), path)
    else:
        content = {
            ".jsonl": jsonl(texts),
            ".json": json.dumps([{"text": text} for text in texts]).encode(),
            ".csv": "\n".join(["text", *texts]).encode(),
            ".tsv": "\n".join(["id\ttext", *(f"1\t{text}" for text in texts)]).encode(),
            ".txt": "".join(texts).encode(),
        }[kind]
        path.write_bytes(PACK.get(path.suffix, bytes)(content))


def texts_of(path, reader=None):
    return [record["text"] for record in read(path, reader=reader, columns=COLUMNS)]


@pytest.mark.parametrize(
    "suffix",
    [".jsonl", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".csv.zst", ".tsv.gz", ".parquet", ".arrow", ".feather"],
)
def test_shards_are_read_in_order_of_their_names(tmp_path, suffix):
    for name, texts in {"b": TEXTS[3:5], "a": TEXTS[:3], "c": TEXTS[5:]}.items():
        write(tmp_path / f"{name}{suffix}", texts)
    for other in (".DS_Store", "_SUCCESS", "README.md", "LICENSE", "dataset_info.json", "Thumbs.db", "_committed_12"):
        (tmp_path / other).write_text("{}")
    assert texts_of(tmp_path) == TEXTS
    records = read_for_job(tmp_path, reader=None, columns=COLUMNS)
    assert [record["text"] for record in records] == TEXTS
    assert all(record.place.startswith(f"file='{name}") for record, name in zip(records, "aaabbcc", strict=True))
    assert len({record.place for record in records}) == len(TEXTS)
    check_readable(tmp_path, reader=None)


@pytest.mark.parametrize("packed", sorted(PACK))
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_compressed_file_is_the_file(tmp_path, kind, packed):
    write(tmp_path / f"d{kind}{packed}", TEXTS)
    assert texts_of(tmp_path / f"d{kind}{packed}") == TEXTS


def test_a_compressed_file_may_have_several_parts_and_a_byte_order_mark(tmp_path):
    for suffix in PACK:
        parts = PACK[suffix](b"\xef\xbb\xbf" + jsonl(TEXTS[:3])), PACK[suffix](jsonl(TEXTS[3:]))
        (tmp_path / f"d.jsonl{suffix}").write_bytes(b"".join(parts))
        assert texts_of(tmp_path / f"d.jsonl{suffix}") == TEXTS


def test_compressed_texts_of_a_folder(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"{number}.txt.gz", [f"text {number}"])
    (tmp_path / "3.txt").write_text("text 3")
    assert texts_of(tmp_path) == ["text 1", "text 2", "text 3"]


@pytest.mark.parametrize("packed", sorted(PACK))
@pytest.mark.parametrize("how", [read, read_for_job])
def test_a_damaged_compressed_file_is_refused_as_a_whole(tmp_path, packed, how):
    content = PACK[packed](jsonl(TEXTS * 1000))
    for damaged in (content[:-9], content[: len(content) // 2], b"no such file"):
        (tmp_path / f"d.jsonl{packed}").write_bytes(damaged)
        with pytest.raises(DataError, match=f"is not a whole {packed} file") as caught:
            how(tmp_path / f"d.jsonl{packed}", reader=None, columns=COLUMNS)
        assert caught.value.__suppress_context__


def test_a_compressed_file_that_expands_too_far_is_an_error_for_its_owner_alone(tmp_path, monkeypatch):
    """What a file expands to follows from its rows, so it must not decide whether a job can be opened."""
    monkeypatch.setattr(data_file, "GROWTH_FROM", 1000)
    path = tmp_path / "d.jsonl.gz"
    write(path, ["a" * 900_000])
    assert path.stat().st_size * data_file.MAX_GROWTH < 900_000
    with pytest.raises(DataError, match="expands to more than 256 times its size"):
        read(path, reader=None, columns=COLUMNS)
    records = read_for_job(path, reader=None, columns=COLUMNS)
    assert [len(record["text"]) for record in records] == [900_000]
    assert ["expands to" in fault for fault in records.faults] == [True]
    monkeypatch.setattr(data_file, "GROWTH_FROM", 1_000_000)
    assert len(read(path, reader=None, columns=COLUMNS)) == 1


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.jsonl.gz", "d.csv.zst", "folder"])
def test_a_row_that_is_too_long_is_one_broken_row(tmp_path, monkeypatch, name):
    monkeypatch.setattr(data_file, "MAX_ROW", 400_000)
    texts = ["first", "long " * 200_000, "", "last"]
    if name == "folder":
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number}.txt").write_text(text)
    else:
        write(tmp_path / name, texts)
    with pytest.raises(DataError, match=r"(line|row|text)=[23] .*is a (row|text) of more than 400000") as caught:
        read(tmp_path / name, reader=None, columns=COLUMNS)
    assert len(str(caught.value)) < 300
    records = read_for_job(tmp_path / name, reader=None, columns=COLUMNS)
    assert [record["text"] for record in records] == ["first", "", "", "last"]
    assert records.faults == [str(caught.value)]


def refused(path, match, reader=None):
    for check in (lambda: texts_of(path, reader), lambda: check_readable(path, reader=reader)):
        with pytest.raises(DataError, match=match):
            check()


def test_a_folder_with_other_things_is_refused_and_not_read_in_part(tmp_path):
    write(tmp_path / "a.jsonl", TEXTS)
    for name, match in {
        "b.csv": "files for the readers csv, jsonl",
        "b.xlsx": r"1 .jsonl or .ndjson files and 1 more \(.xlsx 1\); move these out",
        "b.smith": r"1 more \(with other suffixes 1\)",
        "b": r"1 more \(without suffix 1\)",
        "notes.md": r"1 more \(.md 1\)",
        "_a.jsonl": r"1 more \(with _ in front 1\)",
        "a.jsonl.gz": "'a.jsonl' plain and compressed",
    }.items():
        (tmp_path / name).write_bytes(b"text")
        refused(tmp_path, match)
        (tmp_path / name).unlink()
    (tmp_path / "patient").mkdir()
    refused(tmp_path, "has 1 folders inside; give the folder that holds the files")
    (tmp_path / "patient").rename(tmp_path / "train")
    refused(tmp_path, "has 1 folders inside: train; give")
    (tmp_path / "train").rmdir()
    assert texts_of(tmp_path) == TEXTS


def test_a_folder_of_texts_with_documents_is_refused_and_counts_them(tmp_path):
    for name in (
        "1.txt",
        "2.txt",
        "Smith.docx",
        "3.DOCX",
        "4.pdf",
        "5.smith",
        "~$mith.docx",
        ".hidden.pdf",
        "README.md",
    ):
        (tmp_path / name).write_bytes(b"text")
    (tmp_path / "__MACOSX").mkdir()
    refused(tmp_path, r"has 2 .txt files and 5 more \(.docx 3, .pdf 1, with other suffixes 1\); move these out")
    (tmp_path / "1.csv").write_text("text")
    refused(tmp_path, r"2 .txt files and 6 more \(.csv 1, .docx 3,", "text")
    refused(tmp_path, "files for the readers csv, text; put them into folders apart")
    for name in ("1.txt", "2.txt", "1.csv"):
        (tmp_path / name).unlink()
    refused(tmp_path, r"has no .txt file but 5 others \(.docx 3, .pdf 1, with other suffixes 1\); write", "text")


def test_an_empty_folder_names_the_readers(tmp_path):
    (tmp_path / ".hidden.jsonl").write_text("")
    refused(tmp_path, "no file with a suffix of a reader; name a reader: arrow, csv")
    refused(tmp_path, "no .jsonl or .ndjson file", "jsonl")


def test_shards_without_suffix_need_a_named_reader(tmp_path):
    for number in (0, 1):
        (tmp_path / f"part-0000{number}").write_bytes(jsonl([f"text {number}"]))
    (tmp_path / "_SUCCESS").write_text("")
    refused(tmp_path, "name a reader")
    assert texts_of(tmp_path, "jsonl") == ["text 0", "text 1"]


def test_shards_of_several_splits_are_refused(tmp_path):
    """A site would train on its held-out records without a word."""
    for names in (
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("data_train", "data_dev"),
        ("my_train_1", "my_val"),
    ):
        for name in names:
            write(tmp_path / f"{name}.parquet", TEXTS)
        refused(tmp_path, "several splits")
        for name in names:
            (tmp_path / f"{name}.parquet").unlink()
    for name in ("train-1", "training-2", "contest"):
        write(tmp_path / f"{name}.parquet", TEXTS)
    assert len(texts_of(tmp_path)) == 3 * len(TEXTS)


def test_a_set_of_shards_has_to_be_whole(tmp_path):
    for number in (0, 1, 2):
        write(tmp_path / f"train-0000{number}-of-00003-0a1b.parquet", TEXTS)
    assert len(texts_of(tmp_path)) == 3 * len(TEXTS)
    (tmp_path / "train-00001-of-00003-0a1b.parquet").unlink()
    refused(tmp_path, "lacks shard train-00001-of-00003, and 0 more")
    write(tmp_path / "train-00000-of-00001.parquet", TEXTS)
    refused(tmp_path, "shards 'train' of 1 and of 3")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv"])
def test_a_pointer_or_a_cut_shard_is_named(tmp_path, kind):
    for number in range(4):
        write(tmp_path / f"{number}{kind}", TEXTS)
    (tmp_path / f"2{kind}").write_bytes(POINTER)
    refused(tmp_path, f"file='2{kind}' is a pointer of Git LFS .*git lfs pull")
    (tmp_path / f"2{kind}").write_bytes((tmp_path / f"1{kind}").read_bytes()[:-20])
    if kind in (".parquet", ".arrow", ".json", ".jsonl"):
        with pytest.raises(DataError, match=f"file='2{kind}'"):
            texts_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("text\na\n".encode("utf-16"), "UTF-16"),
        (gzip.compress(b"text\n", mtime=0), "gzip; give its name the suffix .gz"),
        (PACK[".zst"](b"text\n"), "suffix .zst"),
        (b"PK\x03\x04 and more", "zip archive or a spreadsheet"),
        (b"PAR1 and more", "name the reader parquet"),
    ],
    ids=["utf-16", "gzip", "zstandard", "zip", "parquet"],
)
def test_content_of_another_kind_is_named(tmp_path, content, rule):
    for name in ("d.csv", "d.jsonl", "d.txt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rule):
            read(tmp_path / name, reader=None, columns=COLUMNS)


def test_a_record_that_starts_like_another_format_is_no_fact_about_its_file(tmp_path):
    for start in (b"PK\x03\x04", b"\x1f\x8b", b"\xff\xfe", POINTER):
        (tmp_path / "d.jsonl").write_bytes(start.splitlines()[0] + b"\n" + jsonl(["b"]))
        records = read_for_job(tmp_path / "d.jsonl", reader=None, columns=COLUMNS)
        assert [record["text"] for record in records] == ["", "b"]


def test_a_shard_without_the_column_is_named(tmp_path):
    write(tmp_path / "a.csv", TEXTS)
    (tmp_path / "b.csv").write_text("tekst\na\n")
    with pytest.raises(DataError, match=r"column='text' is not in data=.* file='b.csv', columns=tekst"):
        read(tmp_path, reader=None, columns=COLUMNS)
    write(tmp_path / "c.parquet", TEXTS)
    with pytest.raises(DataError, match="csv, parquet"):
        read(tmp_path, reader=None, columns=COLUMNS)


def test_a_parquet_file_that_was_compressed_again_is_refused(tmp_path):
    write(tmp_path / "d.parquet", TEXTS)
    (tmp_path / "d.parquet.gz").write_bytes(gzip.compress((tmp_path / "d.parquet").read_bytes()))
    refused(tmp_path / "d.parquet.gz", "compressed again; expand it")


def test_a_file_that_may_not_be_read_is_refused_with_the_reason(tmp_path):
    """A folder in the place of a shard, since this test may run as root."""
    (tmp_path / "d.jsonl.gz").mkdir()
    refused(tmp_path / "d.jsonl.gz", "no file with a suffix of a reader")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "gone.jsonl", "does not exist")


def saved(path, shards, **state):
    """Writes a folder as `save_to_disk` of the datasets library does: streams of Arrow, and two files of JSON."""
    path.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        with pyarrow.ipc.new_stream(path / name, table(texts).schema) as file:
            file.write_table(table(texts))
    (path / "dataset_info.json").write_text('{"features": {}}')
    files = [{"filename": name} for name in names]
    (path / "state.json").write_text(json.dumps({"_data_files": files, "_split": None, **state}))
    return path


def test_a_folder_that_datasets_saved_is_read_as_its_state_says(tmp_path):
    path = saved(tmp_path / "d", [TEXTS[:4], TEXTS[4:]])
    with pyarrow.ipc.new_stream(path / "cache-0123.arrow", table(["of a filter"]).schema) as file:
        file.write_table(table(["of a filter"]))
    assert texts_of(path) == TEXTS
    for name, kind in (("data-00002-of-00003.arrow", ".arrow"), ("more.csv", ".csv")):
        (path / name).write_bytes(b"")
        refused(path, rf"has 2 .arrow or .feather files and 1 more \({kind} 1\); move these out")
        (path / name).unlink()
    refused(path, "name reader arrow", "jsonl")
    (path / "data-00001-of-00002.arrow").unlink()
    refused(path, "lacks file='data-00001-of-00002.arrow', which state.json names")


@pytest.mark.parametrize(
    "state",
    [
        {"_data_files": [{"filename": "../other.arrow"}]},
        {"_indices_data_files": [{"filename": "i"}]},
        {"_data_files": 1},
    ],
)
def test_a_state_that_points_elsewhere_is_refused(tmp_path, state):
    refused(saved(tmp_path / "d", [TEXTS], **state), "file='state.json' (points to other files|is damaged)")


def test_a_folder_of_saved_splits_names_them(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / "d" / split, [TEXTS])
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    refused(tmp_path / "d", r"holds the splits test, train of a dataset; give one of them, for example .*/train'")
    assert texts_of(tmp_path / "d" / "train") == TEXTS


def test_a_blank_row_in_a_shard_is_an_empty_record(tmp_path):
    write(tmp_path / "a.jsonl.gz", ["a", " "])
    write(tmp_path / "b.jsonl.gz", ["", "b"])
    records = read_for_job(tmp_path, reader=None, columns=COLUMNS)
    assert [is_empty(record) for record in records] == [False, True, True, False]
