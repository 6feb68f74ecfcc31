"""Losses of a frozen head, computed in chunks of tokens, so that the logits of a whole batch never exist at once."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from offsite.errors import UnsupportedModel

# Number of tokens whose logits exist at once; measured by `python -m bench.chunked_head --chunks`.
CHUNK = 256


@runtime_checkable
class StoredHead(Protocol):
    """A dense layer that makes its frozen weight anew at each use, some rows at a time, and has no parameter for it.

    Attributes:
      in_features: width of the hidden states.
      out_features: number of logits of a token.
      bias: frozen bias, (vocabulary,), or None.
    """

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns logits (..., vocabulary) of hidden states (..., width), without a gradient."""

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of the hidden states, (..., width), for one of the logits, (..., vocabulary)."""


class TokenLosses(torch.autograd.Function):
    """The negative log-likelihood of each token, from the hidden states in front of a frozen head.

    No weight of the head takes a gradient, so a backward pass needs only the gradient with respect to the hidden
    states, and this gradient is known as soon as a token's logits are known. The forward pass computes the gradient and
    keeps nothing else; the logits of one chunk are freed before the logits of the next exist. There are no second
    derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weight: "torch.Tensor | StoredHead",
        bias: torch.Tensor | None,
        chunk: int,
    ) -> torch.Tensor:
        """Returns losses in nats, (N,), float32 or the head's own dtype where that is wider.

        Args:
          ctx: autograd's context of this call.
          hidden: hidden states, floating (N, width).
          targets: token ids, int64 (N,), in 0..vocabulary - 1.
          weight: frozen weight of the head, (vocabulary, width), or the head itself if it is a `StoredHead`.
          bias: frozen bias of the head, (vocabulary,), or None.
          chunk: number of tokens whose logits exist at once, >= 1; changes only memory and speed.
        """
        losses, gradients = [], []
        stored = isinstance(weight, StoredHead)
        # split and not range: without tokens there is one empty chunk, and so a loss tensor of the right dtype to
        # return.
        for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = weight.product(states) if stored else functional.linear(states, weight, bias)
            loss, slope = _loss_and_slope(logits, ids, slope=ctx.needs_input_grad[0])
            losses.append(loss)
            if slope is not None:
                # In the dtype of the logits, as in the backward pass of `linear`, also under autocast.
                slope = slope.to(logits.dtype)
                gradients.append(weight.transposed_product(slope) if stored else torch.matmul(slope, weight))
            del logits, slope  # before the next chunk's are made
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the kept gradient times the incoming gradient of each token.

        Raises:
          RuntimeError: the caller set `create_graph`. torch's once_differentiable would stay silent where `outer` is
            constant, as for a sum of losses, and the second derivative would lack the part through the kept gradient.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("losses by chunks cannot be differentiated twice; use CausalLM(chunk=None)")
        (gradients,) = ctx.saved_tensors
        return outer[0].unsqueeze(-1) * gradients, None, None, None, None


def _loss_and_slope(
    logits: torch.Tensor, targets: torch.Tensor, *, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the losses of a chunk, (n,), and with `slope` their gradient with respect to the logits.

    All computation overwrites one table of n x vocabulary numbers (the logits, where these are wide enough);
    log-softmax and its gradient would take two more tables.
    """
    table = logits.to(wide(logits.dtype))
    picked = table.gather(1, targets[:, None])
    top = table.amax(1, keepdim=True)
    total = table.sub_(top).exp_().sum(1, keepdim=True)
    losses = (total.log() + top - picked).squeeze(1)
    if not slope:
        return losses, None
    return losses, table.div_(total).scatter_add_(1, targets[:, None], torch.full_like(picked, -1))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which losses of logits are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def head_of(model: nn.Module) -> Any:
    """Returns the module that makes logits from hidden states, or None where the model names no such module."""
    return _named(model, "get_output_embeddings")


def weight_of(head: Any) -> "torch.Tensor | StoredHead":
    """Returns what `TokenLosses` takes as the weight of a head."""
    weight: torch.Tensor | StoredHead = head if isinstance(head, StoredHead) else head.weight
    return weight


def _named(model: nn.Module, getter: str) -> Any:
    get = getattr(model, getter, None)
    return get() if get is not None else None


def obstacle(model: nn.Module) -> str:
    """Returns why the head of a model must get all hidden states at once, or "" where chunks are possible.

    The check is cheap and holds only for this moment, since the set of trained parameters may change. `aftermath`
    checks what the model does with its logits.
    """
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    head, embedding = head_of(model), _named(model, "get_input_embeddings")
    if not (type(head) is nn.Linear or isinstance(head, StoredHead)) or "forward" in vars(head):
        return f"the head, a {type(head).__name__}, is not an nn.Linear with torch's own forward"
    if any(vars(head)[f"_{kind}_hooks"] for kind in ("forward_pre", "forward", "backward_pre", "backward")):
        return "the head has hooks"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "the head is trained"
    if embedding is not None and any(parameter.requires_grad for parameter in embedding.parameters()):
        return "the input embedding is trained"
    return ""


def run(model: nn.Module, ids: torch.Tensor) -> None:
    """Calls a model once on tokens, so that hooks see the activations; the head gets one position of each example.

    Args:
      model: any causal language model.
      ids: token ids, int64 (B, T).
    """
    head = head_of(model)

    def enter(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][..., -1:, :], *args[1:])

    handle = head.register_forward_pre_hook(enter) if isinstance(head, nn.Module) else None
    try:
        with torch.no_grad():
            model(input_ids=ids)
    finally:
        if handle is not None:
            handle.remove()


def aftermath(model: nn.Module, device: torch.device) -> str:
    """Returns how a model's logits differ from its head's output, or "" where both are the same.

    Runs the model on two dummy tokens, without gradients, so that hooks which record training see nothing.

    Args:
      model: a model for which `obstacle` returns "".
      device: device of the model's inputs.
    """
    devices = [device] if device.type == "cuda" else []
    try:
        # Leaves inference mode, in which a write to the logits would go unseen.
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
            hidden_states(model, torch.zeros((1, 2), dtype=torch.long, device=device))
    except UnsupportedModel as refusal:
        return str(refusal)
    except Exception as error:  # a foreign model may fail in any way on logits without tokens
        return f"the model fails on logits without tokens: {type(error).__name__}"
    return ""


def hidden_states(model: nn.Module, ids: torch.Tensor, **further: torch.Tensor) -> torch.Tensor:
    """Returns the input of a model's head, floating (B, T, width), differentiable; the head itself gets no token.

    The model runs as always, but the head gets an empty slice of the tokens, so its output is empty. The model must
    return exactly this output as its logits: the same object, never written to. So any change of the logits (a cap, a
    scale, a mask, in place or not) is detected, whatever the model's name or configuration. Two threads must not share
    a model.

    Args:
      model: a model for which `obstacle` returns "".
      ids: token ids, int64 (B, T).
      further: other inputs of the model, by name.

    Raises:
      UnsupportedModel: the model's logits are not its head's output.
    """
    head = head_of(model)
    inputs: list[torch.Tensor] = []
    outputs: list[tuple[torch.Tensor, int]] = []

    def enter(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        inputs.append(args[0])
        return (args[0][..., :0, :],)

    def leave(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        outputs.append((output, _version(output)))

    handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave)]
    try:
        logits = model(input_ids=ids, **further).logits
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != 1 or inputs[0].shape != (*ids.shape, head.in_features):
        raise UnsupportedModel(
            f"the model calls its head {len(outputs)} times, or not with one hidden state for each token"
        )
    output, version = outputs[0]
    if logits is not output or _version(logits) != version:
        raise UnsupportedModel("the model changes its logits after the head")
    return inputs[0]


def _version(tensor: torch.Tensor) -> int:
    """Returns how often a tensor was written to; torch does not count writes to tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version
