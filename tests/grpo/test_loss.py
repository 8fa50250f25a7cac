"""grpo/loss.py: TRL's loss, gradients and advantages on the same completions; and what TRL does not have."""

import numpy as np
import pytest
import torch

import models
from data_pipeline import packing
from grpo import loss, rollouts
from tests.conftest import random_completions


def test_advantages_are_trls_and_a_group_without_spread_has_none():
    rewards = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) * 3
    rewards[2] = 0.1 + 0.2
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    wanted = {
        "group": centered / (rewards.std(dim=1, keepdim=True) + 1e-4), "batch": centered / (rewards.std() + 1e-4),
        "none": centered,
    }  # fmt: skip
    for scale, exact in wanted.items():
        found, has_spread = loss.advantages(rewards, scale)
        assert torch.allclose(found[[0, 1, 3]], exact[[0, 1, 3]], atol=1e-6)
        assert (found[2] == 0).all() and has_spread.tolist() == [True, True, False, True]


@pytest.mark.parametrize("kind", loss.LOSSES)
def test_loss_and_gradients_are_trls(kind, base, tokenizer, tmp_path):
    """With noise in the old and the reference log-probabilities, so that ratios differ from 1 and some are clipped."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    group, count, longest, kl_coef = 3, 4, 16, 0.05
    dataset = random_completions(count + 1, group, longest=longest)
    dataset.examples, dataset.lengths = dataset.examples[1:], dataset.lengths[1:]  # the first has no prompt
    flat = [completion for _, *completions in dataset.examples for completion in completions]
    draw = torch.Generator().manual_seed(1)
    advantages = torch.randn(count, group, generator=draw)

    policy = models.PolicyModel.create(base, tokenizer=tokenizer).train()
    settings = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=group, num_generations=group, bf16=False, use_cpu=True,
        beta=kl_coef, loss_type=kind, gradient_checkpointing=False, report_to="none", max_completion_length=longest,
        use_bias_correction_kl=True,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": "x"}]}] * 4)
    trainer = GRPOTrainer(
        model=models.PolicyModel.create(base, tokenizer=tokenizer).hf_model, args=settings, train_dataset=prompts,
        reward_funcs=lambda completions, **_: [0.0], processing_class=tokenizer,
    )  # fmt: skip
    theirs = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    def padded(sequences, left):
        width = max(map(len, sequences))
        ids, mask = torch.zeros(len(sequences), width, dtype=torch.int64), torch.zeros(len(sequences), width)
        for row, sequence in enumerate(sequences):
            place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            ids[row, place], mask[row, place] = torch.from_numpy(np.asarray(sequence)), 1
        return ids, mask.long()

    prompt_ids, prompt_mask = padded([example[0] for example in dataset.examples for _ in range(group)], left=True)
    reply_ids, reply_mask = padded(flat, left=False)
    with torch.no_grad():
        now, *_ = trainer._get_per_token_logps_and_entropies(
            theirs, torch.cat([prompt_ids, reply_ids], 1), torch.cat([prompt_mask, reply_mask], 1), reply_ids.shape[1]
        )
    old, reference = (now + 0.3 * torch.randn(now.shape, generator=draw) for _ in range(2))
    wanted = trainer._compute_loss(
        theirs,
        {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": reply_ids,
         "completion_mask": reply_mask, "advantages": advantages.flatten(), "num_items_in_batch": reply_mask.sum(),
         "old_per_token_logps": old, "ref_per_token_logps": reference},
    )  # fmt: skip
    wanted.backward()

    found = 0.0
    weights = loss.token_weights(torch.from_numpy(dataset.lengths[:, 1:]), kind, longest)
    clipped_tokens = 0
    for plan in packing.plan_step(dataset, np.arange(count), 64, 64, policy.attention_crossover_length()):
        logprobs, _ = policy(*policy.prepared(packing.build(dataset, plan, 0)).inputs())
        rows = [int(index) * group + completion for index in plan.indices for completion in range(group)]
        lengths = [len(flat[row]) for row in rows]
        of_old, of_reference = (
            torch.cat([values[row, :length] for row, length in zip(rows, lengths, strict=True)])
            for values in (old, reference)
        )
        repeats = torch.tensor(lengths)
        advantage, weight = (values.flatten()[rows].repeat_interleave(repeats) for values in (advantages, weights))
        losses, clipped = loss.token_loss(logprobs, of_old, of_reference, advantage, 0.2, kl_coef)
        (losses * weight).sum().backward()
        found += float((losses * weight).sum().detach())
        clipped_tokens += int(clipped.sum())
    assert found == pytest.approx(float(wanted), abs=2e-6) and clipped_tokens > 10
    ours = dict(policy.hf_model.named_parameters())
    for name, parameter in theirs.named_parameters():
        difference = (ours[name].grad - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert difference <= 2e-5, (name, difference)


def test_a_completion_that_is_left_out_counts_nothing():
    lengths = torch.tensor([[4, 0], [2, 6]])
    assert loss.token_weights(lengths, "dapo", 8).tolist() == [[pytest.approx(1 / 12), 0], [pytest.approx(1 / 12)] * 2]
    assert loss.token_weights(lengths, "grpo", 8)[0].tolist() == [pytest.approx(1 / 16), 0]
    assert loss.token_weights(lengths, "dr_grpo", 8)[1].tolist() == [pytest.approx(1 / 32)] * 2


def test_a_cut_reply_never_beats_a_finished_one():
    def reply(is_finished):
        return rollouts.Reply([1, 2], [0.0, 0.0], is_finished)

    found = rollouts.Rollouts(
        np.arange(2), [], [], [[reply(True), reply(False)], [reply(True), reply(True)]], [],
        torch.tensor([[1.0, 9.0], [-2.0, 3.0]]),
    )  # fmt: skip
    assert rollouts.judged(found, "lowest").tolist() == [[1.0, -2.0], [-2.0, 3.0]]
    assert rollouts.judged(found, "keep") is found.rewards


def test_repetition_lowers_the_share_of_distinct_runs():
    def share(*tokens):
        return rollouts.distinct_ngrams([[rollouts.Reply(list(tokens))]])

    assert share(1, 2, 3, 4, 5) == 1.0 and share(1, 1, 1, 1, 1) == pytest.approx(1 / 3) and share(1, 2) == 1.0
