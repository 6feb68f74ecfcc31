"""The gate sees whether the first token arrives: a Gemma 3 whose attention rests on BOS, with and without BOS."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.config.emulator_table import EmulatorConfig
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.evaluation.fidelity import check_gate, gradient_cosine
from offsite.emulator.package.package_reader import load
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import ConfigError
from offsite.task.tasks import TASKS
from tests.task.tokenizers_made import BOS, SPECIAL, saved, without_special_tokens
from tests.task_samples import seeded

CAUSAL = TASKS["causal_lm"]
WORDS = [f"w{number}" for number in range(60)]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "initializer_range": 0.2}
SLOW = 7  # pair of a head's entries that positions hardly turn
SHARP = 4.0  # gain of queries and of keys


def tokenizer() -> Tokenizer:
    """One token for each word, and BOS by the post-processor, as Gemma's tokenizer does."""
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, "<unk>"))
    made.pre_tokenizer, made.post_processor = pre_tokenizers.Whitespace(), BOS
    return made


def resting_on_bos(seed: int) -> Any:
    """A Gemma 3 with an attention sink: every query finds the key of BOS, and sharp rivals among words without it.

    Entry 0 of a word's embedding is the same for all words, and queries read it. Entry 1 marks BOS, and keys read it.
    """
    with seeded(seed):
        config = hf.Gemma3TextConfig(vocab_size=len(SPECIAL) + len(WORDS), pad_token_id=3, **SIZES, **HEADS)
        model = hf.Gemma3ForCausalLM(config)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, :2] = torch.tensor([0.3, 0.0])
        table[0] *= 0.2
        table[0, 1] = 1.0
        for block in model.model.layers:
            queries, keys = block.self_attn.q_proj.weight, block.self_attn.k_proj.weight
            queries[SLOW::16] = 0.0
            queries[SLOW::16, 0] = 10.0
            keys[SLOW] = 0.0
            keys[:, 1] = 0.0
            keys[SLOW, 1] = 4.0
            for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
                norm.weight.fill_(SHARP - 1)  # Gemma's norms multiply by 1 + weight
            for last in (block.self_attn.o_proj, block.mlp.down_proj):
                last.weight[:2] = 0.0  # both marks stay as they are
    return model.eval()


def cosine(folder: Path, begins: bool) -> float:
    """The gate's number of the honest int4 emulator, on texts as the folder's tokenizer encodes them."""
    full, words = CAUSAL.load(folder, dtype=torch.float32), CAUSAL.load_processor(folder)
    draw = random.Random(3)
    records = [{"text": " ".join(draw.choices(WORDS, k=24))} for _ in range(8)]
    batch = CAUSAL.encode(words, records, length=26, split="truncate", model_config=full.config)
    assert (batch.input_ids[:, 0] == 0).all() == begins
    public, geometry = PublicExamples(CAUSAL, batch), Geometry.of(full, 1, 1)
    spec = AdapterSpec("lora", rank=4, alpha=8.0, targets=("q_proj", "v_proj"), slots=geometry.slots(full))
    package = folder / f"package-{begins}"
    write_package(full, EmulatorDesign(geometry, ("int4:16",), "verbatim"), Calibration(public.run), package)
    return gradient_cosine(full, load(package), spec, public.losses)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_honest_emulator_passes_the_gate_only_where_texts_begin_with_bos(seed: int, tmp_path: Path) -> None:
    saved(tokenizer)(tmp_path)
    resting_on_bos(seed).save_pretrained(tmp_path)
    floor = EmulatorConfig().gate
    assert floor == 0.6
    begun = cosine(tmp_path, begins=True)
    assert begun > 0.9  # 0.99 for both seeds
    check_gate(begun, floor)
    without_special_tokens(tmp_path)
    bare = cosine(tmp_path, begins=False)
    assert bare < 0.4  # 0.09 and -0.24
    with pytest.raises(ConfigError, match="gradient_cosine="):
        check_gate(bare, floor)
