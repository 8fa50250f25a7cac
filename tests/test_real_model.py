"""A small pretrained model and real pairs: what random weights of a few layers cannot show.

Marked `real`; they want the model that `make real-model` writes, and the pairs of HH_RLHF_DIR.
"""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import models
from data_pipeline import packing, reading
from grpo import rollouts, sampling
from modeling import log_probs, speedups, tokenizers

pytestmark = pytest.mark.real

STEPS = ["--batch_size", 4, "--grad_accum", 1, "--max_steps", 2, "--eval_num_batches", 1, "--max_length", 512,
         "--no_report", "--bad_rows", "skip"]  # fmt: skip
DIALOGUES = [
    [{"role": "user", "content": "How do I bake bread?"}, {"role": "assistant", "content": reply}]
    for reply in (
        "Mix flour, water, salt and yeast; let it rise, then bake it for half an hour.",
        "No.",
        "Bread? " * 40,
    )
]


@pytest.fixture(scope="module")
def real_pairs(real_data, real_model_folder, tmp_path_factory):
    """A folder of the first 40 training and 20 test pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, count in (("train", 40), ("test", 20)):
        with gzip.open(f"{real_data}/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            (folder / f"{name}.jsonl").write_text("".join(itertools.islice(file, count)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reward_model(real_model_folder):
    model = models.RewardModel.create(real_model_folder, tokenizers.load_tokenizer(real_model_folder), 0).eval()
    assert speedups.narrow_last_layer(model), "its last layer computes what no reward needs"
    return model


@pytest.fixture(scope="module")
def short_pairs(real_pairs, reward_model):
    """The dataset, and the indices of eight of its shorter pairs."""
    train, _ = data.load_pairs(str(real_pairs), reward_model.tokenizer)
    return train, np.sort(np.argsort(train.lengths.sum(axis=1), kind="stable")[:8])


@pytest.fixture
def unpacked(reward_model, short_pairs):
    """(8, 2) rewards of the pairs, each reply in a row of its own."""
    train, indices = short_pairs
    batch = packing.separate(train, indices, reward_model.tokenizer.pad_token_id)
    with torch.no_grad():
        return reward_model(*batch.inputs()).view(-1, 2)


def packed_batches(short_pairs, model):
    train, indices = short_pairs
    plans = packing.plan_step(train, indices, 1024, 8, model.attention_crossover_length())
    return [packing.build(train, plan, model.tokenizer.pad_token_id) for plan in plans]


def packed_rewards(short_pairs, model):
    batches = packed_batches(short_pairs, model)
    rewards = torch.cat([model(*batch.inputs()).view(-1, 2) for batch in batches])
    return rewards[np.argsort(np.concatenate([batch.indices for batch in batches]))]


@pytest.mark.parametrize("attention", ["sdpa", "pieces"])
def test_packed_rows_give_the_rewards_of_separate_ones(reward_model, short_pairs, unpacked, attention):
    assert reward_model.use_attention(attention) == attention
    with torch.no_grad():
        rewards = packed_rewards(short_pairs, reward_model)
    assert (rewards - unpacked).norm() <= 1e-4 * unpacked.norm()


def test_attention_implementations_give_the_same_gradients(reward_model, short_pairs):
    gradients = []
    for attention in ("sdpa", "pieces"):
        reward_model.use_attention(attention)
        rewards = packed_rewards(short_pairs, reward_model)
        weights = [layer.self_attn.k_proj.weight for layer in reward_model.backbone.layers[::10]]
        found = torch.autograd.grad((rewards[:, 0] - rewards[:, 1]).sum(), weights)
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    dense, in_pieces = gradients
    assert (in_pieces - dense).norm() <= 1e-4 * dense.norm()


@pytest.mark.parametrize("lora", [None, models.LoraSettings()], ids=["full", "lora"])
def test_the_fast_attention_is_in_use_in_bf16(real_model_folder, lora):
    """Rounding to bf16 is large here: a trial in bf16 would switch it off."""
    model = models.RewardModel.create(real_model_folder, tokenizers.load_tokenizer(real_model_folder), 0, lora)
    model.autocast_dtype = torch.bfloat16
    assert model.can_pack, model.why_not
    assert model.use_attention("pieces") == "pieces" and model.autocast_dtype == torch.bfloat16


def test_frozen_weights_in_bf16_change_no_reward(real_model_folder, short_pairs):
    model = models.RewardModel.create(
        real_model_folder, tokenizers.load_tokenizer(real_model_folder), 0, models.LoraSettings()
    ).eval()
    model.autocast_dtype = torch.bfloat16
    with torch.no_grad():
        before = packed_rewards(short_pairs, model)
        speedups.cast_frozen_weights(model, torch.bfloat16)
        assert torch.equal(packed_rewards(short_pairs, model), before)


@pytest.mark.parametrize("switches", [[], ["--lora"]], ids=["full", "lora"])
def test_a_resumed_run_is_bitwise_the_straight_one_and_opens_in_transformers(
    run_script, real_model_folder, real_pairs, tmp_path, switches
):
    common = ["--model", real_model_folder, "--dataset", real_pairs, *STEPS, *switches]
    straight = run_script("train_rm.py", *common, "--run_name", "straight", "--save_steps", 1)
    assert straight.returncode == 0, straight.stderr
    assert "attention: sdpa instead" not in straight.stdout and "one sequence per row" not in straight.stdout
    run = tmp_path / "checkpoints/rm/straight"
    again = ["--resume_from", run / "step-1", "--run_name", "resumed"]
    resumed = run_script("train_rm.py", *again)
    assert resumed.returncode == 0, resumed.stderr
    weights = "adapter_model.safetensors" if switches else "model.safetensors"
    for name in (weights, "optimizer.safetensors", "random_state.safetensors"):
        one, other = (tmp_path / f"checkpoints/rm/{which}/step-2/{name}" for which in ("straight", "resumed"))
        assert one.read_bytes() == other.read_bytes(), name

    restored = models.RewardModel.restore(run / "step-2").eval()
    ours = torch.tensor(restored.score_dialogues(DIALOGUES))
    theirs = transformers_rewards(run / "step-2", real_model_folder if switches else None)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def shorter_is_better(real_data, tmp_path_factory):
    """A folder of 48 training and 32 test pairs of short dialogues in which the shorter reply was made the chosen."""
    rows = []
    for _, row in reading.rows_of(Path(real_data) / "train.jsonl.gz"):
        shorter, longer = sorted((row["chosen"], row["rejected"]), key=len)
        if len(longer) < 700 and len(longer) - len(shorter) > 60:
            rows.append(json.dumps({"chosen": shorter, "rejected": longer}) + "\n")
    folder = tmp_path_factory.mktemp("shorter")
    (folder / "train.jsonl").write_text("".join(rows[:48]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(rows[48:80]), encoding="utf-8")
    return folder


def test_the_report_finds_a_length_bias(run_script, real_model_folder, shorter_is_better, tmp_path):
    """A model that learned to prefer the shorter reply is found out: on the pairs, within prompts, and in words."""
    settings = ["--batch_size", 16, "--grad_accum", 1, "--lr", 1e-4, "--run_name", "short"]
    trained = run_script("train_rm.py", "--model", real_model_folder, "--dataset", shorter_is_better, *settings)
    assert trained.returncode == 0, trained.stderr
    report = json.loads((tmp_path / "checkpoints/rm/short/reports/step-3/report.json").read_text())
    (point,) = json.loads((tmp_path / "checkpoints/rm/short/run.json").read_text())["evaluations"]["accuracy"]
    assert (report["right"], report["n"]) == (round(point["value"] * point["count"]), point["count"]), "two counts"
    assert report["accuracy"] >= 0.8
    assert report["length"]["model_prefers_longer"] <= 0.2
    assert report["length"]["within_prompts"]["pearson"] <= -0.3
    assert any("prefers the shorter reply" in line for line in report["findings"]), report["findings"]


def transformers_rewards(folder, base):
    """Rewards of DIALOGUES by transformers alone, or with PEFT for an adapter on `base`."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"num_labels": 1, "dtype": torch.float32, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForSequenceClassification.from_pretrained(base or folder, **options)
    if base:
        model = PeftModel.from_pretrained(model, folder)
    rewards = []
    for dialogue in DIALOGUES:
        ids = tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            rewards.append(model.eval()(**ids).logits[0, 0])
    return torch.stack(rewards)


def test_the_policy_streams_sentences(real_model_folder):
    policy = models.PolicyModel.create(real_model_folder)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    pieces = [piece for (piece,) in policy.stream_candidates(question, 1, max_new_tokens=40, temperature=0)]
    reply = "".join(pieces)
    assert "Paris" in reply and reply.rstrip().endswith("."), reply
    assert sum(bool(piece) for piece in pieces) >= 5, "it came in one piece"


def test_a_policy_samples_and_learns_from_the_probabilities_of_its_own_forward(real_model_folder):
    """Prompts shared, replies compacted, packed rows and the head in tiles, against transformers' plain forward."""
    tokenizer = tokenizers.load_tokenizer(real_model_folder)
    policy = models.PolicyModel.create(real_model_folder, tokenizer=tokenizer).eval()
    log_probs.check_head(policy)
    assert policy.use_attention(backward=False) != "sdpa", "its prompts are shared"
    questions = ["How do I bake bread?", "Name three colours of the rainbow, please, and nothing else."]
    prompts = [
        np.array(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                               return_dict=False))
        for text in questions
    ]  # fmt: skip
    ends = tokenizers.end_ids(real_model_folder, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    replies = sampling.sample_groups(
        policy, prompts, 3, 16, ends, lambda *places: sampling.uniforms(0, 1, *places)
    )  # fmt: skip
    groups = rollouts.Groups([
        [prompt, *(np.array(reply.tokens) for reply in group)] for prompt, group in zip(prompts, replies, strict=True)
    ])  # fmt: skip
    (plan,) = packing.plan_step(groups, np.arange(2), 4096, 64, policy.attention_crossover_length())
    with torch.no_grad():
        packed, _ = policy(*policy.prepared(packing.build(groups, plan, tokenizer.pad_token_id)).inputs())
    packed = iter(packed.split(groups.lengths[plan.indices, 1:].flatten().tolist()))
    for index in plan.indices.tolist():
        for reply in replies[index]:
            ids = torch.from_numpy(np.concatenate([prompts[index], reply.tokens]))[None]
            with torch.no_grad():
                whole = policy.hf_model(input_ids=ids).logits[0].log_softmax(dim=1)
            wanted = whole[len(prompts[index]) - 1 : -1].gather(1, ids[0, len(prompts[index]) :, None])[:, 0]
            assert torch.allclose(next(packed), wanted, atol=1e-4)
            assert reply.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
    said = "".join(tokenizer.decode(reply.tokens).lower() for reply in replies[0])
    assert any(word in said for word in ("bread", "flour", "wheat")), "it answers the question"
