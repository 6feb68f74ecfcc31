"""task.readers.image_files: pictures come back as they were written, and errors name a place and nothing else."""

import io
import re
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from offsite.client.home.data_check import check_own_data
from offsite.client.home.installation import SiteHome
from offsite.client.home.settings import SETTINGS
from offsite.client.service.doctor import WARNED, examine
from offsite.coordinator.report.data_facts import DataFacts
from offsite.errors import DataError
from offsite.task import encoded_image
from offsite.task.encoded_image import DAMAGED, EncodedImage
from offsite.task.file_check import check_file
from offsite.task.findings import Findings
from offsite.task.labels import Labels
from offsite.task.nothing_to_learn import Learnt
from offsite.task.readers.columns import columns_of
from offsite.task.readers.image_files import check_images
from offsite.task.readers.tables import READERS, note_on, read, read_for_job
from offsite.task.records import is_empty

GENERATOR = np.random.default_rng(0)
COLOUR = GENERATOR.integers(0, 256, (9, 7, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (5, 6), dtype=np.uint8)
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
PICTURES = {"image": object, "label": object}


def columns(fields=PICTURES, **names):
    return columns_of(fields, names=names)


def png(array):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()


def folder(path, pictures):
    for name, content in pictures.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def same(record, image, **others):
    shown = record["image"].decoded() if isinstance(record["image"], EncodedImage) else record["image"]
    return np.array_equal(shown, image) and {key: record[key] for key in record if key != "image"} == others


def test_a_folder_by_class_is_read_by_class_and_name(tmp_path):
    pictures = {"dog/b.png": png(COLOUR), "dog/a.png": png(GREY), "cat/z.PNG": png(COLOUR), "cat/notes.txt": b"no"}
    path = folder(tmp_path / "d", {**pictures, "readme.txt": b"no", "dog/._a.png": b"no"})
    found = read(path, reader="images", columns=columns())
    assert same(found[0], COLOUR, label="cat")
    assert same(found[1], GREY, label="dog")
    assert same(found[2], COLOUR, label="dog")
    assert len(found) == 3
    assert found[1].place == "image=2"
    assert all(record["image"].decoded().dtype == np.uint8 for record in found)


def test_the_first_folder_is_the_class_of_all_folders_in_it_and_hidden_ones_are_passed_over(tmp_path):
    hidden = (".ipynb_checkpoints/a.png", "__MACOSX/cat/._a.png", "cat/.ipynb_checkpoints/a-checkpoint.png")
    hidden += ("cat/@eaDir/a.png", "dog/Thumbs.db", ".DS_Store", "dog/.DS_Store")
    shown = ("cat/a.png", "cat/2019/b.png", "cat/2019/deep/c.png", "dog/d.png")
    path = folder(tmp_path / "d", dict.fromkeys((*hidden, *shown), png(GREY)))
    (path / "dog" / "loop").symlink_to(path, target_is_directory=True)
    found = read(path, reader="images", columns=columns())
    assert [record["label"] for record in found] == ["cat", "cat", "cat", "dog"]
    assert [record["image"].source.name for record in found] == ["b.png", "c.png", "a.png", "d.png"]
    assert found[1]["label"].inner == ("2019", "deep")


def test_every_suffix_of_a_readable_format_is_read(tmp_path):
    """The suffixes are those of Pillow's own table; the same names in capitals are read too."""
    Image.init()
    suffixes = [suffix for suffix, form in Image.registered_extensions().items() if form in encoded_image.FORMATS]
    assert {".jfif", ".jpe", ".apng"} <= set(suffixes)
    names = [f"a/{number}{suffix}" for number, suffix in enumerate([*suffixes, *map(str.upper, suffixes)])]
    path = folder(tmp_path / "d", dict.fromkeys(names, png(GREY)))
    assert len(read(path, reader="images", columns=columns())) == len(names)


def test_files_that_are_passed_over_are_counted_in_one_line_without_their_names(tmp_path, caplog):
    others = (
        "cat/1.jp2",
        "cat/2.JP2",
        "cat/notes.txt",
        "loose.png",
        "dog/1.dcm",
        "dog/x.smith",
        "dog/smith",
        "README.md",
    )
    path = folder(tmp_path / "d", dict.fromkeys((*others, "cat/a.png", "cat/.hidden.jp2"), png(GREY)))
    assert len(read(path, reader="images", columns=columns())) == 1
    (line,) = caplog.messages
    assert line == (
        f"data={str(path)!r}: images=1 are read, files passed over: .dcm 1, .jp2 2, .md 1, "
        ".png in no class's folder 1, .txt 1, with other suffixes 1, without suffix 1; folders without an image: 'dog'"
    )
    caplog.clear()
    junk = (".ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", "cat/Thumbs.db", "cat/.a.png", "cat/desktop.ini")
    path = folder(tmp_path / "e", dict.fromkeys((*junk, "cat/a.png"), png(GREY)))
    assert len(read(path, reader="images", columns=columns())) == 1
    assert caplog.messages == []


def test_what_is_passed_over_is_told_where_the_owner_looks(tmp_path, caplog):
    """In the findings of `offsite check`, and in what `client init` and `doctor` say; told once, and not logged."""
    path = folder(tmp_path / "d", dict.fromkeys(("cat/a.png", "cat/b.dcm"), png(GREY)))
    line = f"data={str(path)!r}: images=1 are read, files passed over: .dcm 1"
    findings = Findings()
    assert check_file(path, reader="images", columns=columns(), where="site=ash", findings=findings)
    assert (findings.errors, findings.warnings) == ([], [f"site=ash: {line}"])
    found = check_own_data(path, reader="images", column="", names={}, labels={})
    assert found.notes == (line,)
    site = SiteHome.create(tmp_path / "site", name="ash", data=path, suite=1, now=NOW)
    settings = site.folder / SETTINGS
    settings.write_text(re.sub(r'(?m)^reader = ""', 'reader = "images"', settings.read_text()))
    (data,) = [one for one in examine(SiteHome.open(site.folder), lambda: NOW) if one.check == "data"]
    assert (data.state, data.detail.endswith(f"; {line}")) == (WARNED, True), data
    facts = DataFacts.of("training", "ash", Learnt(1, 0, 1), note_on(path, "images"))
    assert facts.warnings == (f"site=ash training data: {line}",)
    assert caplog.messages == []


def test_names_of_folders_have_the_form_of_the_models_names(tmp_path):
    path = folder(
        tmp_path / "d", {"Zoe\u0308/a.png": png(GREY), "Zo\u00eb/b.png": png(GREY), "zo\u00eb/c.png": png(GREY)}
    )
    found = read(path, reader="images", columns=columns())
    assert {record["label"] for record in found} == {"Zo\u00eb", "zo\u00eb"}
    model = Labels(SimpleNamespace(id2label={0: "Zo\u00eb", 1: "b"}))
    with pytest.raises(DataError, match=r"image=3 field='label': folder='zo\u00eb' must be .*did you mean Zo\u00eb"):
        model.of(found, "label")
    assert model.of(found[:2], "label") == [0, 0]


def test_paths_without_images_and_a_missing_reader_are_said(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [{"bytes": None, "path": "secret.png"}], "label": [1]}), tmp_path / "p.parquet"
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [{"bytes": png(GREY), "path": "secret"}], "label": [1]}), tmp_path / "d.parquet"
    )
    pyarrow.parquet.write_table(pyarrow.table({"image": [png(GREY)], "label": [1]}), tmp_path / "b.parquet")
    cases = [("p", "image_parquet", "holds the path of"), ("p", None, "holds the path of")]
    cases += [(name, None, "holds an encoded image, which this reader does not read") for name in "db"]
    for name, reader, rule in cases:
        with pytest.raises(DataError, match=rf"row=1 column='image' {rule}") as caught:
            read(tmp_path / f"{name}.parquet", reader=reader, columns=columns())
        assert "'image_parquet'" in str(caught.value)
        assert "'images'" in str(caught.value)
        assert "secret" not in str(caught.value)
    path = folder(tmp_path / "f", {"cat/a.png": png(GREY)})
    for where in (path, path / "cat"):
        with pytest.raises(DataError, match=r"is a folder of images; name the reader 'images', .*'image_parquet'"):
            read(where, reader=None, columns=columns())
    (tmp_path / "t.jsonl").write_text('{"image": "secret.png", "label": 1}\n')
    with pytest.raises(DataError, match="line=1 field='image': is a text and no image") as caught:
        check_images(tmp_path / "t.jsonl", read(tmp_path / "t.jsonl", reader=None, columns=columns()))
    assert "secret" not in str(caught.value)


def test_other_modes_become_rgb(tmp_path):
    four = Image.fromarray(COLOUR).convert("CMYK")
    content = io.BytesIO()
    four.save(content, "TIFF")
    clear = np.dstack([COLOUR, np.full(COLOUR.shape[:2], 9, np.uint8)])
    path = folder(tmp_path / "d", {"a/1.png": png(clear), "a/2.tiff": content.getvalue()})
    found = read(path, reader="images", columns=columns())
    assert same(found[0], COLOUR, label="a")
    assert found[1]["image"].decoded().shape == COLOUR.shape


def test_a_parquet_file_holds_encoded_images_beside_plain_columns(tmp_path):
    table = {
        "bare": [png(COLOUR), png(GREY)],
        "framed": [{"bytes": png(GREY), "path": "secret.png"}, {"bytes": png(COLOUR), "path": None}],
        "label": [3, 4],
        "question": ["what ?", "which ?"],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "d.parquet")
    for column, (first, second) in (("bare", (COLOUR, GREY)), ("framed", (GREY, COLOUR))):
        wanted = columns({"image": object, "question": str, "label": object}, image=column)
        found = read(tmp_path / "d.parquet", reader="image_parquet", columns=wanted)
        assert same(found[0], first, label=3, question="what ?")
        assert same(found[1], second, label=4, question="which ?")
        assert found[1].place == "row=2"


def test_an_npz_file_holds_images_numbers_texts_and_ragged_arrays(tmp_path):
    texts = GENERATOR.normal(size=(3, 5, 2)).astype(np.float32)
    np.savez(
        tmp_path / "d.npz",
        image=np.stack([COLOUR] * 3),
        label=np.array([0, 1, 2], np.uint8),
        name=np.array(["a", "bc", "d"]),
        words=np.array([["x", "y"], ["z", "w"], ["v", "u"]]),
        prompt_embeds=texts,
        prompt_embeds_length=np.array([5, 2, 1]),
    )
    fields = {"image": object, "label": object, "name": str, "words": list, "prompt_embeds": object}
    found = read(tmp_path / "d.npz", reader=None, columns=columns(fields))
    assert len(found) == 3
    for row, record in enumerate(found):
        assert np.array_equal(record["image"], COLOUR)
        assert (record["label"], record["name"]) == (row, ["a", "bc", "d"][row])
        assert type(record["label"]) is int
        assert np.array_equal(record["prompt_embeds"], texts[row, : (5, 2, 1)[row]])
    assert found[1]["words"] == ["z", "w"]


def test_files_that_are_no_images_are_refused_without_their_names(tmp_path):
    path = folder(tmp_path / "d", {"a/patient-one.png": png(COLOUR), "a/patient-two.png": png(COLOUR)[:40]})
    with pytest.raises(DataError, match="image=2 is not a readable image") as caught:
        check_images(path, read(path, reader="images", columns=columns()))
    assert "patient" not in str(caught.value)
    assert caught.value.__cause__ is None
    table = pyarrow.table({"image": [b"secret"], "label": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="row=1 is not a readable image") as caught:
        check_images(tmp_path, read(tmp_path / "d.parquet", reader="image_parquet", columns=columns()))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_eight_bits_are_refused_and_not_cut_to_white(tmp_path, dtype):
    content = io.BytesIO()
    Image.fromarray(GREY.astype(dtype) * 200).save(content, "TIFF")
    path = folder(tmp_path / "d", {"a/1.tiff": content.getvalue()})
    with pytest.raises(DataError, match="image=1 must have at most 8 bits a channel"):
        check_images(path, read(path, reader="images", columns=columns()))


@pytest.mark.parametrize("lengths", [[3, -1], [3, 6], [3.0, 1.0], ["3", "1"], [[3], [1]]])
def test_lengths_that_no_row_can_have_are_refused(tmp_path, lengths):
    np.savez(tmp_path / "d.npz", prompt_embeds=np.zeros((2, 5, 4)), prompt_embeds_length=np.array(lengths))
    with pytest.raises(DataError, match="prompt_embeds_length must be"):
        read(tmp_path / "d.npz", reader="npz", columns=columns({"prompt_embeds": object}))
    np.savez(tmp_path / "e.npz", prompt_embeds=np.zeros((2, 5, 4)), prompt_embeds_length=np.array([5, 0]))
    found = read(tmp_path / "e.npz", reader="npz", columns=columns({"prompt_embeds": object}))
    assert [len(record["prompt_embeds"]) for record in found] == [5, 0]


def test_a_length_or_label_of_one_row_is_that_row_alone_in_a_job(tmp_path):
    lengths = np.array([5, 6, -1, 2])
    np.savez(tmp_path / "d.npz", prompt_embeds=np.ones((4, 5, 4)), prompt_embeds_length=lengths)
    found = read_for_job(tmp_path / "d.npz", reader="npz", columns=columns({"prompt_embeds": object}))
    assert [None if is_empty(one) else len(one["prompt_embeds"]) for one in found] == [5, None, None, 2]
    assert [fault.split("row=")[1][0] for fault in found.faults] == ["2", "3"]
    table = {"image": [png(GREY), None, png(GREY)], "label": ["a", "b", None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "d.parquet")
    found = read_for_job(tmp_path / "d.parquet", reader="image_parquet", columns=columns())
    assert [is_empty(one) for one in found] == [False, True, True]


def test_an_image_that_would_fill_the_memory_is_refused_and_counts_for_no_other(tmp_path, monkeypatch):
    """An image is decoded when its record is encoded, so there is no limit that images share."""
    path = folder(tmp_path / "d", {"a/1.png": png(COLOUR), "a/2.png": png(GREY)})
    monkeypatch.setattr(encoded_image, "MAX_PIXELS", 62)
    found = read(path, reader="images", columns=columns())
    with pytest.raises(DataError, match="image=1 must have at most 62 pixels"):
        check_images(path, found)
    check_images(path, found[1:])
    monkeypatch.setattr(encoded_image, "MAX_PIXELS", 63)
    check_images(path, found)


@pytest.mark.parametrize("cut", [9, 20, 33, 60, 100])
def test_damage_anywhere_in_an_image_is_one_rule(cut):
    """The library fails in many ways, each of which would tell the place of the damage."""
    content = io.BytesIO()
    Image.fromarray(GREY).save(content, "TIFF")
    outcomes = set()
    for whole in (png(COLOUR), content.getvalue()):
        for damaged in (whole[:cut], whole[:cut] + bytes(5) + whole[cut + 5 :], whole[:cut] + b"\xff" + whole[cut:]):
            try:
                EncodedImage(damaged).decoded()
            except DataError as error:
                outcomes.add(str(error).partition(";")[0])
    assert outcomes
    assert outcomes <= {DAMAGED.partition(";")[0], "must have at most 67108864 pixels"}


def test_an_image_that_is_gone_is_no_broken_record(tmp_path):
    """Its record would become an empty one in a job, and with the whole disk gone the job would train on nothing."""
    path = folder(tmp_path / "d", {"a/1.png": png(COLOUR), "a/2.png": png(COLOUR)})
    records = read_for_job(path, reader="images", columns=columns())
    (path / "a" / "2.png").unlink()
    with pytest.raises(OSError, match="No such file"):
        records[1]["image"].decoded()


def test_pickled_objects_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    np.savez(tmp_path / "d.npz", image=np.array([Trap()], object), label=np.array([1]))
    with pytest.raises(DataError, match="plain arrays"):
        read(tmp_path / "d.npz", reader="npz", columns=columns())


def test_columns_of_different_length_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", image=np.stack([COLOUR] * 3), label=np.array([0, 1]))
    with pytest.raises(DataError, match="image=3, label=2: all columns"):
        read(tmp_path / "d.npz", reader="npz", columns=columns())
    np.savez(tmp_path / "e.npz", image=COLOUR[None], label=np.float32(2))
    with pytest.raises(DataError, match="all columns"):
        read(tmp_path / "e.npz", reader="npz", columns=columns())


def test_a_label_that_is_no_name_or_number_is_refused_by_its_row(tmp_path):
    np.savez(tmp_path / "d.npz", image=np.stack([COLOUR] * 2), label=np.array([0.5, 1]))
    with pytest.raises(DataError, match="row=1 column='label'"):
        read(tmp_path / "d.npz", reader="npz", columns=columns())
    pyarrow.parquet.write_table(pyarrow.table({"image": [png(GREY)], "label": [None]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="row=1 column='label' holds NoneType"):
        read(tmp_path / "d.parquet", reader="image_parquet", columns=columns())


def test_a_folder_without_images_or_another_column_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="no images in folders"):
        read(tmp_path / "d", reader="images", columns=columns())
    with pytest.raises(DataError, match=r"column='lable'.*did you mean label"):
        read(tmp_path / "d", reader="images", columns=columns(label="lable"))
    (tmp_path / "f").write_bytes(b"")
    for reader in ("images", "image_parquet", "npz"):
        assert reader in READERS
        with pytest.raises(DataError):
            read(tmp_path / "f", reader=reader, columns=columns())
