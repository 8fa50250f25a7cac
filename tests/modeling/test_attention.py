"""attention.py: each way to attend gives what transformers' own attention under the dense mask gives."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import models
from data_pipeline import packing
from modeling import attention, speedups
from tests.conftest import random_completions
from tests.test_models import (
    gradients,
    make_model,
    packed_batches,
    plain_rewards,
    random_pairs,
    rewards_of,
    tiny_config,
)


@pytest.fixture(params=[(4, 2), (16, 4), (attention.TILE_QUERIES, attention.KEY_BLOCK)], ids=str)
def tile_size(request, monkeypatch):
    """Tiles so small that pairs are cut, in the middle of a completion and at its end, and the real size."""
    for name, value in zip(("TILE_QUERIES", "KEY_BLOCK"), request.param, strict=True):
        monkeypatch.setattr(attention, name, value)
    return request.param


def random_ids(seed, rows=3, width=90):
    """(example_index, completion_index) of rows of pairs, some without a prefix, and padding at the end."""
    draw = np.random.default_rng(seed)
    example_index, completion_index = (torch.full((rows, width), value) for value in (-1, 0))
    number = 0
    for row in range(rows):
        column = 0
        while True:
            lengths = [int(draw.integers(0, 20)), int(draw.integers(1, 20)), int(draw.integers(1, 20))]
            if column + sum(lengths) > width:
                break
            example_index[row, column : column + sum(lengths)] = number
            completion_index[row, column : column + sum(lengths)] = torch.repeat_interleave(
                torch.arange(3), torch.tensor(lengths)
            )
            column += sum(lengths)
            number += 1
    assert (example_index == -1).any()
    return example_index, completion_index


def visible_in(tiles, rows, width):
    """The (B, T, T) mask that a list of tiles amounts to; a query in two tiles would fail."""
    mask, seen = torch.zeros(rows, width, width, dtype=torch.bool), torch.zeros(rows, width, dtype=torch.bool)
    for tile in tiles:
        assert not seen[tile.row, tile.queries].any()
        seen[tile.row, tile.queries] = True
        columns = torch.cat([torch.arange(keys.start, keys.stop) for keys in tile.keys])
        queries = torch.arange(tile.queries.start, tile.queries.stop)
        assert not mask[tile.row, queries].any() and len(columns.unique()) == len(columns)
        mask[tile.row, queries[:, None], columns] = tile.mask == 0
    return mask


@pytest.mark.parametrize("seed", range(4))
def test_tiles_show_each_token_what_the_mask_shows_it(tile_size, seed):
    example_index, completion_index = random_ids(seed)
    wanted = attention.packed_attention_mask(example_index, completion_index)[:, 0]
    got = visible_in(attention.make_tiles(example_index, completion_index), *example_index.shape)
    is_padding = example_index == -1
    assert torch.equal(got[~is_padding], wanted[~is_padding])
    assert not (got & is_padding[:, :, None]).any(dim=1)[~is_padding].any(), "padding sees what is none"


def test_long_pairs_are_computed_without_most_of_what_is_hidden():
    # prefix 100, tails of 1,000 each: under the dense mask 2,100² products, needed 100·101/2 + 2·(1,000·100 + 500,500)
    example_index = torch.zeros(1, 2100, dtype=torch.long)
    completion_index = torch.repeat_interleave(torch.arange(3), torch.tensor([100, 1000, 1000]))[None]
    tiles = attention.make_tiles(example_index, completion_index)
    computed = sum((p.queries.stop - p.queries.start) * sum(k.stop - k.start for k in p.keys) for p in tiles)
    needed = attention.packed_attention_mask(example_index, completion_index).sum().item()
    assert needed == 5050 + 2 * 600_500
    assert needed < computed < 1.25 * needed and computed < 0.35 * 2100**2


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiled_attention_and_its_gradients_are_those_of_sdpa(tile_size, heads, key_heads, dtype):
    torch.manual_seed(0)
    example_index, completion_index = random_ids(1)
    rows, width = example_index.shape
    inputs = [torch.randn(rows, width, count, 8).transpose(1, 2) for count in (heads, key_heads, key_heads)]
    counts = (example_index >= 0)[:, None, :, None]
    weight = torch.randn(rows, heads, width, 8) * counts  # padding's results are nobody's
    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    mask = attention.packed_attention_mask(example_index, completion_index)
    wanted = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), exact)
    rough = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    got = attention._TileAttention.apply(*rough, attention.make_tiles(example_index, completion_index), 0.3)
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
    example_index, completion_index = torch.zeros(1, width, dtype=torch.long), torch.zeros(1, width, dtype=torch.long)
    completion_index[:, width // 2 :], completion_index[:, 3 * width // 4 :] = 1, 2
    mask = attention.PackedMask(example_index, completion_index, "pieces")

    def results(dtype, attend):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (query.clone(), key.clone(), value.clone())]
        result = attend(*inputs)
        return [result, *torch.autograd.grad(result, inputs, grad.to(dtype))]

    def exact(query, key, value):
        key, value = (tensor.repeat_interleave(heads // key_heads, dim=1) for tensor in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask.dense)

    def in_tiles(query, key, value):
        return attention._TileAttention.apply(query, key, value, mask.tiles, size**-0.5)

    for got, wanted in zip(results(torch.bfloat16, in_tiles), results(torch.float64, exact), strict=True):
        assert (got.double() - wanted).norm() < 0.008 * wanted.norm()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rewards_and_gradients_are_those_of_separate_sequences(base, tokenizer, lora, checkpointing, tile_size):
    pairs = random_pairs(12)
    model = make_model(base, tokenizer, lora).train()
    expected_rewards = plain_rewards(model, pairs)
    expected = gradients(model, expected_rewards)
    assert model.use_attention("pieces") == "pieces"
    if checkpointing:
        speedups.set_gradient_checkpointing(model)
    rewards = rewards_of(model, packed_batches(pairs))
    torch.testing.assert_close(rewards, expected_rewards, rtol=1e-6, atol=1e-6)
    got = gradients(model, rewards)
    assert got.keys() == expected.keys() and len(got) > 5
    for name, wanted in expected.items():
        assert (got[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


@pytest.fixture(scope="module")
def small_model(base, tokenizer):
    """A model to be scored, with nothing drawn at random while it is."""
    return make_model(base, tokenizer).eval()


@pytest.mark.parametrize("completions", range(1, 17))
def test_any_number_of_completions_has_the_rewards_and_gradients_of_separate_sequences(
    small_model, monkeypatch, completions
):
    for name, value in (("TILE_QUERIES", 16), ("KEY_BLOCK", 4)):
        monkeypatch.setattr(attention, name, value)
    examples = random_completions(5, completions, longest=12)
    weights = torch.randn(5, completions, generator=torch.Generator().manual_seed(0))

    def rewards_and_gradients(rewards):
        small_model.zero_grad()
        (rewards * weights).sum().backward()
        found = {name: p.grad.clone() for name, p in small_model.hf_model.named_parameters() if p.grad is not None}
        return rewards.detach(), found

    sequences = [torch.from_numpy(sequence) for index in range(5) for sequence in examples.sequences(index)]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    plain = small_model.hf_model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0]
    wanted, wanted_gradients = rewards_and_gradients(plain.view(5, completions))

    rows = [[1, 0, 4], [3, 2]]
    width = max(int(examples.lengths[row].sum()) for row in rows) + 3
    batch = packing.pack(examples, np.arange(5), rows, pad_id=0, width=width)
    for implementation in ("sdpa", "pieces"):
        assert small_model.use_attention(implementation) == implementation
        packed = small_model(*batch.inputs())[torch.from_numpy(np.argsort(batch.indices))]
        got, got_gradients = rewards_and_gradients(packed)
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()
        assert got_gradients.keys() == wanted_gradients.keys() and len(got_gradients) > 5
        for name, gradient in wanted_gradients.items():
            assert (got_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_a_tile_skips_the_completions_before_its_own():
    # prompt 128, 8 completions of 256 each: a tile sees the prompt and its own completion's earlier keys
    example_index = torch.zeros(1, 128 + 8 * 256, dtype=torch.long)
    completion_index = torch.repeat_interleave(torch.arange(9), torch.tensor([128] + [256] * 8))[None]
    tiles = attention.make_tiles(example_index, completion_index)
    assert [tile.mask.shape[1] for tile in tiles] == [128] + [256, 384] * 8


def test_queries_of_a_tile_that_see_none_of_its_first_keys_are_right():
    # the fourth last tile: its first queries see 700 keys of one example, its last ones none of those
    lengths = torch.tensor([30, 650, 600, 5, 90, 90])
    example_index = torch.repeat_interleave(torch.tensor([0, 0, 0, 1, 1, 1]), lengths)[None]
    completion_index = torch.repeat_interleave(torch.tensor([0, 1, 2, 0, 1, 2]), lengths)[None]
    mask = attention.PackedMask(example_index, completion_index, "pieces")
    draw = torch.Generator().manual_seed(0)
    shape = (1, 2, example_index.shape[1], 8)
    inputs = [(3 * torch.randn(shape, generator=draw)).requires_grad_() for _ in range(3)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask.dense)
    got = attention._TileAttention.apply(*inputs, mask.tiles, 8**-0.5)
    weight = torch.randn(shape, generator=draw)
    for ours, theirs in zip(
        (got, *torch.autograd.grad(got, inputs, weight)), (wanted, *torch.autograd.grad(wanted, inputs, weight)),
        strict=True,
    ):  # fmt: skip
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


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
    example_index = torch.repeat_interleave(torch.arange(2), 256)[None]
    completion_index = torch.repeat_interleave(torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([100, 100, 56] * 2))[None]
    blocks = attention.PackedMask(example_index, completion_index, "flex").blocks
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
    assert attention.best_implementation(torch.device("mps")) == "sdpa"
    for capability, best in (((7, 5), "sdpa"), ((8, 0), "flex"), ((12, 0), "flex")):  # T4, A100, RTX 50
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert attention.best_implementation(torch.device("cuda")) == best
    assert capsys.readouterr().out == ""


ARCHITECTURES = {
    "Llama": ({"intermediate_size": 64}, "pieces"),
    "GPT2": ({"bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0}, "pieces"),
    "Mistral": ({"intermediate_size": 64, "num_key_value_heads": 1}, "pieces"),
    "Gemma2": ({"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2}, "sdpa"),  # not packed at all
}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_other_architectures_attend_in_tiles_or_say_why_not(name, tmp_path, tokenizer):
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
