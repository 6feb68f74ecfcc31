"""What every entry of task.TASKS promises; a new entry inherits all of it by adding its tiny model."""

import socket

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from errors import ConfigError, DataError, UnknownName
from task.examples import Examples
from task.tasks import TASKS

TEXTS = ["the quick brown fox jumps over the lazy dog", "a b c", "pack my box with five dozen liquor jugs now"]


def tokenizer(vocab_size=97):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<end>"]))
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<end>", model_max_length=16)


def llama():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    return LlamaForCausalLM(config)


def gpt2():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def gemma2():
    """Caps its logits after the head."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=97, pad_token_id=0)
    return Gemma2ForCausalLM(config)


TINY = {"causal_lm": [llama, gpt2, gemma2]}  # task -> makers of a tiny random model
each = pytest.mark.parametrize(("task", "make"), [(TASKS[name], make) for name in TASKS for make in TINY[name]])


@pytest.fixture
def loaded(task, make, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    with torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return task.load(tmp_path, dtype=torch.float32), task.load_tokenizer(tmp_path)


def examples(task, words, split="truncate"):
    return task.encode(words, TEXTS, length=8, split=split)


def gradient(model, losses):
    model.zero_grad()
    losses.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def train(model, part):
    """Makes everything trainable, or as an adapter does it, only what lies between the tables of words."""
    model.requires_grad_(True)
    if part == "inside":
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)


parts = pytest.mark.parametrize("part", ["everything", "inside"])


@each
def test_a_loaded_model_is_frozen_in_eval_mode_and_keeps_no_cache(loaded):
    model, _ = loaded
    assert not model.training
    assert not model.config.use_cache
    assert not any(p.requires_grad for p in model.parameters())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_one_finite_float32_number_per_example(task, loaded, dtype):
    model, words = loaded
    losses = task.losses(model.to(dtype), examples(task, words))
    assert losses.shape == (3,)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    assert (losses > 0).all()


@each
def test_no_example_touches_another(task, loaded):
    model, words = loaded
    batch = examples(task, words)
    together = task.losses(model, batch)
    alone = torch.cat([task.losses(model, batch.select([index])) for index in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5)
    assert torch.allclose(task.losses(model, batch.select([2, 0, 1])), together[[2, 0, 1]], rtol=1e-5)


@parts
@each
def test_the_gradient_of_one_loss_is_the_gradient_of_that_example_alone(task, loaded, part):
    model, words = loaded
    train(model, part)
    batch = examples(task, words)
    for index in range(3):
        together = gradient(model, task.losses(model, batch)[index])
        alone = gradient(model, task.losses(model, batch.select([index])))
        assert (together - alone).norm() < 1e-5 * alone.norm()


@parts
@each
def test_an_example_without_a_target_has_no_loss_and_no_gradient(task, loaded, part):
    model, words = loaded
    train(model, part)
    empty = task.encode(words, [TEXTS[0], "", "a"], length=8, split="truncate")
    assert len(empty) == 3
    losses = task.losses(model, empty)
    assert losses[1:].tolist() == [0.0, 0.0]
    assert not gradient(model, losses[1:]).any()


@each
def test_token_losses_are_the_sums_behind_the_means(task, loaded):
    model, words = loaded
    batch = examples(task, words)
    total, count = task.token_losses(model, batch)
    singles = [task.token_losses(model, batch.select([index])) for index in range(3)]
    assert count == sum(number for _, number in singles)
    assert total == pytest.approx(sum(part for part, _ in singles), rel=1e-5)
    means = [part / number for part, number in singles]
    assert task.losses(model, batch).tolist() == pytest.approx(means, rel=1e-5)


@each
def test_selecting_nothing_gives_no_examples(task, loaded):
    _, words = loaded
    none = examples(task, words).select([])
    assert isinstance(none, Examples)
    assert len(none) == 0


@each
def test_bad_encodings_are_refused(task, loaded):
    _, words = loaded
    with pytest.raises(UnknownName, match="blocks"):
        task.encode(words, TEXTS, length=8, split="block")
    with pytest.raises(ConfigError, match="length=1"):
        task.encode(words, TEXTS, length=1, split="blocks")
    with pytest.raises(DataError, match="examples=0"):
        task.encode(words, [], length=8, split="truncate")
    with pytest.raises(DataError, match="examples=0"):
        task.encode(words, ["a b"], length=64, split="blocks")


def test_every_task_has_a_tiny_model_here():
    assert set(TINY) == set(TASKS)
    assert all(name == task.name for name, task in TASKS.items())
