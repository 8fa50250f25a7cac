"""The Chat tab. Conversations are kept in the browser, by the JavaScript in page_head.html."""

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
        # Sessions that wait for a reply. Gradio's `cancels` alone misses a reply that the page has not requested yet.
        self.waiting: set[str | None] = set()
        with gr.Sidebar(open=False, width=300):
            new_chat = gr.Button("New chat", elem_id="new-chat")
            saved = gr.Radio([], label="Saved in this browser", elem_id="saved-chats")
            delete = gr.Button("Delete this chat", variant="stop", size="sm")
            storage_problem = gr.Markdown()
        self.conversation = gr.State(conversation.new())
        chatbot = gr.Chatbot(
            elem_id="chat", height="60vh", show_label=False, scale=1, buttons=["copy"], editable="user",
            render_markdown=False, feedback_options=None, placeholder="Say something.",
        )  # fmt: skip
        textbox = gr.Textbox(
            show_label=False, placeholder="Message", submit_btn=True, autofocus=True, elem_id="message", max_lines=12,
            container=False,
        )  # fmt: skip
        with gr.Accordion("Generation settings", open=False):
            system_prompt = gr.Textbox("", label="System prompt", lines=2, placeholder="none")
            with gr.Row():
                temperature, top_p, max_new_tokens, best_of = (
                    gr.Slider(low, high, value, step=step, label=label, info=info)
                    for label, info, low, high, value, step in (
                        ("Temperature", "0 always takes the likeliest token", 0, 2, Settings.temperature, 0.05),
                        ("Top-p", "sample from this share of probability", 0.05, 1, Settings.top_p, 0.05),
                        ("Max new tokens", "longer replies are cut", 1, 8192, Settings.max_new_tokens, 1),
                        ("Best of N", "generate N replies, show the best", 1, MAX_CANDIDATES, Settings.candidates, 1),
                    )
                )
            thinking = gr.Checkbox(False, label="Think first", info="for models that can, such as Qwen3")
        # in the order of the fields of `Settings`
        self.settings = [system_prompt, temperature, top_p, max_new_tokens, thinking, best_of]

        # hidden components that carry conversations to the browser's storage and back
        to_save, titles, opened, saved_id = (gr.JSON(visible="hidden") for _ in range(4))
        shown = [self.conversation, chatbot, textbox]

        prepare_saving = {"fn": lambda chat: [conversation.title(chat), chat], "inputs": self.conversation,
                          "outputs": to_save, **AT_ONCE}  # fmt: skip
        save = {"fn": None, "inputs": to_save, "outputs": [titles, storage_problem, saved_id], **QUIET,
                "js": "conversation => window.conversations.save(conversation)"}  # fmt: skip

        def save_after(event: Any) -> None:
            event.then(**prepare_saving).then(**save).then(self.list_saved, [titles, saved_id], saved, **AT_ONCE)

        def save_first(event: Any) -> Any:
            """Before another conversation is shown: stop the reply and save what has been generated of it."""
            return event(**prepare_saving, cancels=replying).then(**save)

        replying = []
        for event, change, inputs in (
            (textbox.submit, self.ask, [self.conversation, textbox, *self.settings]),
            (chatbot.retry, self.retry, [self.conversation, *self.settings]),
            (chatbot.edit, self.edit, [self.conversation, *self.settings]),
        ):
            accepted = event(change, inputs, shown, **AT_ONCE)
            # the browser may already show a change that was rejected
            accepted.failure(lambda chat: self.show_all(chat)[1], self.conversation, chatbot, **AT_ONCE)
            running = accepted.success(
                self.reply, [self.conversation, *self.settings], shown, show_progress="minimal",
                show_progress_on=chatbot, **GENERATION,
            )  # fmt: skip
            replying.append(running)
            save_after(accepted)  # the question is saved even if the page is closed in the middle of the reply
            save_after(running)
        # cancel the reply before anything else is shown, or its last piece could arrive afterwards
        stopped = textbox.stop(None, None, None, cancels=replying, **QUIET)
        save_after(stopped.then(self.stop, self.conversation, shown, **AT_ONCE))
        save_after(chatbot.undo(self.undo, [self.conversation, textbox], shown, **AT_ONCE))
        save_after(chatbot.option_select(self.pick, self.conversation, shown, **AT_ONCE))
        for event in (new_chat.click, chatbot.clear):
            save_after(save_first(event).then(self.new_chat, system_prompt, shown, **AT_ONCE))

        show_opened = {"fn": self.open, "inputs": [saved, opened], "outputs": [*shown, system_prompt, saved]}
        page.load(**show_opened, js="(_, __) => [null, window.conversations.open(null)]", **AT_ONCE)
        save_first(saved.input).then(**show_opened, js="(id, _) => [id, window.conversations.open(id)]", **AT_ONCE)
        remove = {"fn": None, "inputs": saved, "outputs": titles, "js": "id => window.conversations.remove(id)"}
        removed = delete.click(**remove, cancels=replying, **QUIET)
        save_after(removed.then(self.new_chat, system_prompt, shown, **AT_ONCE))

    # -- What is shown -------------------------------------------------------------------------------------------------

    def show(self, chat: Conversation, footers: list[str], options: Any = (), is_busy: bool = False) -> list[Any]:
        """New values for the state, the chat and the text box, which has a Stop button while a reply is generated."""
        messages, _ = conversation.to_chatbot(chat, footers, options)
        return [{**chat, "is_busy": is_busy}, messages, gr.Textbox(submit_btn=not is_busy, stop_btn=is_busy)]

    def footers(self, chat: Conversation) -> list[str]:
        """A line for each reply: its reward, or why it has none; empty lines without a reward model."""
        replies = conversation.dialogues_to_score(chat)
        if self.engine.reward_model is None:
            return [""] * len(replies)
        try:
            rewards = self.engine.rewards_of([with_system_prompt(chat["system_prompt"], reply) for reply in replies])
            return conversation.reward_footers(rewards)
        except Exception as error:  # the replies are shown without rewards
            return [f"no reward: {self.engine.explain(error)}"] * len(replies)

    def options(self, chat: Conversation) -> list[tuple[str, int]]:
        """The other candidates of the last reply, if there are any."""
        last = chat["messages"][-1] if chat["messages"] else {}
        if not last.get("others"):
            return []
        contents = [last["content"], *(other["content"] for other in last["others"])]
        question = conversation.dialogue(conversation.before_last_reply(chat))
        prompt = with_system_prompt(chat["system_prompt"], question)
        try:
            rewards = self.engine.rewards_of([with_reply(prompt, content) for content in contents])
        except Exception:  # no reward model, or the footer below the reply says why
            rewards = None
        return conversation.candidate_options(contents, rewards)

    def show_all(self, chat: Conversation) -> list[Any]:
        """A conversation in which no reply is being generated, with all rewards and candidates."""
        footers, options = self.footers(chat), self.options(chat)
        if options and footers[-1]:
            footers[-1] += f" · one of {len(options) + 1} candidates"
        return self.show(chat, footers, options)

    # -- What clicks do ------------------------------------------------------------------------------------------------

    def start_reply(self, chat: Conversation, changed: Conversation, request: gr.Request, settings: Any) -> list[Any]:
        """Show the changed conversation and mark its reply as wanted.

        If it cannot be answered now, the visitor gets an error and keeps the conversation as it was.
        """
        with errors_shown(self.engine):
            if chat.get("is_busy"):
                raise ValueError("a reply is being written: stop it first, or wait")
            dialogue = conversation.dialogue(changed)
            if dialogue and not dialogue[-1]["content"].strip():
                raise ValueError("the message is empty")
            self.engine.check(dialogue, Settings(*settings))
        self.waiting.add(request.session_hash)
        return self.show(changed, self.footers(changed), is_busy=True)

    def ask(self, chat: Conversation, text: str, request: gr.Request, *settings: Any) -> list[Any]:
        """Move the message from the box into the chat; a rejected message stays in the box."""
        shown = self.start_reply(chat, conversation.ask(chat, text), request, settings)
        return [*shown[:2], gr.Textbox("", submit_btn=False, stop_btn=True)]

    def retry(self, chat: Conversation, request: gr.Request, *settings: Any) -> list[Any]:
        return self.start_reply(chat, conversation.before_last_reply(chat), request, settings)

    def edit(self, chat: Conversation, event: gr.EditData, request: gr.Request, *settings: Any) -> list[Any]:
        shown_index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        _, indices = conversation.to_chatbot(chat, [])
        edited = conversation.edit(chat, indices[shown_index], str(event.value))
        return self.start_reply(chat, edited, request, settings)

    def stop(self, chat: Conversation, request: gr.Request) -> list[Any]:
        self.waiting.discard(request.session_hash)
        is_unanswered = bool(chat["messages"]) and chat["messages"][-1]["role"] == "user"
        return self.show_all(conversation.note(chat, "stopped before the first word") if is_unanswered else chat)

    def undo(self, chat: Conversation, draft: str) -> list[Any]:
        """Drop the last question and its reply; the question returns to the box, above what is typed there."""
        earlier, question = conversation.undo(chat)
        text = f"{question}\n\n{draft}" if draft.strip() else question
        return [*self.show_all(earlier)[:2], gr.Textbox(text, submit_btn=True, stop_btn=False)]

    def pick(self, chat: Conversation, event: gr.SelectData) -> list[Any]:
        return self.show_all(conversation.pick(chat, int(event.value)))

    def new_chat(self, system_prompt: str, request: gr.Request) -> list[Any]:
        self.waiting.discard(request.session_hash)
        return self.show(conversation.new(system_prompt), [])

    def open(self, _: Any, opened: list[Any] | None, request: gr.Request) -> list[Any]:
        """Show a saved conversation: `opened` is (titles and ids of all conversations, the one to show or None)."""
        self.waiting.discard(request.session_hash)
        titles, found = opened or ([], None)
        chat = conversation.checked(found)
        system_prompt = chat["system_prompt"] if chat["messages"] else gr.skip()  # without a chat, what was typed stays
        return [*self.show_all(chat), system_prompt, self.list_saved(titles, chat["id"])]

    def list_saved(self, titles: list[tuple[str, str]] | None, saved_id: str) -> gr.Radio:
        """The list of saved conversations; the one shown, whose id is `saved_id`, is selected if it is saved."""
        is_listed = any(identity == saved_id for _, identity in titles or [])
        return gr.Radio(choices=titles or [], value=saved_id if is_listed else None)

    def reply(self, chat: Conversation, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Answer the user's last message: updates the page while the reply grows, then adds its reward.

        Once the visitor has stopped the reply or left the conversation, it ends without another update.
        """
        if request.session_hash not in self.waiting:
            return
        settings = Settings(*values)
        chat = {**chat, "system_prompt": settings.system_prompt}
        dialogue = conversation.dialogue(chat)
        footers = self.footers(chat)
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
        except Exception as error:  # without this last update the page would wait forever
            answered = conversation.note(answered, self.engine.explain(error))
        yield self.show_all(answered)
