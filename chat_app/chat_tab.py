"""The Chat tab. Conversations are kept in the browser, by the JavaScript in page_head.html."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from chat_app import conversation
from chat_app.conversation import Conversation, with_reply, with_system_prompt
from chat_app.engine import MAX_CANDIDATES, ChatEngine, Settings
from chat_app.events import AT_ONCE, GENERATION, QUIET, errors_shown


class ChatTab:
    """The tab's components and what each click does. A visitor's only state is `conversation`."""

    def __init__(self, engine: ChatEngine, page: gr.Blocks):
        self.engine = engine
        # Sessions that still wait for their reply. Gradio's `cancels` alone misses a reply that the page has not
        # requested yet.
        self.waiting: set[str | None] = set()
        with gr.Sidebar(open=False, width=300):
            new_chat = gr.Button("New chat", elem_id="new-chat")
            saved = gr.Radio([], label="Saved in this browser", elem_id="saved-chats")
            delete = gr.Button("Delete this chat", variant="stop", size="sm")
            storage_problem = gr.Markdown()
        self.conversation = gr.State(conversation.new())
        self.chatbot = gr.Chatbot(
            elem_id="chat", height="60vh", show_label=False, scale=1, buttons=["copy"], editable="user",
            render_markdown=False, feedback_options=None, placeholder="Say something.",
        )  # fmt: skip
        self.textbox = gr.Textbox(
            show_label=False, placeholder="Message", submit_btn=True, autofocus=True, elem_id="message", max_lines=12,
            container=False,
        )  # fmt: skip
        with gr.Accordion("Generation settings", open=False):
            self.system_prompt = gr.Textbox("", label="System prompt", lines=2, placeholder="none")
            with gr.Row():
                temperature = gr.Slider(
                    0, 2, 0.7, step=0.05, label="Temperature", info="0 always takes the likeliest token"
                )
                top_p = gr.Slider(
                    0.05,
                    1,
                    0.9,
                    step=0.05,
                    label="Top-p",
                    info="sample from this share of probability",
                )
                max_new_tokens = gr.Slider(1, 8192, 512, step=1, label="Max new tokens", info="longer replies are cut")
                best_of = gr.Slider(
                    1, MAX_CANDIDATES, 1, step=1, label="Best of N", info="generate N replies, show the best"
                )
            thinking = gr.Checkbox(False, label="Think first", info="for models that can, such as Qwen3")
        self.settings = [self.system_prompt, temperature, top_p, max_new_tokens, thinking, best_of]

        # hidden components through which conversations reach the browser's storage and come back
        to_save, titles, opened, saved_id = (gr.JSON(visible="hidden") for _ in range(4))
        shown = [self.conversation, self.chatbot, self.textbox]

        prepare_saving = {"fn": self.to_save, "inputs": self.conversation, "outputs": to_save, **AT_ONCE}
        save = {"fn": None, "inputs": to_save, "outputs": [titles, storage_problem, saved_id], **QUIET,
                "js": "conversation => window.conversations.save(conversation)"}  # fmt: skip

        def save_after(event: Any) -> None:
            event.then(**prepare_saving).then(**save).then(self.list_saved, [titles, saved_id], saved, **AT_ONCE)

        def save_first(event: Any) -> Any:
            """Before another conversation is shown: end the reply and save what has been written of it."""
            return event(**prepare_saving, cancels=replying).then(**save)

        replying = []
        for event, change, inputs in (
            (self.textbox.submit, self.ask, [self.conversation, self.textbox, *self.settings]),
            (self.chatbot.retry, self.retry, [self.conversation, *self.settings]),
            (self.chatbot.edit, self.edit, [self.conversation, *self.settings]),
        ):
            accepted = event(change, inputs, shown, **AT_ONCE)
            # the browser may show a change already that was refused
            accepted.failure(lambda chat: self.show_all(chat)[1], self.conversation, self.chatbot, **AT_ONCE)
            running = accepted.success(
                self.reply, [self.conversation, *self.settings], shown, show_progress="minimal",
                show_progress_on=self.chatbot, **GENERATION,
            )  # fmt: skip
            replying.append(running)
            save_after(accepted)  # the question is saved even if the page is closed in the middle of the reply
            save_after(running)
        # cancel the reply before anything else is shown: its last piece must not arrive later
        stopped = self.textbox.stop(None, None, None, cancels=replying, **QUIET)
        save_after(stopped.then(self.stop, self.conversation, shown, **AT_ONCE))
        save_after(self.chatbot.undo(self.undo, [self.conversation, self.textbox], shown, **AT_ONCE))
        save_after(self.chatbot.option_select(self.pick, self.conversation, shown, **AT_ONCE))
        for event in (new_chat.click, self.chatbot.clear):
            save_after(save_first(event).then(self.new_chat, self.system_prompt, shown, **AT_ONCE))

        show_opened = {"fn": self.open, "inputs": [saved, opened], "outputs": [*shown, self.system_prompt, saved]}
        page.load(**show_opened, js="(_, __) => [null, window.conversations.open(null)]", **AT_ONCE)
        save_first(saved.input).then(**show_opened, js="(id, _) => [id, window.conversations.open(id)]", **AT_ONCE)
        remove = {"fn": None, "inputs": saved, "outputs": titles, "js": "id => window.conversations.remove(id)"}
        removed = delete.click(**remove, cancels=replying, **QUIET)
        save_after(removed.then(self.new_chat, self.system_prompt, shown, **AT_ONCE))

    # -- What is shown -----------------------------------------------------------------------------------------------

    def show(self, chat: Conversation, footers: list[str], options: Any = (), is_busy: bool = False) -> list[Any]:
        """The values of `shown`: the state, its messages, and the text box with a Send or a Stop button."""
        messages, _ = conversation.to_chatbot(chat, footers, options)
        return [{**chat, "is_busy": is_busy}, messages, gr.Textbox(submit_btn=not is_busy, stop_btn=is_busy)]

    def footers(self, chat: Conversation) -> list[str]:
        """A line for each reply: its reward, or why it has none; no lines without a reward model."""
        dialogues = [
            with_system_prompt(chat["system_prompt"], messages) for messages in conversation.dialogues_to_score(chat)
        ]
        if self.engine.reward_model is None or not dialogues:
            return []
        try:
            return conversation.reward_footers(self.engine.rewards_of(dialogues))
        except Exception as error:  # the replies are shown without rewards
            return [f"no reward: {self.engine.explain(error)}"] * len(dialogues)

    def options(self, chat: Conversation) -> list[tuple[str, int]]:
        """The other candidates of the last reply, if there are any."""
        last = (chat["messages"] or [{}])[-1]
        if not last.get("others"):
            return []
        contents = [last["content"], *(other["content"] for other in last["others"])]
        question = conversation.dialogue(conversation.before_last_reply(chat))
        prompt = with_system_prompt(chat["system_prompt"], question)
        try:
            dialogues = [with_reply(prompt, content) for content in contents]
            rewards = self.engine.rewards_of(dialogues) if self.engine.reward_model else None
        except Exception:  # the footer below the reply says why
            rewards = None
        return conversation.candidate_options(contents, rewards)

    def show_all(self, chat: Conversation) -> list[Any]:
        footers, options = self.footers(chat), self.options(chat)
        if options and footers:
            footers[-1] += f" · one of {len(options) + 1} candidates"
        return self.show(chat, footers, options)

    # -- What clicks do ----------------------------------------------------------------------------------------------

    def start_reply(self, chat: Conversation, request: gr.Request) -> list[Any]:
        self.waiting.add(request.session_hash)
        return self.show(chat, self.footers(chat), is_busy=True)

    def check(self, before: Conversation, after: Conversation, settings: tuple[Any, ...]) -> None:
        """Raise an error for the visitor, before anything is dropped, if `after` cannot be answered now."""
        with errors_shown(self.engine):
            if before.get("is_busy"):
                raise ValueError("a reply is being written: stop it first, or wait")
            dialogue = conversation.dialogue(after)
            if dialogue and not dialogue[-1]["content"].strip():
                raise ValueError("the message is empty")
            self.engine.check(dialogue, Settings(*settings))

    def ask(self, chat: Conversation, text: str, request: gr.Request, *settings: Any) -> list[Any]:
        """Move the message from the box into the chat; a refused message stays in the box."""
        asked = conversation.ask(chat, text)
        self.check(chat, asked, settings)
        state, messages, _ = self.start_reply(asked, request)
        return [state, messages, gr.Textbox("", submit_btn=False, stop_btn=True)]

    def retry(self, chat: Conversation, request: gr.Request, *settings: Any) -> list[Any]:
        unanswered = conversation.before_last_reply(chat)
        self.check(chat, unanswered, settings)
        return self.start_reply(unanswered, request)

    def edit(self, chat: Conversation, event: gr.EditData, request: gr.Request, *settings: Any) -> list[Any]:
        shown_index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        _, indices = conversation.to_chatbot(chat, [])
        edited = conversation.edit(chat, indices[shown_index], str(event.value))
        self.check(chat, edited, settings)
        return self.start_reply(edited, request)

    def stop(self, chat: Conversation, request: gr.Request) -> list[Any]:
        self.waiting.discard(request.session_hash)
        is_unanswered = bool(chat["messages"]) and chat["messages"][-1]["role"] == "user"
        return self.show_all(conversation.note(chat, "stopped before the first word") if is_unanswered else chat)

    def undo(self, chat: Conversation, draft: str) -> list[Any]:
        """Drop the last question and its reply; the question goes back into the box, before what is typed there."""
        earlier, question = conversation.undo(chat)
        state, messages, _ = self.show_all(earlier)
        text = f"{question}\n\n{draft}" if draft.strip() else question
        return [state, messages, gr.Textbox(text, submit_btn=True, stop_btn=False)]

    def pick(self, chat: Conversation, event: gr.SelectData) -> list[Any]:
        return self.show_all(conversation.pick(chat, int(event.value)))

    def new_chat(self, system_prompt: str, request: gr.Request) -> list[Any]:
        self.waiting.discard(request.session_hash)
        return self.show(conversation.new(system_prompt), [])

    def open(self, _: Any, opened: list[Any] | None, request: gr.Request) -> list[Any]:
        """Show what the browser kept: `opened` is (titles and ids of all conversations, one conversation or None)."""
        self.waiting.discard(request.session_hash)
        titles, found = opened or ([], None)
        chat = conversation.checked(found)
        return [*self.show_all(chat), chat["system_prompt"], self.list_saved(titles, chat["id"])]

    def to_save(self, chat: Conversation) -> list[Any]:
        return [conversation.title(chat) if chat["messages"] else "", chat]

    def list_saved(self, titles: list[tuple[str, str]] | None, saved_id: str) -> gr.Radio:
        """The list of conversations; the one with the id `saved_id`, which is on the page, is marked."""
        choices = [(title, identity) for title, identity in titles or []]
        is_listed = saved_id in [identity for _, identity in choices]
        return gr.Radio(choices=choices, value=saved_id if is_listed else None)

    def reply(self, chat: Conversation, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Answer the user's last message: updates the page while the reply grows, then adds its reward.

        It ends without another update once the visitor has stopped the reply or left the conversation.
        """
        if request.session_hash not in self.waiting:
            return
        settings = Settings(*values)
        chat = {**chat, "system_prompt": settings.system_prompt}
        dialogue = conversation.dialogue(chat)
        footers = self.footers(chat) or [""] * len(conversation.dialogues_to_score(chat))
        if settings.candidates > 1:
            footers.append(f"writing {settings.candidates} replies at once; the best one will be shown")
        answered = chat
        try:
            for replies in self.engine.generate(dialogue, settings):
                if request.session_hash not in self.waiting:
                    return
                answered = conversation.answer(chat, replies)
                yield self.show(answered, footers, is_busy=True)
            ranked = self.engine.rank(dialogue, replies, settings.system_prompt)
            answered = conversation.answer(chat, [reply for reply, _ in ranked])
        except Exception as error:  # without a last update the page would wait forever
            answered = conversation.note(answered, self.engine.explain(error))
        yield self.show_all(answered)
