"""The tuners of Hugging Face PEFT 0.21 that keep the contract of `tests/contracts/test_methods.py`."""

from typing import Any

import peft
import torch
from peft.utils import constants

from offsite.adapter.inject import ADAPTER
from offsite.adapter.methods.peft_tuners import DIVIDES, DIVIDES_INPUTS, DIVIDES_OUTPUTS, ENTRIES, MOVED, ROUNDED, Tuner
from offsite.adapter.options import Option

# A site builds an adapter before it can check the size; these bounds on options exceed every useful adapter.
_MANY, _LONG = 2**22, 4096
_PRODUCT = "products do not average"
_ROTATION = "weights are rotated, and the mean of two rotations is not a rotation"


def _settle_signs(layer: Any) -> None:
    """Makes the entry of largest magnitude of each left singular vector positive.

    A singular value decomposition leaves the signs open, and each library chooses other signs, under which the trained
    numbers would mean something else. peft stores the factors, so a loaded adapter has the signs that were set here.
    """
    up, down = layer.tinylora_B[ADAPTER], layer.tinylora_A[ADAPTER]
    with torch.no_grad():
        top = up.gather(0, up.abs().argmax(dim=0, keepdim=True))
        up.mul_(top.sign())
        down.mul_(top.sign().T)


def _leave_sparse_tensors_unchecked(layer: Any) -> None:
    """Sets torch's default explicitly; otherwise torch warns about the default in the first forward pass."""
    del layer
    torch.sparse.check_sparse_tensor_invariants.disable()


TUNERS: tuple[Tuner, ...] = (
    Tuner(
        "rslora", peft.LoraConfig, False, f"both factors are trained, and {_PRODUCT}",
        alpha="lora_alpha", fixed=(("use_rslora", True),),
    ),
    Tuner(
        "dora", peft.LoraConfig, False, "columns are divided by their own length, which is not linear",
        alpha="lora_alpha", fixed=(("use_dora", True),), start=ROUNDED,
    ),
    Tuner(
        "vera", peft.VeraConfig, False, f"two vectors scale the frozen factors, and {_PRODUCT}",
        seed="projection_prng_key", options=(Option("d_initial", 0.1, 1e-6, 10.0),),
    ),
    Tuner(
        "randlora", peft.RandLoraConfig, False, f"two sets of scales multiply frozen bases, and {_PRODUCT}",
        seed="projection_prng_key",
    ),
    Tuner(
        "fourierft", peft.FourierFTConfig, True, "the update is a Fourier transform of the coefficients, so linear",
        rank="", seed="random_loc_seed", fixed=(("init_weights", True),),
        options=(Option("n_frequency", 1000, 1, _MANY), Option("scaling", 150.0, 1e-6, 1e6)),
        fitted=(("n_frequency", ENTRIES),),
    ),
    Tuner(
        "waveft", peft.WaveFTConfig, True, "the update is a wavelet transform of the coefficients, so linear",
        rank="", seed="random_loc_seed",
        options=(Option("n_frequency", 2592, 1, _MANY), Option("scaling", 25.0, 1e-6, 1e6)),
        fitted=(("n_frequency", ENTRIES),),
    ),
    Tuner(
        "c3a", peft.C3AConfig, True, "the update is a convolution with the kernel, so linear in it",
        rank="", fixed=(("init_weights", True),), conv1d=False,
        options=(Option("block_size", 256, 1, _LONG),), fitted=(("block_size", DIVIDES),),
    ),
    Tuner(
        "oft", peft.OFTConfig, False, _ROTATION,
        rank="", conv1d=False, options=(Option("oft_block_size", 32, 2, _LONG),),
        fitted=(("oft_block_size", DIVIDES_INPUTS),),
    ),
    Tuner("hra", peft.HRAConfig, False, _ROTATION, rank_step=2, conv1d=False, start=ROUNDED),
    Tuner("hira", peft.HiraConfig, False, f"both factors are trained, and {_PRODUCT}"),
    Tuner("loha", peft.LoHaConfig, False, f"four factors are trained, and {_PRODUCT}", alpha="alpha", conv1d=False),
    Tuner("lokr", peft.LoKrConfig, False, f"the factors are trained, and {_PRODUCT}", alpha="alpha", conv1d=False),
    Tuner(
        "delora", peft.DeloraConfig, False, "the factors are divided by their lengths, which is not linear",
        conv1d=False, options=(Option("delora_lambda", 15.0, 1e-6, 1e6),),
    ),
    Tuner("deft", peft.DeftConfig, False, f"a projection and its factor are trained, and {_PRODUCT}", start=ROUNDED),
    Tuner(
        "glora", peft.GloraConfig, False, f"factors multiply weights and each other, and {_PRODUCT}", conv1d=False
    ),
    Tuner(
        "gralora", peft.GraloraConfig, False, f"both factors of each block are trained, and {_PRODUCT}",
        rank_step=2, alpha="alpha",
    ),
    Tuner(
        "peanut", peft.PeanutConfig, False, "a small network of the weights with a non-linear function inside",
        conv1d=False,
    ),
    Tuner(
        "tinylora", peft.TinyLoraConfig, True, "the vector mixes frozen matrices, so the effect is linear in it",
        seed="projection_seed", options=(Option("u", 64, 1, _LONG),), shared=True, settle=_settle_signs,
    ),
    Tuner(
        "unilora", peft.UniLoraConfig, False, f"one vector fills both factors, and {_PRODUCT}",
        seed="proj_seed", options=(Option("theta_d_length", 256, 1, _MANY),), shared=True, start=MOVED,
    ),
    Tuner(
        "vblora", peft.VBLoRAConfig, False, "a softmax picks vectors out of a bank, for both factors",
        options=(
            Option("num_vectors", 256, 2, _LONG),
            Option("topk", 2, 1, 256),
            Option("vector_length", 256, 1, _LONG),
        ),
        fitted=(("vector_length", DIVIDES),), shared=True, start=MOVED,
        targets=constants.TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING,
    ),
    Tuner(
        "road", peft.RoadConfig, False, "outputs are rotated by trained angles, and sine and cosine are not linear",
        rank="", conv1d=False, fitted=(("group_size", DIVIDES_OUTPUTS),),
        options=(
            Option("group_size", 64, 2, _LONG),
            Option("variant", "road_1", choices=("road_1", "road_2", "road_4")),
        ),
    ),
    Tuner(
        "shira", peft.ShiraConfig, True, "the values are added to weights at fixed places, so the effect is linear",
        seed="random_seed", conv1d=False, settle=_leave_sparse_tensors_unchecked,
    ),
    Tuner(
        "supertuning", peft.SupertuningConfig, True, "the values are added to weights at fixed places, so it is linear",
        rank="", conv1d=False, options=(Option("select_top", True), Option("sparsity", 0.99, 0.0, 1.0)),
    ),
    Tuner(
        "miss_bat", peft.MissConfig, True, "the block is multiplied with the weights, so the effect is linear in it",
        fixed=(("init_weights", "bat"),), conv1d=False,
    ),
    Tuner(
        "beft", peft.BeftConfig, True, "a bias is added, so the effect is linear in it",
        rank="", conv1d=False, targets=constants.TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING,
    ),
)  # fmt: skip
