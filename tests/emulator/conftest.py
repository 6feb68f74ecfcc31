"""Tiny random models of many families, each with an input: the emulator must not know any family by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.structure.geometry import Geometry

VOCABULARY = 61
IDS = (torch.arange(22).reshape(2, 11) * 7) % VOCABULARY
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LAYERS = {"num_hidden_layers": 6}
CAUSAL = {**TEXT, **LAYERS, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
IMAGE_TOKEN = 60  # not in IDS
CAUSAL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    name: str
    model: Any
    inputs: dict[str, torch.Tensor]

    def run(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.inputs)[0]

    def calibrate(self, model: Any) -> None:
        model(**self.inputs)

    def losses(self, model: Any) -> torch.Tensor:
        output = model(**self.inputs)[0]
        return (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).mean()

    def build(self, directory: Path, recipe: tuple[str, ...] = (), embedding: str = "verbatim", **more: Any) -> Any:
        geometry = Geometry.of(self.model, 2, 1)
        return write_package(
            self.model,
            EmulatorDesign(geometry, recipe, embedding),
            Calibration(self.calibrate, self.losses),
            directory,
            **more,
        )


def _causal(config: Any) -> Any:
    return hf.AutoModelForCausalLM.from_config(config)


def _t5() -> Any:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=5, num_heads=4, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


def _bart() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 5, "decoder_layers": 5, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=VOCABULARY, **sizes, **heads))


def _vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION, **LAYERS))


def _clip() -> Any:
    text = {**TEXT, "num_hidden_layers": 5, "max_position_embeddings": 64, "eos_token_id": IMAGE_TOKEN}
    vision = {**VISION, "num_hidden_layers": 6}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def _llava() -> Any:
    vision = {"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 5}
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **CAUSAL}, vision_config=vision, image_token_index=IMAGE_TOKEN
    )
    return hf.LlavaForConditionalGeneration(config)


def _dit() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="needs the optional extra: pip install 'offsite[diffusion]'")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=6, sample_size=8, num_embeds_ada_norm=10
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama_tied": lambda: _causal(hf.LlamaConfig(**CAUSAL, tie_word_embeddings=True)),
    "llama_untied": lambda: _causal(hf.LlamaConfig(**CAUSAL, tie_word_embeddings=False)),
    "mistral": lambda: _causal(hf.MistralConfig(**CAUSAL)),
    "mixtral": lambda: _causal(hf.MixtralConfig(**CAUSAL, num_local_experts=3)),
    "qwen3": lambda: _causal(hf.Qwen3Config(**CAUSAL)),
    "gemma3": lambda: _causal(hf.Gemma3TextConfig(**CAUSAL, sliding_window=4)),
    "gpt2": lambda: _causal(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=6, n_head=4, n_positions=64, eos_token_id=2)
    ),
    "opt": lambda: _causal(
        hf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, **LAYERS
        )
    ),
    "gpt_neox": lambda: _causal(hf.GPTNeoXConfig(**TEXT, **LAYERS, max_position_embeddings=64)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT, **LAYERS)),
    "bert_masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT, **LAYERS)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**TEXT, **LAYERS, pad_token_id=0, global_attn_every_n_layers=2)
    ),
    "t5": _t5,
    "bart": _bart,
    "vit": _vit,
    "bloom": lambda: _causal(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=6, n_head=4)),
    "qwen2": lambda: _causal(hf.Qwen2Config(**CAUSAL)),
    "phi": lambda: _causal(hf.PhiConfig(**CAUSAL)),
    "falcon": lambda: _causal(
        hf.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, eos_token_id=2, **LAYERS)
    ),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT, **LAYERS)),
    "clip": _clip,
    "llava": _llava,
    "dit": _dit,
}


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    kind = getattr(model, "main_input_name", "hidden_states")
    if kind == "hidden_states":
        noisy = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
        return {kind: noisy, "timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 9])}
    if kind == "pixel_values":
        return {kind: pixels}
    if hasattr(model.config, "vision_config"):
        places = torch.full((2, 16 if hasattr(model.config, "image_token_id") else 1), IMAGE_TOKEN)
        return {"input_ids": torch.cat([IDS[:, :5], places, IDS[:, 5:]], 1), "pixel_values": pixels}
    extra = {"decoder_input_ids": IDS[:, :7]} if model.config.is_encoder_decoder else {}
    return {"input_ids": IDS, **extra}


def make_family(name: str, dtype: torch.dtype = torch.float32) -> Family:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = BUILDERS[name]().eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(previous)
        for parameter in model.parameters():  # norms and biases start at 1 and 0, which would hide a lost tensor
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    if isinstance(model, hf.PreTrainedModel):
        model.config.use_cache = False
    return Family(name, model, _inputs(model))


@pytest.fixture(params=sorted(BUILDERS))
def family(request: pytest.FixtureRequest) -> Family:
    return make_family(request.param)


@pytest.fixture
def llama() -> Family:
    return make_family("llama_tied")


@pytest.fixture
def make() -> Callable[..., Family]:
    return make_family


@pytest.fixture
def package(llama: Family, tmp_path: Path) -> Path:
    llama.build(tmp_path / "p", ("skip_uniform:0.34", "int4:16"), "int8")
    return tmp_path / "p"
