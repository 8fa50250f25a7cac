"""The reward model, which scores positions.

Nothing here knows where text comes from, what a loss is or how anything is trained: a reward model scores the
positions it is given.

Letters: B rows, T tokens per row, N pairs, D hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling import attention, devices
from modeling.pretrained import (
    LoraSettings,
    add_lora,
    base_of_adapter,
    is_adapter,
    load_tokenizer,
    open_model,
    quiet_transformers,
    save_model,
)
from utils import CheckpointError, UserError, first_line


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The reward model
# ---------------------------------------------------------------------------------------------------------------------


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
        self.attention = "sdpa"  # see `use_attention`
        self.can_pack, self.why_not = self._try_packing()

    @classmethod
    def create(cls, name: str, tokenizer: Any, seed: int, lora: LoraSettings | None = None) -> RewardModel:
        """A base model (hub id or folder) with a new head drawn from `seed`; a reward model's head is kept as it is.

        The head is normal with standard deviation 1/sqrt(D + 1), as in Stiennon et al. 2020 (arXiv 2009.01325).
        """
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)  # for the heads that transformers draws
        classifier, missing = open_model(
            AutoModelForSequenceClassification, name, num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
        # whatever the head is called, it is not part of the backbone; poolers are, and belong to heads
        strange = sorted(
            path for path in missing if path.startswith(f"{classifier.base_model_prefix}.") and "pooler" not in path
        )
        if strange:
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
        peft_model = add_lora(classifier, lora, "SEQ_CLS", seed) if lora else None
        return cls(classifier, tokenizer, peft_model)

    @classmethod
    def restore(cls, folder: Path, base: str | None = None) -> RewardModel:
        """A saved reward model, full or LoRA. Raises CheckpointError if anything, the head above all, is missing.

        `base` is where an adapter's base model lies now, if not where the adapter says.
        """
        from transformers import AutoModelForSequenceClassification

        tokenizer = load_tokenizer(str(folder))
        name = (base or base_of_adapter(folder)) if is_adapter(folder) else str(folder)
        classifier, missing = open_model(
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
            if not any("score" in key or "classifier" in key for key in file.keys()):  # noqa: SIM118
                raise CheckpointError("the adapter holds no reward head", where=folder, found="only LoRA matrices")
        try:
            with quiet_transformers():
                peft_model = PeftModel.from_pretrained(classifier, folder, is_trainable=True)
                peft_model.active_peft_config.base_model_name_or_path = name  # where it lies now
        except RuntimeError as error:
            raise CheckpointError(
                "the adapter does not fit its base model", where=folder, found=f"base {name}: {first_line(error)}"
            ) from error
        return cls(classifier, tokenizer, peft_model)

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write weights (`state()` unless given), configuration and tokenizer; for LoRA adapter and head only."""
        save_model(self.classifier, self.peft_model, self.tokenizer, folder, self.state() if state is None else state)

    def state(self) -> dict[str, Tensor]:
        """What `save` takes: all weights, or with LoRA the adapters and the head."""
        if self.peft_model is None:
            return self.classifier.state_dict()
        tensors = self.peft_model.state_dict()
        return {name: tensor for name, tensor in tensors.items() if "lora_" in name or "modules_to_save" in name}

    def names_in_file(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A `state()` by the names that its tensors have in the file."""
        if self.peft_model is None:
            return state
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.peft_model, state_dict=state, save_embedding_layers=False)

    def base_fingerprint(self) -> str | None:
        """What tells the model under an adapter from another of its shape: a hash over the edges of every weight.

        Of the weights as they are now: before `store_frozen_weights` rounds them.
        """
        if self.peft_model is None:
            return None
        digest = hashlib.sha256()
        for name, weight in self.classifier.named_parameters():
            if not weight.requires_grad and "original_module" not in name:
                edges = torch.cat([weight.flatten()[:16], weight.flatten()[-16:]])
                digest.update(f"{name} {tuple(weight.shape)}".encode() + edges.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        return next(self.classifier.parameters()).device

    @property
    def backbone(self) -> nn.Module:
        return self.classifier.base_model

    def enable_gradient_checkpointing(self) -> None:
        """Keep one activation per layer and compute the rest again in the backward pass: slower by a third, smaller."""
        if self.classifier.supports_gradient_checkpointing:
            self.classifier.activation_checkpointing_enable({"use_reentrant": False})

    def forward(self, *tensors: Tensor) -> Tensor:
        """`score_packed` of five tensors, `score_rows` of two: what DDP and FSDP hook into."""
        rewards = self.score_packed(*tensors) if len(tensors) == 5 else self.score_rows(*tensors)
        return rewards.clone()  # a view would lose FSDP's hook

    def use_sparse_embedding_gradients(self) -> None:
        """Have the embedding's gradient list the tokens that were there, until `dense_embedding_gradient` ends a step.

        A dense one of Qwen3's 151,936 rows would be filled with zeros and added up in every micro-batch, in which a few
        thousand rows are met. DDP and FSDP add up dense ones only.
        """
        embeddings = self.classifier.get_input_embeddings()
        if type(embeddings) is nn.Embedding and embeddings.weight.requires_grad and embeddings.max_norm is None:
            embeddings.sparse = True

    @torch.no_grad()
    def dense_embedding_gradient(self) -> None:
        """Turn a sparse gradient of the embedding into the one that clipping and AdamW want."""
        weight = self.classifier.get_input_embeddings().weight
        if weight.grad is not None and weight.grad.is_sparse:
            if weight.device.type == "cpu":
                devices.trim_heap_if_scarce()  # activations are gone, but their room is held while this takes its own
            # coalescing sorts, so the order of summation, and with it the last bit, is always the same
            weight.grad = weight.grad.coalesce().to_dense()

    def use_attention(self, choice: str = "auto") -> str:
        """How packed rows attend from now on, where the model is now: one of attention.WAYS, or "auto" for what pays.

        Tried on two tiny sequences, forward and backward, before it is relied on; if that fails, a line says why and it
        is sdpa. Files that are saved do not know of it. Returns what is used.
        """
        way = attention.way_for(self.device) if choice == "auto" else choice
        self.attention = "sdpa"
        if way == "sdpa" or not self.can_pack:
            return self.attention
        if not attention.install(self.classifier):
            works, why_not = False, "the architecture computes attention in its own way"
        else:
            self.attention = way
            works, why_not = self._try_packing(backward=True)
        if not works:
            self.attention = "sdpa"
            print(f"attention: sdpa, and not {way}: {why_not}", flush=True)
        return self.attention

    @torch.no_grad()
    def store_frozen_weights(self, dtype: torch.dtype) -> None:
        """Keep the matrices that LoRA leaves alone in autocast's dtype, instead of casting them in every forward.

        Autocast rounds them anyway, so rewards and gradients are the very same, for less time and memory. It keeps its
        own casts only of weights that need gradients. Afterwards the model cannot compute without autocast.
        """
        for module in self.backbone.modules():
            if isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters(recurse=False)):
                module.to(dtype)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the parts of each decoder layer, in place: names of weights stay, one layer's code serves all.

        The parts and not the layers, because under gradient checkpointing a layer is compiled whole or not at all,
        and our attention is not. Shapes are `dynamic`, or every width would compile anew. Raises UserError where one
        line cannot be compiled: inductor needs a C++ compiler on a CPU, Triton a C compiler on CUDA.
        """
        try:
            torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(8, device=self.device))
        except Exception as error:  # the compilers' and dynamo's errors have no common class
            raise UserError(
                "torch.compile does not work here",
                where=f"{platform.system()}, {self.device}",
                found=f"{type(error).__name__}: {first_line(error)}",
                safe="nothing was trained yet, and without compiling everything works",
                next="leave --compile out, or install a compiler (Debian: apt install g++)",
            ) from error
        kinds = self.classifier._no_split_modules or ()
        layers = [module for module in self.backbone.modules() if type(module).__name__ in kinds]
        if not layers:
            raise UserError("this architecture does not say what its layers are, so none can be compiled")
        for part in (part for layer in layers for part in layer.children()):
            # not `part.compile()`: all modules' calls are one function, whose compiled forms are limited in number
            part.forward = torch.compile(part.forward, dynamic=True, backend=backend)

    def score_packed(
        self, input_ids: Tensor, position_ids: Tensor, pair_ids: Tensor, branch_ids: Tensor, ends: Tensor
    ) -> Tensor:
        """Rewards at given positions of rows that hold pairs with a shared prefix.

        Args:
            input_ids, position_ids, pair_ids, branch_ids: (B, T); see `attention.pair_attention_mask`.
            ends: integers of any shape, each a position in the rows laid end to end (row · T + column).

        Returns:
            fp32 rewards of the shape of `ends`.
        """
        with self._autocast():
            packed = attention.PackedMask(pair_ids, branch_ids, self.attention)
            mask = packed.dense if self.attention == "sdpa" else packed.carrier()
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

    @torch.no_grad()
    def token_rewards(self, dialogue: list[dict[str, str]]) -> tuple[list[str], list[float]]:
        """The reward as the last message grows: the text of each of its tokens, and the fp32 reward after it.

        The last reward is the dialogue's own; those before it are what the head says of an unfinished reply, which
        training never looks at. Raises ValueError for an architecture whose earlier rewards depend on later tokens.
        """
        if not self.can_pack:
            raise ValueError(f"no reward token by token: {self.why_not}")
        text = self.tokenizer.apply_chat_template(dialogue, tokenize=False)
        # a reply that differs from the first letter on shows where the template puts the last message
        other = "\ue001" if dialogue[-1]["content"].lstrip().startswith("\ue000") else "\ue000"
        another = self.tokenizer.apply_chat_template(
            [*dialogue[:-1], dialogue[-1] | {"content": other}], tokenize=False
        )
        start = next(place for place, (a, b) in enumerate(zip(text, another, strict=False)) if a != b)
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        first = next(index for index, (_, end) in enumerate(encoding.offsets) if end > start)
        ids = torch.tensor([encoding.ids], device=self.device)  # (1, T)
        with self._autocast():
            output = self.backbone(input_ids=ids, attention_mask=torch.ones_like(ids))
        rewards = self._head(output.last_hidden_state, torch.arange(first, ids.shape[1], device=self.device))
        shown, texts = start, []
        for _, end in encoding.offsets[first:]:  # the tokens of one character all name its place
            texts.append(text[shown:end])
            shown = max(shown, end)
        return texts, rewards.tolist()

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

    def _try_packing(self, backward: bool = False) -> tuple[bool, str]:
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
        on, was_training = self.device, self.training
        trained = [parameter for parameter in self.classifier.parameters() if parameter.requires_grad]
        tolerance = 1e-4 if self.autocast_dtype is None else 0.05
        self.eval()
        try:
            with torch.set_grad_enabled(backward):
                got = self.score_packed(
                    packed.to(on),
                    positions.to(on),
                    torch.zeros_like(packed).to(on),
                    branches.to(on),
                    torch.tensor([4, 7]).to(on),
                )
            with torch.no_grad():
                wanted = self.score_rows(rows.to(on), row_mask.to(on))
            if backward:
                torch.autograd.grad(got.sum(), trained, allow_unused=True)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            return False, f"its forward pass refuses packed rows ({first_line(error)})"
        finally:
            self.train(was_training)
        if torch.allclose(got.detach(), wanted, rtol=tolerance, atol=tolerance):
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

    def most_positions(self) -> int | None:
        """The longest sequence, in tokens, that the architecture has positions for; None if it has no such limit."""
        return getattr(self._text_config, "max_position_embeddings", None)

    @property
    def _text_config(self) -> Any:
        return self.classifier.config.get_text_config()
