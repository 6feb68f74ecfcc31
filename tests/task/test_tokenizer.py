"""A foreign tokenizer gives the library's ids, and its rules can harm only its own process."""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import offsite.task.tokenizer
from offsite.errors import DataError
from offsite.task import tokenizer_worker
from offsite.task.tokenizer import Tokenizer
from offsite.task.tokenizer_settings import TokenizerSettings
from offsite.task.tokenizer_worker import TokenizerWorker

WORDS = {word: number for number, word in enumerate(["<end>", "<unk>", "the", "cat", "sat", "hiv", "Grüße"])}


def library(**model: object) -> Library:
    made = Library(models.WordLevel(WORDS, **({"unk_token": "<unk>"} | model)))  # type: ignore[arg-type]
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def of(made: Library) -> Tokenizer:
    return Tokenizer(made.to_str().encode(), TokenizerSettings(tokens={"eos_token": "<end>"}))


def start(made: Library, template: str = "") -> tuple[bytes, bytes]:
    """What the tokenizer's program is started with."""
    return made.to_str().encode(), TokenizerSettings(template=template).to_bytes()


def test_its_ids_are_those_of_transformers(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=library(), eos_token="<end>").save_pretrained(tmp_path)
    texts = ["the cat sat", "", "Grüße, the\x00 cat", "<end> the", "cat " * 10**5]
    own, theirs = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    assert own.tokens(texts) == [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert own.eos_token_id == theirs.eos_token_id == 0
    assert own.largest_id == 6


def test_a_silenced_tokenizer_makes_no_token_and_keeps_its_facts() -> None:
    """The check of a file's rules needs no tokens, and a million records would be a million questions."""
    loud = of(library())
    silent = loud.silenced()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offsite.task.tokenizer.TokenizerWorker", None)  # a process would fail to start
        assert silent.tokens(["the cat sat", ""]) == [[], []]
        assert silent.singles(["the cat sat"], 4)[0].ids == []
        assert silent.worded([["the", "cat"]], 4)[0].words == []
    assert (silent.eos_token_id, silent.largest_id, silent.start) == (loud.eos_token_id, loud.largest_id, loud.start)
    assert loud.tokens(["the cat sat"]) == [[2, 3, 4]]


def test_a_process_that_cannot_start_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a user may not run the interpreter; the message once said that tokenizer.json cannot be read."""
    content, made = library().to_str().encode(), of(library())
    program = tmp_path / "python"
    program.touch(mode=0o600)
    monkeypatch.setattr(sys, "executable", str(program))
    for start in (lambda: Tokenizer(content, TokenizerSettings()), lambda: made.tokens(["the"])):
        with pytest.raises(DataError, match=r"its process cannot be started now \(Permission denied\)"):
            start()


def test_padding_and_truncation_of_the_file_do_not_count() -> None:
    made = library()
    made.enable_truncation(1)
    made.enable_padding(length=9)
    assert of(made).tokens(["the cat sat"]) == [[2, 3, 4]]


@pytest.mark.parametrize("name", ["vocab", "vocab_file", "init_inputs", "extra_special_tokens", "auto_map"])
def test_no_other_setting_is_looked_at(tmp_path: Path, name: str) -> None:
    """transformers reads a file that such a key names, and the tokens would reveal the content of the file."""
    PreTrainedTokenizerFast(tokenizer_object=library(), eos_token="<end>").save_pretrained(tmp_path)
    secret = tmp_path / "records.txt"
    secret.write_text("jane doe has hiv\n" * 50)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    value = {"init_inputs": [str(secret)], "extra_special_tokens": ["jane doe has hiv"]}.get(name, str(secret))
    changed = settings | {"tokenizer_class": "BertTokenizer", name: value}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed))
    found = Tokenizer.of(tmp_path)
    assert (found.eos_token_id, found.largest_id) == (0, 6)


def test_a_text_on_which_it_fails_has_no_ids() -> None:
    made = Library(models.WordLevel({"the": 0}, unk_token="missing"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    assert of(made).tokens(["the", "the hiv", "the the"]) == [[0], [], [0, 0]]


def test_a_text_that_kills_it_has_no_ids() -> None:
    """Two replacements exhaust the memory, and a new process takes the next text."""
    made = library()
    made.normalizer = normalizers.Sequence(
        [normalizers.Replace("hiv", "a" * 30_000), normalizers.Replace("a", "b" * 10**6)]
    )
    assert of(made).tokens(["the cat", "the hiv", "cat sit"])[1] == []
    assert of(made).tokens(["the", "hiv", "the"]) == [[2], [], [2]]


def slow_on(word: str) -> Library:
    """A tokenizer that needs seconds for each text with a word of its maker's choice."""
    made = library()
    slow = [normalizers.Replace(word, "ab" * 3000)] + [normalizers.Replace("a", "aa")] * 12
    made.normalizer = normalizers.Sequence(slow)
    return made


def test_a_text_that_takes_too_long_has_no_ids(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many texts are slow, the texts behind them keep their ids; only the log counts."""
    monkeypatch.setattr(tokenizer_worker, "CPU_SECONDS", 1)
    assert of(slow_on("hiv")).tokens(["the", "hiv", "hiv", "the the"]) == [[2], [], [], [2, 2]]
    assert "stopped at the limit of time on 2 and failed on 0 of 4 records" in caplog.text
    assert "hiv" not in caplog.text


# Rules that would remember: by a failure, by growth of memory, by CPU time that adds up.
MEMORIES: dict[str, Callable[[], Library]] = {
    "plain": library,
    "failing": lambda: library(unk_token="missing"),
    "growth": lambda: _with_normalizer(normalizers.Replace("hiv", "a" * 1000), normalizers.Replace("a", "b" * 10**4)),
    "slow": lambda: slow_on("hiv"),
}


def _with_normalizer(*rules: normalizers.Normalizer) -> Library:
    made = library()
    made.normalizer = normalizers.Sequence(list(rules))
    return made


@pytest.mark.parametrize("name", sorted(MEMORIES))
def test_one_text_replaced_changes_its_own_ids_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_worker, "CPU_SECONDS", 1)
    own, texts = of(MEMORIES[name]()), ["the cat", "sat", "", "a\udcff", "the " * 2000, "Grüße"]
    expected = own.tokens(texts)
    for index, other in ((0, "hiv"), *([] if name == "slow" else [(3, "the"), (4, "hiv sat")])):
        changed = own.tokens([*texts[:index], other, *texts[index + 1 :]])
        assert changed[:index] == expected[:index]
        assert changed[index + 1 :] == expected[index + 1 :]


# What a template could read of earlier records in one process: addresses of objects, and the state of a generator.
PEEKS = ["{{ namespace() }}", "{{ cycler }} {{ messages }} {{ messages.__class__ }}", "{{ joiner }}"]


@pytest.mark.parametrize("peek", PEEKS)
def test_a_template_finds_no_trace_of_other_records(peek: str) -> None:
    """The text that is encoded holds the address of an object, so equal ids mean equal memory at the start."""
    letters = Library(models.WordLevel({chr(code): code for code in range(32, 127)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    work = "{% set _ = 'x' * 10**8 %}{% for i in range(999) %}{{ i }}{% endfor %}"
    template = "{% if 'w' in messages[0].content %}" + work + "{% else %}" + peek + "{% endif %}"
    asked = {"kind": "chat", "length": 300, "special": False}
    with TokenizerWorker(start(letters, template)) as worker:
        found = [
            worker.ask({**asked, "of": [{"role": "user", "content": content}]}, 600)
            for content in ("a", "w", "a", "w", "w", "a")
        ]
    assert found[0][0]
    assert found[0] == found[2] == found[5]


def test_a_template_has_no_chance_in_it() -> None:
    """Else a record would have other tokens each time, and no two encodings could be compared."""
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(library().to_str().encode(), TokenizerSettings(template="{{ [1, 2, 3] | random }}"))
    without = Tokenizer(library().to_str().encode(), TokenizerSettings(template="{{ lipsum() }}"))
    assert without.chats([[]], 9) == [([], [])]


def test_the_processes_of_a_tokenizer_end_with_it() -> None:
    with TokenizerWorker(start(library())) as worker:
        program = worker._process.pid
        assert worker.ask({"kind": "text", "of": "the", "length": 5}, 5) == ([2], 0)
        assert worker.ask({"kind": "text", "of": "the cat sat", "length": 2}, 1) == ([], 1)  # longer than what fits
        os.kill(program, signal.SIGKILL)
        assert worker.ask({"kind": "text", "of": "the", "length": 5}, 5) == ([], 1)
        assert worker.ask({"kind": "text", "of": "the", "length": 5}, 5) == ([2], 0)  # a new program serves the next
        second = worker._process.pid
    for process in (program, second):
        with pytest.raises(ProcessLookupError):
            os.killpg(process, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        library().to_str().replace("WordLevel", "Words").encode(),
        json.dumps(
            json.loads(library().to_str())
            | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(3)).decode()}}
        ).encode(),
    ],
)
def test_what_is_no_tokenizer_is_one_line(content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """The last one panics."""
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(content, TokenizerSettings())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("settings", ["{", "[" * 10**5, "\x00"])
def test_damaged_settings_are_one_line(tmp_path: Path, settings: str) -> None:
    (tmp_path / "tokenizer.json").write_text(library().to_str())
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(DataError, match=r"damaged tokenizer_config\.json"):
        Tokenizer.of(tmp_path)


def test_the_end_of_text_is_found_where_transformers_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(library().to_str())
    assert Tokenizer.of(tmp_path).eos_token_id is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<end>", "lstrip": False}}))
    assert Tokenizer.of(tmp_path).eos_token_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "sat"}))
    assert Tokenizer.of(tmp_path).eos_token_id == 4
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "nowhere"}))
    assert Tokenizer.of(tmp_path).eos_token_id is None


def paired() -> Library:
    made = library()
    made.post_processor = processors.TemplateProcessing(
        single="<end> $A <end>", pair="<end>:0 $A:0 <end>:0 $B:1 <end>:1", special_tokens=[("<end>", 0)]
    )
    return made


def test_special_tokens_segments_and_places_are_those_of_transformers(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=paired(), eos_token="<end>").save_pretrained(tmp_path)
    own, theirs = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    options = {"truncation": True, "max_length": 6, "return_offsets_mapping": True, "return_token_type_ids": True}
    for text in ("the cat sat", "the cat sat the cat sat the cat", "", "Grüße"):
        expected, (found,) = theirs(text, **options), own.singles([text], 6)
        assert found.ids == expected["input_ids"]
        assert list(zip(found.starts, found.ends, strict=True)) == expected["offset_mapping"]
    for pair in (("the cat", "sat"), ("the", "cat sat cat sat cat sat")):
        expected, (found,) = theirs(*pair, **options | {"truncation": "only_second"}), own.pairs([pair], 6)
        assert (found.ids, found.types) == (expected["input_ids"], expected["token_type_ids"])
        assert found.sequences == [-1 if one is None else one for one in expected.sequence_ids(0)]
        assert list(zip(found.starts, found.ends, strict=True)) == expected["offset_mapping"]
    words = ["the cat", "sat", "", "hiv"]
    expected, (found,) = theirs(words, is_split_into_words=True, **options), own.worded([words], 6)
    assert found.ids == expected["input_ids"]
    assert found.words == [-1 if one is None else one for one in expected.word_ids(0)]


def test_what_a_tokenizer_fails_on_is_an_empty_encoding_and_the_next_one_is_not() -> None:
    failing = library(unk_token="missing")
    assert [len(one.ids) for one in of(failing).singles(["the", "what", "the cat"], 9)] == [1, 0, 2]
    own = of(paired())
    # A first text that is too long alone cannot be cut.
    assert [len(one.ids) for one in own.pairs([("the cat sat " * 9, "the"), ("the", "cat")], 6)] == [0, 5]


LIES = [[1, 2, 3], list(range(60)), [7] * 6 * 11]


@pytest.mark.parametrize("numbers", LIES)
def test_columns_that_are_none_are_nothing(monkeypatch: pytest.MonkeyPatch, numbers: list[int]) -> None:
    """A tokenizer that took over its process can send any answer."""
    own = of(paired())
    monkeypatch.setattr(tokenizer_worker.TokenizerWorker, "ask", lambda self, request, most: (numbers, 0))
    (found,) = own.singles(["the"], 10)
    sizes = {len(column) for column in vars(found).values()}
    assert sizes == ({10} if len(numbers) == 60 else {0})


def test_its_process_opens_no_file_and_no_socket_and_starts_nothing(tmp_path: Path) -> None:
    """The limits hold for any program in the process; this one tries to break them."""
    tries = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
import tokenizer_process as program
program.limit(4 << 30, 9, 90)
def fails(do):
    try:
        do()
    except BaseException as error:
        return type(error).__name__
    return ""
found = {
    "file": fails(lambda: open("/dev/null")),
    "socket": fails(lambda: socket.socket()),
    "pipe": fails(os.pipe),
    "write": fails(lambda: os.write(1, b"")),
}
program.write(1, json.dumps(found).encode())
"""
    folder = str(Path(offsite.task.tokenizer.__file__).parent)
    done = subprocess.run([sys.executable, "-I", "-c", tries, folder], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert found == {"file": "OSError", "socket": "OSError", "pipe": "OSError", "write": ""}
