"""Methods that are known and not offered, each with its reason."""

_EVERY_BLOCK = "it acts in every block, also in those that an emulator lacks, and not in the slots alone"
_DECOMPOSED = (
    "its frozen factors are singular vectors of the base weights, whose signs the linear algebra library chooses, so "
    "two machines would train different adapters"
)
_REWRITES = "it rewrites the base weights, which coordinator and sites must have alike"
_FROM_DATA = "it is computed from activations or gradients on data, which at a site would be a release of its own"
_ONE_ROW = "its learned tokens have one gradient for the whole batch, and none for each example"

REFUSED: dict[str, str] = {
    "adalora": "its rank schedule prunes by each site's own scores, and without the schedule it is lora",
    "adamss": f"it needs scikit-learn to cluster the base weights, and {_DECOMPOSED}",
    "adaption_prompt": "it takes the last blocks of a model, whatever the slots are, and only of a few families",
    "boft": "peft compiles native code and loads it while it attaches; take oft",
    "cartridge": f"its learned keys and values have no slots: {_EVERY_BLOCK}; take soft_prompt",
    "controlnet": (
        "it trains a copy of the whole downward half and middle, in a small U-net as much as the whole again, so there "
        "is no small update; take ip_adapter where an image steers, or lora"
    ),
    "corda": f"as a start of lora, {_FROM_DATA}",
    "cpt": f"{_ONE_ROW}; take soft_prompt",
    "eva": f"as a start of lora, {_FROM_DATA}",
    "frod": (
        "its common basis comes from eigenvectors that change wholly when weights change in their last digits, so two "
        "machines would train different adapters"
    ),
    "kasa": f"as a variant of lora, {_REWRITES}",
    "lily": "its router averages over the batch, so that one example's gradient depends on the others",
    "loftq": f"as a start of lora, {_REWRITES}",
    "lora_ga": f"as a start of lora, {_FROM_DATA}",
    "mica": f"as a start of lora, {_DECOMPOSED}",
    "monteclora": "it draws samples in each forward pass of training, and trains numbers that have no part in the loss",
    "multitask_prompt_tuning": "it needs a task number that no record has, and its tokens stand in front of the model",
    "olora": f"as a start of lora, {_REWRITES}",
    "osf": "it projects gradients in hooks, which breaks those of single examples",
    "p_tuning": f"its encoder is not in what peft stores, and {_ONE_ROW}; take soft_prompt",
    "pissa": f"as a start of lora, {_REWRITES}",
    "poly": "it needs a task number that no record has, and draws its routing in each forward pass of training",
    "prefix_tuning": f"its learned keys and values have no slots: {_EVERY_BLOCK}; take soft_prompt",
    "prompt_tuning": f"{_ONE_ROW}; take soft_prompt",
    "psoft": _DECOMPOSED,
    "pvera": "it draws from a distribution in each forward pass of training, and with it an example's gradient",
    "shadow": f"its shadow network runs beside the whole model: {_EVERY_BLOCK}",
    "textual_inversion": (
        "records hold what the text encoder made of a prompt, so no word is looked up that could be new; take "
        "concept_tokens, which learns the word behind that encoder"
    ),
    "trainable_tokens": "it trains rows of the embedding, which lies outside the slots and may be shipped compressed",
    "velora": "it is lora with approximate gradients, which clip and noise are not made for",
    "xlora": "it mixes adapters that were trained before, which no package holds",
}
