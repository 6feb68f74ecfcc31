"""Questions about images: an image-text model (LLaVA) learns the answer, but not the question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from offsite.errors import ConfigError, UnsupportedModel
from offsite.task import checkpoint, chunked_head
from offsite.task.device import device_of
from offsite.task.encode import mask_of, padded
from offsite.task.examples import Examples, all_but, vocabulary_of
from offsite.task.generation import Prompt, end_of_answer
from offsite.task.image_text_processor import MARKERS, ImageTextProcessor, holds_marker, without_marker
from offsite.task.images import Pixels, check_records, plain_pixels, size_of
from offsite.task.number_format import dtype_of
from offsite.task.record_fields import FIELDS
from offsite.task.records import fault
from offsite.task.spec import Record, Tally
from offsite.task.splits import SHORTEST

# Vision towers, with the number of places before the places of their patches.
BEFORE_PATCHES = {"clip_vision_model": 1, "siglip_vision_model": 0}


@dataclass(frozen=True)
class AskedImages:
    """Images, each with one question and its answer; each row is one record.

    Attributes:
      pixels: pixels of n images.
      text: tokens of n conversations; each has one place for every image token that the model inserts.
    """

    pixels: Pixels
    text: Examples

    def __len__(self) -> int:
        return len(self.text)

    @property
    def targets(self) -> torch.Tensor:
        """Number of learnt tokens of each answer, int64 (n,)."""
        return self.text.targets

    def select(self, indices: Any) -> "AskedImages":
        """Returns the rows at integer indices, in that order; a sequence, an array or a tensor, which may be empty."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.text.input_ids.device).reshape(-1)
        return AskedImages(self.pixels.select(rows), self.text.select(rows))

    def to(self, device: torch.device | str) -> "AskedImages":
        """Returns the examples on a device."""
        return AskedImages(self.pixels.to(device), self.text.to(device))

    def within(self, model: nn.Module) -> "AskedImages":
        """Returns the examples; an example with an unknown id or a wrong number of image places is emptied.

        An emptied example keeps its image places, because the model counts the places of a whole batch.
        """
        config: Any = model.config
        ids, place, count = self.text.input_ids, int(config.image_token_id), image_places(config)
        fits = ((ids >= 0) & (ids < vocabulary_of(model))).all(dim=1) & ((ids == place).sum(dim=1) == count)
        empty = torch.tensor(_empty(place, count, ids.shape[1]), device=ids.device)
        mask = self.text.attention_mask * fits[:, None].long()
        return AskedImages(self.pixels, Examples(torch.where(fits[:, None], ids, empty), mask, self.text.answers))

    def emptied(self, rows: Sequence[int]) -> "AskedImages":
        """Returns the examples; nothing is learnt from those at the indices `rows`, which keep their image places."""
        text, kept = self.text, all_but(rows, len(self), self.text.input_ids.device)
        return AskedImages(self.pixels, Examples(text.input_ids, text.attention_mask * kept[:, None], text.answers))


class ImageText:
    """The task of LLaVA: an image, a question and an answer; only the answer's tokens are learnt."""

    name: ClassVar[str] = "image_text"
    kind: ClassVar[str] = "image_text"
    columns: ClassVar[Mapping[str, type]] = FIELDS["image_text"]

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory; see `task.checkpoint.load`.

        Raises:
          UnsupportedModel: the model cuts images into pieces, or its vision tower is not known.
        """
        model = checkpoint.load(path, dtype=dtype, kind=self.kind)
        image_places(model.config)
        return model

    def load_processor(self, path: Path | str) -> ImageTextProcessor:
        """Returns the image processor and the tokenizer of a directory."""
        return ImageTextProcessor.of(path)

    def encode(
        self, processor: ImageTextProcessor, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> AskedImages:
        """Returns each record as a conversation of one question, through the model's chat template.

        The template writes the image's marker, so a marker in the question is left out. A record becomes an example
        without a target if its question leaves no room for the answer, or if its tokens do not contain exactly one
        image.

        Args:
          processor: image processor and tokenizer from `load_processor`.
          records: records with an image, a question and an answer.
          length: tokens of an example, including the image's places; longer examples are cut on the right.
          split: "truncate".
          model_config: configuration of the model.

        Raises:
          ConfigError: the length is too small for an image, or the split is not "truncate".
          DataError: there is no record, a record has no valid image, or the tokenizer has no chat template.
          UnsupportedModel: model and image processor do not belong together.
        """
        check_records(records, split, self.name)
        count, place = image_places(model_config), int(model_config.image_token_id)
        vocabulary = int(model_config.get_text_config().vocab_size)
        if length < count + SHORTEST:
            raise ConfigError(
                f"length={length} must be at least {count + SHORTEST}, an image takes {count} tokens; "
                f"{count + 64} is usual"
            )
        pixels, valid = processor.images.pixels(records, "image", model_config.vision_config)
        questions = [_question(records, index, processor.marker) for index in range(len(records))]
        talks = [_conversation(asked or "", record) for asked, record in zip(questions, records, strict=True)]
        encoded = processor.words.chats(talks, length - count + 1, special=True)
        counts = [ids.count(place) for ids, _ in encoded]
        _check_places(records, [0 if asked is None else count for asked, count in zip(questions, counts, strict=True)])
        rows, answers = [], []
        for (ids, flags), good, asked in zip(encoded, valid.tolist(), questions, strict=True):
            whole = good and asked is not None and ids.count(place) == 1 and max(ids) < vocabulary
            at = ids.index(place) if whole else 0
            rows.append(_with_places(ids, place, count) if whole else _empty(place, count, count))
            answers.append([*flags[:at], *[0] * count, *flags[at + 1 :]] if whole else [])
        return AskedImages(pixels, Examples(padded(rows, length), mask_of(rows, length), padded(answers, length)))

    def prompts(
        self, processor: ImageTextProcessor, records: Sequence[Record], *, length: int, model_config: Any
    ) -> list[Prompt | None]:
        """Returns each question with its image, and the template's prompt; see `task.generation.GeneratingTask`."""
        count, place = image_places(model_config), int(model_config.image_token_id)
        pixels, valid = processor.images.pixels(records, "image", model_config.vision_config)
        questions = [_question(records, index, processor.marker) for index in range(len(records))]
        talks = [_conversation(asked or "", record)[:1] for asked, record in zip(questions, records, strict=True)]
        encoded = processor.words.prompts(talks, length - count + 2, special=True)
        ends = end_of_answer(processor.words, _conversation("a", {"answer": "b"}), "b", special=True)
        prompts = list[Prompt | None]()
        for row, (ids, good) in enumerate(zip(encoded, valid.tolist(), strict=True)):
            text, whole = records[row]["answer"], good and questions[row] is not None and ids.count(place) == 1
            if not whole or len(ids) + count - 1 > length or not text.strip():
                prompts.append(None)
                continue
            pixel_values = pixels.select([row]).scaled(torch.float32)
            prompts.append(Prompt.of(_with_places(ids, place, count), text, ends, pixel_values=pixel_values))
        return prompts

    def losses(self, model: nn.Module, batch: AskedImages) -> torch.Tensor:
        """Returns each answer's mean negative log-likelihood per token, nats, float32 (B,), 0 without an answer."""
        batch = batch.to(device_of(model))
        sums, _ = self._scores(model, batch)
        return (sums / batch.targets.clamp(min=1)).float()

    def tally(self, model: nn.Module, batch: AskedImages) -> Tally:
        """Returns the sums of a batch, with perplexity and the number of answers that the model gives exactly.

        If each token of an answer is the likeliest after the tokens before it, greedy decoding gives exactly this
        answer.
        """
        batch = batch.to(device_of(model))
        with torch.no_grad():
            sums, exact = self._scores(model, batch)
        loss, targets = float(sums.double().sum()), int(batch.targets.sum())
        asked = batch.targets > 0
        matches = (float(exact[asked].sum()), int(asked.sum()))
        return Tally(loss, targets, {"perplexity": (loss, targets), "exact_match": matches})

    def run(self, model: nn.Module, batch: AskedImages) -> None:
        """Calls a model once with examples, without gradients; the head gets one position of each example."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            model(**self._inputs(model, batch), logits_to_keep=1)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> AskedImages:
        """Returns two random images, one with a text half as long as the other's."""
        config: Any = model.config
        count, place = image_places(config), int(config.image_token_id)
        others = torch.tensor([number for number in range(vocabulary_of(model)) if number != place])
        room = max(length - count, 2 * SHORTEST)
        drawn = others[torch.randint(len(others), (2, room), generator=torch.Generator().manual_seed(seed))]
        ids = torch.cat([drawn[:, :1], torch.full((2, count), place), drawn[:, 1:]], dim=1)
        widths = torch.tensor([room, room // 2]) + count
        mask = (torch.arange(count + room)[None, :] < widths[:, None]).long()
        answers = (torch.arange(count + room) > count).long().repeat(2, 1)
        return AskedImages(plain_pixels(config.vision_config, 2, seed=seed), Examples(ids, mask, answers))

    def _scores(self, model: nn.Module, batch: AskedImages) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns for each example the sum of its answer's losses, (B,), and whether greedy decoding gives it, (B,)."""
        keep = batch.text.predicted.bool()
        targets = [ids[own] for ids, own in zip(batch.text.input_ids[:, 1:], keep, strict=True)]
        logits = self._answer_logits(model, batch, keep)
        sums = [functional.cross_entropy(row, ids, reduction="sum") for row, ids in zip(logits, targets, strict=True)]
        exact = [(row.argmax(dim=1) == ids).all() for row, ids in zip(logits, targets, strict=True)]
        return torch.stack(sums), torch.stack(exact)

    def _answer_logits(self, model: nn.Module, batch: AskedImages, keep: torch.Tensor) -> list[torch.Tensor]:
        """Returns the logits in front of each example's answer, float32 (number of its targets, V).

        The head takes one example at a time: in a product over the positions of a whole batch, the length of another
        example's answer would decide how an example's own logits are rounded.
        """
        if chunked_head.obstacle(model):
            whole = model(**self._inputs(model, batch)).logits[:, :-1]
            return [row[own].float() for row, own in zip(whole, keep, strict=True)]
        head, inputs = chunked_head.head_of(model), self._inputs(model, batch)
        hidden = chunked_head.hidden_states(model, inputs.pop("input_ids"), **inputs)[:, :-1]
        rows = zip(hidden, keep, strict=True)
        return [head(states[own]).float() for states, own in rows]

    def _inputs(self, model: nn.Module, batch: AskedImages) -> dict[str, torch.Tensor]:
        """Returns the inputs of a model by name.

        The model gets no attention mask, because padding is on the right, where causal attention of a token never
        looks.
        """
        return {"input_ids": batch.text.input_ids, "pixel_values": batch.pixels.scaled(dtype_of(model))}


def image_places(model_config: Any) -> int:
    """Returns the number of places in a text that the tokens of one image take.

    Raises:
      UnsupportedModel: the number differs between images, or the vision tower is not known.
    """
    tower: Any = getattr(model_config, "vision_config", None)
    kind, vision = getattr(model_config, "model_type", None), getattr(tower, "model_type", None)
    if kind != "llava" or vision not in BEFORE_PATCHES:
        raise UnsupportedModel(
            f"model_type={kind!r} with vision tower {vision!r} must be 'llava' with {' or '.join(BEFORE_PATCHES)}, in "
            "which every image takes the same number of tokens; choose another model"
        )
    height, width = (side // int(tower.patch_size) for side in size_of(tower))
    left_out = 1 if model_config.vision_feature_select_strategy == "default" else 0
    return height * width + BEFORE_PATCHES[vision] - left_out


def _question(records: Sequence[Record], index: int, marker: str) -> str | None:
    """Returns a record's question without the marker of its image; None for a faulty record in `LenientRecords`."""
    question = without_marker(records[index]["question"], marker)
    if question is None:
        rule = (
            f"must hold at most one marker of its image, {MARKERS[0]!r} or the model's {marker!r}, and no marker of "
            "another processor, because a record has one image; remove the others"
        )
        fault(records, index, "question", rule)
    if holds_marker(records[index]["answer"], marker):
        fault(records, index, "answer", "must hold no marker of an image, because the answer is text; remove it")
        return None
    return question


def _check_places(records: Sequence[Record], places: Sequence[int]) -> None:
    """Refuses a record whose tokens hold several images, as where a text has a name of the image that no file tells."""
    for index, count in enumerate(places):
        if count > 1:
            rule = (
                f"makes {count} images in the model's tokens, must make one; remove the text that stands for an image"
            )
            fault(records, index, "question", rule)


def _conversation(question: str, record: Record) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": record["answer"]}]},
    ]


def _with_places(ids: Sequence[int], place: int, count: int) -> list[int]:
    """Returns tokens with one place for each token of their one image."""
    at = ids.index(place)
    return [*ids[:at], *[place] * count, *ids[at + 1 :]]


def _empty(place: int, count: int, width: int) -> list[int]:
    """Returns `width` tokens with an image's places and zeros."""
    return ([place] * count + [0] * width)[:width]
