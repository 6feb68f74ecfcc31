"""A tiny language model with a word vocabulary, four owners' texts and a federation file, made once per session."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from xdist.scheduler import LoadScopeScheduling

from tests.schedule import PROCESSES, Files, spread

WORDS = [f"w{i}" for i in range(60)]
OWNERS = ("ash", "birch", "cedar", "elm")
FED = """
seed = 1

[model]
path = "model"

[data]
public = "data/public"
sites_dir = "data/sites"
owners = ["ash", "birch", "cedar", "elm"]
length = 16
split = "blocks"

[emulator]
first = 1
last = 1
compress = ["int4:32"]
gate = 0.1

[training]
rounds = 2
batch = 8

[aggregation]
learning_rate = 0.02

[evaluation]
examples = 8
public_examples = 8
"""

VARIANT = """
[[emulator.variants]]
sites = ["birch", "elm"]
compress = ["skip@2", "int8:32"]
embedding = "int4:32"
"""


def sentence(seed: str, count: int) -> str:
    """Returns `count` words, from a vocabulary that depends on the seed."""
    draw = random.Random(seed)
    mine = draw.sample(WORDS, 20)
    return " ".join(draw.choice(mine) for _ in range(count))


def make_model(folder: Path) -> None:
    """Writes a six-block Llama with its tokenizer."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    train_a_little(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_a_little(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Teaches the model which words are common in public text; an untrained one could not get worse."""
    ids = torch.tensor(tokenizer(sentence("public", 40 * 16 * 8)).input_ids).reshape(40, 8, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in ids:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_world(folder: Path) -> Path:
    """Writes model, texts and fed.toml, and returns the path of the latter."""
    make_model(folder / "model")
    for owner in OWNERS:
        for part, count in (("train", 1600), ("heldout", 300)):
            place = folder / "data" / "sites" / owner / part
            place.mkdir(parents=True)
            (place / "text.txt").write_text(sentence(owner + part, count))
    public = folder / "data" / "public"
    public.mkdir(parents=True)
    (public / "text.txt").write_text(sentence("public", 2000))
    (folder / "fed.toml").write_text(FED)
    return folder / "fed.toml"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--cases`, by which `make test-quick` runs every test but not every row of the large tables."""
    parser.addoption("--cases", type=int, default=0, help="cases of each test at most, spread evenly; 0 for all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests that run whole federations as processes, by where they stand, and keeps `--cases` of each."""
    for item in items:
        if item.nodeid.startswith(PROCESSES):
            item.add_marker(pytest.mark.processes)
    if limit := config.getoption("--cases"):
        kept = spread([item.nodeid for item in items], limit)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Says which worker of `make test` takes which tests."""
    return Files(config, log)


@pytest.fixture(scope="session")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The federation file of the tiny world; tests must not write into its folder."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def varied(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same federation, in which two of the owners get another emulator."""
    folder = tmp_path_factory.mktemp("varied")
    for name in ("model", "data"):
        (folder / name).symlink_to(fed.parent / name)
    (folder / "fed.toml").write_text(fed.read_text().replace("[training]", f"{VARIANT}\n[training]"))
    return folder / "fed.toml"
