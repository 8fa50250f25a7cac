"""Writing replies with a causal language model: several in one batch, token by token as they come.

Letters: B rows, T tokens per row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def stream_candidates(
    language_model: nn.Module,
    tokenizer: Any,
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

    prompt = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
        return_tensors="pt",
        return_dict=True,
    ).to(language_model.device)
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            language_model.generate(
                **prompt,
                **sampling,
                do_sample=temperature > 0,
                num_return_sequences=candidates,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                streamer=Tokens(),
                stopping_criteria=StoppingCriteriaList([StopWhenAsked()]),
            )
        except BaseException as error:  # handed to the reader below; a stream must end, or its reader hangs
            failures.append(error)
            steps.put(None)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    ends = language_model.generation_config.eos_token_id
    texts = [_TextOfTokens(tokenizer, ends) for _ in range(candidates)]
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
