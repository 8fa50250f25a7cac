"""generation.py and PolicyModel: a streamed reply is what the language model generates, one reply or several."""

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import models
from data_pipeline import packing
from modeling import generation, pretrained, tokenizers
from tests.conftest import Completions
from tests.test_models import tiny_config
from utils import CheckpointError, UserError

HELLO = [{"role": "user", "content": "Hello!"}]


def logprobs_of(model, *sequences):
    """The log-probabilities of all tokens of some sequences but the first of each, end to end."""
    examples = Completions([[ids[:1], ids[1:]] for ids in sequences])
    batch = model.prepared(packing.separate(examples, np.arange(len(sequences)), 0))
    with torch.no_grad():
        return model(*batch.inputs())[0]


def test_log_probabilities_are_those_of_the_language_model(base):
    model = models.PolicyModel.create(base).eval()
    logprobs = logprobs_of(model, [5, 6, 7, 8, 9], [10, 11, 12])
    with torch.no_grad():
        both = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[10, 11, 12]])
        losses = [model.hf_model(input_ids=ids, labels=ids).loss for ids in both]
    assert logprobs.shape == (6,) and logprobs.dtype == torch.float32
    assert logprobs[:4].mean().item() == pytest.approx(-losses[0].item(), abs=1e-5)
    assert logprobs[4:].mean().item() == pytest.approx(-losses[1].item(), abs=1e-5)


def test_streamed_pieces_are_the_generated_text(base):
    model = models.PolicyModel.create(base).eval()
    pieces = [text for (text,) in model.stream_candidates(HELLO, 1, max_new_tokens=12, temperature=0)]
    prompt = model.tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
    )
    whole = model.hf_model.generate(**prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)
    new_ids = whole[0, prompt["input_ids"].shape[1] :]
    assert "".join(pieces) == model.tokenizer.decode(new_ids, skip_special_tokens=True)


def test_a_stopped_stream_ends_at_the_next_token(base):
    model = models.PolicyModel.create(base).eval()
    stop = threading.Event()
    stream = model.stream_candidates(HELLO, 1, max_new_tokens=1000, temperature=1.0, stop=stop)
    next(stream)
    stop.set()
    assert len(list(stream)) < 50


def test_a_failing_generation_raises_instead_of_hanging(base, monkeypatch):
    model = models.PolicyModel.create(base).eval()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(model.hf_model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.stream_candidates(HELLO, 1))


def test_an_adapter_that_does_not_fit_its_base_is_explained_for_both_models(base, tokenizer, tmp_path):
    reward_model = models.RewardModel.create(base, tokenizer, 0, pretrained.LoraSettings())
    policy = models.PolicyModel.create(base, pretrained.LoraSettings())
    for name, model in (("policy", policy), ("reward", reward_model)):
        model.save(tmp_path / name)
        path = tmp_path / name / "adapter_model.safetensors"
        weights = load_file(path)
        cut = {key: weight[:, :2].contiguous() if "lora_A" in key else weight for key, weight in weights.items()}
        save_file(cut, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match="the adapter does not fit its base model"):
            type(model).restore(tmp_path / name)


def test_a_policy_with_adapters_comes_back_the_same(base, tmp_path):
    model = models.PolicyModel.create(base, pretrained.LoraSettings(), seed=3)
    with torch.no_grad():
        for name, parameter in model.hf_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval().save(tmp_path)
    again = models.PolicyModel.restore(tmp_path).eval()
    plain = models.PolicyModel.create(base).eval()
    wanted = logprobs_of(model, [5, 6, 7, 8])
    assert torch.equal(logprobs_of(again, [5, 6, 7, 8]), wanted)
    assert not torch.allclose(logprobs_of(plain, [5, 6, 7, 8]), wanted, atol=1e-3)


def test_a_reward_model_is_no_policy(base, tokenizer, tmp_path):
    config = tiny_config("Llama", intermediate_size=64, num_labels=1, tie_word_embeddings=False)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a language model"):
        models.PolicyModel.create(str(tmp_path))


def test_candidates_of_one_batch_grow_together_and_nothing_follows_an_end(base):
    model = models.PolicyModel.create(base).eval()
    torch.manual_seed(0)
    steps = list(model.stream_candidates(HELLO, 4, max_new_tokens=40, temperature=1.0, top_p=1.0))
    assert all(len(pieces) == 4 for pieces in steps) and len(steps) <= 41
    replies = ["".join(pieces) for pieces in zip(*steps, strict=True)]
    torch.manual_seed(0)
    prompt = model.tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
    )
    whole = model.hf_model.generate(
        **prompt, do_sample=True, temperature=1.0, top_p=1.0, num_return_sequences=4, max_new_tokens=40, pad_token_id=0
    )
    new_ids = whole[:, prompt["input_ids"].shape[1] :]
    assert replies == model.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    assert len(set(replies)) == 4


def test_the_text_of_a_candidate_that_ended_does_not_grow_with_the_padding(base):
    tokenizer = tokenizers.load_tokenizer(base)
    end, word = tokenizer.eos_token_id, tokenizer("bread", add_special_tokens=False)["input_ids"]
    decoder = generation.IncrementalDecoder(tokenizer, end)
    assert "".join(decoder.add(token) for token in [*word, end, *word]) + decoder.finish() == "bread"


def test_a_character_of_several_tokens_comes_whole_and_half_a_one_at_the_end(base):
    tokenizer = tokenizers.load_tokenizer(base)
    tokens = tokenizer("a🙂", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 2
    decoder = generation.IncrementalDecoder(tokenizer, None)
    assert [decoder.add(token) for token in tokens] == ["a", *[""] * (len(tokens) - 2), "🙂"] and decoder.finish() == ""
    decoder = generation.IncrementalDecoder(tokenizer, None)
    pieces = [decoder.add(token) for token in tokens[:-1]]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(tokens[:-1])


def test_several_replies_at_temperature_0_are_refused(base):
    model = models.PolicyModel.create(base).eval()
    with pytest.raises(ValueError, match="all be the same one"):
        next(model.stream_candidates(HELLO, 2, temperature=0))
