"""Reward models whose behaviour is known, because their weights are made and not trained."""

import math
import shutil

import torch

import models


def save_length_model(folder, tokenizer_folder, scale=1.0, most_positions=2048):
    """A real GPT-2 classifier whose reward is `scale` times the number of tokens in front of the last one.

    Token embeddings are 0 and its one block adds nothing, so the last hidden state is LayerNorm(position embedding).
    The embedding of position p is (c, s, −c, −s) with s = p / P and c = √(1 − s²): mean 0, variance 1/2, so LayerNorm
    multiplies it by √2, and a head that reads s gives back p.
    """
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = models.load_tokenizer(str(tokenizer_folder))
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=most_positions, n_embd=4, n_layer=1, n_head=1, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, layer_norm_epsilon=1e-12,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        s = torch.arange(most_positions) / most_positions
        c = (1 - s**2).sqrt()
        model.transformer.wpe.weight.copy_(torch.stack([c, s, -c, -s], dim=1))
        model.transformer.ln_f.weight.fill_(1)
        model.score.weight[0, 1] = scale * most_positions / math.sqrt(2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_constant_model(folder, base, tokenizer):
    """A reward model whose head is zero."""
    model = models.RewardModel.create(base, tokenizer, 0)
    with torch.no_grad():
        model.hf_model.score.weight.zero_()
    model.save(folder)
    return folder


def save_with_named_templates(folder, base, default=None):
    """A copy of a base model whose tokenizer has three named chat templates, as Command-R's has."""
    shutil.copytree(base, folder)
    tokenizer = models.load_tokenizer(str(folder))
    default = default or tokenizer.chat_template
    tokenizer.chat_template = {"tool_use": "tools: " + default, "default": default, "rag": "documents: " + default}
    tokenizer.save_pretrained(folder)
    return folder
