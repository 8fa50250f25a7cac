"""The Chat tab. Conversations are kept in the browser, by the JavaScript in page_head.html."""

import html
import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr

import utils
from chat_app import conversation
from chat_app.conversation import Conversation, with_reply, with_system_prompt
from chat_app.engine import MAX_CANDIDATES, ChatEngine, Settings
from chat_app.events import AT_ONCE, GENERATION, QUIET
from data_pipeline.messages import Messages

WELCOME = (
    "### Talk to a model, and see what a reward model thinks of each reply\n"
    "A **reward** is a number that guesses how much people would like a reply: of two replies *to the same question*, "
    "they would more likely prefer the one with the higher reward."
)
EXAMPLES = [
    "Explain in three sentences why the sky is blue.",
    "My friend failed an exam. What could I say to cheer her up?",
    "How do I bake bread without an oven?",
]
SECONDS_TO_END = 60  # more than a long prompt takes on a slow machine


class Writing:
    """A reply that a visitor waits for. It ends itself when it is told to stop.

    Gradio's `cancels` would tear it off: then the page may show an error instead of what has been written.
    """

    def __init__(self) -> None:
        self.stop, self.ended = threading.Event(), threading.Event()
        self.has_started = False
        self.is_left = False  # the visitor looks at something else


class ChatTab:
    """The tab's components and what each click does. A visitor's only state is `conversation`."""

    def __init__(self, engine: ChatEngine, page: gr.Blocks):
        self.engine = engine
        self.writing: dict[str | None, Writing] = {}  # by session: the latest reply that it has asked for
        self.lock = threading.Lock()
        with gr.Sidebar(open=False, width=300):
            new_chat = gr.Button("New chat", elem_id="new-chat")
            search = gr.Textbox(show_label=False, placeholder="Search in all chats", elem_id="search-chats")
            saved = gr.Radio([], label="Saved in this browser", elem_id="saved-chats")
            rename = gr.Textbox(
                show_label=False, placeholder="New name for this chat, then Enter", elem_id="rename-chat"
            )
            delete = gr.Button("Delete this chat", variant="stop", size="sm")
            restore = gr.Button(size="sm", visible=False, elem_id="restore-chat")
            export = gr.Button("Export all chats as JSONL", size="sm", elem_id="export-chats")
            storage_problem = gr.Markdown()
        self.conversation = gr.State(conversation.EMPTY)
        self.load = gr.Button(**load_button(engine), variant="primary", elem_id="load-here")
        load_problem = gr.HTML(visible=False)
        chatbot = gr.Chatbot(
            elem_id="chat", height="60vh", show_label=False, scale=1, buttons=["copy"], editable="user",
            latex_delimiters=conversation.LATEX_DELIMITERS, feedback_options=None, placeholder=WELCOME,
            examples=[{"text": text} for text in EXAMPLES],
        )  # fmt: skip
        textbox = gr.Textbox(
            show_label=False, placeholder="Message", submit_btn=True, autofocus=True, elem_id="message", max_lines=12,
            container=False,
        )  # fmt: skip
        with gr.Row(elem_id="within-reach"):
            info = "write N replies, show the one with the highest reward"
            best_of = gr.Slider(1, MAX_CANDIDATES, Settings.candidates, step=1, label="Best of N", info=info, scale=2)
            plain = gr.Checkbox(False, label="Plain text", info="show replies as the model wrote them", min_width=200)
        with gr.Accordion("Generation settings", open=False):
            system_prompt = gr.Textbox("", label="System prompt", lines=2, placeholder="none")
            with gr.Row():
                temperature, top_p, max_new_tokens = (
                    gr.Slider(low, high, value, step=step, label=label, info=info)
                    for label, info, low, high, value, step in (
                        ("Temperature", "0 always takes the likeliest token", 0, 2, Settings.temperature, 0.05),
                        ("Top-p", "sample from this share of probability", 0.05, 1, Settings.top_p, 0.05),
                        ("Max new tokens", "longer replies are cut", 1, 8192, Settings.max_new_tokens, 1),
                    )
                )
            thinking = gr.Checkbox(False, label="Think first", info="for models that can, such as Qwen3")
        # in the order of the fields of `Settings`
        self.settings = [system_prompt, temperature, top_p, max_new_tokens, thinking, best_of]

        self.loaded = self.load.click(self.load_models, None, load_problem, api_visibility="private")
        # one after the other: Gradio looks for formulas once more while it already renders without them
        without_formulas = plain.input(lambda: gr.Chatbot(latex_delimiters=[]), None, chatbot, **AT_ONCE)
        switched = without_formulas.then(lambda on: gr.Chatbot(render_markdown=not on), plain, chatbot, **AT_ONCE)
        switched.then(lambda on: gr.Chatbot(latex_delimiters=formulas(on)), plain, chatbot, **AT_ONCE)

        # hidden components that carry conversations to the browser's storage and back
        to_save, listed, opened, saved_id, exported = (gr.JSON(visible="hidden") for _ in range(5))
        shown = [self.conversation, chatbot, textbox]
        show_list = {"fn": self.list_saved, "inputs": [listed, saved_id], "outputs": [saved, restore], **AT_ONCE}

        prepare_saving = {"fn": lambda chat: [conversation.title(chat), chat], "inputs": self.conversation,
                          "outputs": to_save, **AT_ONCE}  # fmt: skip
        save = {"fn": None, "inputs": to_save, "outputs": [listed, storage_problem, saved_id], **QUIET,
                "js": "conversation => window.conversations.save(conversation)"}  # fmt: skip

        def save_after(event: Any) -> None:
            event.then(**prepare_saving).then(**save).then(**show_list)

        # `saved` may change until its value is used: the end of a reply selects the chat it belongs to
        leave = {"fn": self.leave, "inputs": saved, "outputs": None, **AT_ONCE,
                 "js": "id => window.conversations.choose(id)"}  # fmt: skip

        def save_first(event: Any) -> Any:
            """Before another conversation is shown: end the reply and save what has been generated of it."""
            return event(**leave).then(**prepare_saving).then(**save)

        for event, change, inputs in (
            (textbox.submit, self.ask, [self.conversation, textbox, *self.settings]),
            (chatbot.example_select, self.ask_example, [self.conversation, *self.settings]),
            (chatbot.retry, self.retry, [self.conversation, *self.settings]),
            (chatbot.edit, self.edit, [self.conversation, *self.settings]),
        ):
            accepted = event(change, inputs, shown, **AT_ONCE)
            # "multiple": the request for a reply that was stopped in the queue must not block that for the next one
            running = accepted.then(
                self.reply, [self.conversation, *self.settings], shown, show_progress="minimal",
                show_progress_on=chatbot, trigger_mode="multiple", **GENERATION,
            )  # fmt: skip
            save_after(accepted)  # the question is saved even if the page is closed in the middle of the reply
            save_after(running)
        save_after(textbox.stop(self.stop, self.conversation, shown, **AT_ONCE))
        save_after(chatbot.undo(self.undo, [self.conversation, textbox], shown, **AT_ONCE))
        save_after(chatbot.option_select(self.pick, self.conversation, shown, **AT_ONCE))
        save_after(save_first(new_chat.click).then(self.new_chat, system_prompt, shown, **AT_ONCE))

        outputs = [*shown, system_prompt, saved, restore]
        show_first = {"fn": self.open_first, "inputs": [opened, self.conversation], "outputs": outputs, **AT_ONCE}
        page.load(**show_first, js="(_, __) => [window.conversations.open(null), null]")
        show_opened = {"fn": self.open, "inputs": [saved, opened], "outputs": outputs, **AT_ONCE}
        save_first(saved.input).then(**show_opened, js="() => [null, window.conversations.openChosen()]")
        restored = "() => [null, window.conversations.open(window.conversations.restore())]"
        save_first(restore.click).then(**show_opened, js=restored)
        remove = {"fn": None, "inputs": None, "outputs": listed, "js": "() => window.conversations.removeChosen()"}
        listing = {"inputs": [listed, saved], "outputs": [saved, restore], **AT_ONCE}
        find = "query => window.conversations.search(query)"
        found = search.change(None, search, listed, js=find, **QUIET)
        found.then(self.list_saved, trigger_mode="always_last", **listing)
        name = "(id, name) => [window.conversations.rename(id, name), '']"
        renamed = rename.submit(None, [saved, rename], [listed, rename], js=name, **QUIET)
        renamed.then(self.list_saved, **listing)
        collected = export.click(None, None, exported, js="() => [window.conversations.all()]", **QUIET)
        written = collected.then(lambda kept: {"text": conversation.export(kept)}, exported, exported, **AT_ONCE)
        written.then(None, exported, None, js="({ text }) => window.conversations.download(text)", **QUIET)
        removed = save_first(delete.click).then(**remove, **QUIET)
        save_after(removed.then(self.new_chat, system_prompt, shown, **AT_ONCE))
        page.unload(self.forget)

    # -- What is shown -------------------------------------------------------------------------------------------------

    def show(self, chat: Conversation, footers: list[str], options: Any = (), is_busy: bool = False) -> list[Any]:
        """New values for the state, the chat and the text box, which has a Stop button while a reply is generated."""
        messages, _ = conversation.to_chatbot(chat, footers, options)
        return [{**chat, "is_busy": is_busy}, messages, gr.Textbox(submit_btn=not is_busy, stop_btn=is_busy)]

    def share_below(self, rewards: list[float] | None) -> float | None:
        return self.engine.share_below(rewards[0]) if rewards else None

    def footers(self, chat: Conversation) -> list[str]:
        """A line for each reply: its reward, or why it has none; the last one's also compares it with its versions."""
        replies = [message for message in chat["messages"] if message["role"] == "assistant"]
        dialogues = [
            with_system_prompt(chat["system_prompt"], dialogue) for dialogue in conversation.dialogues_to_score(chat)
        ]
        rewards, problem = [None] * len(replies), ""
        if self.engine.reward_model is not None:
            try:
                rewards = [[reward] for reward in self.engine.rewards_of(dialogues)]
                if replies and replies[-1]["others"]:
                    rewards[-1] = self.version_rewards(dialogues[-1][:-1], conversation.versions_of(replies[-1]))
            except Exception as error:  # the replies are shown without rewards
                problem = f"no reward: {self.engine.explain(error)}"
        return [
            " · ".join(filter(None, [problem, conversation.footer(values, reply["ending"], self.share_below(values))]))
            for values, reply in zip(rewards, replies, strict=True)
        ]

    def version_rewards(self, prompt: Messages, versions: list[conversation.Message]) -> list[float]:
        return self.engine.rewards_of([with_reply(prompt, version["content"]) for version in versions])

    def options(self, chat: Conversation) -> list[tuple[str, int]]:
        """All versions of the last reply, if there is more than one."""
        last = chat["messages"][-1] if chat["messages"] else {}
        if not last.get("others"):
            return []
        versions = conversation.versions_of(last)
        prompt = conversation.dialogue(conversation.before_last_reply(chat))
        try:
            rewards = self.version_rewards(with_system_prompt(chat["system_prompt"], prompt), versions)
        except Exception:  # no reward model, or the footer below the reply says why
            rewards = None
        return conversation.version_options(versions, rewards)

    def show_all(self, chat: Conversation) -> list[Any]:
        """A conversation in which no reply is being generated, with all rewards and versions."""
        return self.show(chat, self.footers(chat), self.options(chat))

    def load_models(self) -> gr.HTML:
        """Load the models that the page was started with, or chosen since; shows what went wrong."""
        try:
            self.engine.load()
        except Exception as error:  # shown on the page, whatever it is
            return gr.HTML(f"<pre>{html.escape(self.engine.explain(error))}</pre>", visible=True)
        return gr.HTML(visible=False)

    # -- What clicks do ------------------------------------------------------------------------------------------------

    def start_reply(self, chat: Conversation, changed: Conversation, request: gr.Request, settings: Any) -> list[Any]:
        """Show the changed conversation and mark its reply as wanted.

        If it cannot be answered now, the visitor gets a hint and keeps the conversation as it was.
        """
        try:
            if problem := busy(chat):
                raise problem
            dialogue = conversation.dialogue(changed)
            if dialogue and not dialogue[-1]["content"].strip():
                raise ValueError("the message is empty")
            self.engine.check(dialogue, Settings(*settings))
        except Exception as error:
            return self.refuse(chat, error)
        self.writing[request.session_hash] = Writing()
        return self.show(changed, self.footers(changed), is_busy=True)

    def refuse(self, chat: Conversation, error: Exception) -> list[Any]:
        """Say why something is not done. An error that is raised would cover the conversation with Gradio's own."""
        gr.Warning(html.escape(self.engine.explain(error)), title="Not now")
        # the browser may already show the change
        return [gr.skip(), gr.skip() if chat.get("is_busy") else self.show_all(chat)[1], gr.skip()]

    def ask(self, chat: Conversation, text: str, request: gr.Request, *settings: Any) -> list[Any]:
        """Move the message from the box into the chat; a rejected message stays in the box."""
        state, messages, box = self.start_reply(chat, conversation.ask(chat, text), request, settings)
        return [state, messages, box if box == gr.skip() else gr.Textbox("", submit_btn=False, stop_btn=True)]

    def ask_example(self, chat: Conversation, event: gr.SelectData, request: gr.Request, *settings: Any) -> list[Any]:
        """A click on one of the EXAMPLES; what is typed in the box stays there."""
        return self.start_reply(chat, conversation.ask(chat, event.value["text"]), request, settings)

    def retry(self, chat: Conversation, request: gr.Request, *settings: Any) -> list[Any]:
        return self.start_reply(chat, conversation.retry(chat), request, settings)

    def edit(self, chat: Conversation, event: gr.EditData, request: gr.Request, *settings: Any) -> list[Any]:
        shown_index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        _, indices = conversation.to_chatbot(chat, [])
        edited = conversation.edit(chat, indices[shown_index], str(event.value))
        return self.start_reply(chat, edited, request, settings)

    def stop(self, chat: Conversation, request: gr.Request) -> list[Any]:
        """Let the reply end itself, which shows what has been written; one that still waits ends here."""
        writing = self.writing.get(request.session_hash)
        if writing is None or self.end(writing):
            return [gr.skip()] * 3
        return self.show_all(stopped_before_the_first_word(chat))

    def end(self, writing: Writing) -> bool:
        """Tell a reply to end; returns whether it had started, so that it will show its end itself."""
        with self.lock:
            writing.stop.set()
            return writing.has_started

    def leave(self, _: str | None, request: gr.Request) -> None:
        """Before something else is shown: end the reply and wait until its last piece is on its way."""
        if writing := self.writing.get(request.session_hash):
            writing.is_left = True
            if self.end(writing):
                writing.ended.wait(SECONDS_TO_END)

    def forget(self, request: gr.Request) -> None:
        """The page was closed."""
        if writing := self.writing.pop(request.session_hash, None):
            self.end(writing)

    def undo(self, chat: Conversation, draft: str) -> list[Any]:
        """Drop the last question and its reply; the question returns to the box, above what is typed there."""
        if problem := busy(chat):
            return self.refuse(chat, problem)
        earlier, question = conversation.undo(chat)
        text = f"{question}\n\n{draft}" if draft.strip() else question
        return [*self.show_all(earlier)[:2], gr.Textbox(text, submit_btn=True, stop_btn=False)]

    def pick(self, chat: Conversation, event: gr.SelectData) -> list[Any]:
        if problem := busy(chat):
            return self.refuse(chat, problem)
        return self.show_all(conversation.pick(chat, int(event.value)))

    def new_chat(self, system_prompt: str) -> list[Any]:
        return self.show(conversation.new(system_prompt), [])

    def open(self, _: Any, opened: list[Any] | None) -> list[Any]:
        """Show a saved conversation: `opened` is (the saved conversations, the one to show or None)."""
        listed, found = opened or (None, None)
        chat = conversation.checked(found)
        system_prompt = chat["system_prompt"] if chat["messages"] else gr.skip()  # without a chat, what was typed stays
        return [*self.show_all(chat), system_prompt, *self.list_saved(listed, chat["id"])]

    def open_first(self, opened: list[Any] | None, chat: Conversation, request: gr.Request) -> list[Any]:
        """What a page shows first: the latest conversation, unless a question was asked before this could answer."""
        shown = self.open(None, opened)
        if request.session_hash in self.writing:
            return [*[gr.skip()] * 4, *self.list_saved(opened[0] if opened else None, chat["id"])]
        return shown

    def list_saved(self, listed: dict[str, Any] | None, saved_id: str | None) -> list[Any]:
        """The saved conversations, of which the one shown, `saved_id`, is selected if it is saved; and the undo."""
        chats, deleted = (listed or {}).get("chats", []), (listed or {}).get("deleted", "")
        is_listed = any(identity == saved_id for _, identity in chats)
        undo = gr.Button(f"Undo: bring back “{conversation.shortened(deleted, 24)}”", visible=bool(deleted))
        return [gr.Radio(choices=chats, value=saved_id if is_listed else None), undo]

    def reply(self, chat: Conversation, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Answer the user's last message: updates the page while the reply grows, then adds its reward.

        When the visitor stops the reply, it ends with what has been written. If it was stopped while it waited for its
        turn, the page already shows that.
        """
        writing = self.writing.get(request.session_hash)
        with self.lock:
            is_wanted = writing is not None and not writing.has_started and not writing.stop.is_set()
            if is_wanted:
                writing.has_started = True
        if not is_wanted:
            yield [gr.skip()] * 3  # without any update, Gradio would empty the chat
            return
        try:
            yield from self.write(chat, Settings(*values), writing)
        finally:
            writing.ended.set()

    def write(self, chat: Conversation, settings: Settings, writing: Writing) -> Iterator[list[Any]]:
        chat = {**chat, "system_prompt": settings.system_prompt}
        dialogue = conversation.dialogue(chat)
        footers = self.footers(chat)
        if settings.candidates > 1:
            footers.append(f"writing {settings.candidates} replies at once; the best one will be shown")
        answered = chat
        try:
            for replies in self.engine.generate(dialogue, settings, stop=writing.stop):
                if any(reply.content or reply.thinking for reply in replies):
                    answered = conversation.answer(chat, replies)
                    if not writing.stop.is_set():
                        yield self.show(answered, footers, is_busy=True)
            if not conversation.is_answered(answered):
                answered = stopped_before_the_first_word(chat)
            elif not writing.is_left and (ranked := self.engine.rank(dialogue, replies, settings.system_prompt)):
                answered = conversation.answer(chat, [reply for reply, _ in ranked])
        except Exception as error:  # without this last update the page would wait forever
            if chat.get("versions") and not conversation.is_answered(answered):
                gr.Warning(
                    html.escape(self.engine.explain(error)), title="No reply"
                )  # the replies that were to be replaced stay
            else:
                answered = conversation.note(answered, self.engine.explain(error))
        answered = conversation.settled(answered)
        # who has left waits for this, and sees the rewards when the conversation is opened again
        yield self.show(answered, []) if writing.is_left else self.show_all(answered)


def load_button(engine: ChatEngine) -> dict[str, Any]:
    """The button in the chat, which is there until a model is."""
    return {"value": f"Load {utils.seen_from_here(engine.policy_name)}", "visible": engine.policy is None}


def formulas(is_plain: bool) -> list[dict[str, Any]]:
    return [] if is_plain else conversation.LATEX_DELIMITERS


def busy(chat: Conversation) -> ValueError | None:
    """Why nothing else can change the conversation while a reply is being written."""
    return ValueError("a reply is being written: stop it first, or wait") if chat.get("is_busy") else None


def stopped_before_the_first_word(chat: Conversation) -> Conversation:
    """Without a reply to keep, a note says why there is none."""
    chat = conversation.settled(chat)
    return chat if conversation.is_answered(chat) else conversation.note(chat, "stopped before the first word")
