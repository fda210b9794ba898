"""What a tokenizer's chat template puts around an assistant turn, found by rendering sentinels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .boundary import TurnBoundary
from .rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = Sequence[Message | Mapping[str, str]]

# What templates that print today's date print (Llama 3.2's own default): a score must not change overnight.
_TODAY = datetime(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# Contents that end in a letter, a digit and a sign: what stays the same behind them belongs to the template.
_QUESTIONS = ("sentinel question", "sentinel question 7", "another sentinel question.")
_ANSWERS = ("sentinel answer", "7 sentinel answers.", "Another sentinel")


_MARK = "sentinelcontent"
# Roles whose messages some templates put elsewhere (Mistral: the system's before the last question) or write as JSON.
_WRITTEN_ANYWHERE = ("system", "tool")


class EncodingError(ValueError):
    """One conversation cannot be encoded; ``field`` says which part of it is at fault."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


class ChatTemplateError(ValueError):
    """The tokenizer's chat template is missing or of a form that gives the response no place."""


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template puts around the last assistant turn.

    Args:
        boundary: its token ids, for the model's configuration.
        header: text of the assistant header.
        scaffold: text between header and answer that is the template's (Qwen3's empty think block), often
            empty.
        turn_end: text of the terminator.
        trailer: text behind the terminator (a newline, an eos), which no sequence needs.
    """

    boundary: TurnBoundary
    header: str
    scaffold: str
    turn_end: str
    trailer: str


class ChatTemplate:
    """A tokenizer with one chat template: renders conversations, tokenises rendered text, knows the facts.

    Raises:
        ChatTemplateError: no template, or none whose turns can be told apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | Path | None = None) -> None:
        self.tokenizer: Any = tokenizer
        self.source = _read_chat_template(chat_template)
        if self.source is None and not self.tokenizer.chat_template:
            raise ChatTemplateError(
                f"the tokenizer {self.tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat "
                "template; give one with chat_template= (Jinja text or the path of a file with it)"
            )
        self.source = self._without_clock()
        self._written: dict[tuple[int, tuple[str, ...]], bool] = {}
        added: Mapping[int, Any] = self.tokenizer.added_tokens_decoder
        self.added_ids = frozenset(added)
        self._added_texts = [str(token) for token in added.values()]
        self._control_texts = [str(token) for token in added.values() if token.special and str(token)]
        self._anchor = self._find_anchor(added)
        self.facts = self._derive_facts()
        bos = self.tokenizer.bos_token
        self.begins_with_bos = bool(bos) and self._render_sentinel(_QUESTIONS[0]).startswith(str(bos))

    def render(self, messages: Conversation, generation_prompt: bool = False) -> str:
        """Text of a conversation; with ``generation_prompt`` it ends where a model begins to answer.

        Raises:
            EncodingError: the template refuses the conversation (Gemma: a system message).
        """
        import jinja2

        conversation = [
            {"role": m.role, "content": m.content} if isinstance(m, Message) else dict(m) for m in messages
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    chat_template=self.source,
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"the chat template is not valid Jinja: {error}") from error
        except (jinja2.TemplateError, TypeError, KeyError, IndexError) as error:
            raise EncodingError("prompt", f"the chat template refuses this conversation: {error}") from error

    def left_out(self, messages: Conversation, response: str, full: str) -> str | None:
        """What of a conversation is not in `full`, its rendered text: templates drop turns of roles that they do not know,
        and the reasoning in front of a response. White space does not count, nor what an earlier turn of the assistant has
        in front of its ``</think>``.
        """
        text, position = _without_white_space(full), 0
        for index, message in enumerate(messages):
            if not isinstance(message, Message):
                message = Message(message["role"], message["content"])
            role, content = message.role, message.content
            if role == "assistant":
                content = content.rpartition("</think>")[2]
            wanted = _without_white_space(content)
            found = text.find(wanted, position) if role not in _WRITTEN_ANYWHERE else -1
            if found >= 0:
                position = found + len(wanted)
            elif wanted and role == "assistant":
                return f"messages[{index}] (assistant)"
            elif wanted and not self._writes(messages, index, response):
                return f"messages[{index}] ({role})"
        return None if _without_white_space(response) in text[position:] else "a part of the response"

    def _writes(self, messages: Conversation, index: int, response: str) -> bool:
        """Whether a message's content gets into the text at all, in whatever form (JSON's, say). Asked once for each sequence
        of roles.
        """
        roles = tuple(m.role if isinstance(m, Message) else m["role"] for m in messages)
        if (index, roles) not in self._written:
            marked = [*messages[:index], Message(roles[index], _MARK), *messages[index + 1 :]]
            self._written[index, roles] = _MARK in self.render([*marked, Message("assistant", response)])
        return self._written[index, roles]

    def holds_control_token(self, text: str) -> bool:
        """Whether the tokenizer would see one of its control tokens (end of turn, bos ..) in `text`."""
        return any(control in text for control in self._control_texts)

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text: special tokens in it are recognised, none are added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_behind(self, prefix_ids: list[int], prefix: str, text: str) -> list[int]:
        """Token ids of ``prefix + text`` that begin with exactly ``prefix_ids``.

        They are those of the whole text unless the tokeniser merges across the border. Then ``text`` is
        tokenised on its own (behind a special token, so that no word-begin space is put in front of it): what
        a model sees that generates ``text`` behind ``prefix_ids``.
        """
        whole = self.encode(prefix + text)
        if whole[: len(prefix_ids)] == prefix_ids:
            return whole
        if self._anchor is not None:
            anchor_text, anchor_id = self._anchor
            anchored = self.encode(anchor_text + text)
            if anchored[0] == anchor_id:
                return prefix_ids + anchored[1:]
        return prefix_ids + self.encode(text)

    def _without_clock(self) -> str | None:
        """The template with one date in place of today's; as it came where it asks for none."""
        template = self.tokenizer.get_chat_template(self.source)
        if "strftime_now(" not in template:
            return self.source
        pinned = _CLOCK.sub(lambda call: repr(_TODAY.strftime(call[2])), template)
        if "strftime_now(" in pinned:
            raise ChatTemplateError(
                "the chat template asks for today's date in a way that cannot be made to stand still"
            )
        return pinned

    def _find_anchor(self, added: Mapping[int, Any]) -> tuple[str, int] | None:
        for token_id, token in added.items():
            if token.special and not token.rstrip and self.encode(str(token)) == [token_id]:
                return str(token), token_id
        return None

    def _derive_facts(self) -> TemplateFacts:
        question, answer = _QUESTIONS[0], _ANSWERS[0]
        prompt, full = self._render_sentinel(question), self._render_sentinel(question, answer)
        if not full.startswith(prompt) or answer not in full[len(prompt) :]:
            raise ChatTemplateError(
                "the chat template renders a prompt with its generation prompt differently from the "
                f"beginning of the full conversation ({prompt!r} against {full!r})"
            )
        scaffold, tail = full[len(prompt) :].split(answer, 1)
        turn_end = self._turn_end(tail)
        header_ids = self._stable_tail([self._render_sentinel(q) for q in _QUESTIONS], prompt, question)
        user_end_ids = self._stable_tail(
            [self._render_sentinel(q, generation_prompt=False) for q in _QUESTIONS],
            self._render_sentinel(question, generation_prompt=False),
            question,
        )
        header = prompt[prompt.rindex(question) + len(question) :]
        if header_ids == user_end_ids and scaffold.strip():  # a template that knows no generation prompt
            header, header_ids, scaffold = scaffold, self.encode(scaffold), ""
        elif header_ids != user_end_ids:
            header_ids = header_ids[_shared_length(header_ids, user_end_ids) :]
        header_ids = self._from_first_added_token(header_ids)
        header = self._text_of_header(header, header_ids)
        if not scaffold.strip():  # white space belongs to the first word: Mistral's " Hello"
            scaffold = ""
        scaffold_ids = self.encode_behind(self.encode(prompt), prompt, scaffold)[len(self.encode(prompt)) :]
        if not header_ids:
            raise ChatTemplateError("the chat template puts nothing between a question and its answer")
        header_space, scaffold_space = self._white_space(header_ids), self._white_space(scaffold_ids)
        boundary = TurnBoundary(
            assistant_header_ids=header_ids,
            scaffold_ids=scaffold_ids if scaffold else [],
            turn_end_ids=self._turn_end_ids(turn_end),
            header_white_space=header_space if header_space < len(header_ids) else 0,
            scaffold_white_space=scaffold_space if scaffold_space < len(scaffold_ids) else 0,
        )
        return TemplateFacts(boundary, header, scaffold, turn_end, tail[len(turn_end) :])

    def _render_sentinel(
        self, question: str, answer: str | None = None, generation_prompt: bool = True
    ) -> str:
        messages = [Message("user", question)]
        if answer is not None:
            messages.append(Message("assistant", answer))
        try:
            return self.render(messages, generation_prompt=answer is None and generation_prompt)
        except EncodingError:
            return self.render(
                [Message("system", "sentinel system"), *messages], answer is None and generation_prompt
            )

    def _turn_end(self, tail: str) -> str:
        """The terminator in what follows an answer: up to a special token, else all but white space."""
        ends = [(tail.index(text), len(text)) for text in self._added_texts if text and text in tail]
        if not ends:
            return tail.rstrip()
        position, length = min(ends, key=lambda end: (end[0], -end[1]))
        return tail[: position + length]

    def _turn_end_ids(self, turn_end: str) -> list[int]:
        texts = [answer + turn_end for answer in _ANSWERS]
        return self._from_first_added_token(self._stable_tail(texts, texts[0], _ANSWERS[0]))

    def _stable_tail(self, texts: list[str], first: str, sentinel: str) -> list[int]:
        """Token ids that all texts end with, none of them from the sentinel's own words."""
        tail = first[first.rindex(sentinel) + len(sentinel) :]
        shared = self.encode(tail)
        for text in texts:
            ids = self.encode(text)
            length = _shared_length(shared[::-1], ids[::-1])
            shared = shared[len(shared) - length :]
        return shared

    def _from_first_added_token(self, ids: list[int]) -> list[int]:
        """Drop what lies before the first special token: it may merge with the text in front of it."""
        return ids[next((i for i, token_id in enumerate(ids) if token_id in self.added_ids), 0) :]

    def _text_of_header(self, text: str, header_ids: list[int]) -> str:
        """The part of ``text`` that the header's tokens stand for, without the end of the turn in front of it."""
        if not header_ids or header_ids[0] not in self.added_ids:
            return text
        first = str(self.tokenizer.added_tokens_decoder[header_ids[0]])
        return first + first.join(text.split(first)[-header_ids.count(header_ids[0]) :])

    def _white_space(self, ids: list[int]) -> int:
        count = 0
        while count < len(ids) and not self.tokenizer.decode([ids[-1 - count]]).strip():
            count += 1
        return count


def _without_white_space(text: str) -> str:
    return "".join(text.split())


def _shared_length(first: list[int], second: list[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def _read_chat_template(chat_template: str | Path | None) -> str | None:
    if chat_template is None or (isinstance(chat_template, str) and "{" in chat_template):
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(
            f"chat_template {str(chat_template)!r}: {error}; expected Jinja text or a file with it"
        ) from error
