"""modeling/log_probs.py: log-probabilities in parts are those of the whole table, and of each architecture itself."""

import numpy as np
import pytest
import torch
import transformers

import models
from data_pipeline import packing
from modeling import log_probs
from modeling.log_probs import Head, token_logprobs
from tests.conftest import random_completions
from tests.modeling.test_lengths import SIZES
from utils import UserError

HEADS = {
    "plain": Head(torch.empty(0), None),
    "scaled, capped, with a bias": Head(torch.empty(0), torch.empty(0), scale=0.5, cap=5.0),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("at_once", [7, 1000])
def test_values_and_gradients_are_those_of_the_whole_table(kind, temperature, at_once, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=draw, requires_grad=True) for size in ((50, 16), (300, 16), (300,))
    )
    head = HEADS[kind]._replace(weight=weight, bias=bias if HEADS[kind].bias is not None else None)
    monkeypatch.setattr(log_probs, "TILE_TOKENS", at_once)
    monkeypatch.setattr(log_probs, "TILE_ENTRIES", 13 * at_once)
    targets, factors = torch.randint(0, 300, (50,), generator=draw), torch.randn(50, generator=draw)
    z = hidden @ weight.T + (0 if head.bias is None else bias)
    z = z * head.scale
    z = z if head.cap is None else head.cap * torch.tanh(z / head.cap)
    whole = (z / temperature).log_softmax(dim=1)
    wanted = whole.gather(1, targets[:, None])[:, 0]
    got, entropy = token_logprobs(head, hidden, targets, temperature)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(entropy, -(whole.exp() * whole).sum(dim=1), atol=1e-5) and not entropy.requires_grad
    inputs = [hidden, weight, *([] if head.bias is None else [bias])]
    for ours, exact in zip(*(torch.autograd.grad((x * factors).sum(), inputs) for x in (got, wanted)), strict=True):
        assert torch.allclose(ours, exact, atol=1e-5 * float(exact.abs().max()))


def test_in_bf16_gradients_are_rounded_and_values_nearly_not():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*size, generator=draw).bfloat16().float() for size in ((60, 64), (5000, 64)))
    targets, factors = torch.randint(0, 5000, (60,), generator=draw), torch.randn(60, generator=draw)
    found = {}
    for dtype in (None, torch.bfloat16):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        logprobs, entropy = token_logprobs(Head(inputs[1], None), inputs[0], targets, dtype=dtype)
        found[dtype] = [logprobs.detach(), entropy, *torch.autograd.grad((logprobs * factors).sum(), inputs)]
    for number, (exact, rounded) in enumerate(zip(found[None], found[torch.bfloat16], strict=True)):
        difference = float((exact - rounded).norm() / exact.norm())
        assert difference <= (1e-5 if number < 2 else 2e-2), (number, difference)


LANGUAGE_MODELS = {
    "Qwen3": {"head_dim": 16}, "Llama": {}, "Gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 4.0}, "GPT2": {}, "GPTJ": {"rotary_dim": 8},
}  # fmt: skip


def save_language_model(name, folder, tokenizer, **options):
    torch.manual_seed(0)
    sizes = (
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": SIZES["vocab_size"]}
        if name.startswith("GPT")
        else SIZES
    )
    config = getattr(transformers, f"{name}Config")(**{**sizes, **LANGUAGE_MODELS[name], **options})
    config.pad_token_id = tokenizer.pad_token_id
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in path:
                weight.normal_(std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", list(LANGUAGE_MODELS))
def test_each_architectures_own_logits_give_the_same(name, tmp_path, tokenizer, monkeypatch):
    policy = models.PolicyModel.create(save_language_model(name, tmp_path, tokenizer), tokenizer=tokenizer).eval()
    log_probs.check_head(policy)
    head = log_probs.head_of(policy.hf_model)
    monkeypatch.setattr(log_probs, "head_of", lambda hf_model: head._replace(scale=head.scale * 1.01))
    with pytest.raises(UserError, match="head is of a kind that is not known here"):
        log_probs.check_head(policy)


@pytest.mark.parametrize("attention", ["sdpa", "pieces"])
def test_a_policy_says_of_packed_rows_what_it_says_of_separate_ones_and_its_own_logits(base, tokenizer, attention):
    policy = models.PolicyModel.create(base, tokenizer=tokenizer).eval()
    policy.use_attention(attention)
    dataset = random_completions(6, 3)
    indices = np.arange(1, 6)  # the first has no prompt, which a policy always has
    plans = packing.plan_step(dataset, indices, 128, 64, policy.attention_crossover_length())
    found = {}
    for plan in plans:
        for batch in (packing.build(dataset, plan, 0), packing.separate(dataset, plan.indices, 0)):
            prepared = policy.prepared(batch)
            logprobs, _ = policy(*prepared.inputs())
            lengths = dataset.lengths[plan.indices, 1:].flatten().tolist()
            for (index, completion), values in zip(
                ((int(i), k) for i in plan.indices for k in range(3)), logprobs.split(lengths), strict=True
            ):
                found.setdefault((index, completion), []).append(values)
    assert len(found) == 15
    for (index, completion), (packed, separate) in found.items():
        prompt, reply = dataset.examples[index][0], dataset.examples[index][1 + completion]
        ids = torch.from_numpy(np.concatenate([prompt, reply]))[None]
        whole = policy.hf_model(input_ids=ids).logits[0].log_softmax(dim=1)
        wanted = whole[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert torch.allclose(packed, wanted, atol=1e-5) and torch.allclose(separate, wanted, atol=1e-5)
