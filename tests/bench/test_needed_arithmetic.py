"""bench/needed_arithmetic.py: needed arithmetic by hand, and as torch counts it."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import needed_arithmetic
import train_rm
from modeling import attention, speedups
from tests.conftest import micro_batches_of
from tests.test_models import PairsFromIds, make_model


@pytest.mark.parametrize("lengths", [(0, 1, 1), (3, 1, 2), (40, 20, 7)])
def test_visible_positions_are_those_of_the_mask(lengths):
    completion_index = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    mask = attention.packed_attention_mask(torch.zeros_like(completion_index), completion_index)
    assert needed_arithmetic.visible_positions(np.array([lengths, lengths])) == 2 * mask.sum().item()


def test_needed_arithmetic_of_one_pair_by_hand(base, tokenizer):
    model = make_model(base, tokenizer)
    config = model.hf_model.config
    # the demo's model: per layer q and o of 128 · heads · size, k and v of 128 · key heads · size, three of 128 · inner
    heads, key_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = 2 * 128 * heads + 2 * 128 * key_heads + 3 * 128 * config.intermediate_size
    # prefix 3, tails 1 and 2: 6 tokens; visible 1+2+3, 4, 4+5 = 19
    per_layer = 3 * (2 * 6 * matrices + 4 * heads * 19)
    # the last layer's MLP at the last two tokens only
    not_needed = 3 * 2 * (6 - 2) * 3 * 128 * config.intermediate_size
    by_hand = config.num_hidden_layers * per_layer - not_needed + 3 * 2 * 2 * 128
    assert needed_arithmetic.needed_flops(model, np.array([(3, 1, 2)])) == by_hand


@pytest.mark.parametrize("lora", [False, True])
def test_needed_arithmetic_is_what_torch_counts_less_what_is_hidden(base, tokenizer, lora):
    model = make_model(base, tokenizer, lora).train()
    assert speedups.narrow_last_layer(model)
    sides = np.arange(5, 37), np.concatenate([np.arange(5, 25), np.arange(100, 109)])
    pairs = PairsFromIds([sides])
    (batch,) = micro_batches_of(pairs, np.array([0]), 41, 32, 0, 3840.0)
    assert (batch.example_index >= 0).sum() == batch.input_ids.numel() == 41
    # the math kernel's products are all seen by the counter, and are counted as 4 · heads · size · 41² forward
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rewards = train_rm.score(model, batch)
        rewards.sum().backward()
    config = model.hf_model.config
    hidden = 41**2 - needed_arithmetic.visible_positions(pairs.lengths)
    heads = config.num_attention_heads * config.head_dim
    computed_though_hidden = config.num_hidden_layers * 3 * 4 * heads * hidden
    assert counter.get_total_flops() - computed_though_hidden == needed_arithmetic.needed_flops(model, pairs.lengths)


def test_a_skeleton_has_the_arithmetic_of_the_model_it_stands_for(base, tokenizer):
    lengths = np.array([(3, 1, 2), (40, 20, 7)])
    wanted = needed_arithmetic.needed_flops(make_model(base, tokenizer), lengths)
    assert needed_arithmetic.needed_flops(needed_arithmetic.skeleton(base), lengths) == wanted
