"""Methods that are known but not offered, each with its reason."""

_EVERY_BLOCK = "it acts in every block and not only in the slots, and an emulator lacks some blocks"
_DECOMPOSED = (
    "its frozen factors are singular vectors of the base weights; their signs depend on the linear algebra library, so "
    "two machines would train different adapters"
)
_REWRITES = "it rewrites the base weights, which must be the same at coordinator and sites"
_FROM_DATA = "it is computed from activations or gradients on data, and at a site that would be another private release"
_ONE_ROW = "its learned tokens have one gradient for the whole batch, and no gradient for each example"

REFUSED: dict[str, str] = {
    "adalora": "its rank schedule prunes by the scores of each site, and without the schedule it is lora",
    "adamss": f"it needs scikit-learn to cluster the base weights, and {_DECOMPOSED}",
    "adaption_prompt": "it changes the last blocks of a model, whatever the slots are, and knows only a few families",
    "boft": "peft compiles native code and loads it while it attaches; take oft",
    "cartridge": f"its learned keys and values have no slots: {_EVERY_BLOCK}; take soft_prompt",
    "controlnet": (
        "it trains a copy of the whole downward half and middle, in a small U-net as much as the whole model, so the "
        "update is not small; take ip_adapter where an image steers, or lora"
    ),
    "corda": f"as a start of lora, {_FROM_DATA}",
    "cpt": f"{_ONE_ROW}; take soft_prompt",
    "eva": f"as a start of lora, {_FROM_DATA}",
    "frod": (
        "its common basis comes from eigenvectors that change completely when weights change in their last digits, so "
        "two machines would train different adapters"
    ),
    "kasa": f"as a variant of lora, {_REWRITES}",
    "lily": "its router averages over the batch, so the gradient of one example depends on the others",
    "loftq": f"as a start of lora, {_REWRITES}",
    "lora_ga": f"as a start of lora, {_FROM_DATA}",
    "mica": f"as a start of lora, {_DECOMPOSED}",
    "monteclora": "it draws samples in each forward pass of training, and trains numbers without effect on the loss",
    "multitask_prompt_tuning": "it needs a task number that no record has, and its tokens precede the whole model",
    "olora": f"as a start of lora, {_REWRITES}",
    "osf": "it projects gradients in hooks, which breaks the gradients of single examples",
    "p_tuning": f"peft does not store its encoder, and {_ONE_ROW}; take soft_prompt",
    "pissa": f"as a start of lora, {_REWRITES}",
    "poly": "it needs a task number that no record has, and draws its routing in each forward pass of training",
    "prefix_tuning": f"its learned keys and values have no slots: {_EVERY_BLOCK}; take soft_prompt",
    "prompt_tuning": f"{_ONE_ROW}; take soft_prompt",
    "psoft": _DECOMPOSED,
    "pvera": "it draws from a distribution in each forward pass of training, so each example's gradient is random",
    "shadow": f"its shadow network runs in parallel to the whole model: {_EVERY_BLOCK}",
    "textual_inversion": (
        "records hold the output of the text encoder, so no new word could be looked up; take concept_tokens, which "
        "learns the word after that encoder"
    ),
    "trainable_tokens": "it trains rows of the embedding, which lies outside the slots and may be shipped compressed",
    "velora": "it is lora with approximate gradients, for which clipping and noise are not made",
    "xlora": "it mixes adapters of earlier trainings, and no package holds these",
}
