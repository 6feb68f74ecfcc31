"""task.encode: the examples of a tokenizer whose ids are obvious."""

from types import SimpleNamespace

import pytest
import torch

from offsite.errors import DataError
from offsite.task.encode import encode
from offsite.task.examples import Examples
from offsite.task.splits import JOINED, SPLITS


class Letters:
    """A tokenizer with one id for each letter, a = 1, and by default without an end-of-text token."""

    def __init__(self, eos_token_id=None, start=(), end=()):
        self.eos_token_id = eos_token_id
        self.start, self.end = list(start), list(end)

    def tokens(self, texts, length=None):
        return [[ord(letter) - 96 for letter in text] for text in texts]


def test_blocks_cut_each_text_and_no_text_moves_the_blocks_of_another():
    texts = ["abcdefg", "de", "", "fghij"]
    found = encode(Letters(0), texts, length=4, split="blocks")
    assert found.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0], [4, 5, 0, 0], [0] * 4, [6, 7, 8, 9]]
    assert found.targets.tolist() == [3, 3, 2, 0, 3]
    for index, other in ((0, "a"), (1, "abcdefghij"), (2, "x"), (3, "")):
        rows = [encode(Letters(0), [text], length=4, split="blocks").input_ids.tolist() for text in texts]
        rows[index] = encode(Letters(0), [other], length=4, split="blocks").input_ids.tolist()
        changed = encode(Letters(0), [*texts[:index], other, *texts[index + 1 :]], length=4, split="blocks")
        assert changed.input_ids.tolist() == [block for blocks in rows for block in blocks]


def test_public_texts_may_be_joined_by_eos_and_no_job_may_have_that():
    found = encode(Letters(0), ["abc", "de", "", "fghij"], length=4, split=JOINED)
    assert JOINED not in SPLITS
    assert found.input_ids.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 10]]
    assert found.attention_mask.all()


def test_without_an_eos_token_documents_follow_each_other():
    assert encode(Letters(), ["abc", "d"], length=2, split=JOINED).input_ids.tolist() == [[1, 2], [3, 4]]


def test_truncate_keeps_one_example_a_text_padded_on_the_right():
    found = encode(Letters(0), ["abcdef", "ab", "a", "", "abcd"], length=4, split="truncate")
    assert found.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [0] * 4, [0] * 4, [1, 1, 1, 1]]
    assert found.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0], [0] * 4, [0] * 4, [1, 2, 3, 4]]
    assert found.targets.tolist() == [3, 2, 0, 0, 3]


@pytest.mark.parametrize("ids", [[], [7]])
def test_a_tokenizer_has_no_say_in_how_many_examples_there_are(ids):
    class Choosy(Letters):
        def tokens(self, texts, length=None):
            return [ids if "x" in text else found for text, found in zip(texts, super().tokens(texts), strict=True)]

    assert encode(Choosy(0), ["abc", "axc", "abd"], length=3, split="truncate").targets.tolist() == [2, 0, 2]
    assert len(encode(Choosy(0), ["x", "xx"], length=3, split="truncate")) == 2


def knowing(vocabulary):
    text = SimpleNamespace(vocab_size=vocabulary)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


def test_an_example_that_the_model_does_not_know_is_emptied():
    found = encode(Letters(0), ["abc", "abz", "ab"], length=3, split="truncate").within(knowing(26))
    assert found.input_ids.tolist() == [[1, 2, 3], [0, 0, 0], [1, 2, 0]]
    assert found.targets.tolist() == [2, 0, 2]


def test_ids_and_mask_are_int64_of_one_shape():
    found = encode(Letters(0), ["abc"], length=5, split="truncate")
    assert found.input_ids.dtype == found.attention_mask.dtype == torch.int64
    assert tuple(found.input_ids.shape) == tuple(found.attention_mask.shape) == (1, 5)


@pytest.mark.parametrize("indices", [[2, 0], (2, 0), torch.tensor([2, 0]), [], torch.tensor([], dtype=torch.long)])
def test_select_takes_rows_in_the_order_asked(indices):
    found = encode(Letters(0), ["abcd", "efgh", "ijkl"], length=3, split="truncate").select(indices)
    assert found.input_ids.tolist() == ([[9, 10, 11], [1, 2, 3]] if len(indices) else [])
    assert tuple(found.attention_mask.shape) == (len(indices), 3)


def test_examples_of_different_shapes_are_refused():
    with pytest.raises(DataError, match="must be one"):
        Examples(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.long))
