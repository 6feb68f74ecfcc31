"""Over a table of tokenizers: the ids of every task are those of transformers' own class, with its special tokens."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from offsite.errors import DataError
from offsite.task.tasks import TASKS
from offsite.task.tokenizer import Tokenizer
from offsite.task.tokenizer_agreement import check_agreement
from tests.task.tokenizers_made import (
    BOS,
    CODED,
    PLAIN,
    TEXTS,
    byte_level,
    change,
    pieces,
    saved,
    template,
    whole_words,
)

LENGTH = 16
CAUSAL, COMPLETION = TASKS["causal_lm"], TASKS["prompt_completion"]


def rows(batch):
    """Returns the ids of each example without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def encode(task, words, records, length=LENGTH, split="truncate"):
    return task.encode(words, records, length=length, split=split, model_config=None)


def expected_row(theirs, text, length=LENGTH):
    """transformers' ids, ended by the end-of-text token where the text is whole and has no end yet."""
    bare = theirs(text, add_special_tokens=False)["input_ids"]
    ids = theirs(text, truncation=True, max_length=length)["input_ids"]
    around = len(theirs(text)["input_ids"]) - len(bare)
    if not bare or len(ids) < 2:
        return []
    ends = around > 0 and ids[-1] == theirs.eos_token_id
    return (ids if ends else [*ids, theirs.eos_token_id])[:length]


@pytest.mark.parametrize("name", PLAIN)
def test_ids_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    PLAIN[name](tmp_path)
    own, theirs = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    check_agreement(tmp_path, own)
    assert own.eos_token_id == theirs.eos_token_id
    for length in (LENGTH, 200):
        options = {"truncation": True, "max_length": length}
        assert [found.ids for found in own.singles(TEXTS, length)] == [
            theirs(text, **options)["input_ids"] for text in TEXTS
        ]
    pairs = [("the river", text) for text in TEXTS if text]  # transformers takes an empty second text for none
    expected = [theirs(*pair, truncation="only_second", max_length=99, return_token_type_ids=True) for pair in pairs]
    found = own.pairs(pairs, 99)
    assert [(one.ids, one.types) for one in found] == [(one["input_ids"], one["token_type_ids"]) for one in expected]
    texts = [text for text in TEXTS if not text.startswith("</s>")]
    batch = encode(CAUSAL, own, [{"text": text} for text in texts])
    assert rows(batch) == [expected_row(theirs, text) for text in texts]


@pytest.mark.parametrize("name", ["words with a beginning", "words without", "words with both", "LlamaTokenizer"])
def test_a_completion_follows_its_prompt_and_the_beginning_stands_once(tmp_path: Path, name: str) -> None:
    PLAIN[name](tmp_path)
    own, theirs = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    around = theirs("river")["input_ids"]
    first = [theirs.bos_token_id] if around[0] == theirs.bos_token_id else []
    plain = [theirs(text, add_special_tokens=False)["input_ids"] for text in ("the river", "runs")]
    records = [{"prompt": "the river", "completion": "runs"}, {"prompt": "", "completion": "runs"}]
    records += [{"prompt": "the river", "completion": ""}]
    batch = encode(COMPLETION, own, records)
    assert rows(batch)[0] == [*first, *plain[0], *plain[1], theirs.eos_token_id]
    assert rows(batch)[1] == [*first, *plain[1], theirs.eos_token_id]
    assert batch.targets.tolist() == [len(plain[1]) + 1, len(plain[1]) + len(first), 0]


def test_what_a_person_wrote_by_hand_is_not_doubled(tmp_path: Path) -> None:
    saved(lambda: whole_words(BOS))(tmp_path)
    own = Tokenizer.of(tmp_path)
    once, twice = encode(CAUSAL, own, [{"text": "the river"}]), encode(CAUSAL, own, [{"text": "<s> the river </s>"}])
    assert rows(once) == rows(twice)
    record = {"prompt": "<s> the", "completion": "river </s>"}
    assert rows(encode(COMPLETION, own, [record])) == rows(once)
    blocks = [
        rows(encode(CAUSAL, own, [{"text": text}], split="blocks")) for text in ("the river", "<s> the river </s>")
    ]
    assert blocks[0] == blocks[1] == rows(once)


def test_an_empty_text_is_no_example_though_it_would_have_a_beginning(tmp_path: Path) -> None:
    saved(lambda: whole_words(BOS))(tmp_path)
    batch = encode(CAUSAL, Tokenizer.of(tmp_path), [{"text": text} for text in ("", " ", "river", "the river")])
    assert batch.targets.tolist() == [0, 0, 2, 3]


def test_every_block_begins_as_a_text_does(tmp_path: Path) -> None:
    """A model reads each block alone, from its first position."""
    saved(lambda: whole_words(BOS))(tmp_path)
    own, theirs = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    text = "the river runs " * 5
    ids = [*theirs(text, add_special_tokens=False)["input_ids"], theirs.eos_token_id]
    found = rows(encode(CAUSAL, own, [{"text": text}], length=6, split="blocks"))
    assert found == [[theirs.bos_token_id, *ids[at : at + 5]] for at in (0, 5, 10)]


@pytest.mark.parametrize("name", CODED)
def test_a_target_has_the_code_of_its_own_language(tmp_path: Path, name: str) -> None:
    CODED[name](tmp_path)
    own, theirs = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    check_agreement(tmp_path, own)
    for length in (5, 64):
        options = {"truncation": True, "max_length": length}
        sources, targets = own.singles(TEXTS, length), own.targets(TEXTS, length)
        assert [one.ids for one in sources] == [theirs(text, **options)["input_ids"] for text in TEXTS]
        assert [one.ids for one in targets] == [theirs(text_target=text, **options)["input_ids"] for text in TEXTS]
    assert [one.ids for one in own.singles(TEXTS, 64)] != [one.ids for one in own.targets(TEXTS, 64)]


@pytest.mark.parametrize("missing", ["tgt_lang", "src_lang"])
def test_a_target_without_a_language_is_refused(tmp_path: Path, missing: str) -> None:
    """transformers gives such a target the language of its source."""
    CODED["MBartTokenizer"](tmp_path)
    change(tmp_path, **{missing: None})
    with pytest.raises(DataError, match=rf"{missing}=''.* must name both languages"):
        Tokenizer.of(tmp_path).targets(["the river"], 9)


@pytest.mark.parametrize("kind", ["M2M100Tokenizer", "PLBartTokenizer", "SeamlessM4TTokenizerFast"])
def test_a_class_with_codes_of_another_kind_takes_no_targets(tmp_path: Path, kind: str) -> None:
    saved(lambda: pieces(BOS))(tmp_path)
    change(tmp_path, tokenizer_class=kind, src_lang="en_XX", tgt_lang="de_DE")
    with pytest.raises(DataError, match="marks the languages of source and target in a way of its own"):
        Tokenizer.of(tmp_path).targets(["the river"], 9)


def test_a_code_that_no_setting_names_is_refused_for_targets(tmp_path: Path) -> None:
    saved(lambda: pieces(template("$A </s> en_XX", "$A $B </s> en_XX")))(tmp_path)
    own = Tokenizer.of(tmp_path)
    assert own.singles(["the river"], 9)[0].ids[-1] == own.end[-1]
    with pytest.raises(DataError, match=r"token='en_XX': tokenizer\.json adds this token to every text"):
        own.targets(["the river"], 9)


WORDS = [["the", "river", "runs"], ["river", "", "2024", "don't", "<mask>", " old", "naïve"], []]
INSIDE = (
    "RobertaTokenizer",
    "GPT2Tokenizer",
    "bytes",
    "bytes after a split",
    "GemmaTokenizer",
    "pieces without a mark in front",
)


@pytest.mark.parametrize("name", INSIDE)
def test_a_word_has_the_ids_that_it_has_inside_a_text(tmp_path: Path, name: str) -> None:
    PLAIN[name](tmp_path)
    own, theirs = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    (found,) = own.worded([["the", "river", "runs"]], 40)
    ids = [number for number, own in zip(found.ids, found.sequences, strict=True) if own >= 0]
    start = len(theirs("the", add_special_tokens=False)["input_ids"])
    inside = theirs("the the river runs", add_special_tokens=False)["input_ids"][start:]
    assert ids == inside
    assert sorted({word for word in found.words if word >= 0}) == [0, 1, 2]


def test_words_are_those_of_a_tokenizer_that_adds_spaces(tmp_path: Path) -> None:
    """The documented use of RoBERTa for words is `add_prefix_space=True`; ids and places are the same without it."""
    PLAIN["RobertaTokenizer"](tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), add_prefix_space=True)
    for found, words in zip(Tokenizer.of(tmp_path).worded(WORDS, 40), WORDS, strict=True):
        expected = theirs(words, is_split_into_words=True)
        assert found.ids == expected["input_ids"]
        assert found.words == [-1 if word is None else word for word in expected.word_ids(0)]


@pytest.mark.parametrize("name", ["pieces of words", "pieces with an end", "words with both"])
def test_a_tokenizer_that_knows_words_gets_no_further_space(tmp_path: Path, name: str) -> None:
    PLAIN[name](tmp_path)
    own, theirs = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    for found, words in zip(own.worded(WORDS[:2], 40), WORDS[:2], strict=True):
        expected = theirs(words, is_split_into_words=True)
        assert (found.ids, found.words) == (
            expected["input_ids"],
            [-1 if word is None else word for word in expected.word_ids(0)],
        )


def test_a_token_of_a_space_alone_has_no_label(tmp_path: Path) -> None:
    """After a split that parts digits from spaces, the first token of a number would know nothing of the number."""
    PLAIN["bytes after a split"](tmp_path)
    (found,) = Tokenizer.of(tmp_path).worded([["the", "2024"]], 40)
    at = found.words.index(1)
    assert (found.starts[at], found.words[at - 1]) == (0, -1)


def test_half_a_character_costs_no_record(tmp_path: Path) -> None:
    saved(byte_level)(tmp_path)
    own = Tokenizer.of(tmp_path)
    assert own.tokens(["the \ud83d river"]) == own.tokens(["the \ufffd river"])
    assert own.singles(["\udcff"], 9) == own.singles(["\ufffd"], 9)
    assert own.worded([["the", "\ud83d"]], 9) == own.worded([["the", "\ufffd"]], 9)
    assert own.tokens(["the \U0001f642"])[0] != own.tokens(["the \ufffd"])[0]


def test_a_class_that_ignores_tokenizer_json_is_named_before_any_work(tmp_path: Path) -> None:
    """transformers makes the rules of a LlamaTokenizer anew, so tokenizer.json would mean other ids."""
    saved(lambda: pieces(BOS))(tmp_path)
    change(tmp_path, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(DataError, match=r"gives other ids than tokenizer\.json.*save_pretrained"):
        check_agreement(tmp_path, Tokenizer.of(tmp_path))


def test_a_language_that_the_tokenizer_lacks_is_one_line(tmp_path: Path) -> None:
    CODED["MBartTokenizer"](tmp_path)
    change(tmp_path, tgt_lang="xx_XX")
    with pytest.raises(DataError, match=r"names a language that tokenizer\.json lacks"):
        Tokenizer.of(tmp_path)
