"""A frozen head and its losses, some tokens at a time, so that the logits of a whole batch never exist at once."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offsite.errors import UnsupportedModel

# Tokens whose logits exist at once. Measured by `python -m bench.head --chunks`.
CHUNK = 256


class TokenLosses(torch.autograd.Function):
    """Each token's negative log-likelihood, from the hidden states in front of a frozen head.

    No weight of the head takes a gradient, so all that a backward pass needs is the gradient with respect to the hidden
    states, and that is known as soon as a token's logits are. The forward pass computes it and keeps nothing else; the
    logits of one chunk are gone before those of the next exist. There are no second derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        chunk: int,
    ) -> torch.Tensor:
        """Returns losses in nats, (N,), float32 or the head's own dtype where that is wider.

        Args:
          ctx: of this call.
          hidden: floating (N, width).
          targets: int64 (N,), ids within the vocabulary.
          weight: of the head, (vocabulary, width), not trained.
          bias: of the head, (vocabulary,), not trained, or None.
          chunk: tokens whose logits exist at once, >= 1; changes memory and speed only.
        """
        losses, gradients = [], []
        # split and not range: no tokens are one empty chunk, so there is a loss tensor of the right dtype to return.
        for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = functional.linear(part, weight, bias)
            found, slope = _loss_and_slope(logits, wanted, slope=ctx.needs_input_grad[0])
            losses.append(found)
            if slope is not None:
                # As the backward pass of `linear` does it: in the dtype of the logits, also under autocast.
                gradients.append(torch.matmul(slope.to(logits.dtype), weight))
            del logits, slope  # before the next chunk's are made
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the kept gradient times what came in for each token.

        Raises:
          RuntimeError: `create_graph` was asked for. torch's once_differentiable would stay silent where `outer` is
            constant, as for a sum of losses, and the second derivative lack what the kept gradient depends on.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("losses by chunks cannot be differentiated twice; use CausalLM(chunk=None)")
        (gradients,) = ctx.saved_tensors
        return outer[0].unsqueeze(-1) * gradients, None, None, None, None


def _loss_and_slope(
    logits: torch.Tensor, targets: torch.Tensor, *, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the losses of a chunk, (n,), and if asked for their gradient with respect to the logits; spends these.

    Everything happens in one table of n x vocabulary numbers, where log-softmax and its gradient would be two more.
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
    """Returns the module that makes logits of hidden states, or None where the model names none."""
    return _named(model, "get_output_embeddings")


def _named(model: nn.Module, getter: str) -> Any:
    found = getattr(model, getter, None)
    return found() if found is not None else None


def obstacle(model: nn.Module) -> str:
    """Returns why the head of a model has to see all hidden states at once, or "" where nothing speaks against parts.

    Cheap, and true for this moment only, since what trains may change. What a model does with its logits is told by
    `aftermath`.
    """
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    head, entrance = head_of(model), _named(model, "get_input_embeddings")
    if type(head) is not nn.Linear or "forward" in vars(head):
        return f"the head, a {type(head).__name__}, is not an nn.Linear that runs as torch has it"
    if any(vars(head)[f"_{kind}_hooks"] for kind in ("forward_pre", "forward", "backward_pre", "backward")):
        return "hooks of others watch the head"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "the head is trained"
    if entrance is not None and any(parameter.requires_grad for parameter in entrance.parameters()):
        return "the input embedding is trained"
    return ""


def run(model: nn.Module, ids: torch.Tensor) -> None:
    """Calls a model once on tokens, for what its blocks do with them; its head gets one position of each example.

    Args:
      model: any causal language model.
      ids: int64 (B, T).
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
    """Returns why a model's logits are more than its head's output, or "" where they are exactly that.

    Runs the model on two invented tokens, without gradients, so that hooks which record training see nothing.

    Args:
      model: for which `obstacle` finds nothing.
      device: of its inputs.
    """
    devices = [device] if device.type == "cuda" else []
    try:
        # Also if called in inference mode, where no write to the logits would be seen.
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
            hidden_states(model, torch.zeros((1, 2), dtype=torch.long, device=device))
    except UnsupportedModel as refusal:
        return str(refusal)
    except Exception as error:  # whatever a foreign model does when its logits are of no token
        return f"the model fails on logits of no token: {type(error).__name__}"
    return ""


def hidden_states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Returns what a model gives to its head, floating (B, T, width), differentiable; the head works on no token.

    The model runs as it always does, but the head gets none of the tokens, so its output has no size. That output has
    to be what the model returns as logits: the same object, never written to. So whatever a model does with logits (a
    cap, a scale, a mask, in place or not) is seen whatever its name or configuration. Not for two threads on one model.

    Args:
      model: for which `obstacle` finds nothing.
      ids: int64 (B, T).

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
        logits = model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != 1 or inputs[0].shape != (*ids.shape, head.in_features):
        raise UnsupportedModel(f"the model calls its head {len(outputs)} times, or not on one hidden state per token")
    output, version = outputs[0]
    if logits is not output or _version(logits) != version:
        raise UnsupportedModel("the model changes its logits after the head")
    return inputs[0]


def _version(tensor: torch.Tensor) -> int:
    """Returns how often a tensor was written to; torch does not count for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version
