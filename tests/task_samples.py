"""Tiny random models of several families for every task, with a processor and records that can be learnt.

Records of even seeds and of odd seeds are two dialects: a model that learnt one dialect still has to learn the other.
"""

import io
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.task import latents, pictures

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
ROLES = ["user", "assistant"]
VOCABULARY = len(SPECIAL) + len(WORDS) + len(ROLES)
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 40}
LABELS = {0: "ham", 1: "spam", 2: "news"}
TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "LOC"}
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """One model of one task.

    Attributes:
      task: key in `task.tasks.TASKS`.
      family: family of the model.
      make: function that returns a new random model.
      save_processor: function that writes a tokenizer or an image processor into the model's folder.
      records: (count, seed) -> records with the fields of the task, of different sizes where sizes vary.
      length: tokens of an example.
      targets: layers for adapters in the model's blocks.
      suffix: suffix of the data files with such records.
      reader: key in `task.readers.tables.READERS`; empty to choose by the suffix.
      dialects: whether records of even and of odd seeds differ, so that a model can first be taught one dialect.
    """

    task: str
    family: str
    make: Callable[[], Any]
    save_processor: Callable[[Path], None]
    records: Callable[[int, int], Records]
    length: int
    targets: tuple[str, ...]
    suffix: str = ".jsonl"
    reader: str = ""
    dialects: bool = False

    def __str__(self) -> str:
        return f"{self.task}-{self.family}"

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Writes model and processor, and returns the folder."""
        with seeded(seed):
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():  # away from heads that are all 0
                    parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
        self.save_processor(folder)
        return folder


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def words_tokenizer(single: str = "", pair: str = "", template: str | None = None) -> Callable[[Path], None]:
    """Returns a function that writes a tokenizer with one token for each word."""

    def save(folder: Path) -> None:
        vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, *ROLES])}
        made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        if single:
            made.post_processor = processors.TemplateProcessing(
                single=single, pair=pair or None, special_tokens=[("<s>", 2), ("</s>", 3)]
            )
        names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        saved = hf.PreTrainedTokenizerFast(tokenizer_object=made, **names)
        saved.chat_template = template
        saved.save_pretrained(folder)

    return save


def draw(seed: int) -> random.Random:
    return random.Random(f"records {seed}")


def _sentence(dice: random.Random, words: list[str], most: int = 12) -> str:
    return " ".join(dice.choice(words) for _ in range(dice.randint(3, most)))


def _few(seed: int) -> list[str]:
    return WORDS[30:42] if seed % 2 else WORDS[10:22]


def texts(count: int, seed: int) -> Records:
    """Returns texts from a small set of words."""
    dice, words = draw(seed), _few(seed)
    return [{"text": _sentence(dice, words, 14)} for _ in range(count)]


def completions(count: int, seed: int) -> Records:
    """Returns questions from all words, with answers from a small set of words."""
    dice, words = draw(seed), _few(seed)
    return [{"prompt": _sentence(dice, WORDS, 7), "completion": _sentence(dice, words, 7)} for _ in range(count)]


def talks(count: int, seed: int) -> Records:
    """Returns `completions` as conversations of one or two rounds."""
    dice, found = draw(seed), []
    for _ in range(count):
        rounds = [completions(1, 2 * dice.randrange(10**6) + seed % 2)[0] for _ in range(dice.randint(1, 2))]
        found.append(
            {
                "messages": [
                    {"role": role, "content": one[field]}
                    for one in rounds
                    for role, field in (("user", "prompt"), ("assistant", "completion"))
                ]
            }
        )
    return found


def labelled(count: int, seed: int) -> Records:
    """Returns texts whose words depend on their class; some labels are numbers."""
    dice, found = draw(seed), []
    for _ in range(count):
        label = dice.choice([0, 1, 1, 2])
        first = 20 * label + 5 * (seed % 2)
        words = WORDS[first : first + 10]
        found.append({"text": _sentence(dice, words), "label": dice.choice([label, LABELS[label], str(label)])})
    return found


def tagged(count: int, seed: int) -> Records:
    """Returns words whose tags follow from the words."""
    dice, found = draw(seed), []
    for _ in range(count):
        numbers = [2 * dice.randrange(30) + seed % 2 for _ in range(dice.randint(3, 12))]
        tags = [0 if number < 30 else 1 + number // 2 % 3 for number in numbers]
        found.append({"words": [WORDS[n] for n in numbers], "labels": [TAGS[tag] for tag in tags]})
    return found


def answered(count: int, seed: int) -> Records:
    """Returns contexts whose answer consists of words from a small set; the question names one of these words."""
    dice, found = draw(seed), []
    for _ in range(count):
        before, after = (_sentence(dice, WORDS[:40], 4) for _ in range(2))
        answer = " ".join(dice.choice(WORDS[50 + seed % 2 :: 2]) for _ in range(dice.randint(1, 2)))
        found.append(
            {
                "question": f"{dice.choice(WORDS[40:50])} {answer.split()[0]}",
                "context": f"{before} {answer} {after}",
                "answer": answer,
                "answer_start": len(before) + 1,
            }
        )
    return found


def translated(count: int, seed: int) -> Records:
    """Returns sources with targets: as many other words, from a small set."""
    dice, found = draw(seed), []
    for _ in range(count):
        numbers = [2 * dice.randrange(10) + seed % 2 for _ in range(dice.randint(2, 8))]
        found.append(
            {
                "source": " ".join(WORDS[number] for number in numbers),
                "target": " ".join(WORDS[30 + number // 2] for number in numbers),
            }
        )
    return found


def _llama() -> Any:
    sizes = {**ENCODER, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **IDS))


def _gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 40, "vocab_size": VOCABULARY}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **IDS))


def _gemma2() -> Any:
    """Returns a model that caps its logits after the head."""
    sizes = {**ENCODER, "num_hidden_layers": 2, "head_dim": 8, "num_key_value_heads": 2}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, vocab_size=VOCABULARY, **IDS))


def _bert(head: str, names: dict[int, str] | None = None) -> Callable[[], Any]:
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if names else {}
    return lambda: getattr(hf, f"BertFor{head}")(
        hf.BertConfig(**ENCODER, **PLAIN, vocab_size=VOCABULARY, pad_token_id=0, **labels)
    )


def _named(names: dict[int, str]) -> dict[str, Any]:
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _roberta() -> Any:
    """Returns a model that counts positions from the padding token, and has no segments."""
    config = hf.RobertaConfig(**ENCODER, **PLAIN, vocab_size=VOCABULARY, **IDS, type_vocab_size=1, **_named(LABELS))
    return hf.RobertaForSequenceClassification(config)


def _distilbert() -> Any:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 6, "n_heads": 4, "max_position_embeddings": 40}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0}
    return hf.DistilBertForQuestionAnswering(hf.DistilBertConfig(**sizes, **off, vocab_size=VOCABULARY, pad_token_id=0))


def _modernbert() -> Any:
    config = hf.ModernBertConfig(
        **ENCODER,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        max_position_embeddings=40,
        global_attn_every_n_layers=2,
        local_attention=8,
        **_named(LABELS),
    )
    return hf.ModernBertForSequenceClassification(config)


def _t5() -> Any:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=5,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def _bart() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 5, "decoder_layers": 5, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40}
    config = hf.BartConfig(vocab_size=VOCABULARY, **sizes, **heads, dropout=0.0, **IDS, decoder_start_token_id=3)
    return hf.BartForConditionalGeneration(config)


_TEXT, _CHAT = words_tokenizer(), words_tokenizer(template=TEMPLATE)
_PAIRS = words_tokenizer("<s> $A </s>", "<s>:0 $A:0 </s>:0 $B:1 </s>:1")
_ENDED = words_tokenizer("$A </s>")
_LLAMA, _BERT = ("v_proj", "o_proj", "down_proj"), ("value", "output.dense")
SAMPLES = [
    Sample("causal_lm", "llama", _llama, _TEXT, texts, 16, _LLAMA),
    Sample("causal_lm", "gpt2", _gpt2, _TEXT, texts, 16, ("c_attn", "c_proj")),
    Sample("causal_lm", "gemma2", _gemma2, _TEXT, texts, 16, _LLAMA),
    Sample("prompt_completion", "llama", _llama, _TEXT, completions, 16, _LLAMA),
    Sample("chat", "llama", _llama, _CHAT, talks, 64, _LLAMA),
    Sample("sequence_classification", "bert", _bert("SequenceClassification", LABELS), _PAIRS, labelled, 16, _BERT),
    Sample("sequence_classification", "roberta", _roberta, _PAIRS, labelled, 16, _BERT),
    Sample("sequence_classification", "modernbert", _modernbert, _PAIRS, labelled, 16, ("Wqkv", "Wo")),
    Sample("token_classification", "bert", _bert("TokenClassification", TAGS), _PAIRS, tagged, 16, _BERT),
    Sample("extractive_qa", "bert", _bert("QuestionAnswering"), _PAIRS, answered, 20, _BERT),
    Sample("extractive_qa", "distilbert", _distilbert, _PAIRS, answered, 20, ("v_lin", "out_lin")),
    Sample("seq2seq", "t5", _t5, _ENDED, translated, 12, ("v", "o")),
    Sample("seq2seq", "bart", _bart, _PAIRS, translated, 12, ("v_proj", "out_proj")),
]
SAMPLES = [replace(sample, dialects=True) for sample in SAMPLES]


def first_of(task: str) -> Sample:
    """Returns the first sample of a task."""
    return next(sample for sample in SAMPLES if sample.task == task)


def write_records(records: Records, path: Path) -> None:
    """Writes records into a data file by its suffix; images are encoded, and ragged arrays are padded."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        rows = [{field: _png(value) for field, value in record.items()} for record in records]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        np.savez(path, **{field: array for one in records[0] for field, array in _arrays(records, one).items()})


def _png(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    content = io.BytesIO()
    Image.fromarray(value).save(content, "PNG")
    return content.getvalue()


def _arrays(records: Records, field: str) -> dict[str, np.ndarray]:
    values = [np.asarray(record[field]) for record in records]
    if len({value.shape for value in values}) == 1:
        return {field: np.stack(values)}
    lengths = [len(value) for value in values]
    padded = [np.pad(value, ((0, max(lengths) - len(value)), (0, 0))) for value in values]
    return {field: np.stack(padded), f"{field}_length": np.array(lengths)}


def _only(records: Callable[[int, int], Records], *fields: str) -> Callable[[int, int], Records]:
    return lambda count, seed: [{field: one[field] for field in fields} for one in records(count, seed)]


_PICTURES = (".parquet", "image_parquet")
_SEEN, _ASKED = _only(pictures.pictures, "image", "label"), _only(pictures.pictures, "image", "question", "answer")
_VIT, _LLAVA, _DIT = ("q_proj", "v_proj", "fc1"), ("q_proj", "v_proj", "up_proj"), ("to_q", "to_v", "proj")
_BY_CLASS, _BY_TEXT = (_only(latents.latents, "latents", field) for field in ("label", "prompt_embeds"))
_BY_IMAGE = _only(latents.with_images, "latents", "prompt_embeds", "image_embeds")
SAMPLES += [
    Sample("image_classification", "vit", pictures.vit, pictures.vit_processor, _SEEN, 32, _VIT, *_PICTURES),
    Sample("clip_classification", "clip", pictures.clip, pictures.clip_processor, _SEEN, 32, _VIT, *_PICTURES),
    Sample("image_text", "llava", pictures.llava, pictures.llava_processor, _ASKED, 32, _LLAVA, *_PICTURES),
    Sample("class_to_image", "dit", latents.dit, latents.schedule, _BY_CLASS, 8, _DIT, ".npz"),
    Sample("text_to_image", "pixart", latents.pixart, latents.schedule, _BY_TEXT, 8, _DIT, ".npz"),
    Sample("image_prompt_to_image", "pixart", latents.pixart, latents.schedule, _BY_IMAGE, 8, _DIT, ".npz"),
    Sample("text_to_image", "unet", latents.unet, latents.schedule, _BY_TEXT, 8, _DIT, ".npz"),
]
