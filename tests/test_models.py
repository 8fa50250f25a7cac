"""models.py: packed scoring against plain forwards, checkpoints that anyone can load, odd tokenizers, the policy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import data
import models
import train_rm
from data_pipeline import packing, tokenization
from modeling import attention, speedups
from tests.conftest import micro_batches_of
from utils import CheckpointError, UserError

HELLO = [{"role": "user", "content": "Can you tell me something about bread?"}]
DIALOGUES = [
    [*HELLO, {"role": "assistant", "content": "A hot oven gives a crisp crust."}],
    [*HELLO, {"role": "assistant", "content": "Rooks belong on open files, and the king should be safe."}],
]


class PairsFromIds(data.PairDataset):
    """Pairs made of given token ids, without a file."""

    def __init__(self, pairs):
        sequences = [(np.array(c, np.int32), np.array(r, np.int32)) for c, r in pairs]
        prefixes = [tokenization.shared_prefix(c, r) for c, r in sequences]
        self.lengths = np.array([(p, len(c) - p, len(r) - p) for p, (c, r) in zip(prefixes, sequences, strict=True)])
        self.packed_lengths = self.lengths.sum(axis=1)
        packed = [np.concatenate([c, r[p:]]) for p, (c, r) in zip(prefixes, sequences, strict=True)]
        self.parts = [SimpleNamespace(token_ids=np.concatenate(packed))]
        self.sources = np.zeros(len(pairs), np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.packed_lengths)])
        self.label_margins = np.linspace(0, 1, len(pairs), dtype=np.float32)
        self.kinds, self.kind_names = np.zeros(len(pairs), np.int32), [""]


def random_pairs(count, seed=0, vocabulary=1000):
    """Random pairs that share a prefix; the first one's rejected side goes on where its chosen side ends."""
    draw = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        prefix, chosen, rejected = (draw.integers(5, vocabulary, size=draw.integers(3, 20)) for _ in range(3))
        whole = np.concatenate([prefix, chosen])
        pairs.append((whole, np.concatenate([whole if number == 0 else prefix, rejected])))
    return PairsFromIds(pairs)


def plain_rewards(model, pairs):
    """(N, 2): each side alone in a batch of one, through transformers' own forward."""
    rows = []
    for index in range(len(pairs.lengths)):
        sides = [torch.from_numpy(ids.astype(np.int64))[None] for ids in pairs.sequences(index)]
        rows.append(torch.cat([model.hf_model(input_ids=ids).logits[0] for ids in sides]))
    return torch.stack(rows)


def packed_batches(pairs):
    """Two micro-batches of uneven rows: three pairs, two, one, so that rows share and are padded."""
    half = len(pairs.lengths) // 2
    rows = [[0, 1, 2], [3, 4], list(range(5, half))]
    width = max(int(pairs.packed_lengths[[start + i for i in row]].sum()) for start in (0, half) for row in rows) + 3
    return [packing.pack(pairs, np.arange(start, start + half), rows, pad_id=0, width=width) for start in (0, half)]


def separate_batches(pairs):
    return micro_batches_of(pairs, np.arange(len(pairs.lengths)), 200, 32, 0, None)


def rewards_of(model, batches):
    """(N, 2) through `train_rm.score`, in the pairs' own order."""
    order = np.concatenate([batch.indices for batch in batches])
    rewards = torch.cat([train_rm.score(model, batch) for batch in batches])
    return rewards[torch.from_numpy(np.argsort(order))]


def gradients(model, rewards):
    model.zero_grad()
    train_rm.bradley_terry_loss(rewards[:, 0], rewards[:, 1], torch.zeros(len(rewards))).mean().backward()
    return {name: p.grad.clone() for name, p in model.hf_model.named_parameters() if p.grad is not None}


def make_model(base, tokenizer, lora=False, seed=0):
    settings = models.LoraSettings(dropout=0.0) if lora else None
    model = models.RewardModel.create(base, tokenizer, seed, settings)
    if lora:  # fresh adapters change nothing (B = 0), and would hide a mistake
        with torch.no_grad():
            for name, parameter in model.hf_model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def test_pair_mask_is_causal_and_hides_the_other_completion_and_other_pairs():
    # one row: pair 0 = [p c r r], pair 1 = [p c r], then padding
    example_index = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]])
    completion_index = torch.tensor([[0, 1, 2, 2, 0, 1, 2, 0]])
    mask = attention.packed_attention_mask(example_index, completion_index)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("lora", [False, True])
def test_packed_pairs_score_like_separate_sequences(base, tokenizer, lora):
    model = make_model(base, tokenizer, lora).eval()
    pairs = random_pairs(12)
    batches = packed_batches(pairs)
    assert any(len(row_pairs.unique()) > 2 for batch in batches for row_pairs in batch.example_index), (
        "no row holds two pairs"
    )
    assert any((batch.example_index == -1).any() for batch in batches), "nothing is padded"
    assert pairs.lengths[0, 1] == 1, "the first pair's chosen side should be a prefix of its rejected side"
    with torch.no_grad():
        got, wanted = rewards_of(model, packed_batches(pairs)), plain_rewards(model, pairs)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_those_of_separate_sequences(base, tokenizer, lora, checkpointing):
    pairs = random_pairs(12)
    model = make_model(base, tokenizer, lora).train()
    expected = gradients(model, plain_rewards(model, pairs))
    if checkpointing:
        speedups.set_gradient_checkpointing(model)
        assert model.hf_model.is_activation_checkpointing
    got = gradients(model, rewards_of(model, packed_batches(pairs)))
    assert got.keys() == expected.keys() and len(got) > 5
    for name, wanted in expected.items():
        assert (got[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


def test_separate_rows_score_like_packed_ones(base, tokenizer):
    model = make_model(base, tokenizer).eval()
    pairs = random_pairs(12)
    with torch.no_grad():
        separate = rewards_of(model, separate_batches(pairs))
        assert torch.allclose(separate, rewards_of(model, packed_batches(pairs)), atol=1e-6)


def tiny_config(name, **options):
    """A two-layer model of another architecture."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1024}
    return getattr(transformers, f"{name}Config")(**{**sizes, **options})


OTHERS = {
    "Llama": ({"intermediate_size": 64}, True),
    "GPT2": ({"bos_token_id": 0, "eos_token_id": 0}, True),
    "Mistral": ({"intermediate_size": 64, "sliding_window": 16, "num_key_value_heads": 2}, True),
    "Gemma2": ({"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2}, False),  # soft cap: eager only
    "Bloom": ({}, False),  # ALiBi takes positions from the mask
    "Bert": ({"intermediate_size": 64}, False),  # looks both ways, and its head reads [CLS]
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_architectures_score_as_transformers_does(name, tmp_path, tokenizer):
    options, packs = OTHERS[name]
    torch.manual_seed(0)
    config = tiny_config(name, num_labels=1, pad_token_id=tokenizer.pad_token_id, **options)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = models.RewardModel.create(str(tmp_path), tokenizer, seed=0).eval()
    assert model.can_pack == packs, model.why_not
    pairs = random_pairs(12)
    with torch.no_grad():
        got = rewards_of(model, packed_batches(pairs) if model.packs_up_to(60) else separate_batches(pairs))
        assert torch.allclose(got, plain_rewards(model, pairs), atol=1e-5)


def test_a_narrow_sliding_window_is_not_packed(tmp_path, tokenizer):
    config = tiny_config("Mistral", intermediate_size=64, sliding_window=16, num_key_value_heads=2, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = models.RewardModel.create(str(tmp_path), tokenizer, seed=0)
    assert model.packs_up_to(16) and not model.packs_up_to(17)


def test_attention_crossover_length_of_qwen3_06b_is_3840(base, tokenizer):
    # 2 · 15.7 M weights a layer against 4 · width · 16 heads · 128
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, num_labels=1,
    )  # fmt: skip
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    model = models.RewardModel.__new__(models.RewardModel)
    torch.nn.Module.__init__(model)
    model.hf_model, model.attention = classifier, "sdpa"
    assert model.attention_crossover_length() == pytest.approx(3840, rel=0.01)
    model.attention = "flex"  # skips what is not visible
    assert model.attention_crossover_length() == float("inf")


# ---------------------------------------------------------------------------------------------------------------------
# Creating, saving, loading
# ---------------------------------------------------------------------------------------------------------------------


def stock_scores(folder, **options):
    """What anybody gets: transformers' own class and tokenizer on the templated text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    texts = tokenizer.apply_chat_template(DIALOGUES, tokenize=False)
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].tolist()


def test_a_full_checkpoint_opens_with_transformers_and_scores_the_same(base, tokenizer, tmp_path):
    model = make_model(base, tokenizer).eval()
    model.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    assert stock_scores(tmp_path) == pytest.approx(model.score_dialogues(DIALOGUES), abs=1e-6)
    assert models.RewardModel.restore(tmp_path).eval().score_dialogues(DIALOGUES) == model.score_dialogues(DIALOGUES)


def test_a_lora_checkpoint_holds_adapter_and_head_only_and_scores_the_same(base, tokenizer, tmp_path):
    from safetensors import safe_open

    model = make_model(base, tokenizer, lora=True).eval()
    model.save(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all("lora_" in name or "score" in name for name in names) and any("score" in name for name in names)
    assert not (tmp_path / "model.safetensors").exists()
    assert models.RewardModel.restore(tmp_path).eval().score_dialogues(DIALOGUES) == model.score_dialogues(DIALOGUES)
    stock = stock_scores(tmp_path, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    assert stock == pytest.approx(model.score_dialogues(DIALOGUES), abs=1e-6)


def test_a_merged_lora_model_scores_the_same(base, tokenizer, tmp_path):
    model = make_model(base, tokenizer, lora=True).eval()
    before = model.score_dialogues(DIALOGUES)
    model.peft_model.merge_and_unload().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert stock_scores(tmp_path) == pytest.approx(before, abs=1e-5)


def test_a_missing_head_is_refused_and_not_drawn_anew(base, tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    make_model(base, tokenizer).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"score.weight"):
        models.RewardModel.restore(tmp_path)


def test_an_adapter_without_a_head_is_refused(base, tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    make_model(base, tokenizer, lora=True).save(tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "score" not in k}
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="no reward head"):
        models.RewardModel.restore(tmp_path)


def test_the_head_is_drawn_from_the_seed(base, tokenizer):
    heads = [make_model(base, tokenizer, seed=seed).hf_model.score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1 / (128 + 1) ** 0.5, rel=0.3)


def test_a_reward_model_as_base_keeps_its_head(base, tokenizer, tmp_path):
    model = make_model(base, tokenizer, seed=5).eval()
    model.save(tmp_path)
    again = models.RewardModel.create(str(tmp_path), tokenizer, seed=6).eval()
    assert again.score_dialogues(DIALOGUES) == model.score_dialogues(DIALOGUES)


def test_rewards_stay_fp32_under_bf16_autocast(base, tokenizer):
    model = make_model(base, tokenizer).eval()
    exact = rewards_of(model, packed_batches(random_pairs(12))).detach()
    model.autocast_dtype = torch.bfloat16
    rough = rewards_of(model, packed_batches(random_pairs(12))).detach()
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact) and torch.allclose(rough, exact, atol=0.05)
    assert not torch.equal(rough, rough.bfloat16().float()), "rewards were rounded to bf16"


def rounded_lora_model(base, tokenizer):
    """With weights that bf16 holds exactly, as those of a model that was published in it."""
    model = make_model(base, tokenizer, lora=True)
    with torch.no_grad():
        for parameter in model.hf_model.parameters():
            if not parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    return model


def test_frozen_weights_kept_in_bf16_change_no_reward_in_fp32_either(base, tokenizer):
    model, pairs = rounded_lora_model(base, tokenizer).eval(), random_pairs(12)
    exact = rewards_of(model, packed_batches(pairs)).detach()
    model.autocast_dtype = torch.bfloat16
    speedups.cast_frozen_weights(model, torch.bfloat16)
    assert not torch.allclose(rewards_of(model, packed_batches(pairs)), exact, rtol=1e-5)
    with model.in_fp32():
        torch.testing.assert_close(rewards_of(model, packed_batches(pairs)), exact, rtol=1e-6, atol=1e-6)
    assert model.autocast_dtype == torch.bfloat16


def test_frozen_weights_that_bf16_would_round_stay_in_fp32(base, tokenizer):
    model = make_model(base, tokenizer, lora=True)
    speedups.cast_frozen_weights(model, torch.bfloat16)
    assert {p.dtype for p in model.hf_model.parameters()} == {torch.float32}


def test_frozen_weights_kept_in_bf16_change_neither_rewards_nor_gradients(base, tokenizer):
    pairs, found = random_pairs(12), []
    for keep in (False, True):
        model = rounded_lora_model(base, tokenizer).train()
        model.autocast_dtype = torch.bfloat16
        if keep:
            speedups.cast_frozen_weights(model, torch.bfloat16)
            kept = [p for p in model.backbone.parameters() if p.dtype == torch.bfloat16]
            assert len(kept) > 5 and not any(p.requires_grad for p in kept)
        rewards = rewards_of(model, packed_batches(pairs))
        found.append((rewards.detach(), gradients(model, rewards), model.names_in_file(model.state())))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name
    for name, tensor in found[0][2].items():
        assert tensor.dtype == found[1][2][name].dtype and torch.equal(tensor, found[1][2][name]), name


def test_a_wrong_lora_target_lists_the_valid_names(base, tokenizer):
    with pytest.raises(UserError, match=r"q_porj, did you mean 'q_proj'\?(.|\n)*down_proj, gate_proj, k_proj"):
        models.RewardModel.create(base, tokenizer, 0, models.LoraSettings(target_modules=("q_porj",)))


def test_an_adapter_folder_as_base_says_what_to_type(base, tokenizer, tmp_path):
    make_model(base, tokenizer, lora=True).save(tmp_path)
    with pytest.raises(UserError, match="--resume_from"):
        models.RewardModel.create(str(tmp_path), tokenizer, 0)


def test_a_folder_without_weights_is_named(base, tokenizer, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((models.Path(base) / name).read_bytes())
    with pytest.raises(UserError, match="cannot be opened"):
        models.RewardModel.create(str(tmp_path), tokenizer, 0)


def test_a_mistyped_path_suggests_the_nearest_name(base):
    with pytest.raises(UserError, match="did you mean 'model'"):
        models.load_tokenizer(base[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def odd_tokenizer(demo_tokenizer, folder, template, **tokens):
    from transformers import PreTrainedTokenizerFast

    odd = PreTrainedTokenizerFast(tokenizer_object=demo_tokenizer.backend_tokenizer, **tokens)
    odd.chat_template = template
    odd.save_pretrained(folder)
    return models.load_tokenizer(str(folder))


ENDS_IN_EOS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_a_pad_token_that_ends_every_dialogue_is_replaced(base, tokenizer, tmp_path, pad):
    tokens = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", **({"pad_token": pad} if pad else {})}
    odd = odd_tokenizer(tokenizer, tmp_path / "tokenizer", ENDS_IN_EOS, **tokens)
    last = odd.apply_chat_template(DIALOGUES[0], return_dict=False)[-1]
    assert last == odd.eos_token_id != odd.pad_token_id
    model = models.RewardModel.create(base, odd, 0).eval()
    model.save(tmp_path)
    # the stock class reads the rightmost token that is not padding, which must be the last one of the dialogue
    assert stock_scores(tmp_path) == pytest.approx(model.score_dialogues(DIALOGUES), abs=1e-6)
    single = [model.score_dialogues([dialogue])[0] for dialogue in DIALOGUES]
    assert single == pytest.approx(model.score_dialogues(DIALOGUES), abs=1e-6)


def test_a_base_without_template_gets_chatml(tokenizer, tmp_path):
    odd = odd_tokenizer(tokenizer, tmp_path, None, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    text = odd.apply_chat_template(DIALOGUES[0], tokenize=False)
    assert text.startswith("<|im_start|>user\nCan you") and text.endswith("crust.<|im_end|>\n")


@pytest.mark.parametrize("reply", ["Yes: knead it, and wait.", "  Naïve 🙂 ", "\n", "bread", "你好", "1 < 2 & <b>"])
def test_the_rewards_of_a_growing_reply_end_at_the_dialogues_own(base, tokenizer, reply):
    model = models.RewardModel.create(base, tokenizer, 0).eval()
    dialogue = [*DIALOGUES[0][:1], {"role": "assistant", "content": reply}]
    texts, rewards = model.token_rewards(dialogue)
    assert "".join(texts) == f"{reply}<|im_end|>\n" and len(texts) == len(rewards)
    assert rewards[-1] == pytest.approx(model.score_dialogues([dialogue])[0], abs=1e-5)


def test_the_reward_after_a_token_is_that_of_the_sequence_cut_there(base, tokenizer):
    model = models.RewardModel.create(base, tokenizer, 0).eval()
    _, rewards = model.token_rewards(DIALOGUES[0])
    whole = tokenizer.apply_chat_template(DIALOGUES[0], return_dict=False)
    for position in range(len(rewards)):
        cut = torch.tensor([whole[: len(whole) - len(rewards) + position + 1]])
        assert model.score_rows(cut, torch.ones_like(cut)).item() == pytest.approx(rewards[position], abs=1e-5)


def test_no_reward_token_by_token_where_later_tokens_would_change_it(tokenizer, tmp_path):
    config = tiny_config("Bert", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = models.RewardModel.restore(tmp_path).eval()
    with pytest.raises(ValueError, match="no reward token by token"):
        model.token_rewards(DIALOGUES[0])


def test_token_rewards_with_qwens_own_template(real_tokenizer_folder, tmp_path):
    tokenizer = models.load_tokenizer(real_tokenizer_folder)
    sizes = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
    config = tiny_config("Qwen3", num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = models.RewardModel.restore(tmp_path).eval()
    for reply in ("Naïve 🙂, 你好.", "  two spaces", "one\n\ntwo"):
        dialogue = [*DIALOGUES[0][:1], {"role": "assistant", "content": reply}]
        texts, rewards = model.token_rewards(dialogue)
        assert "".join(texts).removesuffix("<|im_end|>\n").strip() == reply.strip()
        assert rewards[-1] == pytest.approx(model.score_dialogues([dialogue])[0], abs=1e-5)


def test_a_sparse_embedding_gradient_ends_as_the_dense_one(base, tokenizer):
    gradients = []
    for is_sparse in (False, True):
        model = models.RewardModel.create(base, tokenizer, seed=0).train()
        weight = model.hf_model.get_input_embeddings().weight
        if is_sparse:
            speedups.use_sparse_embedding_gradients(model)
        for seed in (0, 1):  # two micro-batches, with tokens in common
            ids = torch.randint(5, 60, (3, 20), generator=torch.Generator().manual_seed(seed))
            model.score_rows(ids, torch.ones_like(ids)).sum().backward()
        assert weight.grad.is_sparse == is_sparse
        speedups.densify_embedding_gradient(model)
        gradients.append(weight.grad)
    assert not gradients[1].is_sparse and gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)  # the largest is 16


def test_a_sparse_embedding_gradient_of_many_tokens_becomes_dense_on_the_way(base, tokenizer):
    """It has a row for each token, repeated ones too, and a step may have far more tokens than the vocabulary."""
    model = models.RewardModel.create(base, tokenizer, seed=0).train()
    speedups.use_sparse_embedding_gradients(model)
    weight = model.hf_model.get_input_embeddings().weight
    rows = torch.randint(5, 60, (3, 1, len(weight) // 2), generator=torch.Generator().manual_seed(0))
    for ids, is_sparse in zip(rows, (True, False, False), strict=True):
        model.score_rows(ids, torch.ones_like(ids)).sum().backward()
        assert weight.grad.is_sparse == is_sparse
    bounded = weight.grad
    weight.grad = None
    model.hf_model.get_input_embeddings().sparse = False
    for ids in rows:
        model.score_rows(ids, torch.ones_like(ids)).sum().backward()
    torch.testing.assert_close(bounded, weight.grad, rtol=1e-4, atol=1e-5)


def test_only_a_cpu_has_sparse_embedding_gradients(base, tokenizer, monkeypatch):
    model = models.RewardModel.create(base, tokenizer, seed=0)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    speedups.use_sparse_embedding_gradients(model)
    assert not model.hf_model.get_input_embeddings().sparse


def test_a_frozen_embedding_stays_as_it_is(base, tokenizer):
    model = models.RewardModel.create(base, tokenizer, 0, models.LoraSettings())
    speedups.use_sparse_embedding_gradients(model)
    assert not model.hf_model.get_input_embeddings().sparse
    speedups.densify_embedding_gradient(model)
