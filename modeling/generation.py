"""Sample replies from a causal language model: several in one batch, streamed token by token."""

import queue
import threading
from collections.abc import Generator
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


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
) -> Generator[list[str], None, list[bool]]:
    """Sample several replies to `messages` in one batch; yield after each token the text that it adds to each reply.

    The text is "" for a reply that has ended and for a token that completes no character. `temperature` 0 is greedy
    decoding, which allows one candidate only. Setting `stop`, or closing the iterator, ends the generation at the next
    token. Errors of the generation are raised here. Returns for each reply whether it is whole: whether the model ended
    it itself.
    """
    if candidates > 1 and temperature == 0:
        raise ValueError("several replies at temperature 0 would all be the same one: raise the temperature")
    is_closed = threading.Event()
    # from the thread that generates: each reply's next token; at the end None, or the error that ended it
    steps: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()

    class StopWhenAsked(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            should_stop = is_closed.is_set() or (stop is not None and stop.is_set())
            return torch.full((input_ids.shape[0],), should_stop, device=input_ids.device)

    class QueueStreamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if value.dim() == 1:  # `generate` streams the prompt first, which is (candidates, T)
                steps.put(value.tolist())

        def end(self) -> None:
            steps.put(None)

    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=enable_thinking, return_tensors="pt", return_dict=True
    )
    prompt = prompt.to(language_model.device)
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}

    def generate() -> None:
        try:
            language_model.generate(
                **prompt,
                **sampling,
                do_sample=temperature > 0,
                num_return_sequences=candidates,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                streamer=QueueStreamer(),
                stopping_criteria=StoppingCriteriaList([StopWhenAsked()]),
            )
        except BaseException as error:  # raised below; a queue without an end would block the loop there forever
            steps.put(error)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    eos_token_id = language_model.generation_config.eos_token_id
    decoders = [IncrementalDecoder(tokenizer, eos_token_id) for _ in range(candidates)]
    try:
        while (tokens := steps.get()) is not None:
            if isinstance(tokens, BaseException):
                raise tokens
            yield [decoder.add(token) for decoder, token in zip(decoders, tokens, strict=True)]
        yield [decoder.finish() for decoder in decoders]
        return [decoder.has_ended for decoder in decoders]
    finally:
        is_closed.set()
        thread.join()


class IncrementalDecoder:
    """The text of a growing reply, without special tokens. A character appears once all its bytes are there."""

    def __init__(self, tokenizer: Any, eos_token_id: int | list[int] | None):
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._eos_ids = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        self._tokens: list[int] = []
        self._text = ""

    @property
    def has_ended(self) -> bool:
        return bool(self._tokens) and self._tokens[-1] in self._eos_ids

    def add(self, token: int) -> str:
        """The text that the reply's next token adds: "" for the padding after its end."""
        if self.has_ended:
            return ""
        self._tokens.append(token)
        piece = self._decoder.step(self._tokenizer, token) or ""
        self._text += piece
        return piece

    def finish(self) -> str:
        """What is left at the end of the reply: an incomplete character, as a replacement character."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return whole.removeprefix(self._text) if whole.startswith(self._text) else ""
