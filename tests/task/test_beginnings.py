"""The first token reaches the model in every task: against the losses of transformers' own inputs."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import AutoTokenizer

from offsite.task.seq2seq import WRAPPED
from offsite.task.tasks import TASKS
from tests.task import pictures
from tests.task.tokenizers_made import BOS, CODED, saved, whole_words, without_special_tokens

CAUSAL = TASKS["causal_lm"]
TEXTS = ["the river runs the river", "river runs", "runs the river runs the river runs"]


def gemma(vocabulary: int) -> hf.Gemma3ForCausalLM:
    """A Gemma 3 that is trained a little on texts with their beginning, as its family is."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 1}
    model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(vocab_size=vocabulary, pad_token_id=3, **settings))
    return model


def teach(model: hf.Gemma3ForCausalLM, rows: list[list[int]], steps: int = 60) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        ids = torch.tensor([rows[step % len(rows)]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    saved(lambda: whole_words(BOS))(folder)
    words = AutoTokenizer.from_pretrained(str(folder))
    model = gemma(len(words))
    teach(model, [[*words(text)["input_ids"], words.eos_token_id] for text in TEXTS])
    model.eval().save_pretrained(folder)
    return folder


def losses(folder: Path) -> torch.Tensor:
    model, words = CAUSAL.load(folder, dtype=torch.float32), CAUSAL.load_processor(folder)
    records = [{"text": text} for text in TEXTS]
    batch = CAUSAL.encode(words, records, length=12, split="truncate", model_config=model.config)
    return CAUSAL.losses(model, batch)


def test_the_loss_is_that_of_a_text_with_its_beginning(folder: Path) -> None:
    words, model = AutoTokenizer.from_pretrained(str(folder)), CAUSAL.load(folder, dtype=torch.float32)
    expected = []
    for text in TEXTS:
        ids = torch.tensor([[*words(text)["input_ids"], words.eos_token_id]])
        expected.append(float(model(input_ids=ids, labels=ids).loss))
    assert losses(folder).tolist() == pytest.approx(expected, rel=1e-4)


def test_without_its_beginning_the_same_model_is_worse(folder: Path) -> None:
    begun = losses(folder)
    rule = (folder / "tokenizer.json").read_text()
    without_special_tokens(folder)
    bare = losses(folder)
    (folder / "tokenizer.json").write_text(rule)
    assert torch.equal(losses(folder), begun)
    assert float(bare.mean()) > 1.5 * float(begun.mean())


@pytest.mark.parametrize("written", ["", "{{ bos_token }}"])
def test_a_conversation_with_an_image_begins_once(tmp_path: Path, written: str) -> None:
    """transformers' processors add the beginning, unless the template wrote the token."""
    task = TASKS["image_text"]
    pictures.llava_folder(tmp_path)
    rule = json.loads((tmp_path / "tokenizer.json").read_text())
    first = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0], "trim_offsets": False}
    rule["post_processor"] = {**first, "add_prefix_space": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(rule))
    (tmp_path / "chat_template.jinja").write_text(written + pictures.CHAT.replace("{{ '<s>' if loop.first }}", ""))
    model = task.load(tmp_path, dtype=torch.float32)
    processor, records = task.load_processor(tmp_path), pictures.pictures(2, 0)
    batch = task.encode(processor, records, length=40, split="truncate", model_config=model.config)
    assert batch.text.input_ids[:, 0].tolist() == [0, 0]
    assert (batch.text.input_ids[:, 1] != 0).all()
    assert (batch.targets > 0).all()


@pytest.mark.parametrize("name", ["MBartTokenizer", "MBart50Tokenizer"])
def test_an_mbart_starts_with_the_language_of_its_target(tmp_path: Path, name: str) -> None:
    task = TASKS["seq2seq"]
    CODED[name](tmp_path)
    words = AutoTokenizer.from_pretrained(str(tmp_path))
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40}
    torch.manual_seed(0)
    model = hf.MBartForConditionalGeneration(
        hf.MBartConfig(vocab_size=len(words), pad_token_id=words.pad_token_id, **sizes, **heads)
    ).eval()
    assert model.config.model_type in WRAPPED
    pairs = [("the river", "runs the mill"), ("old mill runs", "by"), ("a b c", "the river runs by the old mill")]
    records = [{"source": source, "target": target} for source, target in pairs]
    processor = task.load_processor(tmp_path)
    batch = task.encode(processor, records, length=24, split="truncate", model_config=model.config)
    for row, (source, target) in enumerate(pairs):
        inputs = words(source, text_target=target, return_tensors="pt")
        with torch.no_grad():
            expected = model(**{key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}).loss
            loss = task.losses(model, batch.select([row]))[0]
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
