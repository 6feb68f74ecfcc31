"""Texts that a model generates from prompts: greedily, one record at a time, whatever the model's own settings say."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from offsite.task.spec import Record

TRIAL_IDS = 4096  # of a trial of a template, whose system prompt may be long


@dataclass(frozen=True)
class Prompt:
    """What a model gets of one record before it generates, and the right text.

    Attributes:
      inputs: name of a model's argument -> tensor (1, ...), without padding.
      begin: number of tokens in front of the first generated one, at least 1; for an encoder-decoder those of its
        decoder.
      ends: ids that end a text beside the model's own.
      text: the right text.
    """

    inputs: Mapping[str, Tensor] = field(repr=False)
    begin: int
    ends: frozenset[int] = frozenset()
    text: str = field(default="", repr=False)

    @classmethod
    def of(cls, ids: Sequence[int], text: str, ends: frozenset[int] = frozenset(), **inputs: Tensor) -> "Prompt":
        """Returns the prompt of a decoder, whose text goes on behind `ids`."""
        table = torch.tensor([list(ids)], dtype=torch.long)
        return cls({"input_ids": table, "attention_mask": torch.ones_like(table), **inputs}, len(ids), ends, text)


@runtime_checkable
class GeneratingTask(Protocol):
    """A task whose models generate the text that its records hold."""

    def prompts(
        self, processor: Any, records: Sequence[Record], *, length: int, model_config: Any
    ) -> list[Prompt | None]:
        """Returns a prompt for each record, in the encoding in which the task learns the record.

        None stands for a record whose prompt has no room in `length` tokens, or that holds no right text.

        Args:
          processor: processor from the task's `load_processor`.
          records: records with the task's fields.
          length: maximum number of tokens of a prompt, >= 1.
          model_config: configuration of the model.
        """


def generate(model: Any, prompt: Prompt, *, new_tokens: int, end: int | None, cache: bool) -> tuple[list[int], bool]:
    """Returns the ids that a model generates, and whether they came to an end of their own.

    Each id is the likeliest after those before it (greedy decoding), so that the same model gives the same text. Of the
    model's own settings for generating only the ids that end a text count: no sampling, no beams, no penalties.

    Args:
      model: a model of transformers that generates; its modes and settings are afterwards as before.
      prompt: the prompt.
      new_tokens: largest number of generated tokens, at least 1.
      end: id with which the tokenizer ends a text, or None.
      cache: whether keys and values of earlier tokens are kept, which is faster; not with learned tokens in a block.
    """
    ends = sorted({*_own_ends(model), *prompt.ends, *([] if end is None else [end])})
    start = prompt.inputs.get("decoder_input_ids")
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        use_cache=cache,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # of one record nothing is padded
        decoder_start_token_id=None if start is None else int(start[0, 0]),
    )
    place = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    inputs = {
        name: tensor.to(place.device, place.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in prompt.inputs.items()
    }
    with _only(model, settings), torch.no_grad():
        ids = model.generate(**inputs, generation_config=settings)[0, prompt.begin :].tolist()
    ended = bool(ids) and ids[-1] in ends
    return (ids[:-1] if ended else ids), ended


def end_of_answer(words: Any, talk: Sequence[Mapping[str, Any]], text: str, *, special: bool = False) -> frozenset[int]:
    """Returns the special token with which a chat template ends an answer; nothing where it ends answers otherwise.

    Args:
      words: a `task.tokenizer.Tokenizer` with a chat template.
      talk: a question and its answer.
      text: text of the answer.
      special: as for `Tokenizer.chats`.
    """
    ((ids, flags),) = words.chats([talk], TRIAL_IDS, special=special)
    answer, (said,) = [number for number, flag in zip(ids, flags, strict=True) if flag][::-1], words.tokens([text])
    for number, shown in zip(answer, words.texts([[number] for number in answer]), strict=True):
        if shown == "" and number not in said:
            return frozenset({number})
        if shown.strip() or number in said:
            break
    return frozenset()


@contextmanager
def _only(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Puts a model into eval mode with these settings alone; transformers would add those of the model's folder."""
    own, modes = model.generation_config, [(module, module.training) for module in model.modules()]
    model.generation_config = settings
    nn.Module.eval(model)
    try:
        yield
    finally:
        model.generation_config = own
        for module, training in modes:
            module.training = training


def _own_ends(model: Any) -> set[int]:
    """Returns the ids that end a text by the model's own settings for generating and by its configuration."""
    ends = set[int]()
    for settings in (model.generation_config, model.config, model.config.get_text_config()):
        number = getattr(settings, "eos_token_id", None)
        numbers = number if isinstance(number, list | tuple) else [number]
        ends |= {own for own in numbers if type(own) is int and own >= 0}
    return ends
