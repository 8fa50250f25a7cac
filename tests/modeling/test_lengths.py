"""modeling/lengths.py: the reward of a sequence is the same alone, padded, packed and scored, at every length."""

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import models
import train_rm
from data_pipeline import packing
from modeling import lengths, scorer
from tests.conftest import Completions

SWITCH = 24  # tokens: where each of these tiny models does something else
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 1024, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
THETA = {"rope_theta": 10_000.0}
LONG_ROPE = {
    **THETA, "rope_type": "longrope", "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 3.0, 5.0, 8.0, 9.0, 11.0, 15.0, 20.0],
}  # fmt: skip
DYNAMIC = {**THETA, "rope_type": "dynamic", "factor": 4.0}
LLAMA3 = {
    **THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": SWITCH,
}  # fmt: skip
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SWITCH}
TWO_KINDS = ["sliding_attention", "full_attention"]

# name: (architecture, settings beside SIZES, whether sequences above SWITCH may be packed, above which each is alone)
ARCHITECTURES = {
    "Qwen3": ("Qwen3", {"head_dim": 16}, True, None),
    "Qwen2 with a sliding window": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": SWITCH, "max_window_layers": 1}, False, None,
    ),
    "Llama 3": ("Llama", {"rope_parameters": LLAMA3}, True, None),
    "Llama with dynamic rope": (
        "Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}, True, SWITCH,
    ),
    "SmolLM3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}, True, None),
    "Phi 3.5": (
        "Phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": SWITCH, "pad_token_id": 0,
                 "sliding_window": 1000}, True, SWITCH,
    ),
    "Phi 3": ("Phi3", {"sliding_window": SWITCH, "pad_token_id": 0}, False, None),
    "Gemma 3": (
        "Gemma3Text", {"sliding_window": SWITCH, "layer_types": TWO_KINDS, "head_dim": 16, "query_pre_attn_scalar": 16},
        False, None,
    ),
    "Gemma 3 with a dynamic rope in some layers": (
        "Gemma3Text",
        {"sliding_window": 1000, "layer_types": TWO_KINDS, "head_dim": 16, "max_position_embeddings": SWITCH,
         "rope_parameters": {"sliding_attention": {**THETA, "rope_type": "default"}, "full_attention": DYNAMIC}},
        True, SWITCH,
    ),
    "Mistral": ("Mistral", {"sliding_window": SWITCH}, False, None),
    "GPT-2": ("GPT2", {}, True, None),
    "GPT-Neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "window_size": SWITCH}, False, None),
    "Pythia": ("GPTNeoX", {}, True, None),
    "OLMo 2": ("Olmo2", {"pad_token_id": 0}, True, None),
    "OLMo 3": ("Olmo3", {"sliding_window": SWITCH, "layer_types": TWO_KINDS, "pad_token_id": 0}, False, None),
    "Qwen3.5": (
        "Qwen3_5Text", {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
                        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
                        "linear_num_value_heads": 2}, False, None,
    ),
    "DeepSeek V3": (
        "DeepseekV3", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
                       "moe_intermediate_size": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                       "v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 2}, True, None,
    ),
    "Doge": ("Doge", {"keep_window_size": SWITCH}, False, SWITCH),
    "gpt-oss": (
        "GptOss", {"head_dim": 16, "sliding_window": SWITCH, "layer_types": TWO_KINDS, "rope_parameters": YARN,
                   "num_local_experts": 4, "num_experts_per_tok": 2}, False, None,
    ),
}  # fmt: skip


def save_tiny(name, folder, tokenizer):
    """A tiny model of random weights and its tokenizer, on disk; returns the folder."""
    architecture, options, *_ = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**(SIZES | options), num_labels=1)
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for path, weight in model.named_parameters():  # large enough for attention to matter
            if weight.dim() > 1 and "embed" not in path:
                weight.normal_(std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs_on_both_sides():
    """Prompts with two completions, whose sequences end below, at and above SWITCH, in every combination."""
    draw = np.random.default_rng(0)
    ends, prompts = [5, SWITCH, SWITCH + 1, 2 * SWITCH], [4, 3, 20, SWITCH - 2]
    return Completions(
        [
            [draw.integers(5, 1000, size=size) for size in (prompt, first - prompt, second - prompt)]
            for prompt, first in zip(prompts, ends, strict=True)
            for second in ends
            if prompt < min(first, second)
        ]
    )


def rewards_alone(folder, pairs):
    """(N, 2) of each sequence in a batch of one, by a model of transformers that has seen no other sequence."""
    fresh = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rewards = []
    for index in range(len(pairs.lengths)):
        for ids in pairs.sequences(index):
            with torch.no_grad():
                rewards.append(copy.deepcopy(fresh)(input_ids=torch.from_numpy(ids)[None]).logits[0, 0])
    return torch.stack(rewards).view(-1, 2)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def tiny(request, tmp_path_factory, tokenizer):
    """Of each model: its name, its folder, pairs, and the reward of each of their sequences alone, (N, 2)."""
    folder, pairs = save_tiny(request.param, tmp_path_factory.mktemp("tiny"), tokenizer), pairs_on_both_sides()
    return request.param, folder, pairs, rewards_alone(folder, pairs)


def planned(model, pairs):
    """The micro-batches that training makes of these pairs, and the rewards of each, (N, 2)."""
    longest = int(pairs.lengths.sum(axis=1).max())
    crossover_length = model.attention_crossover_length() if model.packs_up_to(longest) else None
    indices = np.arange(len(pairs.lengths))
    plans = packing.plan_step(pairs, indices, 400, 32, crossover_length, model.alone_above())
    batches = [packing.build(pairs, plan, model.tokenizer.pad_token_id) for plan in plans]
    order = np.argsort(np.concatenate([batch.indices for batch in batches]))
    return plans, torch.cat([train_rm.score(model, batch) for batch in batches])[torch.from_numpy(order)]


def assert_same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_a_reward_does_not_depend_on_other_sequences(tiny):
    name, folder, pairs, wanted = tiny
    _, _, packs_beyond, alone_above = ARCHITECTURES[name]
    model = models.RewardModel.restore(folder).eval()
    assert (model.packs_up_to(SWITCH + 1), model.alone_above()) == (packs_beyond, alone_above), model.why_not
    assert wanted.std() > 0.05
    with torch.no_grad():
        # all in one padded batch, the long ones first and the short ones first
        sequences = [torch.from_numpy(ids) for index in range(len(pairs.lengths)) for ids in pairs.sequences(index)]
        for order in (list(range(len(sequences))), list(range(len(sequences)))[::-1]):
            ids = torch.nn.utils.rnn.pad_sequence([sequences[at] for at in order], batch_first=True)
            lengths_in_order = torch.tensor([len(sequences[at]) for at in order])
            mask = (torch.arange(ids.shape[1]) < lengths_in_order[:, None]).long()
            assert_same(model.score_rows(ids, mask), wanted.flatten()[order])
        # as training cuts and packs them, twice, because some ropes remember
        for _ in range(2):
            plans, rewards = planned(model, pairs)
            assert_same(rewards, wanted)
    if model.packs_up_to(SWITCH) and (packs_beyond or alone_above):
        assert any(plan.is_packed and plan.num_examples > 1 for plan in plans), "nothing was packed"


def test_a_reward_in_an_evaluation_is_that_of_the_sequence_alone(tiny):
    _, folder, pairs, wanted = tiny
    groups = [
        scorer.TokenizedGroup([ids.astype(np.int32) for ids in pairs.sequences(index)], [1, 1])
        for index in range(len(pairs.lengths))
    ]
    ready = scorer.Scorer(models.RewardModel.restore(folder), scorer.ScoringConfig(tokens_per_batch=500))
    got = dict(found for batch in ready.rewards(groups) for found in batch)
    assert_same(torch.tensor([got[at] for at in range(len(groups))]), wanted)


@pytest.mark.parametrize("name", ["Phi 3.5", "Llama with dynamic rope"])
def test_gradients_across_the_switch_are_those_of_separate_sequences(name, tmp_path, tokenizer):
    folder, pairs = save_tiny(name, tmp_path, tokenizer), pairs_on_both_sides()
    model = models.RewardModel.restore(folder).train()
    plans, rewards = planned(model, pairs)
    assert {plan.is_packed for plan in plans} == {True, False}
    (rewards[:, 0] - rewards[:, 1]).square().sum().backward()
    got = {path: weight.grad.clone() for path, weight in model.hf_model.named_parameters()}
    model.zero_grad()
    separate = [
        model.hf_model(input_ids=torch.from_numpy(ids)[None]).logits[0, 0]
        for index in range(len(pairs.lengths))
        for ids in pairs.sequences(index)
    ]
    rewards = torch.stack(separate).view(-1, 2)
    (rewards[:, 0] - rewards[:, 1]).square().sum().backward()
    for path, weight in model.hf_model.named_parameters():
        assert (got[path] - weight.grad).norm() <= 1e-4 * weight.grad.norm() + 1e-7, path


def test_without_a_forward_of_its_own_a_long_sequence_would_change_a_short_one(tmp_path, tokenizer):
    """What the tests above would find: the rope itself, as transformers computes it."""
    folder = save_tiny("Phi 3.5", tmp_path, tokenizer)
    model = models.RewardModel.restore(folder).eval()
    ids = torch.randint(5, 1000, (2, SWITCH + 1), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(SWITCH + 1) < torch.tensor([[6], [SWITCH + 1]])).long()
    with torch.no_grad():
        together = model._score_rows(ids, mask)
        apart = model.score_rows(ids, mask)
        assert apart[0] == pytest.approx(model.score_rows(ids[:1, :6], mask[:1, :6]).item(), abs=1e-6)
    assert abs(together[0] - apart[0]) > 0.01 and together[1] == pytest.approx(apart[1].item(), abs=1e-5)


def test_a_growing_reply_has_no_rewards_where_rope_has_switched(tmp_path, tokenizer):
    model = models.RewardModel.restore(save_tiny("Phi 3.5", tmp_path, tokenizer)).eval()
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert model.token_rewards(short)[1][-1] == pytest.approx(model.score_dialogues([short])[0], abs=1e-5)
    with pytest.raises(ValueError, match="no reward token by token above 24 tokens"):
        model.token_rewards([short[0], {"role": "assistant", "content": "bread " * SWITCH}])


def test_a_dynamic_rope_has_positions_up_to_its_factor():
    config = transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 100}, rope_parameters=DYNAMIC)
    assert lengths.most_positions(config) == 400
    assert lengths.most_positions(transformers.LlamaConfig(**SIZES)) == 128
