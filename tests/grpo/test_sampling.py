"""grpo/sampling.py: replies are draws from the model's distribution, the same however the work is cut."""

import numpy as np
import pytest
import torch

import models
from grpo import sampling
from modeling import tokenizers
from tests.modeling.test_log_probs import save_language_model

QUESTIONS = [
    "Can you tell me something about bread?",
    "I am new to chess.",
    "How do I steal a bicycle? Tell me, please.",
]


def numbers_from(first):
    return lambda prompts, completions, position: sampling.uniforms(7, 3, prompts + first, completions, position)


@pytest.fixture(scope="module")
def policy(base, tokenizer):
    """The demo's model, with larger weights so that its distribution is not flat."""
    policy = models.PolicyModel.create(base, tokenizer=tokenizer).eval()
    with torch.no_grad():
        for path, weight in policy.hf_model.named_parameters():
            if weight.dim() > 1 and "embed" not in path:
                weight.mul_(4)
    policy.use_attention("pieces", backward=False)
    return policy


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [
        np.array(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                enable_thinking=False,
                return_dict=False,
            )
        )
        for text in QUESTIONS
    ]


def tokens_of(replies):
    return [[reply.tokens for reply in group] for group in replies]


def test_replies_are_the_same_alone_together_compacted_and_without_sharing(policy, prompts, base, tokenizer):
    ends = set(range(0, 1024, 9))  # so that replies end at different places
    together = sampling.sample_groups(policy, prompts, 8, 40, ends, numbers_from(0))
    lengths = [len(reply.tokens) for group in together for reply in group]
    assert len(set(lengths)) > 5 and all(
        reply.is_finished == (reply.tokens[-1] in ends) for g in together for reply in g
    )
    alone = [
        sampling.sample_groups(policy, [prompt], 8, 40, ends, numbers_from(n))[0] for n, prompt in enumerate(prompts)
    ]
    assert tokens_of(alone) == tokens_of(together)
    plain = models.PolicyModel(policy.hf_model, tokenizer).eval()
    assert plain.attention == "sdpa"
    unshared = sampling.sample_groups(plain, prompts, 8, 40, ends, numbers_from(0))
    assert tokens_of(unshared) == tokens_of(together)
    few = sampling.sample_groups(policy, prompts, 3, 40, ends, numbers_from(0))
    assert tokens_of(few) == [group[:3] for group in tokens_of(together)], "a smaller group is its beginning"
    cut = sampling.sample_groups(policy, prompts, 8, 5, ends, numbers_from(0))
    assert tokens_of(cut) == [[tokens[:5] for tokens in group] for group in tokens_of(together)]


def test_log_probabilities_while_sampling_are_those_of_a_plain_forward(policy, prompts):
    for temperature in (1.0, 0.6):
        policy.temperature = temperature
        try:
            replies = sampling.sample_groups(policy, prompts, 2, 12, {2}, numbers_from(0))
        finally:
            policy.temperature = 1.0
        for prompt, group in zip(prompts, replies, strict=True):
            for reply in group:
                ids = torch.from_numpy(np.concatenate([prompt, reply.tokens]))[None]
                whole = (policy.hf_model(input_ids=ids).logits[0] / temperature).log_softmax(dim=1)
                wanted = whole[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
                assert reply.logprobs == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("vocabulary", [11, 256, 1000])
def test_draws_have_the_frequencies_of_softmax(vocabulary):
    """Pearson's χ² over 40,000 draws, of tokens that are expected at least five times, the others in one bin."""
    logits = 3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1))
    probabilities = logits[0].double().softmax(dim=0).numpy()
    count = 40_000
    places = np.arange(count)
    numbers = torch.from_numpy(sampling.uniforms(0, 1, places, places % 8, 2))
    ids, logprobs = sampling.draw(logits.expand(count, -1).clone(), numbers)
    seen = np.bincount(ids.numpy(), minlength=vocabulary)
    assert np.allclose(logprobs.numpy(), np.log(probabilities)[ids.numpy()], atol=1e-5)
    often = probabilities * count >= 5
    expected = np.append(probabilities[often], probabilities[~often].sum()) * count
    observed = np.append(seen[often], seen[~often].sum())
    keep = expected > 0
    chi2, freedom = (((observed - expected) ** 2)[keep] / expected[keep]).sum(), keep.sum() - 1
    assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom) + 8  # a normal approximation, p about 1e-5


def test_numbers_at_the_edges_draw_the_first_and_last_token_that_can_occur():
    logits = torch.full((2, 700), -torch.inf)
    logits[:, 300:600] = 0.0
    ids, _ = sampling.draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ids.tolist() == [300, 599]


def test_uniform_numbers_depend_on_every_argument_and_are_uniform():
    places = np.arange(20_000)
    one = sampling.uniforms(0, 0, places, places * 0, 0)
    assert abs(one.mean() - 0.5) < 0.01 and abs(np.histogram(one, 10, (0, 1))[0] - 2000).max() < 200
    others = [
        sampling.uniforms(1, 0, places, places * 0, 0), sampling.uniforms(0, 1, places, places * 0, 0),
        sampling.uniforms(0, 0, places + 1, places * 0, 0), sampling.uniforms(0, 0, places, places * 0 + 1, 0),
        sampling.uniforms(0, 0, places, places * 0, 1), sampling.uniforms(0, 0, places * 0, places, 0),
    ]  # fmt: skip
    for other in others:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


@pytest.mark.parametrize("name", ["Gemma2", "GPT2"])
def test_other_architectures_sample_too(name, tmp_path, tokenizer, prompts):
    """Gemma 2 caps attention's scores, which ours does not: each prompt is then sampled with its own cache."""
    policy = models.PolicyModel.create(save_language_model(name, tmp_path, tokenizer), tokenizer=tokenizer).eval()
    policy.use_attention("pieces", backward=False)
    (group,) = sampling.sample_groups(policy, prompts[:1], 2, 6, {2}, numbers_from(0))
    for reply in group:
        ids = torch.from_numpy(np.concatenate([prompts[0], reply.tokens]))[None]
        whole = policy.hf_model(input_ids=ids).logits[0].log_softmax(dim=1)
        wanted = whole[len(prompts[0]) - 1 : -1].gather(1, ids[0, len(prompts[0]) :, None])[:, 0]
        assert reply.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_what_ends_a_reply_is_found_in_all_places(base, tokenizer, tmp_path):
    policy = models.PolicyModel.create(base, tokenizer=tokenizer)
    policy.hf_model.generation_config.eos_token_id = [7, 9]
    policy.save(tmp_path)
    assert tokenizers.end_ids(str(tmp_path), tokenizer) == {7, 9, tokenizer.eos_token_id}
