"""The arithmetic that a training step cannot do without, counted exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def visible_positions(lengths: np.ndarray) -> int:
    """How many (query, key) positions the mask of `[prefix | chosen | rejected]` pairs shows.

    Args:
        lengths: (N, 3) tokens of prefix, chosen tail and rejected tail, as `PairDataset.lengths` has them.

    A causal sequence of n tokens shows n(n+1)/2: 1 for the first token, n for the last. The prefix is one; each tail is
    another of its own, whose tokens moreover see the whole prefix: p(p+1)/2 + c(c+1)/2 + cp + r(r+1)/2 + rp.
    """
    prefix, chosen, rejected = lengths.T.astype(np.int64)
    causal = [part * (part + 1) // 2 for part in (prefix, chosen, rejected)]
    return int((sum(causal) + prefix * (chosen + rejected)).sum())


def needed_flops(model: Any, lengths: np.ndarray) -> int:
    """Floating-point operations of matrix products in one forward and backward over pairs of these `lengths` (N, 3).

    A product of (m, k) and (k, n) is 2mkn. Per token and matrix of `w` weights, forward is 2w. Backward is 2w for the
    gradient of the input, and another 2w for that of the weights where they are trained; neither is computed in a layer
    before which and in which nothing is trained. Attention is two products, scores and mixing, of 2 · heads · head size
    for each visible (query, key); each of them needs two in the backward pass. The head reads two tokens a pair.

    Not counted: padding, hidden keys, what gradient checkpointing or a kernel computes again, and everything that is no
    matrix product (norms, softmax, rotary positions, the embedding, the optimizer).
    """
    from torch import nn

    tokens, pairs = int(lengths.sum()), len(lengths)
    config = model.classifier.config.get_text_config()
    total, trained_before = 0, model.classifier.get_input_embeddings().weight.requires_grad
    trained_layers = []
    for layer in model.backbone.layers:
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            weights, is_trained = module.weight.numel(), module.weight.requires_grad
            # What comes into the first layer needs a gradient only if the embedding is trained; within the layer
            # everything after q, k and v does, if they are trained or adapted. Of an adapter there, B's input does.
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
    """Whether a matrix of a layer is applied to what comes into the layer: queries, keys and values."""
    return any(part in name for part in ("q_proj", "k_proj", "v_proj"))


def skeleton(base: str) -> Any:
    """What `needed_flops` looks at of a model that trains every parameter, without the memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(base))
    return SimpleNamespace(classifier=classifier, backbone=classifier.model)
