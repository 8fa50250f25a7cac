"""Open and save tokenizers, pretrained models and LoRA adapters: transformers' own classes, which models.py wraps."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from common import hub
from data_pipeline import tokenization
from utils import CheckpointError, UserError, first_line, nearest, read_json

# For models whose chat template writes today's date, if nothing says which date they were trained with. It is the one
# that Llama's own templates write where they cannot ask for today's.
UNKNOWN_DATE = datetime(2024, 7, 26)
TRY_OFFLINE = "python train_rm.py --demo   (offline), or --model FOLDER with a downloaded model"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685): W + alpha/r · B·A on each of `target_modules`."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


# -- Tokenizer ---------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str, date: datetime | None = None) -> Any:
    """The tokenizer of a hub id or folder, with a chat template and a pad token that scoring can rely on.

    `date` is what a chat template that writes today's date writes from now on, saved copies included; None leaves that
    to the clock, as a conversation wants it.
    """
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
        has_markers = all(
            tokenizer.backend_tokenizer.token_to_id(marker) is not None for marker in ("<|im_start|>", "<|im_end|>")
        )
        tokenizer.chat_template = tokenization.CHATML_TEMPLATE if has_markers else tokenization.PLAIN_TEMPLATE
        chosen = "ChatML" if has_markers else "a plain one, System: … User: … Assistant: …"
        print(f"{name} has no chat template: {chosen} is used", flush=True)
    if date is not None and tokenization.fix_date(tokenizer, date):
        why = ", as nothing says which one it was trained with" if date == UNKNOWN_DATE else ""
        print(f"the chat template writes today's date: fixed at {date:%Y-%m-%d}{why}", flush=True)
    tokenization.take_system_turns(tokenizer)
    _choose_pad_token(tokenizer)
    return tokenizer


def _choose_pad_token(tokenizer: Any) -> None:
    """Make sure that there is a pad token and that no dialogue rendered by the template ends in it.

    transformers' classification models read the reward at the rightmost token that is not the pad token. If dialogues
    end in <eos> and <eos> is also the pad token, they would read it one token early, unlike this project.
    """
    dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        last_token = tokenizer.apply_chat_template(dialogue, return_dict=False)[-1]
    except Exception as error:  # a template is a program, and can raise anything
        raise UserError(
            "the model's chat template does not take a plain question and answer",
            where=tokenizer.name_or_path,
            found=f"{type(error).__name__}: {first_line(error)}",
            next="fix its chat_template.jinja, or remove the file to use one of ours",
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


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def base_of_adapter(folder: Path) -> str:
    """The hub id or folder of the model that an adapter was trained on."""
    try:
        return read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("the adapter's configuration cannot be read", where=folder, found=error) from error
