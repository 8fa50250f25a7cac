"""Talk to a model in the browser and see what a reward model thinks of each reply.

python chat.py                                    the page, and a button that loads Qwen3-0.6B
python chat.py --model ./checkpoints/rm/RUN       the run's newest checkpoint scores, and its base model talks
python chat.py --model FOLDER_OR_HUB_ID --reward_model ./checkpoints/rm/RUN/step-500
"""

from __future__ import annotations

import errno
import html
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flags
import hub
import utils
from flags import flag
from utils import UserError

if TYPE_CHECKING:
    import gradio as gr

    import checkpoint
    import models
    import policy
else:  # loaded when first used, so that --help answers at once
    gr, checkpoint, models, policy = map(utils.lazy_import, ("gradio", "checkpoint", "models", "policy"))


@dataclass(frozen=True)
class ChatConfig:
    """Every setting of the page."""

    # fmt: off
    model: str = flag("Qwen/Qwen3-0.6B", "who talks: hub id or folder, or a reward checkpoint for its base")
    reward_model: str | None = flag(None, "who scores: a reward checkpoint's folder, or its run's for the newest one")
    autoload: bool = flag(False, "load the default model at start too, without waiting for the button")
    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0 lets the whole network in")
    port: int = flag(7860, "port; if it is taken and was not given, the next free one", minimum=1, below=65536)
    debug: bool = flag(False, "show the traceback of an error")
    # fmt: on

    def problems(self) -> list[str]:
        """What no single field can tell is wrong."""
        names = ("model", "reward_model", "host")
        return [f"--{name}: got nothing, wants a name" for name in names if getattr(self, name) == ""]


# ---------------------------------------------------------------------------------------------------------------------
# Who talks and who scores
# ---------------------------------------------------------------------------------------------------------------------


def choose_models(model: str, reward_model: str | None) -> tuple[str, Path | None]:
    """(who talks: folder or hub id, who scores: folder); UserError or CheckpointError if the flags' files are wrong."""
    hub.refuse_missing_path(model, "--model")
    scorer = None
    if reward_model:
        # only folders can score; as it stands, a mistyped "runs/a" would pass for a hub id
        hub.refuse_missing_path(str(Path(reward_model).expanduser().absolute()), "--reward_model")
        scorer = sound_checkpoint(reward_model)
        if not is_reward_checkpoint(scorer):
            raise UserError("--reward_model names no reward checkpoint", where=scorer.absolute())
    if not Path(model).expanduser().exists():
        return model, scorer
    folder = sound_checkpoint(model)
    if not is_reward_checkpoint(folder):
        return str(folder), scorer
    return base_model_of(folder), scorer or folder


def sound_checkpoint(name: str) -> Path:
    """A model's folder, verified where it has a manifest; a run's folder means its newest sound step."""
    folder = Path(name).expanduser()
    if utils.step_folders(folder):
        return checkpoint.find(str(folder))
    if (folder / "manifest.json").exists():
        checkpoint.verify(folder)
    return folder


def is_reward_checkpoint(folder: Path) -> bool:
    if adapter := read_settings(folder / "adapter_config.json"):
        return adapter.get("task_type") == "SEQ_CLS"
    architectures = read_settings(folder / "config.json").get("architectures") or [""]
    return architectures[0].endswith("ForSequenceClassification")


def base_model_of(folder: Path) -> str:
    """The model that a reward checkpoint was trained from: the one that talks."""
    names = [
        read_settings(folder / "train_config.json").get("model"),
        read_settings(folder / "adapter_config.json").get("base_model_name_or_path"),
    ]
    if not any(names):
        raise UserError(
            "nothing says which base model this reward checkpoint came from, so nobody could talk",
            where=folder.absolute(),
            found="no train_config.json with a 'model' in it",
            next=f"python chat.py --model TALKER --reward_model {folder}",
        )
    known = [name for name in names if name]
    # a relative path holds only where the training was started; an adapter's is absolute
    base = next((name for name in known if Path(name).exists()), known[0])
    hub.refuse_missing_path(base, "--model")
    return base


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file's object, {} if there is no such file."""
    try:
        return dict(utils.read_json(path)) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError("a model's settings cannot be read", where=path, found=error) from error


# ---------------------------------------------------------------------------------------------------------------------
# Dialogues
# ---------------------------------------------------------------------------------------------------------------------


def text_of(content: str | list[Any]) -> str:
    """A message's text: Gradio gives back as a list of blocks what it was given as text."""
    blocks = [content] if isinstance(content, str) else content
    return "".join(block if isinstance(block, str) else block.get("text", "") for block in blocks)


def is_note(message: dict[str, Any]) -> bool:
    """Whether the page says this itself (why there is no reply): shown in the chat, no part of the dialogue."""
    return bool((message.get("metadata") or {}).get("title"))


def dialogue_of(history: list[dict[str, Any]], system_prompt: str = "") -> list[dict[str, str]]:
    """What was really said: no notes, no message that was never answered."""
    dialogue = [{"role": "system", "content": system_prompt.strip()}] if system_prompt.strip() else []
    for message in history:
        if is_note(message):
            continue
        if dialogue and dialogue[-1]["role"] == message["role"]:
            dialogue.pop()
        dialogue.append({"role": message["role"], "content": text_of(message["content"])})
    return dialogue


def refuse_too_long(dialogue: list[dict[str, str]], tokenizer: Any, model_config: Any, new_tokens: int = 0) -> None:
    """Raise ValueError if a dialogue and the reply to come do not fit the positions that a model knows."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    options = {"add_generation_prompt": new_tokens > 0, "enable_thinking": False, "return_dict": False}
    tokens = len(tokenizer.apply_chat_template(dialogue, **options))
    if limit is not None and tokens + new_tokens > limit:
        new = f" and up to {new_tokens:,} new ones make {tokens + new_tokens:,}" if new_tokens else ""
        raise ValueError(f"too long: {tokens:,} tokens so far{new}; the model's limit is {limit:,}")


# ---------------------------------------------------------------------------------------------------------------------
# What answers the page
# ---------------------------------------------------------------------------------------------------------------------


class Stage:
    """The models, once loaded, and what the page may ask of them."""

    def __init__(self, talker: str, scorer: Path | None, debug: bool = False):
        self.talker, self.scorer, self.debug = talker, scorer, debug
        self.policy: policy.PolicyModel | None = None
        self.reward: models.RewardModel | None = None
        self._rewards: dict[str, float] = {}  # by dialogue: every turn asks again for those of all earlier ones
        self._loading = threading.Lock()  # two visitors may press the button

    def load(self) -> None:
        with self._loading:
            if self.policy is not None:
                return
            device = models.pick_device()
            if self.scorer:
                self.reward = models.RewardModel.restore(self.scorer).to(device).eval()
            is_local = hub.looks_like_a_path(self.talker)
            opened = (
                policy.PolicyModel.restore(Path(self.talker)) if is_local else models.PolicyModel.create(self.talker)
            )
            self.policy = opened.to(device).eval()

    def status(self) -> tuple[str, Any]:
        """What the page says about the models, and the Load button."""
        scorer = f"`{self.scorer}` scores" if self.scorer else "nobody scores (`--reward_model`)"
        if self.scorer and (best := utils.best_step(self.scorer.parent)) not in (None, self.scorer):
            scorer += f" (the best of its run is {best.name})"
        if self.policy is None:
            return f"`{self.talker}` is not loaded yet", gr.Button(visible=True)
        return f"`{self.talker}` talks · {scorer} · on {self.policy.device.type}", gr.Button(visible=False)

    def press_load(self) -> tuple[str, Any]:
        try:
            self.load()
        except Exception as error:  # whatever it is, the visitor must hear of it and the page must live on
            return f"```\n{self.explain(error)}\n```", gr.Button(visible=True)
        return self.status()

    def explain(self, error: Exception) -> str:
        """An error in words for the visitor; the terminal gets the traceback with --debug."""
        if self.debug:
            traceback.print_exception(error)
        return str(error) if isinstance(error, ValueError) else repr(error)

    def answer(
        self,
        message: str,
        history: list[dict],
        system_prompt: str,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
    ) -> Iterator[tuple[str | dict[str, Any], bool]]:
        """Reply to a message: (text so far, True) again and again, then (reply, or a note why there is none; False)."""
        try:
            if self.policy is None:
                raise ValueError("no model is loaded yet: press Load")
            if not message.strip():
                raise ValueError("the message is empty")
            dialogue = dialogue_of([*history, {"role": "user", "content": message}], system_prompt)
            refuse_too_long(dialogue, self.policy.tokenizer, self.policy.language_model.config, int(max_new_tokens))
            reply = ""
            for piece in self.policy.stream(dialogue, int(max_new_tokens), temperature, top_p):
                reply += piece
                yield reply, True
            if not reply.strip():
                raise ValueError("the model ended its reply before it said anything")
            yield reply, False
        except Exception as error:  # a stream must end with a word to the visitor, or the page waits for ever
            yield {"role": "assistant", "content": self.explain(error), "metadata": {"title": "no reply"}}, False

    def reward_of(self, dialogue: list[dict[str, str]]) -> float:
        if self.reward is None:
            raise ValueError("no reward model is loaded")
        refuse_too_long(dialogue, self.reward.tokenizer, self.reward.classifier.config)
        key = json.dumps(dialogue)
        if key not in self._rewards:
            self._rewards[key] = self.reward.score_dialogues([dialogue])[0]
        return self._rewards[key]

    def describe_rewards(self, history: list[dict[str, Any]], system_prompt: str, is_replying: bool = False) -> str:
        """The rewards of a chat's replies, the last one first, as Markdown; nothing while a reply is being written."""
        if self.reward is None or is_replying:
            return ""
        dialogue = dialogue_of(history, system_prompt)
        ends = [end for end, message in enumerate(dialogue, 1) if message["role"] == "assistant"]
        try:
            rewards = [f"{self.reward_of(dialogue[:end]):.3f}" for end in ends]
        except Exception as error:  # the replies themselves are fine
            return f"no reward: {html.escape(self.explain(error), quote=False)}"
        if not rewards:
            return ""
        return f"**reward {rewards[-1]}**" + (f" · replies before: {', '.join(rewards[:-1])}" if rewards[1:] else "")

    def score(self, messages_json: str) -> float:
        """The reward of a dialogue: a JSON list of {"role": ..., "content": ...}."""
        try:
            messages = json.loads(messages_json)
            dialogue = [{"role": message["role"], "content": text_of(message["content"])} for message in messages]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            wanted = 'wants a JSON list of {"role": ..., "content": ...}'
            raise gr.Error(f"{wanted}: {self.explain(error)}", print_exception=False) from error
        try:
            return self.reward_of(dialogue)
        except Exception as error:  # the caller must hear what it is, and the server lives on
            raise gr.Error(self.explain(error), print_exception=False) from error


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def plain_chatbot(**options: Any) -> Any:
    """A gr.Chatbot that shows every message as the plain text it is.

    Gradio's own, even told not to render Markdown, turns HTML into elements (sanitized: nothing runs, but pictures are
    fetched), and it takes the indentation out of a reply on its way into the history.
    """

    chatbot = gr.Chatbot(sanitize_html=True, render_markdown=False, **options)
    show = chatbot._postprocess_content

    def show_plain(content: Any) -> Any:
        text = html.escape(text_of(content if isinstance(content, str) else [content]), quote=False)
        return show({"type": "text", "text": text})

    # on the instance: Gradio answers a subclass by writing a .pyi file beside this one
    chatbot._postprocess_content = show_plain
    chatbot._preprocess_content = lambda content: {"type": "text", "text": html.unescape(content.text)}
    return chatbot


def build_page(stage: Stage) -> Any:
    with gr.Blocks(title="chat", fill_height=True, analytics_enabled=False) as page:
        with gr.Row():
            status = gr.Markdown()
            load = gr.Button("Load", variant="primary", scale=0, visible=False)
        with gr.Sidebar(position="right"):
            settings = [
                gr.Textbox("", label="System prompt", lines=4, placeholder="none"),
                gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0 takes the likeliest token"),
                gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="share of the likeliest tokens to draw from"),
                gr.Slider(1, 4096, 512, step=1, label="Max new tokens"),
            ]
        chatbot = plain_chatbot(show_label=False, scale=1, buttons=["copy"])
        is_replying = gr.State(False)
        chat = gr.ChatInterface(
            stage.answer,
            chatbot=chatbot,
            additional_inputs=settings,
            additional_outputs=[is_replying],
            api_name="chat",
        )
        rewards = gr.Markdown()
        # The rewards follow from the chat instead of standing in it: so a stopped reply has one too, and neither the
        # next prompt nor /chat's answer holds a number that the model never wrote.
        hidden = {"show_progress": "hidden", "api_visibility": "undocumented"}
        scoring = (stage.describe_rewards, [chatbot, settings[0], is_replying], rewards)
        is_replying.change(*scoring, **hidden)
        gr.on([chat.textbox.stop, chatbot.undo, chatbot.clear], lambda: False, None, is_replying, **hidden).then(
            *scoring, **hidden
        )
        load.click(stage.press_load, None, [status, load], api_name="load")
        page.load(stage.status, None, [status, load], **hidden)
        gr.api(stage.score, api_name="score")
    return page


def free_port(host: str, first: int, last: int) -> int:
    """The first port of a range that nobody listens at."""
    for port in range(first, last + 1):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself will
                probe.bind(address)
            return port
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"--host {host} is no address of this machine", found=error) from error
            found = error.strerror
    ports = f"--port {first} is" if first == last else f"ports {first} to {last} are"
    raise UserError(f"{ports} taken", where=host, found=found, next="another --port, or none for the next free one")


def main(argv: list[str]) -> None:
    given, problems = flags.read_flags(ChatConfig, argv, __doc__.split("\n\n")[0])
    config = flags.build_config(ChatConfig, given, problems)
    port = free_port(config.host, config.port, config.port if "port" in given else config.port + 99)
    stage = Stage(*choose_models(config.model, config.reward_model), config.debug)
    if config.autoload or "model" in given or "reward_model" in given:
        print(f"loading {stage.talker}", flush=True)
        stage.load()
    page = build_page(stage)
    page.launch(
        server_name=config.host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
        prevent_thread_lock=True,
    )
    print(f"open {page.local_url}   (Ctrl-C stops)", flush=True)
    try:
        while True:  # not launch's own wait: that one swallows Ctrl-C
            time.sleep(3600)
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
