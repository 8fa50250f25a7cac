"""Models in and out: tokenizer, reward model, policy model, LoRA, the pair attention mask.

Nothing here knows where text comes from, what a loss is or how anything is trained: a reward model scores the
positions it is given.

Letters: B rows, T tokens per row, N pairs, D hidden size.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hub
from utils import CheckpointError, UserError, nearest

# For bases without a template of their own: ChatML, the form that Qwen uses.
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRY_OFFLINE = "python train_rm.py --demo   (offline), or --model FOLDER with a downloaded model"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685): W + alpha/r · B·A on each of `target_modules`."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub id or folder, with a chat template and a pad token that scoring can rely on."""
    from transformers import AutoTokenizer

    hub.refuse_missing_path(name, "--model")
    where_to_look = _where_to_look(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where_to_look)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("no tokenizer can be opened there", where=name, found=_first_line(error)) from error
    if not tokenizer.is_fast:
        raise UserError("this model has no fast tokenizer, and slow ones take hours here", where=name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML_TEMPLATE
    _choose_pad_token(tokenizer)
    return tokenizer


def _choose_pad_token(tokenizer: Any) -> None:
    """Make sure that there is a pad token and that no templated dialogue ends in it.

    The stock classification models read the rightmost token that is not the pad token. A template that ends in <eos>
    under a tokenizer that pads with <eos> would be read one token early, there and only there.
    """
    dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    last_token = tokenizer.apply_chat_template(dialogue, return_dict=False)[-1]
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token]
    for token in [*special, *tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder]:
        if token is not None and tokenizer.convert_tokens_to_ids(token) != last_token:
            tokenizer.pad_token = token
            return
    raise UserError("this tokenizer has no special token that could serve as padding", where=tokenizer.name_or_path)


# ---------------------------------------------------------------------------------------------------------------------
# Opening and saving
# ---------------------------------------------------------------------------------------------------------------------


def _where_to_look(name: str) -> dict[str, Any]:
    if hub.looks_like_a_path(name):
        return {"local_files_only": True}
    return {"local_files_only": hub.only_local_copy(name, "model", "--model", TRY_OFFLINE)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the table of missing weights: that a new head is new is what creating means, and we check it ourselves."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers about gradient checkpointing under a name that is on its way out
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")
            yield
    finally:
        logging.set_verbosity(before)


def _open(auto_class: Any, name: str, **options: Any) -> tuple[nn.Module, set[str]]:
    """A transformers model in fp32 and the names of the weights that its files did not hold."""
    if (Path(name) / "adapter_config.json").exists():
        raise UserError(
            "--model names a LoRA adapter, and training starts from a whole model",
            where=name,
            next=f"python train_rm.py --resume_from {name}   (to train the adapter on), or name its base model",
        )
    hub.refuse_missing_path(name, "--model")
    options = {"dtype": torch.float32, "attn_implementation": "sdpa", **_where_to_look(name), **options}
    with _quiet_transformers():
        try:
            model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
        except ValueError as error:
            if "attn_implementation" not in str(error) and "scaled_dot_product_attention" not in str(error):
                raise UserError("this model cannot be opened", where=name, found=_first_line(error)) from error
            options["attn_implementation"] = "eager"  # the architecture has no sdpa; `can_pack` will notice
            model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError("this model cannot be opened", where=name, found=_first_line(error)) from error
        except Exception as error:  # safetensors' own error class has no base but Exception
            if type(error).__name__ != "SafetensorError":
                raise
            raise UserError("this model's weight file is damaged", where=name, found=_first_line(error)) from error
    # Weights read from a file lie in it as it was mapped, at any alignment, and some matrix products round differently
    # by alignment: a resumed run would differ in the last bit. Memory of our own is always aligned.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, set(info["missing_keys"])


def _add_lora(model: nn.Module, lora: LoraSettings, task_type: str, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    known = sorted({path.split(".")[-1] for path, module in model.named_modules() if isinstance(module, nn.Linear)})
    known = [name for name in known if name not in ("score", "classifier", "lm_head")] or _conv1d_names(model)
    if wrong := [name for name in lora.target_modules if name not in known]:
        guesses = "".join(nearest(name, known) for name in wrong[:1])
        raise UserError(
            f"--lora_target_modules: this model has no {', '.join(wrong)}{guesses}", found=f"it has {', '.join(known)}"
        )
    torch.manual_seed(seed)  # the adapters' A matrices are drawn at random
    config = LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        fan_in_fan_out=not any(isinstance(module, nn.Linear) for path, module in model.named_modules() if "." in path),
    )
    with _quiet_transformers():
        wrapped = get_peft_model(model, config)
    base = Path(wrapped.peft_config["default"].base_model_name_or_path)
    if base.exists():  # an absolute path opens from every working folder
        wrapped.peft_config["default"].base_model_name_or_path = str(base.absolute())
    return wrapped


def _conv1d_names(model: nn.Module) -> list[str]:
    """GPT-2 keeps its weights in transformers' Conv1D, which is a Linear with the matrix transposed."""
    return sorted({path.split(".")[-1] for path, module in model.named_modules() if type(module).__name__ == "Conv1D"})


def _save(model: nn.Module, peft_model: nn.Module | None, tokenizer: Any, folder: Path) -> None:
    with _quiet_transformers():
        if peft_model is None:
            model.save_pretrained(folder)
        else:
            # "auto" would ask the hub whether the base's vocabulary was resized; ours never is
            peft_model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # an empty model card
        tokenizer.save_pretrained(folder)


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("the adapter's configuration cannot be read", where=folder, found=error) from error


# ---------------------------------------------------------------------------------------------------------------------
# The reward model
# ---------------------------------------------------------------------------------------------------------------------


def pair_attention_mask(pair_ids: Tensor, branch_ids: Tensor) -> Tensor:
    """Who may look at whom when pairs share rows: causal, same pair, and the key in the prefix or in one's own branch.

    Args:
        pair_ids: (B, T), which pair a token belongs to; -1 is padding (it sees padding only, so no row is empty).
        branch_ids: (B, T), 0 for the shared prefix, 1 and 2 for the two tails.

    Returns:
        (B, 1, T, T), True where the query (third axis) may attend to the key (fourth axis).

    Example, one row `[p c r]` (prefix, chosen tail, rejected tail): c sees p and c; r sees p and r, never c.
    """
    same_pair = pair_ids[:, :, None] == pair_ids[:, None, :]
    key_branch, query_branch = branch_ids[:, None, :], branch_ids[:, :, None]
    visible = (key_branch == 0) | (key_branch == query_branch)
    causal = torch.ones(pair_ids.shape[1], pair_ids.shape[1], dtype=torch.bool, device=pair_ids.device).tril()
    return (same_pair & visible & causal)[:, None]  # (B, 1, T, T)


class RewardModel(nn.Module):
    """A backbone and a scalar head: one reward, in fp32, for each position asked for.

    `create` starts from a base model and draws a new head; `restore` opens a saved reward model and never draws
    anything. Inside is transformers' own sequence-classification class, so that what `save` writes opens anywhere.
    """

    def __init__(self, classifier: nn.Module, tokenizer: Any, peft_model: nn.Module | None = None):
        super().__init__()
        self.classifier, self.tokenizer = classifier, tokenizer
        # Not registered as a submodule: PEFT changed the classifier in place, and its weights must not count twice.
        self.__dict__["peft_model"] = peft_model
        self.autocast_dtype: torch.dtype | None = None
        self.can_pack, self.why_not = self._try_packing()

    @classmethod
    def create(cls, name: str, tokenizer: Any, seed: int, lora: LoraSettings | None = None) -> RewardModel:
        """A base model (hub id or folder) with a new head drawn from `seed`; a reward model's head is kept as it is.

        The head is normal with standard deviation 1/sqrt(D + 1), as in Stiennon et al. 2020 (arXiv 2009.01325).
        """
        from transformers import AutoModelForSequenceClassification

        classifier, missing = _open(
            AutoModelForSequenceClassification, name, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
        head_names = {path for path in missing if path.split(".")[0] in ("score", "classifier", "pooler")}
        if strange := sorted(missing - head_names - {path for path in missing if ".pooler." in path}):
            raise UserError(
                f"the base model's files lack {len(strange)} of its weights", where=name, found=", ".join(strange[:3])
            )
        if len(tokenizer) > classifier.get_input_embeddings().weight.shape[0]:
            raise UserError("the tokenizer has more tokens than the model has embeddings", where=name)
        if "score.weight" in missing:
            weight = classifier.score.weight  # (1, D)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1))
        peft_model = _add_lora(classifier, lora, "SEQ_CLS", seed) if lora else None
        return cls(classifier, tokenizer, peft_model)

    @classmethod
    def restore(cls, folder: Path) -> RewardModel:
        """A saved reward model, full or LoRA. Raises CheckpointError if anything, the head above all, is missing."""
        from transformers import AutoModelForSequenceClassification

        tokenizer = load_tokenizer(str(folder))
        name = _read_adapter_config(folder)["base_model_name_or_path"] if is_adapter(folder) else str(folder)
        classifier, missing = _open(
            AutoModelForSequenceClassification, name, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
        if not is_adapter(folder):
            if missing:
                raise CheckpointError(
                    f"the checkpoint lacks {len(missing)} of the model's weights",
                    where=folder,
                    found=f"missing: {', '.join(sorted(missing)[:3])}",
                    safe="nothing was drawn anew in their place",
                )
            return cls(classifier, tokenizer)
        from peft import PeftModel
        from safetensors import safe_open

        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            if not any("score" in key or "classifier" in key for key in file.keys()):
                raise CheckpointError("the adapter holds no reward head", where=folder, found="only LoRA matrices")
        try:
            with _quiet_transformers():
                peft_model = PeftModel.from_pretrained(classifier, folder, is_trainable=True)
        except RuntimeError as error:
            raise CheckpointError(
                "the adapter does not fit its base model", where=folder, found=f"base {name}: {_first_line(error)}"
            ) from error
        return cls(classifier, tokenizer, peft_model)

    def save(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer; for LoRA the adapter and the head only."""
        _save(self.classifier, self.peft_model, self.tokenizer, folder)

    @property
    def device(self) -> torch.device:
        return next(self.classifier.parameters()).device

    @property
    def backbone(self) -> nn.Module:
        return self.classifier.base_model

    def enable_gradient_checkpointing(self) -> None:
        """Keep one activation per layer and compute the rest again in the backward pass: slower by a third, far smaller."""
        if self.classifier.supports_gradient_checkpointing:
            self.classifier.activation_checkpointing_enable({"use_reentrant": False})

    def score_packed(
        self, input_ids: Tensor, position_ids: Tensor, pair_ids: Tensor, branch_ids: Tensor, ends: Tensor
    ) -> Tensor:
        """Rewards at given positions of rows that hold pairs with a shared prefix.

        Args:
            input_ids, position_ids, pair_ids, branch_ids: (B, T); see `pair_attention_mask`.
            ends: integers of any shape, each a position in the rows laid end to end (row · T + column).

        Returns:
            fp32 rewards of the shape of `ends`.
        """
        with self._autocast():
            mask = pair_attention_mask(pair_ids, branch_ids)  # (B, 1, T, T)
            output = self.backbone(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        return self._head(output.last_hidden_state, ends)

    def score_rows(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """fp32 rewards (B,) of right-padded sequences, one per row, by the architecture's own forward."""
        with self._autocast():
            if not self._has_score_head():
                return self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float()
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        rows, width = input_ids.shape
        last_columns = attention_mask.sum(dim=1) - 1  # (B,)
        ends = torch.arange(rows, device=input_ids.device) * width + last_columns
        return self._head(output.last_hidden_state, ends)

    @torch.no_grad()
    def score_dialogues(self, dialogues: list[list[dict[str, str]]]) -> list[float]:
        """The rewards of whole dialogues (message lists), through the tokenizer's chat template."""
        texts = self.tokenizer.apply_chat_template(dialogues, tokenize=False)
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        rewards = self.score_rows(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device))
        return rewards.tolist()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _has_score_head(self) -> bool:
        return hasattr(self.classifier, "score")

    def _head(self, hidden: Tensor, ends: Tensor) -> Tensor:
        last_hidden = hidden.flatten(0, 1)[ends].float()  # (*ends, D)
        # outside autocast: a reward rounded to bf16 has steps of 0.8 %, and margins are differences of rewards
        with torch.autocast(self.device.type, enabled=False):
            return self.classifier.score(last_hidden).squeeze(-1)

    @torch.no_grad()
    def _try_packing(self) -> tuple[bool, str]:
        """Whether packed rows give this architecture's own rewards: tried on two tiny sequences, not assumed.

        A causal decoder with rotary or learned positions does; encoders, ALiBi, state-space and eager-only models
        do not, and are scored one sequence a row.
        """
        if not self._has_score_head():
            return False, "its head reads more than the last token"
        # [p p p c c r r r] of one pair, and the same as two sequences [p p p c c] and [p p p r r r]
        packed = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
        positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]])
        branches = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
        rows = torch.tensor([[5, 6, 7, 8, 9, 5], [5, 6, 7, 10, 11, 12]])
        row_mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
        was_training = self.training
        self.eval()
        try:
            on = self.device
            got = self.score_packed(
                packed.to(on),
                positions.to(on),
                torch.zeros_like(packed).to(on),
                branches.to(on),
                torch.tensor([4, 7]).to(on),
            )
            wanted = self.score_rows(rows.to(on), row_mask.to(on))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            return False, f"its forward pass refuses packed rows ({_first_line(error)})"
        finally:
            self.train(was_training)
        if torch.allclose(got, wanted, rtol=1e-4, atol=1e-4):
            return True, ""
        return False, "packed rows do not give its own rewards"

    def packs_up_to(self, max_length: int) -> bool:
        """Whether sequences of up to `max_length` tokens may be packed: a sliding window must not be narrower."""
        layer_types = getattr(self._text_config, "layer_types", None)
        has_window = any("full" not in kind for kind in layer_types) if layer_types else True
        window = getattr(self._text_config, "sliding_window", None) if has_window else None
        return self.can_pack and (window is None or max_length <= window)

    def costly_width(self) -> float:
        """The row width at which attention costs as much arithmetic as everything else in a layer.

        Per token and layer: 2 · weights for the matrices, 4 · width · heads · head size for scores and mixing.
        """
        config = self._text_config
        embeddings = self.classifier.get_input_embeddings().weight.numel()
        weights = (sum(p.numel() for p in self.backbone.parameters()) - embeddings) / config.num_hidden_layers
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return weights / (2 * config.num_attention_heads * head_size)

    @property
    def _text_config(self) -> Any:
        return self.classifier.config.get_text_config()


# ---------------------------------------------------------------------------------------------------------------------
# The policy model
# ---------------------------------------------------------------------------------------------------------------------


class PolicyModel(nn.Module):
    """A causal language model that writes replies and says how likely it finds a text."""

    def __init__(self, language_model: nn.Module, tokenizer: Any, peft_model: nn.Module | None = None):
        super().__init__()
        self.language_model, self.tokenizer = language_model, tokenizer
        self.__dict__["peft_model"] = peft_model  # see RewardModel

    @classmethod
    def create(cls, name: str, lora: LoraSettings | None = None, seed: int = 0) -> PolicyModel:
        """The causal LM of a hub id or folder, in fp32, with new adapters if `lora` is given."""
        from transformers import AutoModelForCausalLM

        tokenizer = load_tokenizer(name)
        model, missing = _open(AutoModelForCausalLM, name)
        if missing:
            raise UserError(
                "this is no language model: its files lack weights that writing needs",
                where=name,
                found=f"missing: {', '.join(sorted(missing)[:3])}",
            )
        return cls(model, tokenizer, _add_lora(model, lora, "CAUSAL_LM", seed) if lora else None)

    @classmethod
    def restore(cls, folder: Path) -> PolicyModel:
        """A saved policy: a whole model, or an adapter on its base."""
        if not is_adapter(folder):
            return cls.create(str(folder))
        from peft import PeftModel

        base = cls.create(_read_adapter_config(folder)["base_model_name_or_path"])
        with _quiet_transformers():
            peft_model = PeftModel.from_pretrained(base.language_model, folder, is_trainable=True)
        return cls(base.language_model, load_tokenizer(str(folder)), peft_model)

    def save(self, folder: Path) -> None:
        _save(self.language_model, self.peft_model, self.tokenizer, folder)

    @property
    def device(self) -> torch.device:
        return next(self.language_model.parameters()).device

    def token_logprobs(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """log p(token t+1 | tokens up to t) in fp32, (B, T - 1); 0 where either token is padding."""
        output = self.language_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits = output.logits[:, :-1].float()  # (B, T - 1, vocabulary)
        chosen = logits.gather(2, input_ids[:, 1:, None]).squeeze(2)  # (B, T - 1)
        both_real = attention_mask[:, 1:] * attention_mask[:, :-1]
        return (chosen - logits.logsumexp(dim=2)) * both_real

    def stream(
        self,
        messages: list[dict[str, str]],
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.9,
        enable_thinking: bool = False,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Write the next reply and yield its text piece by piece as it comes.

        `temperature` 0 is greedy. Setting `stop`, or closing the iterator, ends the generation at the next token.
        What goes wrong in the generation is raised here.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        stop = stop or threading.Event()

        class StopWhenAsked(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
                return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

        prompt = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
            return_tensors="pt",
            return_dict=True,
        ).to(self.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                self.language_model.generate(
                    **prompt,
                    **({"do_sample": False} | sampling),
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([StopWhenAsked()]),
                )
            except BaseException as error:  # handed to the reader below; a stream must end, or its reader hangs
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]
