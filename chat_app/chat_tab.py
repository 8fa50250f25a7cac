"""The page's chat: what its components are and what each click does.

Conversations live in the browser (`localStorage`, one entry each, so that two tabs cannot overwrite one another's).
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from chat_app import conversation as talk
from chat_app.engine import MOST_CANDIDATES, Settings, Stage, dialogue_with

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE = {**QUIET, "concurrency_limit": None}  # but through the queue: outside it, errors reach no visitor
# Everything that writes shares one queue: a model serves one visitor at a time, the others see their place.
WRITING = {"concurrency_id": "writing", "concurrency_limit": 1, "api_visibility": "private"}


# A reply's pieces in order; conversations in and out of localStorage; two places where Gradio would show a message's
# escaped form.
SCRIPT = """
<script>
// Gradio hands a piece of a reply on at once while the tab is hidden, a little later while it is seen: a tab that is
// hidden or left in between got two pieces in the wrong order, and lost the reply. Said to be hidden, order is kept.
Object.defineProperty(document, "visibilityState", { get: () => "hidden" });
window.conversations = (() => {
  const prefix = "rl-with-rm/conversation/";
  const read = key => { try { return JSON.parse(localStorage.getItem(key)); } catch { return null; } };
  // what somebody else wrote there is no conversation
  const all = () => Object.keys(localStorage).filter(key => key.startsWith(prefix)).map(read)
    .filter(kept => kept?.conversation?.id && Array.isArray(kept.conversation.messages))
    .sort((a, b) => b.time - a.time);
  const list = () => all().map(kept => [String(kept.title), String(kept.conversation.id)]);
  // another tab may have gone on with the same conversation: then this one's goes on beside it
  const seen = {}, renamed = {};
  return {
    open: id => {
      const kept = id ? read(prefix + id) : all()[0];
      if (kept) seen[kept.conversation.id] = kept.time;
      return [list(), kept?.conversation ?? null];
    },
    save: ([title, conversation]) => {
      let problem = "";
      const before = read(prefix + conversation.id);
      const changed = before && before.time !== seen[conversation.id];
      if (changed) renamed[conversation.id] ??= crypto.randomUUID?.() ?? String(Math.random()).slice(2);
      const id = renamed[conversation.id] ?? conversation.id;
      try {
        const kept = { time: Date.now() + Math.random(), title, conversation: { ...conversation, id } };
        if (title) localStorage.setItem(prefix + id, JSON.stringify(kept));
        if (title) seen[id] = kept.time;
      } catch (error) { problem = "This browser keeps no more conversations: delete one. (" + error.name + ")"; }
      return [list(), problem, id];
    },
    remove: id => { localStorage.removeItem(prefix + id); return list(); },
  };
})();
(() => {
  const asWritten = text => {
    const box = document.createElement("textarea");  // its content is text, whatever it looks like
    box.innerHTML = text.replace(/\\s*<small class="footer">.*?<\\/small>/gs, "");
    return box.value;
  };
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(asWritten(text));
  }
  new MutationObserver(() => document.querySelectorAll("textarea.edit-textarea:not([data-plain])").forEach(box => {
    box.dataset.plain = "yes";
    box.value = asWritten(box.value);
    box.dispatchEvent(new Event("input"));
  })).observe(document, { childList: true, subtree: true });
})();
</script>
"""


def reasons(stage: Stage, error: Exception) -> gr.Error:
    """An error for the visitor, as Gradio wants it raised."""
    return gr.Error(html.escape(stage.explain(error)), print_exception=False)


class ChatTab:
    """The chat's components and what each click does. All follows from `conversation`, the one state of a visitor."""

    def __init__(self, stage: Stage, page: gr.Blocks):
        self.stage = stage
        # Sessions whose reply is still wanted: Gradio's `cancels` misses one that its page was only about to ask for.
        self.wanted: set[str | None] = set()
        with gr.Sidebar(open=False, width=300):
            begin = gr.Button("New chat", elem_id="new-chat")
            kept = gr.Radio([], label="Kept in this browser", elem_id="kept")
            remove = gr.Button("Delete this chat", variant="stop", size="sm")
            storage_problem = gr.Markdown()
        self.conversation = gr.State(talk.new())  # each visitor gets one of their own when the page loads
        self.chatbot = gr.Chatbot(
            elem_id="chat", height="60vh", show_label=False, scale=1, buttons=["copy"], editable="user",
            render_markdown=False, feedback_options=None, placeholder="Say something.",
        )  # fmt: skip
        self.textbox = gr.Textbox(
            show_label=False, placeholder="Message", submit_btn=True, autofocus=True, elem_id="message", max_lines=12,
            container=False,
        )  # fmt: skip
        with gr.Accordion("How to reply", open=False):
            self.system_prompt = gr.Textbox("", label="System prompt", lines=2, placeholder="none")
            with gr.Row():
                temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0 takes the likeliest token")
                top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="draw from this share of likelihood")
                length = gr.Slider(1, 8192, 512, step=1, label="Max new tokens", info="a reply ends here at the latest")
                best_of = gr.Slider(1, MOST_CANDIDATES, 1, step=1, label="Best of N", info="written at once, ranked")
            thinking = gr.Checkbox(False, label="Think first", info="for models that can, such as Qwen3")
        self.settings = [self.system_prompt, temperature, top_p, length, thinking, best_of]

        # a conversation reaches the browser's storage through hidden values, which JavaScript reads and writes
        to_keep, titles, opened, kept_as = (gr.JSON(visible="hidden") for _ in range(4))
        whole = [self.conversation, self.chatbot, self.textbox]

        keeping = {"fn": self.to_keep, "inputs": self.conversation, "outputs": to_keep, **AT_ONCE}
        save = {"fn": None, "inputs": to_keep, "outputs": [titles, storage_problem, kept_as], **QUIET,
                "js": "kept => window.conversations.save(kept)"}  # fmt: skip

        def keep_after(event: Any) -> None:
            event.then(**keeping).then(**save).then(self.list_kept, [titles, kept_as], kept, **AT_ONCE)

        def keep_first(event: Any) -> Any:
            """What leaves a conversation ends the writing in it, and what was written is kept."""
            return event(**keeping, cancels=replying).then(**save)

        replying = []
        for event, change, inputs in (
            (self.textbox.submit, self.say, [self.conversation, self.textbox, *self.settings]),
            (self.chatbot.retry, self.retry, [self.conversation, *self.settings]),
            (self.chatbot.edit, self.edit, [self.conversation, *self.settings]),
        ):
            begun = event(change, inputs, whole, **AT_ONCE)
            begun.failure(self.show_as_it_is, self.conversation, self.chatbot, **AT_ONCE)
            running = begun.success(
                self.reply, [self.conversation, *self.settings], whole, show_progress="minimal",
                show_progress_on=self.chatbot, **WRITING,
            )  # fmt: skip
            replying.append(running)
            keep_after(begun)  # a page that is closed in the middle of a reply keeps the question
            keep_after(running)
        # first the end of the writing, then what follows: a cancelled event's last words must not come after
        keep_after(
            self.textbox.stop(None, None, None, cancels=replying, **QUIET).then(
                self.stop, self.conversation, whole, **AT_ONCE
            )
        )
        keep_after(self.chatbot.undo(self.undo, [self.conversation, self.textbox], whole, **AT_ONCE))
        keep_after(self.chatbot.option_select(self.pick, self.conversation, whole, **AT_ONCE))
        for event in (begin.click, self.chatbot.clear):
            keep_after(keep_first(event).then(self.begin, self.system_prompt, whole, **AT_ONCE))

        show_opened = {"fn": self.open, "inputs": [kept, opened], "outputs": [*whole, self.system_prompt, kept]}
        page.load(**show_opened, js="(_, __) => [null, window.conversations.open(null)]", **AT_ONCE)
        keep_first(kept.input).then(**show_opened, js="(id, _) => [id, window.conversations.open(id)]", **AT_ONCE)
        forget = {"fn": None, "inputs": kept, "outputs": titles, "js": "id => window.conversations.remove(id)"}
        keep_after(
            remove.click(**forget, cancels=replying, **QUIET).then(self.begin, self.system_prompt, whole, **AT_ONCE)
        )

    # -- What is shown -----------------------------------------------------------------------------------------------

    def show(self, kept: talk.Conversation, footers: list[str], options: Any = (), is_busy: bool = False) -> list[Any]:
        """The values of `whole`: the state, its messages, and the box with the button that fits."""
        messages, _ = talk.shown(kept, footers, options)
        return [{**kept, "is_busy": is_busy}, messages, gr.Textbox(submit_btn=not is_busy, stop_btn=is_busy)]

    def footers(self, kept: talk.Conversation) -> list[str]:
        """A line under each reply: its reward, or why it has none; nothing if nobody scores."""
        dialogues = [dialogue_with(kept["system_prompt"], said) for said in talk.dialogues_to_score(kept)]
        if self.stage.reward is None or not dialogues:
            return []
        try:
            return talk.reward_footers(self.stage.rewards_of(dialogues))
        except Exception as error:  # the replies themselves are fine
            return [f"no reward: {self.stage.explain(error)}"] * len(dialogues)

    def options(self, kept: talk.Conversation) -> list[tuple[str, int]]:
        """The other candidates of the last reply, if there are any."""
        last = (kept["messages"] or [{}])[-1]
        if not last.get("others"):
            return []
        contents = [last["content"], *(other["content"] for other in last["others"])]
        start = dialogue_with(kept["system_prompt"], talk.dialogue(talk.before_last_reply(kept)))
        try:
            dialogues = [[*start, {"role": "assistant", "content": content}] for content in contents]
            rewards = self.stage.rewards_of(dialogues) if self.stage.reward else None
        except Exception:  # said below the reply itself already
            rewards = None
        return talk.candidate_options(contents, rewards)

    def show_all(self, kept: talk.Conversation) -> list[Any]:
        footers, options = self.footers(kept), self.options(kept)
        if options and footers:
            footers[-1] += f" · one of {len(options) + 1} candidates"
        return self.show(kept, footers, options)

    def show_as_it_is(self, kept: talk.Conversation) -> list[dict[str, Any]]:
        """What was refused changed nothing, though the browser may have shown it already."""
        return self.show_all(kept)[1]

    # -- What clicks do ----------------------------------------------------------------------------------------------

    def begin_reply(self, kept: talk.Conversation, request: gr.Request) -> list[Any]:
        self.wanted.add(request.session_hash)
        return self.show(kept, self.footers(kept), is_busy=True)

    def refuse(self, kept: talk.Conversation, asked: talk.Conversation, values: tuple[Any, ...]) -> None:
        """Raise, before anything is dropped, if `asked` cannot be answered now."""
        try:
            if kept.get("is_busy"):
                raise ValueError("a reply is being written: stop it first, or wait")
            dialogue = talk.dialogue(asked)
            if dialogue and not dialogue[-1]["content"].strip():
                raise ValueError("the message is empty")
            self.stage.refuse(dialogue, Settings(*values))
        except Exception as error:
            raise reasons(self.stage, error) from error

    def say(self, kept: talk.Conversation, text: str, request: gr.Request, *values: Any) -> list[Any]:
        """Put the message into the chat; what cannot be answered is refused at once, and stays in the box."""
        said = talk.say(kept, text)
        self.refuse(kept, said, values)
        conversation, messages, _ = self.begin_reply(said, request)
        return [conversation, messages, gr.Textbox("", submit_btn=False, stop_btn=True)]

    def retry(self, kept: talk.Conversation, request: gr.Request, *values: Any) -> list[Any]:
        again = talk.before_last_reply(kept)
        self.refuse(kept, again, values)
        return self.begin_reply(again, request)

    def edit(self, kept: talk.Conversation, event: gr.EditData, request: gr.Request, *values: Any) -> list[Any]:
        place = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        _, indices = talk.shown(kept, [])
        edited = talk.edit(kept, indices[place], str(event.value))
        self.refuse(kept, edited, values)
        return self.begin_reply(edited, request)

    def stop(self, kept: talk.Conversation, request: gr.Request) -> list[Any]:
        self.wanted.discard(request.session_hash)
        is_unanswered = bool(kept["messages"]) and kept["messages"][-1]["role"] == "user"
        return self.show_all(talk.note(kept, "stopped before a word was written") if is_unanswered else kept)

    def undo(self, kept: talk.Conversation, draft: str) -> list[Any]:
        earlier, text = talk.undo(kept)
        conversation, messages, _ = self.show_all(earlier)
        whole_text = f"{text}\n\n{draft}" if draft.strip() else text
        return [conversation, messages, gr.Textbox(whole_text, submit_btn=True, stop_btn=False)]

    def pick(self, kept: talk.Conversation, event: gr.SelectData) -> list[Any]:
        return self.show_all(talk.pick(kept, int(event.value)))

    def begin(self, system_prompt: str, request: gr.Request) -> list[Any]:
        self.wanted.discard(request.session_hash)
        return self.show(talk.new(system_prompt), [])

    def open(self, _: Any, opened: list[Any] | None, request: gr.Request) -> list[Any]:
        """Show what the browser kept: (list of titles and ids, the conversation or None)."""
        self.wanted.discard(request.session_hash)
        titles, found = opened or ([], None)
        kept = talk.checked(found)
        return [*self.show_all(kept), kept["system_prompt"], self.list_kept(titles, kept["id"])]

    def to_keep(self, kept: talk.Conversation) -> list[Any]:
        return [talk.title(kept) if kept["messages"] else "", kept]

    def list_kept(self, titles: list[tuple[str, str]] | None, kept_as: str) -> gr.Radio:
        """The list, with the conversation on the page marked by the id that the browser keeps it under."""
        choices = [(title, identity) for title, identity in titles or []]
        is_known = kept_as in [identity for _, identity in choices]
        return gr.Radio(choices=choices, value=kept_as if is_known else None)

    def reply(self, kept: talk.Conversation, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Answer the user's last message: the page again and again while it is written, then with its reward.

        Once the visitor has stopped it or left the conversation, it ends and changes nothing that is shown.
        """
        if request.session_hash not in self.wanted:
            return
        settings = Settings(*values)
        kept = {**kept, "system_prompt": settings.system_prompt}
        dialogue, footers = talk.dialogue(kept), self.footers(kept)
        count = settings.candidates
        writing = [f"writing {count} replies at once; the best will be shown"] if count > 1 else []
        answered = kept
        try:
            for replies in self.stage.write(dialogue, settings):
                if request.session_hash not in self.wanted:
                    return
                answered = talk.answer(kept, [(reply.content, reply.thinking) for reply in replies])
                yield self.show(answered, footers + writing, is_busy=True)
            ranked = self.stage.ranked(dialogue, replies, settings.system_prompt)
            answered = talk.answer(kept, [(reply.content, reply.thinking) for reply, _ in ranked])
        except Exception as error:  # a stream must end with a word to the visitor, or the page waits for ever
            answered = talk.note(answered, self.stage.explain(error))
        yield self.show_all(answered)
