"""Open and save tokenizers, pretrained models and LoRA adapters: transformers' own classes, which models.py wraps."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from common import hub
from utils import CheckpointError, UserError, first_line, nearest, read_json

# ChatML, which Qwen uses too: for base models that come without a chat template
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALOGUE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TRY_OFFLINE = "python train_rm.py --demo   (offline), or --model FOLDER with a downloaded model"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685): W + alpha/r · B·A on each of `target_modules`."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


# -- Tokenizer ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub id or folder, with a chat template and a pad token that scoring can rely on."""
    hub.check_path_exists(name, "--model")
    local_only = _is_local_only(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
    except Exception as error:  # see open_model
        raise UserError(
            "the tokenizer cannot be opened",
            where=name,
            found=f"{type(error).__name__}: {first_line(error)}",
            next="a model's folder (for a checkpoint its step-N), or a hub id",
        ) from error
    if not tokenizer.is_fast:
        raise UserError("this model has no fast tokenizer, and slow ones take hours here", where=name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML_TEMPLATE
    if isinstance(tokenizer.chat_template, dict):
        _check_named_templates(tokenizer)
    _choose_pad_token(tokenizer)
    return tokenizer


def _check_named_templates(tokenizer: Any) -> None:
    """Make sure that one of several chat templates is "default", which is used unless a dialogue comes with tools."""
    templates = dict(sorted(tokenizer.chat_template.items()))  # from a folder, they come in the order of its files
    if "default" not in templates:
        raise UserError(
            "the model has several chat templates, and none of them is the default",
            where=tokenizer.name_or_path,
            found=", ".join(templates),
            next="save the one to use as chat_template.jinja in the model's folder",
        )
    tokenizer.chat_template = templates if len(templates) > 1 else templates["default"]


def _choose_pad_token(tokenizer: Any) -> None:
    """Make sure that there is a pad token and that no dialogue rendered by the template ends in it.

    transformers' classification models read the reward at the rightmost token that is not the pad token. If dialogues
    end in <eos> and <eos> is also the pad token, they would read it one token early, unlike this project.
    """
    try:
        last_token = tokenizer.apply_chat_template(DIALOGUE, return_dict=False)[-1]
    except Exception as error:  # a template is a program, and can raise anything
        raise UserError(
            "the model's chat template does not take a plain question and answer",
            where=tokenizer.name_or_path,
            found=f"{type(error).__name__}: {first_line(error)}",
            next="fix its chat_template.jinja, or remove the file to use ChatML",
        ) from error
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token]
    for token in [*special, *tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder]:
        if token is not None and tokenizer.convert_tokens_to_ids(token) != last_token:
            tokenizer.pad_token = token
            return
    raise UserError("this tokenizer has no special token that could serve as padding", where=tokenizer.name_or_path)


# -- Opening and saving ------------------------------------------------------------------------------------------------


def _is_local_only(name: str) -> bool:
    return hub.looks_like_a_path(name) or hub.only_local_copy(name, "model", "--model", TRY_OFFLINE)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the table of missing weights: a new head is always missing, and we check the rest ourselves."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers about gradient checkpointing under a deprecated name
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")
            yield
    finally:
        logging.set_verbosity(before)


def open_model(auto_class: Any, name: str, **options: Any) -> tuple[nn.Module, set[str]]:
    """A transformers model in fp32 and the names of the weights that its files did not hold."""
    if is_adapter(Path(name)):
        raise UserError(
            "--model names a LoRA adapter, and training starts from a whole model",
            where=name,
            next=f"python train_rm.py --resume_from {name}   (to train the adapter on), or name its base model",
        )
    hub.check_path_exists(name, "--model")
    # attention None, whatever the configuration names: sdpa, or eager for architectures without it, which
    # `try_packing` notices
    options |= {"dtype": torch.float32, "attn_implementation": None, "local_files_only": _is_local_only(name)}
    with quiet_transformers():
        try:
            model, info = auto_class.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **options)
        except Exception as error:  # any file in the folder can be wrong, and each library has its own errors
            raise UserError(
                "this model cannot be opened",
                where=name,
                found=f"{type(error).__name__}: {first_line(error)}",
                next="a folder with config.json, model.safetensors and a tokenizer, or a hub id",
            ) from error
    # Weights are memory-mapped from the file, at any alignment, and some matrix products round differently depending on
    # alignment, so a resumed run would differ in the last bit. Memory allocated by torch is always aligned.
    for path, parameter in model.named_parameters():
        parameter.data = parameter.data.clone()
        if not parameter.isfinite().all():
            raise UserError(
                "the model's weights are not all finite numbers", where=name, found=path, next="fetch or make it again"
            )
    return model, set(info["missing_keys"])


def add_lora(model: nn.Module, lora: LoraSettings, task_type: str, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D  # GPT-2's Linear, with the matrix transposed

    modules = ((path.split(".")[-1], module) for path, module in model.named_modules())
    layers = {name: module for name, module in modules if isinstance(module, (nn.Linear, Conv1D))}
    known = sorted(layers.keys() - {"score", "classifier", "lm_head"})
    if wrong := [name for name in lora.target_modules if name not in known]:
        guesses = "".join(nearest(name, known) for name in wrong[:1])
        raise UserError(
            f"--lora_target_modules: this model has no {', '.join(wrong)}{guesses}",
            found=f"it has {', '.join(known)}",
            next="some of these, separated by commas",
        )
    torch.manual_seed(seed)  # the adapters' A matrices are drawn at random
    config = LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in lora.target_modules),
    )
    with quiet_transformers():
        wrapped = get_peft_model(model, config)
    base = Path(wrapped.peft_config["default"].base_model_name_or_path)
    if base.exists():  # stored as an absolute path, it can be opened from any working folder
        wrapped.peft_config["default"].base_model_name_or_path = str(base.absolute())
    return wrapped


def open_adapter(model: nn.Module, folder: Path, base: str) -> nn.Module:
    """PEFT's wrapper around the model that was opened from `base`, with the adapter in `folder`, ready to train on."""
    from peft import PeftModel

    try:
        with quiet_transformers():
            peft_model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    except RuntimeError as error:
        raise CheckpointError(
            "the adapter does not fit its base model", where=folder, found=f"base {base}: {first_line(error)}"
        ) from error
    peft_model.active_peft_config.base_model_name_or_path = base  # where it is now
    return peft_model


def save_weights(folder: Path, model: nn.Module, peft_model: nn.Module | None, state: dict[str, Tensor]) -> None:
    """Write tensors of a model, or with LoRA of its adapter, and the configuration."""
    state = dict(state)  # transformers removes from it what it does not write
    with quiet_transformers():
        if peft_model is None:
            model.save_pretrained(folder, state_dict=state)
        else:
            # "auto" would ask the hub whether the base's vocabulary was resized; ours never is
            peft_model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # an empty model card


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    with quiet_transformers():
        tokenizer.save_pretrained(folder)


def names_in_file(model: nn.Module, peft_model: nn.Module | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names, and in the shapes, in which `save_weights` writes them.

    Of tied tensors one is written, and a mixture's experts, one tensor in memory, are split as in its original files.
    """
    if peft_model is not None:
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(peft_model, state_dict=state, save_embedding_layers=False)
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))


def check_saved(folder: Path, model: nn.Module, peft_model: nn.Module | None, tokenizer: Any) -> None:
    """Raise ValueError unless tokenizer and configuration were saved in a folder as they are in memory."""
    saved = load_tokenizer(str(folder))
    if _templates_by_lines(saved) != _templates_by_lines(tokenizer):
        raise ValueError("the chat templates that were saved are not those in memory")
    ids, saved_ids = (each.apply_chat_template(DIALOGUE, return_dict=False) for each in (tokenizer, saved))
    if (ids, tokenizer.pad_token_id) != (saved_ids, saved.pad_token_id):
        raise ValueError("the tokenizer that was saved does not encode a dialogue as the one in memory does")
    if peft_model is None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if type(config) is not type(model.config) or config.architectures != [type(model).__name__]:
            raise ValueError(f"the configuration that was saved is of {config.architectures}")
        return
    from peft import PeftConfig

    saved_adapter, adapter = PeftConfig.from_pretrained(folder), peft_model.active_peft_config
    for name in ("peft_type", "task_type", "base_model_name_or_path", "r", "target_modules"):
        if getattr(saved_adapter, name) != getattr(adapter, name):
            raise ValueError(f"the adapter's configuration that was saved has another {name}")


def _templates_by_lines(tokenizer: Any) -> dict[str, list[str]]:
    """A tokenizer's chat templates by name; files may end lines in another way, which changes nothing."""
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {"default": templates}
    return {name: text.splitlines() for name, text in named.items()}


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def base_of_adapter(folder: Path) -> str:
    """The hub id or folder of the model that an adapter was trained on."""
    try:
        return read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("the adapter's configuration cannot be read", where=folder, found=error) from error
