"""train_sft.py: the loss of replies alone, exact resuming, and checkpoints that chat and other programs open."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import models
import train_sft
from checkpointing import manifest
from data_pipeline import dialogues, packing
from data_pipeline.sources import DataSpec
from modeling import tokenizers
from tests.training.test_train_rm import same_bytes, scalars
from training import distributed
from utils import StopRequest, UserError

TINY = ["--batch_size", "8", "--grad_accum", "2", "--eval_num_batches", "1", "--save_steps", "0", "--eval_steps", "0",
        "--lr", "1e-2"]  # fmt: skip
FILES = ("model.safetensors", "optimizer.safetensors", "random_state.safetensors")


@pytest.fixture(scope="module")
def replies(small_dataset, tokenizer, base):
    ends = tokenizers.end_ids(base, tokenizer)
    return dialogues.load_dialogues(DataSpec(small_dataset), tokenizer, 512, ends, both=True)[0]


@pytest.mark.parametrize("tokens_per_batch", [10**6, 200])
def test_loss_and_gradient_are_transformers_own_with_prompts_left_out(base, tokenizer, replies, tokens_per_batch):
    indices = np.arange(10)
    ours = models.PolicyModel.create(base, tokenizer=tokenizer).train()
    ours.use_attention("pieces")
    plans = packing.plan_step(replies, indices, tokens_per_batch, 64, ours.attention_crossover_length())
    assert (len(plans) == 1) == (tokens_per_batch == 10**6)
    lengths = train_sft.reply_lengths(replies, plans)
    world = distributed.World()
    batches = ((b, ours.prepared(packing.build(replies, b.plan, 0))) for b in world.assign(plans, is_training=True))
    found = train_sft.accumulate_gradients(world, ours, batches, lengths, StopRequest())

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    total = int(replies.lengths[indices, 1].sum())
    wanted = {}
    for index in indices:
        ids = torch.from_numpy(replies.tokens(index).astype(np.int64))[None]
        labels = ids.clone()
        labels[0, : replies.lengths[index, 0]] = -100
        loss = theirs(input_ids=ids, labels=labels).loss * int(replies.lengths[index, 1])
        (loss / total).backward()
        wanted[int(index)] = float(loss)
    order = np.concatenate([plan.indices for plan in plans]).tolist()
    assert (-found).tolist() == pytest.approx([wanted[index] for index in order], abs=1e-4)
    gradients = dict(ours.hf_model.named_parameters())
    for name, parameter in theirs.named_parameters():
        difference = (gradients[name].grad - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert difference < 2e-5, name


def test_the_interval_of_a_ratio_is_that_of_many_samples():
    """Of 2,000 samples of 40 replies the 95 % interval covers the true ratio about as often as it says."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        lengths = draw.integers(5, 60, size=40)
        losses = lengths * (0.5 + 0.3 * draw.standard_normal(40))
        low, high = train_sft.evaluation_of(losses, lengths).interval
        covered += low <= 0.5 <= high
    assert 0.92 < covered / 2000 < 0.97


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_run_goes_on_bitwise_and_its_checkpoint_opens_as_a_policy(
    base, small_dataset, tmp_path, monkeypatch, capsys, lora
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", base, "--dataset", small_dataset, *TINY, *["--lora"] * lora]
    train_sft.main([*flags, "--run_name", "straight"])
    out = capsys.readouterr().out
    assert "held-out loss" in out and "python chat.py --model" in out
    train_sft.main([*flags, "--run_name", "stopped", "--max_steps", "2"])
    train_sft.main(["--resume_from", "checkpoints/sft/stopped", "--max_steps", "0"])
    straight, stopped = (manifest.find(f"checkpoints/sft/{name}") for name in ("straight", "stopped"))
    assert straight.name == stopped.name == "step-4"
    names = ("adapter_model.safetensors", *FILES[1:]) if lora else FILES
    assert same_bytes(straight, stopped, *names)
    values, _ = scalars(tmp_path / "logs/sft/straight")
    assert values["train/loss"][-1][1] < values["train/loss"][0][1] - 0.05, "it learns"
    assert len(values["train/loss_by_examples"]) == 4 and values["eval/loss"][0][0] == 4
    policy = models.PolicyModel.restore(straight)
    assert policy.hf_model.generation_config.eos_token_id == [policy.tokenizer.eos_token_id] or lora
    assert list(policy.stream_candidates([{"role": "user", "content": "Hi"}], 1, max_new_tokens=3))


def test_the_demo_speaks_in_sentences_of_its_pairs(run_script, tmp_path):
    """A third of its epochs: three in four replies begin with a whole sentence that the pairs hold."""
    from data_pipeline import demo

    result = run_script("train_sft.py", "--demo", "--epochs", 2, "--run_name", "demo", timeout=600)
    assert result.returncode == 0, result.stderr
    policy = models.PolicyModel.restore(manifest.find(str(tmp_path / "checkpoints/sft/demo")))
    known = demo._sentence_kinds()
    questions = [f"Can you tell me something about {topic}?" for topic in demo.TEXTS["topics"]]
    replies = [
        "".join(pieces[0] for pieces in policy.stream_candidates([{"role": "user", "content": text}], 1, temperature=0))
        for text in questions
    ]
    right = sum(any(reply.startswith(sentence) for sentence in known) for reply in replies)
    assert right >= 0.75 * len(replies), replies


def test_data_without_replies_is_refused(base, write_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_rows([{"prompt": f"question {n}"} for n in range(5)])
    with pytest.raises(UserError, match="100% of the rows would be skipped"):
        train_sft.main(["--model", base, "--dataset", str(path)])
    assert not list(Path("checkpoints/sft").glob("*/step-*"))
    assert math.isfinite(train_sft.SupervisedTrainingConfig().lr)
