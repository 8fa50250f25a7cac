"""fused.py: norms and MLPs give what the architectures' own give, and keep less for the backward pass."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import models
from modeling import fused, speedups, tokenizers
from tests.test_models import gradients, make_model, packed_batches, random_pairs, rewards_of, tiny_config

SIZES = {"intermediate_size": 96, "num_key_value_heads": 2}
FUSED = {
    "Llama": SIZES, "Mistral": SIZES, "Qwen2": SIZES, "Qwen3": SIZES | {"head_dim": 16},
    "Gemma2": None, "Olmo2": None, "GPT2": None,
}  # fmt: skip


def model_of(name, tmp_path, tokenizer, **options):
    torch.manual_seed(0)
    config = tiny_config(name, num_labels=1, pad_token_id=tokenizer.pad_token_id, **options)
    classifier = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for path, weight in classifier.named_parameters():
            if "norm" in path:  # all 1 when new, so that a forgotten weight would not show
                weight.uniform_(0.5, 1.5)
    classifier.save_pretrained(tmp_path)
    return models.RewardModel.create(str(tmp_path), tokenizer, seed=0).train()


@pytest.mark.parametrize("name", [name for name, options in FUSED.items() if options])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rewards_and_gradients_are_those_of_the_architecture(name, checkpointing, tmp_path, tokenizer):
    model, batches = model_of(name, tmp_path, tokenizer, **FUSED[name]), packed_batches(random_pairs(12))
    wanted = rewards_of(model, batches)
    wanted_gradients = gradients(model, wanted)
    assert fused.fuse_layers(model) == model.text_config.num_hidden_layers
    if checkpointing:
        speedups.set_gradient_checkpointing(model)
    got = rewards_of(model, batches)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for path, gradient in gradients(model, got).items():
        other = wanted_gradients[path]
        assert (gradient - other).norm() <= 1e-5 * other.norm() + 1e-9, path


def test_with_adapters_the_frozen_norms_get_no_gradients(base, tokenizer):
    model, batches = make_model(base, tokenizer, True).train(), packed_batches(random_pairs(12))
    wanted = gradients(model, rewards_of(model, batches))
    assert fused.fuse_layers(model)
    got = gradients(model, rewards_of(model, batches))
    assert got.keys() == wanted.keys() and not any("layernorm" in path for path in got)
    for path, gradient in got.items():
        assert (gradient - wanted[path]).norm() <= 1e-5 * wanted[path].norm() + 1e-9, path


def test_dropout_in_trained_adapters_of_an_mlp_does_not_decide_whether_it_is_fused(base, tokenizer):
    """A resumed run, whose adapters have learned, would compute otherwise than the run it goes on with."""
    model = models.RewardModel.create(
        base, tokenizer, 0, models.LoraSettings(target_modules=("up_proj", "down_proj"))
    ).train()
    with torch.no_grad():
        for name, parameter in model.hf_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    assert fused.fuse_layers(model) == model.text_config.num_hidden_layers
    assert all(module.training for module in model.hf_model.modules())


def test_in_bf16_results_are_as_near_to_fp32_as_before(base, tokenizer):
    model, batches = make_model(base, tokenizer).train(), packed_batches(random_pairs(24))
    exact = rewards_of(model, batches).detach()
    model.autocast_dtype = torch.bfloat16
    before = (rewards_of(model, batches).detach() - exact).norm()
    fused.fuse_layers(model)
    after = (rewards_of(model, batches).detach() - exact).norm()
    assert 0 < after < 1.5 * before


@pytest.mark.parametrize("name", [name for name, options in FUSED.items() if not options])
def test_layers_of_another_form_are_left_alone(name, tmp_path, tokenizer):
    options = {} if name == "GPT2" else {"intermediate_size": 64, "num_key_value_heads": 2}
    model = model_of(name, tmp_path, tokenizer, **options)
    before = [module.forward for module in model.backbone.modules()]
    assert fused.fuse_layers(model) == 0
    assert [module.forward for module in model.backbone.modules()] == before


def test_a_norm_that_computes_something_else_is_left_alone(base, tokenizer):
    model = make_model(base, tokenizer)
    layer = model.hf_model.model.layers[0]
    plain = type(layer.input_layernorm).forward
    layer.input_layernorm.forward = lambda x: plain(layer.input_layernorm, x) + 0.01
    assert fused.fuse_layers(model) == len(model.hf_model.model.layers) - 1


def test_less_is_kept_for_the_backward_pass(base, tokenizer):
    def kept_bytes(model):
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            rewards_of(model, packed_batches(random_pairs(24)))
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        return sum(size for address, size in sizes.items() if address not in own)

    model = make_model(base, tokenizer).train()
    model.autocast_dtype = torch.bfloat16
    model.use_attention("pieces")
    before = kept_bytes(model)
    fused.fuse_layers(model)
    assert kept_bytes(model) < 0.75 * before


def test_saved_files_do_not_depend_on_it(base, tokenizer, tmp_path):
    model, batches = make_model(base, tokenizer), packed_batches(random_pairs(12))
    fused.fuse_layers(model)
    model.save(tmp_path)
    plain = models.RewardModel.restore(tmp_path)
    torch.testing.assert_close(rewards_of(model, batches), rewards_of(plain, batches), rtol=1e-5, atol=1e-6)
    assert tokenizers.load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
