"""Open and save pretrained models and LoRA adapters: transformers' own classes, which models.py wraps."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from common import hub
from modeling import tokenizers
from utils import CheckpointError, UserError, counted, first_line, nearest, read_json

ALL_LINEAR = "all-linear"  # PEFT's word


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685): W + alpha/r · B·A on each of `target_modules`."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


# -- Opening and saving ------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A transformers model, and the names of weights that its files lack, or hold in another shape.

    What of its backbone is in the files and has no place in the model is said in a line.
    """

    model: nn.Module
    missing: set[str]
    mismatched: dict[str, tuple[int, ...]]  # with the shape in the file


def open_model(auto_class: Any, name: str, tokenizer: Any, **options: Any) -> Opened:
    """A transformers model in fp32. The tokenizer's pad token becomes one that the model has an embedding for."""
    if is_adapter(Path(name)):
        raise UserError(
            "--model names a LoRA adapter, and training starts from a whole model",
            where=name,
            next=f"--resume_from {name}   (to train the adapter on), or name its base model",
        )
    hub.check_path_exists(name, "--model")
    local_only = tokenizers.is_local_only(name)
    # attention None, whatever the configuration names: sdpa, or eager for architectures without it, which
    # `try_packing` notices
    options |= {"dtype": torch.float32, "attn_implementation": None, "local_files_only": local_only}
    task = "language model" if auto_class is AutoModelForCausalLM else "model for sequence classification"
    with tokenizers.quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
            if type(config) not in auto_class._model_mapping:
                raise UserError(
                    f"transformers has no {task} of this architecture",
                    where=name,
                    found=config.model_type,
                    next="another model, such as one of Qwen, Llama, Mistral, Gemma, Phi or OLMo",
                )
            if rows := getattr(config.get_text_config(), "vocab_size", None):
                tokenizers.fit_to_embedding(tokenizer, rows)
            model, info = auto_class.from_pretrained(
                name, pad_token_id=tokenizer.pad_token_id, output_loading_info=True, trust_remote_code=False, **options
            )
        except UserError:
            raise
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
    if surplus := surplus_weights(model, info["unexpected_keys"]):
        what = f"{counted(len(surplus), 'weight')} of it, such as {surplus[0]},"
        print(f"{name}: {what} are not used, because its config.json has no place for them", flush=True)
    return Opened(model, set(info["missing_keys"]), {key: tuple(shape) for key, shape, _ in info["mismatched_keys"]})


def open_classifier(name: str, tokenizer: Any) -> Opened:
    """A sequence classifier with one label. A head of other labels is not used: it is among the mismatched weights.

    UserError if any other weight has another shape in the file than its configuration says.
    """
    # without the last option transformers raises an error whose details it has silenced
    opened = open_model(AutoModelForSequenceClassification, name, tokenizer, num_labels=1, ignore_mismatched_sizes=True)
    weights = dict(opened.model.named_parameters())
    for path, shape in opened.mismatched.items():
        wanted = tuple(weights[path].shape)
        if is_of_backbone(opened.model, path) or shape[1:] != wanted[1:]:
            raise UserError(
                "a weight of the model has another shape than its config.json says",
                where=name,
                found=f"{path} of {_shape(shape)}, expected {_shape(wanted)}",
                next="the config.json that belongs to these weights",
            )
    return opened


def open_with_new_head(name: str, tokenizer: Any, seed: int, head_scale: float) -> nn.Module:
    """A base model under a head of one label, drawn from `seed` unless the files hold one; see `RewardModel.create`."""
    torch.manual_seed(seed)  # for the heads that transformers draws
    model, missing, mismatched = opened = open_classifier(name, tokenizer)
    if lost := sorted(path for path in missing if is_of_backbone(model, path)):
        raise UserError(
            f"the base model's files lack {len(lost)} of its weights", where=name, found=", ".join(lost[:3])
        )
    if mismatched:
        print(f"{name} has a head with {_labels(opened)} labels: a new one with one label takes its place", flush=True)
    if "score.weight" in missing or "score.weight" in mismatched:
        weight = model.score.weight  # (1, D)
        generator = torch.Generator().manual_seed(seed)
        deviation = head_scale / math.sqrt(weight.shape[1] + 1)
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
    return model


def check_is_reward_model(opened: Opened, folder: Path) -> None:
    """Raise if a saved model is no reward model, or lacks weights: nothing is ever drawn in their place."""
    if opened.mismatched:
        raise UserError(
            f"this is no reward model: its head has {_labels(opened)} labels, and a reward model has one",
            where=folder,
            next="a checkpoint of train_rm.py, or a model for sequence classification with one label",
        )
    if opened.missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(opened.missing)} of the model's weights",
            where=folder,
            found=f"missing: {', '.join(sorted(opened.missing)[:3])}",
            safe="no new weights were drawn in their place",
        )


def _labels(opened: Opened) -> int:
    return max(shape[0] for shape in opened.mismatched.values())


def is_of_backbone(model: nn.Module, path: str) -> bool:
    """Whether a weight is not part of a head. Whatever a head is called, it is outside; poolers belong to heads."""
    return path.startswith(f"{model.base_model_prefix}.") and "pooler" not in path


def surplus_weights(model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Which of the weights that files hold and a model lacks are of its backbone, as a layer too many is."""
    children = tuple(f"{name}." for name, _ in getattr(model, model.base_model_prefix, model).named_children())
    return sorted(path for path in unexpected if is_of_backbone(model, path) or path.startswith(children))


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def add_lora(model: nn.Module, lora: LoraSettings, task_type: str, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D  # GPT-2's Linear, with the matrix transposed

    paths = {path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    layers = {path.split(".")[-1]: module for path, module in paths.items()}
    known = sorted(layers.keys() - {"score", "classifier", "lm_head"})
    targets = list(lora.target_modules)
    if targets == [ALL_LINEAR]:  # whole paths, as PEFT does it, but of no layer inside a head
        targets = [path for path in paths if is_of_backbone(model, path)]
    elif wrong := [name for name in targets if name not in known]:
        guesses = "".join(nearest(name, known) for name in wrong[:1])
        raise UserError(
            f"--lora_target_modules: this model has no {', '.join(wrong)}{guesses}",
            found=f"it has {', '.join(known)}",
            next=f"some of these, separated by commas, or {ALL_LINEAR}",
        )
    torch.manual_seed(seed)  # the adapters' A matrices are drawn at random
    config = LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layers[path.split(".")[-1]], Conv1D) for path in targets),
    )
    with tokenizers.quiet_transformers():
        wrapped = get_peft_model(model, config)
    base = Path(wrapped.peft_config["default"].base_model_name_or_path)
    if base.exists():  # stored as an absolute path, it can be opened from any working folder
        wrapped.peft_config["default"].base_model_name_or_path = str(base.absolute())
    return wrapped


def open_adapter(model: nn.Module, folder: Path, base: str) -> nn.Module:
    """PEFT's wrapper around the model that was opened from `base`, with the adapter in `folder`, ready to train on."""
    from peft import PeftModel

    try:
        with tokenizers.quiet_transformers():
            peft_model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    except RuntimeError as error:
        raise CheckpointError(
            "the adapter does not fit its base model", where=folder, found=f"base {base}: {first_line(error)}"
        ) from error
    peft_model.active_peft_config.base_model_name_or_path = base  # where it is now
    return peft_model


def check_base(folder: Path, name: str, fingerprint: str | None) -> None:
    """CheckpointError if a training's checkpoint remembers another base under its adapter than `name` is now."""
    state = folder / "training_state.json"
    known = read_json(state).get("base_fingerprint") if state.is_file() else None
    if known not in (None, fingerprint):
        what, found = "the adapter was trained on another base model", f"{name} has changed: its weights differ"
        advice = "restore the old base model, or name its new place"
        raise CheckpointError(what, where=folder, found=found, next=advice)


def save_weights(folder: Path, model: nn.Module, peft_model: nn.Module | None, state: dict[str, Tensor]) -> None:
    """Write tensors of a model, or with LoRA of its adapter, and the configuration."""
    state = dict(state)  # transformers removes from it what it does not write
    with tokenizers.quiet_transformers():
        if peft_model is None:
            model.save_pretrained(folder, state_dict=state)
        else:
            # "auto" would ask the hub whether the base's vocabulary was resized; ours never is
            peft_model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # an empty model card


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
    saved = tokenizers.load_tokenizer(str(folder))
    if _templates_by_lines(saved) != _templates_by_lines(tokenizer):
        raise ValueError("the chat templates that were saved are not those in memory")
    ids, saved_ids = (each.apply_chat_template(tokenizers.DIALOGUE, return_dict=False) for each in (tokenizer, saved))
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
