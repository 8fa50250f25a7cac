"""rehearsal.py: a save that would fail is reported before the first step, and one that works leaves no trace."""

import errno
import shutil

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, MixtralConfig, MixtralForCausalLM

import models
import train_rm
import utils
from checkpointing import checkpoint, manifest, rehearsal
from modeling import tokenizers
from tests.reward_models import save_with_named_templates
from training.distributed import World

POSITION = checkpoint.TrainingState(1, 8, "data", 64, 4096)


def rehearse(model, folder, config=None):
    rehearsal.rehearse(folder, model, POSITION, {"lr": 1e-3} if config is None else config, {})


def save(model, folder):
    optimizer = torch.optim.AdamW(model.trained_parameters().values())
    state = checkpoint.gather_state(model, optimizer, World())
    return checkpoint.save(folder, model, state, checkpoint.random_state(), POSITION, {"lr": 1e-3})


def mixture(folder, tokenizer):
    """Transformers keeps a mixture's experts as one tensor, and writes each to its file."""
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return models.RewardModel.create(str(folder), tokenizer, 0)


def encoder(folder, tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return models.RewardModel.create(str(folder), tokenizer, 0)


MODELS = {
    "full": lambda base, tokenizer, folder: models.RewardModel.create(base, tokenizer, 0),
    "LoRA": lambda base, tokenizer, folder: models.RewardModel.create(base, tokenizer, 0, models.LoraSettings()),
    "a policy with a tied embedding": lambda base, tokenizer, folder: models.PolicyModel.create(base),
    "a mixture of experts": lambda base, tokenizer, folder: mixture(folder, tokenizer),
    "an encoder": lambda base, tokenizer, folder: encoder(folder, tokenizer),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_rehearsed_can_be_saved_and_opened_and_the_rehearsal_leaves_no_trace(
    kind, base, tokenizer, tmp_path, capfd
):
    model = MODELS[kind](base, tokenizer, tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    capfd.readouterr()
    rehearse(model, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == [] and capfd.readouterr() == ("", "")
    folder = save(model, tmp_path / "run")
    assert manifest.problem(folder) is None
    restored = type(model).restore(folder).state()
    assert before.keys() == restored.keys()
    assert all(torch.equal(before[name], restored[name]) for name in before)


def test_a_rehearsal_writes_the_files_of_a_save_without_its_tensors(base, tokenizer, tmp_path, monkeypatch):
    seen = {}

    def look(folder, *rest):
        seen.update({path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")})
        check(folder, *rest)

    check = rehearsal.check
    monkeypatch.setattr(rehearsal, "check", look)
    for lora in (None, models.LoraSettings()):
        seen.clear()
        model = models.RewardModel.create(base, tokenizer, 0, lora)
        rehearse(model, tmp_path / str(lora))
        folder = save(model, tmp_path / str(lora))
        assert seen.keys() == {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert all(size < 10_000 for name, size in seen.items() if name.endswith(".safetensors")), seen


def test_what_a_killed_rehearsal_left_is_not_in_the_way(base, tokenizer, tmp_path):
    (tmp_path / rehearsal.FOLDER / "half").mkdir(parents=True)
    rehearse(models.RewardModel.create(base, tokenizer, 0), tmp_path)
    assert list(tmp_path.iterdir()) == []


def fail(*arguments, **options):
    raise RuntimeError("no tokenizer of mine\nand a second line")


def test_a_tokenizer_whose_save_fails_is_reported_before_the_first_step(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_rm, "accumulate_gradients", lambda *arguments: pytest.fail("a step was computed"))
    opened = tokenizers.AutoTokenizer.from_pretrained(base)
    monkeypatch.setattr(type(opened), "save_pretrained", fail)
    with pytest.raises(utils.UserError) as caught:
        train_rm.main(["--model", base, "--dataset", small_dataset, "--run_name", "one", "--no_report"])
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "could be saved: the tokenizer cannot be written" in message and f"where:  {base}" in message
    assert "RuntimeError: no tokenizer of mine" in message and "free some space" not in message
    assert not (tmp_path / "checkpoints/rm/one").exists()


def test_a_resumed_training_is_rehearsed_too(base, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--batch_size", "8", "--grad_accum", "1", "--lora", "--eval_num_batches", "1", "--no_report"]
    train_rm.main(["--model", base, "--dataset", small_dataset, "--run_name", "one", "--max_steps", "1", *flags])
    monkeypatch.setattr(train_rm, "accumulate_gradients", lambda *arguments: pytest.fail("a step was computed"))
    monkeypatch.setattr(type(tokenizers.AutoTokenizer.from_pretrained(base)), "save_pretrained", fail)
    with pytest.raises(utils.UserError, match="the tokenizer cannot be written"):
        train_rm.main(["--resume_from", "checkpoints/rm/one", "--max_steps", "2"])
    run = tmp_path / "checkpoints/rm/one"
    assert manifest.problem(run / "step-1") is None and not list(run.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["rag/v2", "../rag"])
def test_a_template_whose_name_cannot_be_a_files_is_reported(base, tmp_path, name):
    model = models.RewardModel.create(base, models.load_tokenizer(base), 0)
    template = model.tokenizer.chat_template
    model.tokenizer.chat_template = {"default": template, name: template}
    with pytest.raises(utils.UserError, match="the tokenizer cannot be written") as caught:
        rehearse(model, tmp_path / "run")
    assert "template name" in str(caught.value) and caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run"]


def test_a_name_that_is_too_long_for_a_file_is_no_full_disk(base, tmp_path):
    model = models.RewardModel.create(base, models.load_tokenizer(base), 0)
    template = model.tokenizer.chat_template
    model.tokenizer.chat_template = {"default": template, "x" * 300: template}
    with pytest.raises(utils.UserError, match=r"the tokenizer cannot be written(.|\n)*name too long") as caught:
        rehearse(model, tmp_path)
    assert caught.value.exit_code == 2 and "space" not in str(caught.value)


def forget_templates(folder):
    shutil.rmtree(folder / "additional_chat_templates")


def encode_otherwise(folder):
    settings = utils.read_json(folder / "tokenizer.json")
    settings["normalizer"] = {"type": "Prepend", "prepend": "!"}
    utils.write_json(folder / "tokenizer.json", settings)


def name_another_architecture(folder):
    utils.write_json(
        folder / "config.json", utils.read_json(folder / "config.json") | {"architectures": ["Qwen3ForCausalLM"]}
    )


def name_another_base(folder):
    path = folder / "adapter_config.json"
    utils.write_json(path, utils.read_json(path) | {"base_model_name_or_path": "somewhere/else"})


@pytest.mark.parametrize(
    "lora, spoil, found",
    [
        (False, forget_templates, "the chat templates that were saved are not those in memory"),
        (False, encode_otherwise, "does not encode a dialogue as the one in memory does"),
        (False, name_another_architecture, r"the configuration that was saved is of \['Qwen3ForCausalLM'\]"),
        (True, name_another_base, "has another base_model_name_or_path"),
    ],
)
def test_what_opens_as_something_else_is_reported(base, tmp_path, monkeypatch, lora, spoil, found):
    folder = str(save_with_named_templates(tmp_path / "base", base))
    tokenizer = models.load_tokenizer(folder)
    model = models.RewardModel.create(folder, tokenizer, 0, models.LoraSettings() if lora else None)
    rehearse(model, tmp_path / "run")
    original = checkpoint.write_manifest

    def spoil_first(folder, step):
        spoil(folder)
        original(folder, step)

    monkeypatch.setattr(checkpoint, "write_manifest", spoil_first)
    with pytest.raises(utils.UserError, match=found):
        rehearse(model, tmp_path / "run")


def test_settings_that_come_back_as_others_are_reported(base, tokenizer, tmp_path):
    model = models.RewardModel.create(base, tokenizer, 0)
    with pytest.raises(utils.UserError, match=r"train_config\.json does not hold what was written"):
        rehearse(model, tmp_path, {"dataset": ("a", "tuple")})
    with pytest.raises(utils.UserError, match=r"the state of the training cannot be written(.|\n)*UnicodeEncodeError"):
        rehearse(model, tmp_path, {"dataset": "a name that is not UTF-8: \udcff"})


@pytest.mark.parametrize(
    "error, advice",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (OSError(errno.EACCES, "Permission denied"), "make the folder writable"),
        (OSError(errno.EFBIG, "File too large"), "raise the limit on file sizes"),
        (OSError(errno.EIO, "Input/output error"), "check the folder and its disk"),
        (OSError(errno.ENOENT, "No such file or directory"), "check the folder and its disk"),
    ],
)
def test_each_error_of_the_system_gets_advice_that_fits(base, tokenizer, tmp_path, monkeypatch, error, advice):
    model = models.RewardModel.create(base, tokenizer, 0)

    def refuse(folder):
        raise error

    monkeypatch.setattr(model, "save_tokenizer", refuse)
    for attempt, what in ((rehearse, "no step of this training could be saved"), (save, "step 1 could not be saved")):
        with pytest.raises(utils.DiskOrNetworkError, match=what) as caught:
            attempt(model, tmp_path / "run")
        message = str(caught.value)
        assert f"next:   {advice}" in message and caught.value.exit_code == 4
        assert ("free" in message) == (error.errno == errno.ENOSPC)
        assert list((tmp_path / "run").iterdir()) == []
