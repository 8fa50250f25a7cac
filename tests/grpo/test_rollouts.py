"""grpo/rollouts.py: rewards are those of the replies' text, shared work changes nothing, all of it is kept."""

import numpy as np
import pytest
import torch

import models
from data_pipeline import demo, dialogues
from data_pipeline.sources import DataSpec
from grpo import rollouts
from grpo.rollouts import Reply, Rollouts, Writer
from modeling.scorer import Scorer, ScoringConfig
from training.distributed import World
from utils import UserError


@pytest.fixture(scope="module")
def scorer(base, tokenizer):
    return Scorer(models.RewardModel.create(base, tokenizer, 0), ScoringConfig())


@pytest.fixture(scope="module")
def prompts(small_dataset, tokenizer):
    return dialogues.load_prompts(DataSpec(small_dataset), tokenizer, 512)[0]


@pytest.fixture(scope="module")
def policy(base, tokenizer):
    policy = models.PolicyModel.create(base, tokenizer=tokenizer)
    policy.use_attention("pieces", backward=False)
    return policy


def writer_of(policy, scorer, prompts, world=None, keys_at_once=10**6):
    return Writer(
        policy, scorer, prompts, world or World(), seed=0, max_new_tokens=12, ends=set(range(0, 1024, 20)),
        keys_at_once=keys_at_once,
    )  # fmt: skip


def test_rewards_of_groups_are_those_of_each_dialogue_alone(scorer):
    questions = [[{"role": "user", "content": text}] for text in ("Hello!", "Is the oven hot? " * 9)]
    texts = [["Yes.", "Yes.", "No, it is not.", ""], ["No.", "Yes, it is.", "Yes, it is hot.", "It"]]
    found = rollouts.score(scorer, questions, texts, [None, None], lambda: None)
    assert found[0, 0] == found[0, 1], "of equal replies exactly, or a group without spread would have advantages"
    for question, group, rewards in zip(questions, texts, found.tolist(), strict=True):
        for text, reward in zip(group, rewards, strict=True):
            dialogue = [*question, {"role": "assistant", "content": text}]
            assert reward == pytest.approx(scorer.model.score_dialogues([dialogue])[0], abs=1e-5)


def test_what_the_reward_model_cannot_read_is_named(base, tokenizer):
    short = Scorer(models.RewardModel.create(base, tokenizer, 0), ScoringConfig(max_length=20))
    question = [[{"role": "user", "content": "Is the oven hot? " * 9}]]
    with pytest.raises(UserError, match=r"too long(.|\n)*--max_new_tokens: it reads 20 tokens"):
        rollouts.score(short, question, [["Yes."]], [None], lambda: None)


def test_waves_and_ranks_write_the_same(policy, scorer, prompts):
    indices = np.array([5, 3, 11, 40, 2])
    whole = writer_of(policy, scorer, prompts).write(indices, 3, 4, lambda: None)
    assert whole.prompts.tolist() == indices.tolist() and whole.rewards.shape == (5, 3)
    waves = writer_of(policy, scorer, prompts, keys_at_once=100).write(indices, 3, 4, lambda: None)
    shares = [
        writer_of(policy, scorer, prompts)._write(indices[rank::2], 3, 4, lambda: None) for rank in range(2)
    ]  # fmt: skip
    ranks = Rollouts.interleaved(indices, shares)
    for other in (waves, ranks):
        assert other.texts == whole.texts and other.messages == whole.messages
        assert [[r.tokens for r in group] for group in other.replies] == [
            [r.tokens for r in group] for group in whole.replies
        ]
        assert torch.allclose(other.rewards, whole.rewards, atol=1e-5)
    again = writer_of(policy, scorer, prompts).write(indices, 3, 5, lambda: None)
    assert again.texts != whole.texts, "another step has other draws"
    assert policy.training, "as it was before"


def test_the_rows_that_are_kept_say_everything_of_each_reply():
    replies = [[Reply([1, 2], [0.0, 0.0], True), Reply([3], [0.0], False)]]
    messages = [[{"role": "user", "content": "question"}]]
    found = Rollouts(np.array([7]), [], messages, replies, [["yes", "no"]], torch.tensor([[1.0, 2.0]]))
    rows = rollouts.kept_rows(3, found, torch.tensor([[0.5, -0.5]]), torch.tensor([[0.25, 0.75]]))
    assert rows == [
        (3, 7, 0, "question", "yes", 1.0, 0.5, 0.25, 2, "by itself", None),
        (3, 7, 1, "question", "no", 2.0, -0.5, 0.75, 1, "at the limit", None),
    ]
    assert rollouts.kept_rows(3, found, None, torch.zeros(1, 2), torch.tensor([[0, 1]]))[1][-5:] == (
        None, 0.0, 1, "at the limit", 1.0,
    )  # fmt: skip


def test_the_demos_rules_are_those_of_its_pairs(demo_folder):
    """Of every pair the chosen reply keeps them and the rejected one breaks them."""
    train, test = demo.make_pairs()
    for pair in train + test:
        for side, keeps in (("chosen", True), ("rejected", False)):
            dialogue = dialogues.parsing.parse_transcript(pair[side])
            assert demo.keeps_rules(dialogue[:-1], dialogue[-1]["content"]) == keeps, dialogue
    assert demo.is_demo(str(demo_folder[1])) and not demo.is_demo(str(demo_folder[0]))
    question = [{"role": "user", "content": "Can you tell me something about bread?"}]
    sentence = "Let the dough rest until it has doubled."
    assert not demo.keeps_rules(question, f"{sentence} {sentence}") and not demo.keeps_rules(question, "")
