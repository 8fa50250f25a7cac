"""Log-probabilities of tokens without the (tokens, vocabulary) table of logits: a tile of it at a time, forward and
backward.

Of 2,000 tokens and Qwen3's vocabulary of 151,936 the table alone takes 1.2 GB, and the backward pass holds it twice.

Letters: P tokens, D hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modeling import devices
from utils import UserError

TILE_TOKENS, TILE_ENTRIES = 1024, 2048  # of tokens and of the vocabulary: 8 MB of logits
TOLERANCE = 1e-4  # of the trial, in nats


class Head(NamedTuple):
    """How a language model turns its last hidden states into logits: z = scale · (W h + b), capped at ±cap if set.

    Gemma 2 caps by cap · tanh(z / cap) (arXiv 2408.00118, 2.1); Cohere multiplies by `logit_scale`, Granite divides by
    `logits_scaling`.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor, entries: slice = slice(None), dtype: torch.dtype | None = None) -> Tensor:
        """(P, V) fp32 logits of (P, D) fp32 hidden states, or those of some entries of the vocabulary."""
        return self._finished(devices.product(hidden, self.weight[entries], dtype), entries)

    def rounded_logits(self, hidden: Tensor, weight: Tensor, entries: slice) -> Tensor:
        """The same in the dtype of `hidden` and of `weight`, the weights of these entries."""
        return self._finished(hidden @ weight.T, entries)

    def _finished(self, z: Tensor, entries: slice) -> Tensor:
        if self.bias is not None:
            z += self.bias[entries]
        if self.scale != 1:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)


def head_of(hf_model: nn.Module) -> Head:
    """The head of one of transformers' causal language models; UserError if it has none that is linear."""
    linear, config = hf_model.get_output_embeddings(), hf_model.config.get_text_config()
    if not isinstance(linear, nn.Linear):
        raise UserError("the head of this language model is not a linear layer, so its log-probabilities are not known")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(linear.weight, linear.bias, float(scale), getattr(config, "final_logit_softcapping", None))


def token_logprobs(
    head: Head, hidden: Tensor, targets: Tensor, temperature: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """log p of each target token and the entropy of its distribution, in nats and fp32, (P,) each.

    Args:
        head: `head_of` a language model.
        hidden: (P, D) last hidden states of the tokens before the targets.
        targets: (P,) token ids.
        temperature: logits are divided by it first.
        dtype: bf16 rounds the factors of the head's products, and is faster; the results are of fp32 logits either way,
            their gradients of bf16 ones.

    The log-probabilities have a gradient, with respect to `hidden`, the weight and the bias; the entropy has none.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden.float(), head.weight, head.bias, targets, head, temperature, dtype)


class _TokenLogprobs(torch.autograd.Function):
    """In tiles of tokens and vocabulary that stay in a processor's cache: each is computed, reduced and forgotten.

    One kernel makes probabilities of a tile's logits; the sums of the tiles, (tiles, P), say what share of the whole
    distribution each tile has.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, temperature: float,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        count, vocabulary_tiles = len(hidden), _parts(len(weight), tile_entries(hidden.device))
        chosen, entropy = hidden.new_zeros(count), hidden.new_zeros(count)
        log_sums = hidden.new_full((count,), -torch.inf)
        of_tiles = hidden.new_empty(len(vocabulary_tiles), count)
        for number, entries in enumerate(vocabulary_tiles):
            for tokens in _parts(count, TILE_TOKENS):
                z = head.logits(hidden[tokens], entries, dtype)
                z = z.div_(temperature) if temperature != 1 else z
                at, columns = _inside(targets[tokens], entries)
                chosen[tokens][at] = z[at, columns]
                p = z.softmax(dim=1)
                log_sum = z.amax(dim=1) - p.amax(dim=1).log_()  # the largest is at least one of as many as there are
                both = torch.stack([log_sums[tokens], log_sum])  # (2, p), of all tiles before and of this one
                log_sums[tokens], of_tiles[number, tokens] = both.logsumexp(dim=0), log_sum
                shares = (both - log_sums[tokens]).exp_()
                of_both = torch.stack([entropy[tokens], log_sum - torch.linalg.vecdot(p, z)])
                entropy[tokens] = (shares * of_both + torch.special.entr(shares)).sum(dim=0)
        ctx.save_for_backward(hidden, weight, bias, targets, chosen, of_tiles - log_sums)
        ctx.head, ctx.temperature, ctx.dtype = head, temperature, dtype
        ctx.mark_non_differentiable(entropy)
        return chosen - log_sums, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """d log p / dz is the target's indicator minus p, over the temperature: logits are computed once more.

        With a dtype in that, as autocast computes gradients; they are summed in fp32.
        """
        hidden, weight, bias, targets, chosen, log_shares = ctx.saved_tensors
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        head, temperature, dtype = ctx.head, ctx.temperature, ctx.dtype or hidden.dtype
        factors = (gradient * (head.scale / temperature))[:, None]  # (P, 1)
        rounded = hidden.to(dtype)
        for number, entries in enumerate(_parts(len(weight), tile_entries(hidden.device))):
            rows = weight[entries].to(dtype)
            for tokens in _parts(len(hidden), TILE_TOKENS):
                z = head.rounded_logits(rounded[tokens], rows, entries)
                p = z.div(temperature).softmax(dim=1) if temperature != 1 else z.softmax(dim=1)
                if head.cap is not None:
                    p *= _slope(z, head.cap)
                share = -factors[tokens] * log_shares[number, tokens, None].exp()
                if of_hidden is not None:
                    of_hidden[tokens] += (p @ rows) * share
                if of_weight is not None:
                    of_weight[entries] += p.T @ (hidden[tokens] * share).to(dtype)
                if of_bias is not None:
                    of_bias[entries] += (p.T @ share.to(dtype))[:, 0]
        if head.cap is not None:
            factors = factors * _slope(chosen[:, None] * temperature, head.cap)
        if of_hidden is not None:
            of_hidden.addcmul_(weight[targets], factors)
        if of_weight is not None:
            of_weight.index_add_(0, targets, hidden * factors)
        if of_bias is not None:
            of_bias.index_add_(0, targets, factors[:, 0])
        return of_hidden, of_weight, of_bias, None, None, None, None


def _slope(z: Tensor, cap: float) -> Tensor:
    """The derivative of a capped logit by the uncapped one."""
    return 1 - (z / cap).square()


def _inside(targets: Tensor, entries: slice) -> tuple[Tensor, Tensor]:
    """Which of some targets are among the vocabulary's `entries`, and where there."""
    at = ((targets >= entries.start) & (targets < entries.stop)).nonzero()[:, 0]
    return at, targets[at] - entries.start


def tile_entries(device: torch.device) -> int:
    """Entries of the vocabulary in a tile: few enough for a processor's cache, or enough to keep a GPU busy."""
    return TILE_ENTRIES if device.type == "cpu" else 16 * TILE_ENTRIES


def logits_of(head: Head, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(P, V) fp32 logits of (P, D) fp32 hidden states; `dtype` as in `token_logprobs`."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head.logits(hidden, dtype=dtype)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@torch.no_grad()
def check_head(model: Any) -> None:
    """UserError unless `token_logprobs` are those of the architecture's own forward: tried, not assumed."""
    ids = torch.randint(5, model.text_config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    ids, was_training = ids.to(model.device), model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            wanted = model.hf_model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=1)
            hidden = model.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            got, _ = token_logprobs(head_of(model.hf_model), hidden, ids[0, 1:])
    finally:
        model.train(was_training)
    difference = float((got - wanted.gather(1, ids[0, 1:, None])[:, 0]).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            "this language model's head is of a kind that is not known here", where=model.tokenizer.name_or_path,
            found=f"log-probabilities differ by {difference:.2g} from its own", next="another model",
        )  # fmt: skip
