"""The FLOPs that a training step cannot do without, counted exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def visible_positions(lengths: np.ndarray) -> int:
    """How many (query, key) positions are visible in the mask of `[prompt | chosen | rejected]` pairs.

    Args:
        lengths: (N, 3) tokens of prompt, chosen reply and rejected reply, as in `PairDataset.lengths`.

    A causal sequence of n tokens has n(n+1)/2: 1 for the first token, n for the last. The prompt is one such sequence.
    So is each reply, and its tokens also see the whole prompt: p(p+1)/2 + c(c+1)/2 + cp + r(r+1)/2 + rp.
    """
    prefix, chosen, rejected = lengths.T.astype(np.int64)
    causal = [part * (part + 1) // 2 for part in (prefix, chosen, rejected)]
    return int((sum(causal) + prefix * (chosen + rejected)).sum())


def needed_flops(model: Any, lengths: np.ndarray) -> int:
    """FLOPs of the matrix products in one forward and backward pass over pairs of these `lengths` (N, 3).

    A product of (m, k) and (k, n) takes 2mkn. Per token and matrix of `w` weights, forward takes 2w. Backward takes 2w
    for the gradient of the input, and another 2w for the gradient of the weights if they are trained. Neither is
    computed in a layer if nothing in it and before it is trained. Attention consists of two products, scores and
    mixing, of 2 · heads · head size for each visible (query, key); each needs two more in the backward pass. The reward
    head reads two tokens per pair, and so the last layer's MLP is needed at these only.

    Not counted: padding, masked keys, what gradient checkpointing or a kernel computes again, and everything that is
    not a matrix product (norms, softmax, rotary positions, the embedding, the optimizer).
    """
    from torch import nn

    pairs = len(lengths)
    config = model.hf_model.config.get_text_config()
    total, trained_before = 0, model.hf_model.get_input_embeddings().weight.requires_grad
    trained_layers = []
    for layer in model.backbone.layers:
        is_last = layer is model.backbone.layers[-1]
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            tokens = 2 * pairs if is_last and name.startswith("mlp") else int(lengths.sum())
            weights, is_trained = module.weight.numel(), module.weight.requires_grad
            # The first layer's input needs a gradient only if the embedding is trained. Within the layer, everything
            # after q, k and v does, if these are trained or have adapters; so does the input of an adapter's B.
            needs_input = trained_before or "lora_B" in name or not _reads_layer_input(name)
            total += 2 * weights * tokens * (1 + is_trained + needs_input)
        trained_here = any(parameter.requires_grad for parameter in layer.parameters())
        trained_layers.append(trained_before or trained_here)
        trained_before = trained_layers[-1]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * 2 * config.num_attention_heads * head_size * visible_positions(lengths)
    total += sum(attention * (3 if is_trained else 1) for is_trained in trained_layers)
    return total + 3 * 2 * config.hidden_size * 2 * pairs  # the head is always trained


def _reads_layer_input(name: str) -> bool:
    """Whether a matrix is applied to the layer's input: queries, keys and values."""
    return any(part in name for part in ("q_proj", "k_proj", "v_proj"))


def skeleton(base: str) -> Any:
    """A model that trains all parameters, as far as `needed_flops` needs it, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(base))
    return SimpleNamespace(hf_model=classifier, backbone=classifier.model)
