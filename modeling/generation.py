"""The policy model: it writes replies, one or several at once, and says how likely it finds a text.

Letters: B rows, T tokens per row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from utils import UserError


class PolicyModel(nn.Module):
    """A causal language model that writes replies and says how likely it finds a text."""

    def __init__(self, language_model: nn.Module, tokenizer: Any, peft_model: nn.Module | None = None):
        super().__init__()
        self.language_model, self.tokenizer = language_model, tokenizer
        # Not registered as a submodule: PEFT changed the model in place, and its weights must not count twice.
        self.__dict__["peft_model"] = peft_model

    @classmethod
    def create(cls, name: str, lora: LoraSettings | None = None, seed: int = 0) -> PolicyModel:
        """The causal LM of a hub id or folder, in fp32, with new adapters if `lora` is given."""
        from transformers import AutoModelForCausalLM

        tokenizer = load_tokenizer(name)
        model, missing = open_model(AutoModelForCausalLM, name)
        if missing:
            raise UserError(
                "this is no language model: its files lack weights that writing needs",
                where=name,
                found=f"missing: {', '.join(sorted(missing)[:3])}",
            )
        return cls(model, tokenizer, add_lora(model, lora, "CAUSAL_LM", seed) if lora else None)

    @classmethod
    def restore(cls, folder: Path) -> PolicyModel:
        """A saved policy: a whole model, or an adapter on its base."""
        if not is_adapter(folder):
            return cls.create(str(folder))
        from peft import PeftModel

        base = cls.create(base_of_adapter(folder))
        with quiet_transformers():
            peft_model = PeftModel.from_pretrained(base.language_model, folder, is_trainable=True)
        return cls(base.language_model, load_tokenizer(str(folder)), peft_model)

    def save(self, folder: Path) -> None:
        save_model(self.language_model, self.peft_model, self.tokenizer, folder)

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
        """Write the next reply and yield its text piece by piece as it comes; see `stream_candidates`."""
        for (piece,) in self.stream_candidates(messages, 1, max_new_tokens, temperature, top_p, enable_thinking, stop):
            if piece:
                yield piece

    def stream_candidates(
        self,
        messages: list[dict[str, str]],
        candidates: int,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.9,
        enable_thinking: bool = False,
        stop: threading.Event | None = None,
    ) -> Iterator[list[str]]:
        """Write several replies in one batch and yield, token by token, what each of them has grown by (maybe "").

        `temperature` 0 is greedy: then there is only one reply to write. Setting `stop`, or closing the iterator, ends
        the generation at the next token. What goes wrong in the generation is raised here.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList
        from transformers.generation.streamers import BaseStreamer

        if candidates > 1 and temperature == 0:
            raise ValueError("several replies at temperature 0 would all be the same one: raise the temperature")
        stop = stop or threading.Event()
        steps: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()  # the next token of each reply; None: the end

        class StopWhenAsked(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
                return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

        class Tokens(BaseStreamer):
            is_prompt = True  # which comes first

            def put(self, value: Tensor) -> None:
                if not self.is_prompt:
                    steps.put(value.tolist())
                self.is_prompt = False

            def end(self) -> None:
                steps.put(None)

        prompt = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
            return_tensors="pt",
            return_dict=True,
        ).to(self.device)
        sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                self.language_model.generate(
                    **prompt,
                    **sampling,
                    do_sample=temperature > 0,
                    num_return_sequences=candidates,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    streamer=Tokens(),
                    stopping_criteria=StoppingCriteriaList([StopWhenAsked()]),
                )
            except BaseException as error:  # handed to the reader below; a stream must end, or its reader hangs
                failures.append(error)
                steps.put(None)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        ends = self.language_model.generation_config.eos_token_id
        texts = [_TextOfTokens(self.tokenizer, ends) for _ in range(candidates)]
        try:
            while (tokens := steps.get()) is not None:
                yield [text.grow(token) for text, token in zip(texts, tokens, strict=True)]
            yield [text.rest() for text in texts]
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]


class _TextOfTokens:
    """The text of a growing reply: without special tokens, and no character before all its bytes are there."""

    def __init__(self, tokenizer: Any, ends: int | list[int] | None):
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._tokens: list[int] = []
        self._text = ""

    def grow(self, token: int) -> str:
        """What the reply's next token adds; nothing after its end, where a batch is padded."""
        if self._tokens and self._tokens[-1] in self._ends:
            return ""
        self._tokens.append(token)
        piece = self._decoder.step(self._tokenizer, token) or ""
        self._text += piece
        return piece

    def rest(self) -> str:
        """What is left at the end: half a character, which becomes a replacement character."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return whole.removeprefix(self._text) if whole.startswith(self._text) else ""
