"""Sequence to sequence: a text from another text, for example a translation or a summary."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.errors import UnsupportedModel
from offsite.task.device import device_of
from offsite.task.encode import padded
from offsite.task.examples import vocabulary_of
from offsite.task.generation import Prompt
from offsite.task.labelled import Labelled, cross_entropy, dummy_inputs, padding_of, token_inputs
from offsite.task.labels import IGNORED
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split
from offsite.task.rows import RowBatch
from offsite.task.spec import Record, Tally
from offsite.task.token_rows import translated_rows

WRAPPED = ("mbart", "plbart")  # families whose decoder starts with the last token of the target


class Seq2Seq(Labelled):
    """The task of encoder-decoders: predict each token of the target from the source and the tokens before it."""

    name: ClassVar[str] = "seq2seq"
    kind: ClassVar[str] = "seq2seq"
    columns: ClassVar[Mapping[str, type]] = FIELDS["seq2seq"]

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> RowBatch:
        """Returns pairs of texts as examples; source and target are each cut and padded to `length`.

        Raises:
          ConfigError: the length does not fit the model, or the split is not "truncate".
          DataError: there is no record, or the tokenizer does not say how it marks the language of a target.
          UnsupportedModel: the model names no start token of its decoder.
        """
        check_split(split, self.name)
        sources, targets = translated_rows(processor, records, length)
        inputs, labels = token_inputs(sources, length, model_config), padded(targets, length, IGNORED)
        return RowBatch(inputs | {"decoder_input_ids": _shifted(labels, model_config)}, labels)

    def prompts(
        self, processor: Any, records: Sequence[Record], *, length: int, model_config: Any
    ) -> list[Prompt | None]:
        """Returns each source, and what a decoder begins with; see `task.generation.GeneratingTask`.

        The decoder begins as it does where the task learns: with its start token, and with all tokens that the
        tokenizer puts in front of a target, for example the code of the target's language.
        """
        batch = self.encode(processor, records, length=length, split="truncate", model_config=model_config)
        targets = processor.targets([record["target"] for record in records], length)
        return [
            _prompt(batch.select([row]), record["target"], target.sequences)
            for row, (record, target) in enumerate(zip(records, targets, strict=True))
        ]

    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the sum of the losses of each example's target tokens, nats, (B,)."""
        return cross_entropy(model(**batch.inputs).logits, batch.labels).sum(dim=1)

    def tally(self, model: nn.Module, batch: RowBatch) -> Tally:
        """Returns the sum of the negative log-likelihoods of all target tokens, nats, without gradients."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            loss = float(self.sums(model, batch).double().sum())
        count = int(batch.targets.sum())
        return Tally(loss, count, {"perplexity": (loss, count)})

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> RowBatch:
        """Returns two random pairs of texts."""
        generator = torch.Generator().manual_seed(seed)
        inputs = dummy_inputs(model, length, generator)
        ids = torch.randint(vocabulary_of(model), (2, length), generator=generator)
        labels = torch.where(inputs["attention_mask"].bool(), ids, IGNORED)
        return RowBatch(inputs | {"decoder_input_ids": _shifted(labels, model.config)}, labels)


def _prompt(batch: RowBatch, text: str, sequences: Sequence[int]) -> Prompt | None:
    """Returns the prompt of one record.

    Args:
      batch: the record as an example.
      text: the right text.
      sequences: -1 for each special token of the encoded target.
    """
    first = next((place for place, sequence in enumerate(sequences) if sequence >= 0), None)
    if first is None or not bool(batch.targets.any()):
        return None
    size = int(batch.inputs["attention_mask"].sum())
    inputs = {name: tensor[:, :size] for name, tensor in batch.inputs.items() if name != "decoder_input_ids"}
    begun = batch.inputs["decoder_input_ids"][:, : 1 + first]
    return Prompt(inputs | {"decoder_input_ids": begun}, 1 + first, text=text)


def _shifted(labels: Tensor, model_config: Any) -> Tensor:
    """Returns the decoder's input: its start token, then each label but the last; padding in the place of `IGNORED`.

    An mBART or a PLBart starts with the last label, the code of the target's language or the end of the text, as in
    transformers' `shift_tokens_right` of these models.

    The input needs no mask, because padding is on the right, where no scored token attends.
    """
    ids = torch.where(labels == IGNORED, padding_of(model_config), labels)
    if getattr(model_config, "model_type", None) in WRAPPED:
        last = ((labels != IGNORED).sum(dim=1, keepdim=True) - 1).clamp(min=0)
        return torch.cat([ids.gather(1, last), ids[:, :-1]], dim=1)
    start = getattr(model_config, "decoder_start_token_id", None)
    if start is None:
        raise UnsupportedModel("decoder_start_token_id=None must be a number; write it into the model's config.json")
    return torch.cat([torch.full_like(ids[:, :1], int(start)), ids[:, :-1]], dim=1)
