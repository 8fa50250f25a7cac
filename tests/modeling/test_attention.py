"""attention.py: each way to attend gives what transformers' own attention under the dense mask gives."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import models
from modeling import attention, speedups
from tests.test_models import (
    gradients,
    make_model,
    packed_batches,
    plain_rewards,
    random_pairs,
    rewards_of,
    tiny_config,
)


@pytest.fixture(params=[(4, 2, 0), (16, 4, 12), (attention.QUERIES, attention.KEYS, attention.MOST_KEPT)], ids=str)
def piece(request, monkeypatch):
    """Pieces so small that pairs are cut, in the middle of a tail and at its end, and the real size."""
    for name, value in zip(("QUERIES", "KEYS", "MOST_KEPT"), request.param, strict=True):
        monkeypatch.setattr(attention, name, value)
    return request.param


def random_ids(seed, rows=3, width=90):
    """(pair_ids, branch_ids) of rows of pairs, some without a prefix, and padding at the end."""
    draw = np.random.default_rng(seed)
    pair_ids, branch_ids = (torch.full((rows, width), value) for value in (-1, 0))
    number = 0
    for row in range(rows):
        column = 0
        while True:
            lengths = [int(draw.integers(0, 20)), int(draw.integers(1, 20)), int(draw.integers(1, 20))]
            if column + sum(lengths) > width:
                break
            pair_ids[row, column : column + sum(lengths)] = number
            branch_ids[row, column : column + sum(lengths)] = torch.repeat_interleave(
                torch.arange(3), torch.tensor(lengths)
            )
            column += sum(lengths)
            number += 1
    assert (pair_ids == -1).any()
    return pair_ids, branch_ids


def visible_in(pieces, rows, width):
    """The (B, T, T) mask that a list of pieces amounts to; a query in two pieces would fail."""
    mask, seen = torch.zeros(rows, width, width, dtype=torch.bool), torch.zeros(rows, width, dtype=torch.bool)
    for piece in pieces:
        assert not seen[piece.row, piece.queries].any()
        seen[piece.row, piece.queries] = True
        columns = torch.cat([torch.arange(keys.start, keys.stop) for keys in piece.keys])
        queries = torch.arange(piece.queries.start, piece.queries.stop)
        assert not mask[piece.row, queries].any() and len(columns.unique()) == len(columns)
        mask[piece.row, queries[:, None], columns] = piece.hidden == 0
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_pieces_show_each_token_what_the_mask_shows_it(piece, seed):
    pair_ids, branch_ids = random_ids(seed)
    wanted = attention.pair_attention_mask(pair_ids, branch_ids)[:, 0]
    got = visible_in(attention.pieces_of(pair_ids, branch_ids), *pair_ids.shape)
    is_padding = pair_ids == -1
    assert torch.equal(got[~is_padding], wanted[~is_padding])
    assert not (got & is_padding[:, :, None]).any(dim=1)[~is_padding].any(), "padding sees what is none"


def test_long_pairs_are_computed_without_most_of_what_is_hidden():
    # prefix 100, tails of 1,000 each: under the dense mask 2,100² products, needed 100·101/2 + 2·(1,000·100 + 500,500)
    pair_ids = torch.zeros(1, 2100, dtype=torch.long)
    branch_ids = torch.repeat_interleave(torch.arange(3), torch.tensor([100, 1000, 1000]))[None]
    pieces = attention.pieces_of(pair_ids, branch_ids)
    computed = sum((p.queries.stop - p.queries.start) * sum(k.stop - k.start for k in p.keys) for p in pieces)
    needed = attention.pair_attention_mask(pair_ids, branch_ids).sum().item()
    assert needed == 5050 + 2 * 600_500
    assert needed < computed < 1.25 * needed and computed < 0.35 * 2100**2


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_piecewise_attention_and_its_gradients_are_those_of_sdpa(piece, heads, key_heads, dtype):
    torch.manual_seed(0)
    pair_ids, branch_ids = random_ids(1)
    rows, width = pair_ids.shape
    inputs = [torch.randn(rows, width, count, 8).transpose(1, 2) for count in (heads, key_heads, key_heads)]
    counts = (pair_ids >= 0)[:, None, :, None]
    weight = torch.randn(rows, heads, width, 8) * counts  # padding's results are nobody's
    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    mask = attention.pair_attention_mask(pair_ids, branch_ids)
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), exact)
    rough = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    got = attention._PieceAttention.apply(*rough, attention.pieces_of(pair_ids, branch_ids), 0.3)
    assert got.dtype == dtype and got.isfinite().all()
    tolerance = 2e-6 if dtype == torch.float32 else 0.02
    got_grads = torch.autograd.grad((got * weight).sum(), rough)
    pairs = [(got * counts, wanted * counts), *zip(got_grads, wanted_grads, strict=True)]
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_bf16_rounds_no_scores(heads=4, key_heads=2, width=512, size=128):
    """Against fp64: attention that rounds its scores, as transformers' eager one does, errs by 1.1 to 1.4 % here."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, count, width, size) for count in (heads, key_heads, key_heads, heads)]
    query, key, value, grad = (torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
    query *= 4  # trained models are sure of where they look
    pair_ids, branch_ids = torch.zeros(1, width, dtype=torch.long), torch.zeros(1, width, dtype=torch.long)
    branch_ids[:, width // 2 :], branch_ids[:, 3 * width // 4 :] = 1, 2
    mask = attention.PackedMask(pair_ids, branch_ids, "pieces")

    def results(dtype, attend):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (query.clone(), key.clone(), value.clone())]
        result = attend(*inputs)
        return [result, *torch.autograd.grad(result, inputs, grad.to(dtype))]

    def exact(query, key, value):
        key, value = (tensor.repeat_interleave(heads // key_heads, dim=1) for tensor in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask.dense)

    def in_pieces(query, key, value):
        return attention._PieceAttention.apply(query, key, value, mask.pieces, size**-0.5)

    for got, wanted in zip(results(torch.bfloat16, in_pieces), results(torch.float64, exact), strict=True):
        assert (got.double() - wanted).norm() < 0.008 * wanted.norm()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rewards_and_gradients_are_those_of_separate_sequences(base, tokenizer, lora, checkpointing, piece):
    pairs = random_pairs(12)
    model = make_model(base, tokenizer, lora).train()
    expected_rewards = plain_rewards(model, pairs)
    expected = gradients(model, expected_rewards)
    assert model.use_attention("pieces") == "pieces"
    if checkpointing:
        speedups.enable_gradient_checkpointing(model)
    rewards = rewards_of(model, packed_batches(pairs))
    torch.testing.assert_close(rewards, expected_rewards, rtol=1e-6, atol=1e-6)
    got = gradients(model, rewards)
    assert got.keys() == expected.keys() and len(got) > 5
    for name, wanted in expected.items():
        assert (got[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_rewards_are_those_of_sdpa(base, tokenizer):
    model, pairs = make_model(base, tokenizer).eval(), random_pairs(12)
    with torch.no_grad():
        wanted = rewards_of(model, packed_batches(pairs))
        assert attention.install(model.hf_model)
        model.attention = "flex"  # a CPU has its forward pass only
        torch.testing.assert_close(rewards_of(model, packed_batches(pairs)), wanted, rtol=1e-5, atol=1e-5)


def test_flex_skips_blocks_in_which_nothing_is_visible():
    # two pairs of 256 tokens in a row: of 4 × 4 blocks, 3 of each pair's 2 × 2
    pair_ids = torch.repeat_interleave(torch.arange(2), 256)[None]
    branch_ids = torch.repeat_interleave(torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([100, 100, 56] * 2))[None]
    blocks = attention.PackedMask(pair_ids, branch_ids, "flex").blocks
    assert blocks.to_dense()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_flex_on_a_cpu_falls_back_with_one_line(base, tokenizer, capsys):
    model, pairs = make_model(base, tokenizer), random_pairs(12)
    before = rewards_of(model, packed_batches(pairs))
    assert model.use_attention("flex") == model.attention == "sdpa"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("attention: sdpa instead of flex: ")
    assert torch.equal(rewards_of(model, packed_batches(pairs)), before)


def test_auto_is_pieces_on_a_few_cpu_threads(base, tokenizer, monkeypatch, capsys):
    model = make_model(base, tokenizer)
    assert model.use_attention("auto") == "pieces"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert model.use_attention() == "sdpa"
    assert attention.way_for(torch.device("cuda")) == "flex" and attention.way_for(torch.device("mps")) == "sdpa"
    assert capsys.readouterr().out == ""


ARCHITECTURES = {
    "Llama": ({"intermediate_size": 64}, "pieces"),
    "GPT2": ({"bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0}, "pieces"),
    "Mistral": ({"intermediate_size": 64, "num_key_value_heads": 1}, "pieces"),
    "Gemma2": ({"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2}, "sdpa"),  # not packed at all
}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_other_architectures_attend_in_pieces_or_say_why_not(name, tmp_path, tokenizer):
    options, used = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = tiny_config(name, num_labels=1, pad_token_id=tokenizer.pad_token_id, **options)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = models.RewardModel.create(str(tmp_path), tokenizer, seed=0).eval()
    assert model.use_attention("pieces") == used
    if model.can_pack:
        pairs = random_pairs(12)
        with torch.no_grad():
            got = rewards_of(model, packed_batches(pairs))
            assert torch.allclose(got, plain_rewards(model, pairs), atol=1e-5)


def test_dropout_of_attention_weights_is_not_lost(tmp_path, tokenizer):
    config = tiny_config("GPT2", bos_token_id=0, eos_token_id=0, attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = models.RewardModel.create(str(tmp_path), tokenizer, seed=0).train()
    pairs, rewards = random_pairs(12), {}
    for way in ("sdpa", "pieces"):
        assert model.use_attention(way) == way
        torch.manual_seed(3)
        rewards[way] = rewards_of(model, packed_batches(pairs)).detach()
    assert torch.equal(rewards["sdpa"], rewards["pieces"])
    assert not torch.allclose(rewards["sdpa"], rewards_of(model.eval(), packed_batches(pairs)), atol=1e-3)


def test_files_do_not_know_how_attention_was_computed(base, tokenizer, tmp_path):
    model = make_model(base, tokenizer)
    model.save(tmp_path / "plain")
    model.use_attention("pieces")
    model.save(tmp_path / "pieces")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "pieces").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes(), name
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "pieces" / "config.json").read_text()))


def test_plain_rows_are_scored_as_before(base, tokenizer):
    from tests.test_models import DIALOGUES

    model = make_model(base, tokenizer).eval()
    before = model.score_dialogues(DIALOGUES)
    model.use_attention("pieces")
    assert model.score_dialogues(DIALOGUES) == before
