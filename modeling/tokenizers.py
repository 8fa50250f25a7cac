"""Open and save tokenizers, with a chat template and padding that scoring can rely on."""

import contextlib
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging

from common import hub
from data_pipeline import tokenization
from utils import UserError, first_line

# For models whose chat template writes today's date, if nothing says which date they were trained with. It is the one
# that Llama's own templates write where they cannot ask for today's.
UNKNOWN_DATE = datetime(2024, 7, 26)
DIALOGUE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TRY_OFFLINE = "python train_rm.py --demo   (offline), or --model FOLDER with a downloaded model"


def load_tokenizer(name: str, date: datetime | None = None) -> Any:
    """The tokenizer of a hub id or folder, with a chat template and a pad token that scoring can rely on.

    `date` is what a chat template that writes today's date writes from now on, saved copies included; None leaves that
    to the clock, as a conversation wants it.
    """
    hub.check_path_exists(name, "--model")
    local_only = is_local_only(name)
    if Path(name).is_dir():
        hub.check_no_pointer(Path(name))
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
    if isinstance(tokenizer.chat_template, dict):
        _check_named_templates(tokenizer)
    if date is not None and tokenization.fix_date(tokenizer, date):
        why = ", as nothing says which one it was trained with" if date == UNKNOWN_DATE else ""
        print(f"the chat template writes today's date: fixed at {date:%Y-%m-%d}{why}", flush=True)
    tokenization.take_system_turns(tokenizer)
    choose_pad_token(tokenizer)
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


def choose_pad_token(tokenizer: Any, rows: int | None = None) -> None:
    """Make sure that there is a pad token, that no dialogue rendered by the template ends in it and, given the number
    of rows of the model's embedding, that it is one of them.

    transformers' classification models read the reward at the rightmost token that is not the pad token. If dialogues
    end in <eos> and <eos> is also the pad token, they would read it one token early, unlike this project.
    """
    written = _ids_of_a_dialogue(tokenizer)
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token]
    for token in [*special, *tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder]:
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if number is not None and number != written[-1] and (rows is None or number < rows):
            tokenizer.pad_token = token
            return
    if rows is None or len(tokenizer) < rows:  # whether there is room for another is seen once `rows` is known
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return
    raise UserError(
        "this tokenizer has no special token that could serve as padding",
        where=tokenizer.name_or_path,
        found=f"dialogues end in {tokenizer.convert_ids_to_tokens(written[-1])}, and there is no other below {rows:,}",
        next="a chat_template.jinja that ends dialogues in a line break, or a model with a larger embedding",
    )


def check_token(tokenizer: Any, largest: int, rows: int) -> None:
    """UserError if the largest of some token ids is not one of the model's embedding, which has `rows` rows."""
    if largest >= rows:
        raise UserError(
            "the tokenizer has a token that the model has no embedding for",
            where=tokenizer.name_or_path,
            found=f"{tokenizer.convert_ids_to_tokens(largest)} is {largest:,}, and the embedding has {rows:,} rows",
            next="the tokenizer that belongs to the model, or data and a chat template without this token",
        )


def fit_to_embedding(tokenizer: Any, rows: int) -> None:
    """Choose a pad token that the model's embedding has. UserError if tokens are missing that any text can contain."""
    added = tokenizer.added_tokens_encoder
    ordinary = [number for token, number in tokenizer.get_vocab().items() if token not in added]
    check_token(tokenizer, max(*ordinary, *_ids_of_a_dialogue(tokenizer)), rows)
    choose_pad_token(tokenizer, rows)


def _ids_of_a_dialogue(tokenizer: Any) -> list[int]:
    try:
        if ids := tokenizer.apply_chat_template(DIALOGUE, return_dict=False):
            return ids
        raise ValueError("it writes nothing")
    except Exception as error:  # a template is a program, and can raise anything
        raise UserError(
            "the model's chat template does not take a plain question and answer",
            where=tokenizer.name_or_path,
            found=f"{type(error).__name__}: {first_line(error)}",
            next="fix its chat_template.jinja, or remove the file to use one of ours",
        ) from error


def end_ids(name: str, tokenizer: Any) -> set[int]:
    """The tokens that end a reply: those of the model's generation config, the tokenizer's, and the template's."""
    ends = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError, ValueError):  # many models have no such file
        config = GenerationConfig.from_pretrained(name, local_files_only=is_local_only(name))
        found = config.eos_token_id
        ends |= {found} if isinstance(found, int) else set(found or ())
    special = [number for number in _ids_of_a_dialogue(tokenizer) if number in tokenizer.added_tokens_decoder]
    return (ends | set(special[-1:])) - {None}


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    with quiet_transformers():
        tokenizer.save_pretrained(folder)


def is_local_only(name: str) -> bool:
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
