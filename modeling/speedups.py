"""What makes a model faster without changing its results: packed rows where allowed, compiling, cheaper frozen weights.

The functions take a model of models.py: its `hf_model`, `backbone`, `device` and `packed_hidden` are used.
"""

import contextlib
import functools
import importlib
import platform
from typing import Any

import torch
from torch import Tensor, nn

from modeling import attention, devices
from utils import UserError, first_line

TOLERANCE = 1e-4  # of packed against separate rows, in fp32, relative to the norm
# of compiled against other layers; fused, fewer intermediate results are rounded to bf16, which a real model amplifies
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
TRIAL_WIDTH = 384  # tokens
PARTS_OF_A_PLAIN_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def try_packing(model: Any, backward: bool = False) -> str:
    """Why packed rows do not give this architecture's own hidden states, "" if they do: tried, not assumed.

    Those of a causal decoder with rotary or learned positions do; encoders, ALiBi, state-space and eager-only models
    get one sequence a row. With `backward` the gradient must be computable too.

    Computed in fp32: in bf16 rounding alone moves a real model's hidden states by a tenth of their norm, more than a
    mistake would. So call it before `cast_frozen_weights`.
    """
    # [p p p c c r r r] of one prompt with two completions, and the same as two sequences [p p p c c], [p p p r r r]
    packed = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]])
    completions = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    rows = torch.tensor([[5, 6, 7, 8, 9, 5], [5, 6, 7, 10, 11, 12]])
    row_mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    on, was_training, autocast_dtype = model.device, model.training, model.autocast_dtype
    trained = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    model.eval()
    model.autocast_dtype = None
    try:
        with torch.set_grad_enabled(backward):
            inputs = packed, positions, torch.zeros_like(packed), completions
            got = model.packed_hidden(*(tensor.to(on) for tensor in inputs))[0, [4, 7]]  # (2, D)
            if backward:
                torch.autograd.grad(got.float().sum(), trained, allow_unused=True)
        with torch.no_grad():
            output = model.backbone(input_ids=rows.to(on), attention_mask=row_mask.to(on))
            wanted = output.last_hidden_state[[0, 1], [4, 5]]  # (2, D)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        return f"its forward pass refuses packed rows ({first_line(error)})"
    finally:
        model.train(was_training)
        model.autocast_dtype = autocast_dtype
    difference = float((got.detach().float() - wanted.float()).norm() / wanted.float().norm())
    if difference <= TOLERANCE:
        return ""
    return f"packed rows do not give its own hidden states (they differ by {difference:.2g} of their norm)"


def try_flex(model: Any, backward: bool) -> str:
    """Why FlexAttention cannot be used for heads like this model's on its device; "" if it can."""
    config = model.text_config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    # training in bf16 evaluates in fp32
    tries = {torch.float32: backward and model.autocast_dtype is None, model.autocast_dtype: backward}
    for dtype, needs_gradients in tries.items():
        if dtype is None:
            continue
        with contextlib.nullcontext() if needs_gradients else devices.tf32(model.device):
            why_not = attention.try_flex(heads, key_heads, model.head_size(), model.device, dtype, needs_gradients)
        if why_not:
            return why_not
    return ""


def narrow_last_layer(model: Any) -> bool:
    """Have the last layer compute its MLP only at the positions that `packed_hidden` is asked for, two a pair.

    No other token's last hidden state is ever read. With 28 layers that saves a fortieth of all arithmetic. For
    layers like Llama's, `x + attention(norm(x))`, then `x + mlp(norm(x))`: tried, not assumed. Returns whether it does.
    """
    layer = _layers(model)[-1] if _layers(model) else None
    if layer is None or {name for name, _ in layer.named_children()} != PARTS_OF_A_PLAIN_LAYER:
        return False
    inputs = [tensor.to(model.device) for tensor in _trial_row(model)]
    positions = torch.tensor([[0, 5], [39, TRIAL_WIDTH - 1]], device=model.device)
    was_training, before = model.training, layer.forward
    model.eval()
    try:
        with torch.no_grad(), model.in_fp32():
            wanted = model.packed_hidden(*inputs, positions=positions)  # (2, 2, D)
            layer.forward = functools.partial(_forward_where_needed, layer, layer.forward)
            model.can_narrow = True
            got = model.packed_hidden(*inputs, positions=positions)
        model.can_narrow = bool((got - wanted).norm() <= TOLERANCE * wanted.norm())
    except (RuntimeError, TypeError, ValueError):  # a layer with another signature or result
        model.can_narrow = False
    finally:
        model.train(was_training)
    if not model.can_narrow:
        layer.forward = before
    return model.can_narrow


def _forward_where_needed(layer: nn.Module, forward: Any, hidden: Tensor, **options: Any) -> Any:
    """(B, T, D) -> (1, P, D) at the P positions that the mask brings, or (B, T, D) without them."""
    needed = getattr(options.get("attention_mask"), "needed_positions", None)
    if needed is None:
        return forward(hidden, **options)
    mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)
    hidden = (hidden + mixed).flatten(0, 1)[needed.flatten()][None]
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile the parts of each decoder layer, in place: names of weights stay, one layer's code serves all.

    The parts and not the layers, because under gradient checkpointing a layer is compiled whole or not at all, and our
    attention cannot be. Shapes are `dynamic`, or every width would compile again. Raises UserError where nothing can be
    compiled: inductor needs a C++ compiler on a CPU, Triton a C compiler on CUDA.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(8, device=model.device))
    except Exception as error:  # the errors of compilers and of dynamo have no common class
        raise UserError(
            "torch.compile does not work here",
            where=f"{platform.system()}, {model.device}",
            found=f"{type(error).__name__}: {first_line(error)}",
            safe="nothing was trained yet, and everything works without compiling",
            next="leave --compile out, or install a compiler (Debian: apt install g++)",
        ) from error
    # on CUDA inductor would time some kernels and take the faster, in each process anew: a resumed run could differ
    importlib.import_module("torch._inductor.config").deterministic = True  # here, because importing it takes a while
    parts = _layer_parts(model)
    if not parts:
        raise UserError("this architecture does not name its layer class, so its layers cannot be compiled")
    for part in parts:
        # not `part.compile()`: all modules share one `__call__`, and its compiled forms are limited in number
        part.forward = torch.compile(part.forward, dynamic=True, backend=backend)


def _layers(model: Any) -> list[nn.Module]:
    kinds = model.hf_model._no_split_modules or ()
    return [module for module in model.backbone.modules() if type(module).__name__ in kinds]


def _layer_parts(model: Any) -> list[nn.Module]:
    """The norms, attention and MLP of each decoder layer."""
    return [part for layer in _layers(model) for part in layer.children()]


def _trial_row(model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A packed row of `TRIAL_WIDTH` tokens: what `packed_hidden` takes, each (1, T)."""
    lengths = torch.tensor([40, 70, TRIAL_WIDTH - 200, 30, 60])  # a prompt with two completions, and one with one
    completions = torch.repeat_interleave(torch.tensor([0, 1, 2, 0, 1]), lengths)[None]
    examples = torch.repeat_interleave(torch.tensor([0, 0, 0, 1, 1]), lengths)[None]
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, model.text_config.vocab_size, (1, TRIAL_WIDTH), generator=generator)
    return tokens, positions, examples, completions


def try_compiling(model: Any, backend: str = "inductor") -> str:
    """Compile the layers if they then compute, forward and backward, what they did before; else say why not.

    For `--compile auto`. In the model's autocast, with its attention, on one row of `TRIAL_WIDTH` tokens.
    """
    if (model.most_positions() or TRIAL_WIDTH) < TRIAL_WIDTH:  # on CUDA a position too many cannot be recovered from
        return f"the model has fewer than {TRIAL_WIDTH} positions"
    inputs = [tensor.to(model.device) for tensor in _trial_row(model)]
    trained = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    was_training, before = model.training, [(part, part.forward) for part in _layer_parts(model)]
    model.eval()
    try:
        with torch.no_grad():
            wanted = model.packed_hidden(*inputs).float()
        compile_layers(model, backend)
        got = model.packed_hidden(*inputs).float()
        torch.autograd.grad(got.sum(), trained, allow_unused=True)
        difference = float((got.detach() - wanted).norm() / wanted.norm())
        tolerance = COMPILED_TOLERANCE[model.autocast_dtype or torch.float32]
        why_not = "" if difference <= tolerance else f"compiled layers differ by {difference:.2g} of the norm"
    except Exception as error:  # see compile_layers; UserError is one of them
        cause = error.__cause__ or error
        cause = getattr(cause, "inner_exception", cause)  # dynamo's own say little
        why_not = f"{type(cause).__name__}: {first_line(cause)}"
    finally:
        model.train(was_training)
    if why_not:
        for part, forward in before:
            part.forward = forward
    return why_not


def set_gradient_checkpointing(model: Any, is_on: bool = True) -> None:
    """Keep one activation per layer and recompute the rest in the backward pass: slower by a third, less memory."""
    if not model.hf_model.supports_gradient_checkpointing:
        return
    if is_on:
        # without dropout there is no random state to go back to, which takes a call to the device in every layer
        options = {"use_reentrant": False, "preserve_rng_state": drops_out(model)}
        model.hf_model.activation_checkpointing_enable(options)
    else:
        model.hf_model.activation_checkpointing_disable()


def drops_out(model: Any) -> bool:
    """Whether anything in the model draws random numbers while training: LoRA's dropout, or the architecture's own."""
    settings = model.text_config.to_dict()
    own = [value for name, value in settings.items() if "drop" in name and isinstance(value, (int, float))]
    modules = [module.p for module in model.backbone.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    return any(own) or any(modules)


@torch.no_grad()
def cast_frozen_weights(model: Any, dtype: torch.dtype) -> None:
    """Keep the matrices that LoRA leaves alone in autocast's dtype, instead of casting them in every forward.

    Only those that lose nothing by it, as of models that were published in that dtype: so rewards and gradients are the
    same, with and without autocast, for less time and memory.
    """
    for module in model.backbone.modules():
        own = list(module.parameters(recurse=False))
        if not isinstance(module, nn.Linear) or any(p.requires_grad for p in own):
            continue
        if all(torch.equal(p, p.to(dtype).to(p.dtype)) for p in own):
            module.to(dtype)
            module.forward = functools.partial(_linear, module)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer whose weights are kept in another dtype than its input has outside autocast."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return nn.functional.linear(x, module.weight.to(x.dtype), bias)


def use_sparse_embedding_gradients(model: Any) -> None:
    """Have the embedding's gradient list only the tokens that occurred, until `densify_embedding_gradient`.

    A dense one of Qwen3's 151,936 rows would be filled with zeros and summed in every micro-batch, which has a few
    thousand tokens. DDP and FSDP sum dense gradients only; where `lm_head` is the embedding, its gradient is dense.
    On a CPU only: on CUDA a sparse one waits for the device in every backward pass, and filling a dense one is cheap.
    A step of very many tokens gets a dense one as soon as that takes less memory.
    """
    embeddings, head = model.hf_model.get_input_embeddings(), model.hf_model.get_output_embeddings()
    if model.device.type != "cpu" or (head is not None and head.weight is embeddings.weight):
        return
    if type(embeddings) is nn.Embedding and embeddings.weight.requires_grad and embeddings.max_norm is None:
        embeddings.sparse = True
        embeddings.weight.register_post_accumulate_grad_hook(_bound_sparse_gradient)


def _bound_sparse_gradient(weight: nn.Parameter) -> None:
    # a sparse gradient has a row for each token of the step's micro-batches so far, repeated ones included
    if weight.grad.is_sparse and weight.grad._nnz() > len(weight) // 2:
        weight.grad = weight.grad.coalesce().to_dense()


@torch.no_grad()
def densify_embedding_gradient(model: Any) -> None:
    """Turn a sparse gradient of the embedding into the dense one that clipping and AdamW need, at the end of a step."""
    weight = model.hf_model.get_input_embeddings().weight
    if weight.grad is not None and weight.grad.is_sparse:
        if weight.device.type == "cpu":
            devices.trim_heap_if_scarce()  # the heap still holds the room of freed activations
        # coalescing sorts, so the order of summation, and with it the last bit, is always the same
        weight.grad = weight.grad.coalesce().to_dense()


def remove_dropout(model: Any) -> None:
    """Switch off every dropout, also in training: two passes over the same tokens then give the same numbers."""
    for module in model.hf_model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
