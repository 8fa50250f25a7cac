"""The two models: RewardModel scores replies, PolicyModel writes them.

Nothing here knows where text comes from, what a loss is, or how anything is trained.

Letters: B rows, T tokens per row, N examples, D hidden size.
"""

import contextlib
import hashlib
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from data_pipeline import packing
from modeling import attention, devices, flex, generation, lengths, log_probs, pretrained, scorer, speedups, tokenizers
from modeling.pretrained import LoraSettings
from modeling.tokenizers import load_tokenizer
from utils import CheckpointError, UserError

HEAD_SCALE = 1.0  # of a new head, relative to Stiennon et al.'s


class PretrainedModel(nn.Module):
    """What both models share: one of transformers' models with its tokenizer, and how it is run, saved and identified.

    Attributes:
        hf_model: the model of transformers; with LoRA, PEFT has changed it in place.
        peft_model: PEFT's wrapper around it, or None.
        autocast_dtype: the dtype of matrix products; weights stay in theirs. None: no autocast.
        attention: how packed rows attend, one of `attention.IMPLEMENTATIONS`; see `use_attention`.
    """

    def __init__(self, hf_model: nn.Module, tokenizer: Any, peft_model: nn.Module | None = None):
        super().__init__()
        self.hf_model, self.tokenizer = hf_model, tokenizer
        # Not registered as a submodule: its weights are those of hf_model and must not count twice.
        self.__dict__["peft_model"] = peft_model
        self.autocast_dtype: torch.dtype | None = None
        self.attention = "sdpa"
        self.can_narrow = False  # see speedups.narrow_last_layer
        lengths.forget_longer_sequences(hf_model)
        self.why_not = self.try_packing()  # packed rows are allowed; "" if they are
        self.can_pack = not self.why_not

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write weights (`state()` unless given), configuration and tokenizer; with LoRA, what was trained only."""
        self.save_weights(folder, self.state() if state is None else state)
        self.save_tokenizer(folder)

    def save_weights(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write a `state()` and the configuration."""
        pretrained.save_weights(folder, self.hf_model, self.peft_model, state)

    def save_tokenizer(self, folder: Path) -> None:
        tokenizers.save_tokenizer(folder, self.tokenizer)

    def check_saved(self, folder: Path) -> None:
        """Raise ValueError unless what was saved there opens as what is in memory; weights are not looked at."""
        pretrained.check_saved(folder, self.hf_model, self.peft_model, self.tokenizer)

    def state(self) -> dict[str, Tensor]:
        """What `save` writes: all weights, or with LoRA the adapters and the head."""
        if self.peft_model is None:
            return self.hf_model.state_dict()
        tensors = self.peft_model.state_dict()
        return {name: tensor for name, tensor in tensors.items() if "lora_" in name or "modules_to_save" in name}

    def names_in_file(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A `state()` as its tensors are in the file: their names, and with some architectures their shapes."""
        return pretrained.names_in_file(self.hf_model, self.peft_model, state)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that need gradients, by the names that they have in `hf_model`."""
        return {name: parameter for name, parameter in self.hf_model.named_parameters() if parameter.requires_grad}

    def is_of_head(self, name: str) -> bool:
        """Whether one of `trained_parameters` belongs to a head, and not to the backbone under it."""
        return not name.startswith(f"{self.hf_model.base_model_prefix}.")

    def base_fingerprint(self) -> str | None:
        """A hash over the first and last values of every frozen weight: the identity of the model under an adapter.

        None without LoRA. Of the weights as they are now: call it before `speedups.cast_frozen_weights` rounds them.
        """
        if self.peft_model is None:
            return None
        digest = hashlib.sha256()
        for name, weight in self.hf_model.named_parameters():
            if not weight.requires_grad and "original_module" not in name:
                edges = torch.cat([weight.flatten()[:16], weight.flatten()[-16:]])
                digest.update(f"{name} {tuple(weight.shape)}".encode() + edges.cpu().numpy().tobytes())
        return digest.hexdigest()

    # -- running ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.hf_model.parameters()).device

    @property
    def backbone(self) -> nn.Module:
        """The layers without the head."""
        return self.hf_model.base_model

    @property
    def text_config(self) -> Any:
        return self.hf_model.config.get_text_config()

    def autocast(self, keeps_casts: bool = False) -> contextlib.AbstractContextManager:
        """Autocast to `autocast_dtype`, if there is one.

        A forward pass uses each weight once, and would hold all cast ones until its end; with `keeps_casts` it does,
        for many passes within one context.
        """
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=keeps_casts)

    @contextlib.contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Without autocast, and on CUDA in TF32: for rewards that are shown or kept.

        bf16 moves rewards by a visible part of their spread (docs/evaluation.md has figures). In training only
        differences within a pair count, and it is fine.
        """
        before, self.autocast_dtype = self.autocast_dtype, None
        try:
            with devices.tf32(self.device):
                yield
        finally:
            self.autocast_dtype = before

    def packed_hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        example_index: Tensor,
        completion_index: Tensor,
        block_counts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) of packed rows. Arguments are (B, T); see `attention.packed_attention_mask`.

        `block_counts` are what `prepared` made; without them, flex counts again, and waits for the device. With
        `positions`, of any shape and in the rows laid end to end, only those there: (*positions, D).
        """
        with self.autocast():
            packed = attention.PackedMask(example_index, completion_index, self.attention, block_counts)
            mask = packed.dense if self.attention == "sdpa" else packed.placeholder()
            if positions is not None and self.can_narrow:
                mask.needed_positions = positions  # see speedups.narrow_last_layer
            hidden = self.backbone(
                input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
        if positions is None:
            return hidden
        if self.can_narrow:
            return hidden.view(*positions.shape, -1)
        return hidden.flatten(0, 1)[positions]

    def try_packing(self, backward: bool = False) -> str:
        """Why packed rows do not give the same numbers as separate ones; "" if they do."""
        return speedups.try_packing(self, backward)

    def prepared(self, batch: Any) -> Any:
        """A micro-batch, on the CPU still, with what the attention in use needs besides: made ahead of its turn."""
        return flex.prepared(batch) if self.attention == "flex" and isinstance(batch, packing.PackedBatch) else batch

    def use_attention(self, choice: str = "auto", backward: bool = True) -> str:
        """Choose how packed rows attend on the model's present device: an implementation, or "auto" for the fastest.

        It is tried before it is relied on, with `backward` its gradients too; if that fails, a line says why and sdpa
        is used. Saved files do not depend on it. Returns what is used.
        """
        implementation = attention.best_implementation(self.device) if choice == "auto" else choice
        self.attention = "sdpa"
        if implementation == "sdpa" or not self.can_pack:
            return self.attention
        if not attention.install(self.hf_model):
            why_not = "the architecture computes attention in its own way"
        elif implementation == "flex":
            # flex itself at the shapes of training, and by itself whether the model calls our function as it should
            self.attention = "dense"
            why_not = speedups.try_flex(self, backward) or self.try_packing(backward)
        else:
            self.attention = implementation
            why_not = self.try_packing(backward)
        self.attention = "sdpa" if why_not else implementation
        if why_not:
            print(f"attention: sdpa instead of {implementation}: {why_not}", flush=True)
        return self.attention

    def head_size(self) -> int:
        config = self.text_config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def packs_up_to(self, max_length: int) -> bool:
        """Whether sequences of up to `max_length` tokens may be packed: an attention window must not be narrower."""
        window = lengths.narrowest_window(self.text_config)
        return self.can_pack and (window is None or max_length <= window)

    def alone_above(self) -> int | None:
        """The length above which a sequence must be computed without any other; None if they never disturb another."""
        return lengths.alone_above(self.hf_model)

    def attention_crossover_length(self) -> float:
        """The row length at which attention costs as much arithmetic as everything else in a layer.

        Infinite with attention that skips what the other examples of a row would cost. Per token and layer:
        2 · weights for the matrices, 4 · length · heads · head size for scores and mixing.
        """
        if self.attention != "sdpa":
            return math.inf
        config = self.text_config
        embeddings = self.hf_model.get_input_embeddings().weight.numel()
        weights = (sum(p.numel() for p in self.backbone.parameters()) - embeddings) / config.num_hidden_layers
        return weights / (2 * config.num_attention_heads * self.head_size())

    def check_token(self, largest: int) -> None:
        """UserError if the largest of some token ids has no embedding: on a GPU that could not be recovered from."""
        tokenizers.check_token(self.tokenizer, largest, len(self.hf_model.get_input_embeddings().weight))

    def most_positions(self) -> int | None:
        """The longest sequence, in tokens, that the architecture has positions for; None if it has no such limit."""
        return lengths.most_positions(self.text_config)


# -- The reward model --------------------------------------------------------------------------------------------------


class RewardModel(PretrainedModel):
    """A backbone and a scalar head: one reward, in fp32, for each position asked for.

    `create` starts from a base model and draws a new head; `restore` opens a saved reward model and never draws
    anything. Inside is transformers' own sequence-classification class, so that what `save` writes opens anywhere.
    """

    @classmethod
    def create(cls, name: str, tokenizer: Any, seed: int, lora: LoraSettings | None = None) -> Self:
        """A base model (hub id or folder) with a new head drawn from `seed`; a reward model's own head is kept.

        The tokenizer's pad token becomes one that the model has an embedding for, if it is not.
        The head is normal with standard deviation 1/sqrt(D + 1), as in Stiennon et al. 2020 (arXiv 2009.01325).
        """
        classifier = pretrained.open_with_new_head(name, tokenizer, seed, HEAD_SCALE)
        return cls(classifier, tokenizer, pretrained.add_lora(classifier, lora, "SEQ_CLS", seed) if lora else None)

    @classmethod
    def restore(cls, folder: Path, base: str | None = None) -> Self:
        """A saved reward model, full or LoRA. Raises CheckpointError if any weight, the head above all, is missing.

        `base` is where an adapter's base model is now, if it has moved.
        """
        tokenizer = load_tokenizer(str(folder), tokenizers.UNKNOWN_DATE)
        name = (base or pretrained.base_of_adapter(folder)) if pretrained.is_adapter(folder) else str(folder)
        opened = pretrained.open_classifier(name, tokenizer)
        classifier = opened.model
        if not pretrained.is_adapter(folder):
            pretrained.check_is_reward_model(opened, folder)
            return cls(classifier, tokenizer)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            if not any("score" in key or "classifier" in key for key in file.keys()):  # noqa: SIM118
                raise CheckpointError("the adapter holds no reward head", where=folder, found="only LoRA matrices")
        model = cls(classifier, tokenizer, pretrained.open_adapter(classifier, folder, name))
        pretrained.check_base(folder, name, model.base_fingerprint())
        return model

    def try_packing(self, backward: bool = False) -> str:
        return super().try_packing(backward) if self._has_score_head() else "its head reads more than the last token"

    def forward(self, *tensors: Tensor) -> Tensor:
        """`score_packed` of five or six tensors, `score_rows` of two: what DDP and FSDP hook into."""
        rewards = self.score_rows(*tensors) if len(tensors) == 2 else self.score_packed(*tensors)
        return rewards.clone()  # a view would lose FSDP's hook

    def score_packed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        example_index: Tensor,
        completion_index: Tensor,
        positions: Tensor,
        block_counts: Tensor | None = None,
    ) -> Tensor:
        """Rewards at given positions of rows that hold prompts with their completions.

        Args:
            input_ids, position_ids, example_index, completion_index, block_counts: see `packed_hidden`.
            positions: integers of any shape, each a position in the rows laid end to end (row · T + column).

        Returns:
            fp32 rewards of the shape of `positions`.
        """
        return self.head(
            self.packed_hidden(input_ids, position_ids, example_index, completion_index, block_counts, positions)
        )

    def score_rows(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """fp32 rewards (B,) of right-padded sequences, one per row, by the architecture's own forward.

        Sequences above `alone_above` get a forward each, or the others' rewards would depend on them.
        """
        limit = self.alone_above()
        if limit is not None and input_ids.shape[1] > limit:
            return torch.cat([self._score_rows(*sequence) for sequence in lengths.alone(input_ids, attention_mask)])
        return self._score_rows(input_ids, attention_mask)

    def _score_rows(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with self.autocast():
            if not self._has_score_head():
                return self.hf_model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float()
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        last_columns = attention_mask.sum(dim=1) - 1  # (B,)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return self.head(output.last_hidden_state[rows, last_columns])

    @torch.no_grad()
    def score_dialogues(self, dialogues: list[list[dict[str, str]]]) -> list[float]:
        """The rewards of whole dialogues (message lists), through the tokenizer's chat template."""
        texts = self.tokenizer.apply_chat_template(dialogues, tokenize=False)
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        self.check_token(int(batch["input_ids"].max()))
        with self.in_fp32():
            return self.score_rows(batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)).tolist()

    def token_rewards(self, dialogue: list[dict[str, str]]) -> tuple[list[str], list[float]]:
        """The reward as the last message grows; see `scorer.token_rewards`."""
        return scorer.token_rewards(self, dialogue)

    def _has_score_head(self) -> bool:
        return hasattr(self.hf_model, "score")

    def head(self, hidden: Tensor) -> Tensor:
        """fp32 rewards (...) of hidden states (..., D)."""
        # outside autocast: a reward rounded to bf16 has steps of 0.8 %, and the loss is of differences of rewards
        with torch.autocast(self.device.type, enabled=False):
            return self.hf_model.score(hidden.float()).squeeze(-1)


# -- The policy model --------------------------------------------------------------------------------------------------


class PolicyModel(PretrainedModel):
    """A causal language model: writes replies and says how likely it finds them.

    Attributes:
        temperature: logits are divided by it, in `forward` as in sampling.
    """

    temperature = 1.0

    @classmethod
    def create(cls, name: str, lora: LoraSettings | None = None, seed: int = 0, tokenizer: Any = None) -> Self:
        """The causal LM of a hub id or folder, in fp32, with new adapters if `lora` is given."""
        tokenizer = tokenizer or load_tokenizer(name)
        model, missing, _ = pretrained.open_model(transformers.AutoModelForCausalLM, name, tokenizer)
        if missing:
            raise UserError(
                "this is not a language model: its files lack weights that generation needs",
                where=name,
                found=f"missing: {', '.join(sorted(missing)[:3])}",
            )
        return cls(model, tokenizer, pretrained.add_lora(model, lora, "CAUSAL_LM", seed) if lora else None)

    @classmethod
    def restore(cls, folder: Path, base: str | None = None, tokenizer: Any = None) -> Self:
        """A saved policy: a whole model, or an adapter on its base, which may have moved to `base`."""
        if not pretrained.is_adapter(folder):
            return cls.create(str(folder), tokenizer=tokenizer)
        name = base or pretrained.base_of_adapter(folder)
        whole = cls.create(name, tokenizer=tokenizer or load_tokenizer(str(folder)))
        model = cls(whole.hf_model, whole.tokenizer, pretrained.open_adapter(whole.hf_model, folder, name))
        pretrained.check_base(folder, name, model.base_fingerprint())
        return model

    def prepared(self, batch: Any) -> Any:
        prepared = super().prepared(batch)
        return prepared if isinstance(prepared, packing.TokenBatch) else packing.with_targets(prepared)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The log-probabilities of the tokens of completions, and their entropies: (2, P), fp32, in nats.

        Args:
            tensors: those of `packing.TokenBatch.inputs`, packed or with a row for each completion.
        """
        if len(tensors) == 4:
            input_ids, attention_mask, sources, targets = tensors
            hidden = self.rows_hidden(input_ids, attention_mask).flatten(0, 1)[sources]
        else:
            input_ids, position_ids, example_index, completion_index, sources, targets, *more = tensors
            hidden = self.packed_hidden(
                input_ids, position_ids, example_index, completion_index, *(more or [None]), positions=sources
            )
        head = log_probs.head_of(self.hf_model)
        return torch.stack(log_probs.token_logprobs(head, hidden, targets, self.temperature, self.autocast_dtype))

    def rows_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (B, T, D) of right-padded sequences; those above `alone_above` get a forward each."""
        limit, width = self.alone_above(), input_ids.shape[1]
        is_alone = limit is not None and width > limit
        batches = lengths.alone(input_ids, attention_mask) if is_alone else [(input_ids, attention_mask)]
        with self.autocast():
            hidden = [
                self.backbone(input_ids=i, attention_mask=m, use_cache=False).last_hidden_state for i, m in batches
            ]
        return torch.cat([nn.functional.pad(each, (0, 0, 0, width - each.shape[1])) for each in hidden])

    def stream_candidates(
        self, messages: list[dict[str, str]], candidates: int, **sampling: Any
    ) -> Generator[list[str], None, list[bool]]:
        """Write several replies in one batch; see `generation.stream_candidates`."""
        return generation.stream_candidates(self.hf_model, self.tokenizer, messages, candidates, **sampling)
