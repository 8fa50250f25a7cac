"""RewardModel.compile: the same rewards and gradients, the same files, few compilations."""

import os
import re
import subprocess
import sys

import pytest
import torch

import models
from modeling import speedups
from tests.conftest import ROOT
from tests.test_models import gradients, make_model, packed_batches, random_pairs, rewards_of
from utils import UserError


@pytest.fixture(autouse=True)
def anew(tmp_path_factory):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    """Traced as for inductor, which takes minutes a model here and so is tried once."""
    try:
        speedups.compile_layers(model, backend)
    except UserError as error:
        pytest.skip(f"nothing compiles here: {error}")
    return model


@pytest.mark.parametrize(
    "backend, lora, way, checkpointing",
    [
        ("aot_eager", False, "sdpa", False),
        ("aot_eager", True, "pieces", False),
        ("aot_eager", False, "pieces", True),
        ("inductor", False, "pieces", False),
    ],
)
def test_compiled_rewards_and_gradients_are_the_same(base, tokenizer, tmp_path, backend, lora, way, checkpointing):
    pairs = random_pairs(12)
    model = make_model(base, tokenizer, lora).train()
    model.save(tmp_path / "before")
    names = list(model.names_in_file(model.state()))
    wanted_rewards = rewards_of(model, packed_batches(pairs))
    wanted = gradients(model, wanted_rewards)
    assert model.use_attention(way) == way
    if checkpointing:
        speedups.set_gradient_checkpointing(model)
    compiled(model, backend)
    torch._dynamo.utils.counters.clear()
    rewards = rewards_of(model, packed_batches(pairs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch.testing.assert_close(rewards, wanted_rewards, rtol=2e-6, atol=2e-6)
    for name, gradient in gradients(model, rewards).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name
    model.save(tmp_path / "after")
    assert list(model.names_in_file(model.state())) == names and not any("_orig_mod" in name for name in names)
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name


def test_layers_are_compiled_where_that_works(base, tokenizer):
    pairs, model = random_pairs(12), make_model(base, tokenizer).train()
    wanted = rewards_of(model, packed_batches(pairs))
    assert speedups.try_compiling(model, "aot_eager") == "" and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(rewards_of(model, packed_batches(pairs)), wanted, rtol=2e-6, atol=2e-6)
    assert "forward" in vars(model.backbone.layers[0].mlp)


def test_a_model_with_few_positions_is_not_tried_beyond_them(base, tokenizer):
    model = make_model(base, tokenizer)
    model.text_config.max_position_embeddings = speedups.TRIAL_WIDTH - 1
    assert "positions" in speedups.try_compiling(model, no_backend)


def wrong_backend(graph, inputs):
    return lambda *tensors: [tensor * 2 if tensor.is_floating_point() else tensor for tensor in graph(*tensors)]


def no_backend(graph, inputs):
    raise RuntimeError("no compiler for this card")


@pytest.mark.parametrize(
    "backend, why",
    [(no_backend, "no compiler for this card"), (wrong_backend, "differ by ")],
)
def test_layers_stay_as_they_are_where_compiling_fails(base, tokenizer, backend, why):
    pairs, model = random_pairs(12), make_model(base, tokenizer).train()
    wanted = rewards_of(model, packed_batches(pairs))
    assert re.search(why, speedups.try_compiling(model, backend))
    assert torch.equal(rewards_of(model, packed_batches(pairs)), wanted)


def test_new_shapes_and_further_layers_do_not_compile_again(base, tokenizer):
    model = compiled(make_model(base, tokenizer).train())
    assert model.use_attention("pieces") == "pieces"
    for seed in (0, 1):  # the second shape makes the first one's sizes variable
        gradients(model, rewards_of(model, packed_batches(random_pairs(12, seed))))
    torch._dynamo.utils.counters.clear()
    for seed in (2, 3, 4):
        gradients(model, rewards_of(model, packed_batches(random_pairs(14, seed))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_compiled_dropout_drops_and_is_repeated_by_the_seed_and_by_checkpointing(base, tokenizer):
    pairs, found = random_pairs(12), []
    for checkpointing in (False, True):
        model = models.RewardModel.create(base, tokenizer, 0, models.LoraSettings(dropout=0.5)).train()
        with torch.no_grad():
            for name, parameter in model.hf_model.named_parameters():
                if "lora_B" in name:
                    torch.manual_seed(len(name))
                    parameter.normal_(std=0.05)
        model.use_attention("pieces")
        if checkpointing:
            speedups.set_gradient_checkpointing(model)
        compiled(model)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            rewards = rewards_of(model, packed_batches(pairs))
            found.append((rewards.detach(), gradients(model, rewards)))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
    for plain, checkpointed in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(plain[0], checkpointed[0])
        for name, gradient in plain[1].items():
            torch.testing.assert_close(gradient, checkpointed[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["sdpa", "pieces"])
@pytest.mark.parametrize("lora, checkpointing", [(False, False), (True, True)])
def test_a_last_mlp_at_the_needed_positions_gives_the_same_rewards_and_gradients(
    base, tokenizer, way, lora, checkpointing
):
    pairs, model = random_pairs(12), make_model(base, tokenizer, lora).train()
    assert model.use_attention(way) == way
    if checkpointing:
        speedups.set_gradient_checkpointing(model)
    wanted_rewards = rewards_of(model, packed_batches(pairs))
    wanted = gradients(model, wanted_rewards)
    assert speedups.narrow_last_layer(model) and model.training
    widths, mlp = [], model.backbone.layers[-1].mlp
    mlp.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[:2].numel()))
    rewards = rewards_of(model, packed_batches(pairs))
    assert sum(widths) == 2 * 12
    torch.testing.assert_close(rewards, wanted_rewards, rtol=2e-6, atol=2e-6)
    for name, gradient in gradients(model, rewards).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name
    # separate rows, as the page scores them, still compute everything
    assert model.score_dialogues([[{"role": "user", "content": "Hi"}]])


def test_a_last_layer_of_another_kind_stays_as_it_is(base, tokenizer):
    model = make_model(base, tokenizer)
    layer, wanted = model.backbone.layers[-1], rewards_of(model, packed_batches(random_pairs(12)))
    scaled = type(layer).forward

    def granite(self, hidden_states, **options):  # its results are scaled
        return hidden_states + 0.5 * (scaled(self, hidden_states, **options) - hidden_states)

    layer.forward = granite.__get__(layer)
    assert not speedups.narrow_last_layer(model) and not model.can_narrow
    assert layer.forward == granite.__get__(layer)
    del layer.forward
    layer.extra = torch.nn.Identity()
    assert not speedups.narrow_last_layer(model)
    assert torch.equal(rewards_of(model, packed_batches(random_pairs(12))), wanted)


@pytest.mark.parametrize("dropout, drops", [(0.0, False), (0.05, True)])
def test_checkpointing_keeps_random_states_only_if_something_drops_out(base, tokenizer, dropout, drops):
    model = models.RewardModel.create(base, tokenizer, 0, models.LoraSettings(dropout=dropout)).train()
    assert speedups.drops_out(model) == drops
    model.text_config.attention_dropout = 0.1
    assert speedups.drops_out(model)


def test_a_machine_without_a_compiler_is_told_so(base, tmp_path):
    code = (
        "import models; from modeling import speedups; "
        "speedups.compile_layers(models.RewardModel.create(BASE, models.load_tokenizer(BASE), 0))"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("BASE", repr(base))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "torch.compile does not work here" in done.stderr, done.stderr
    assert "UserError" in done.stderr and "--compile" in done.stderr and "g++" in done.stderr
