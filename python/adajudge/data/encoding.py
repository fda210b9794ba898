"""From a conversation and a response to token ids with a role for each: prompt or response."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .boundary import TurnBoundary
from .rows import Message
from .template import ChatTemplate, Conversation, EncodingError, TemplateFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one prompt and response, the prompt first.

    Args:
        input_ids: prompt tokens, then response tokens up to and including the turn's terminator.
        prompt_length: how many of them are the prompt's.
        prompt_tokens_cut: prompt tokens left out to fit ``max_length``.
        response_tokens_cut: response tokens left out (only with ``truncate_response``).
        content_tokens: tokens that are words, not special tokens.
        unknown_tokens: those of the text that the tokenizer has no word for.
        holds_control_tokens: whether prompt or response text itself holds a control token (end of turn, bos ..).
            The roles of the tokens are right all the same, but the backbone sees turns that nobody took.
    """

    input_ids: list[int]
    prompt_length: int
    prompt_tokens_cut: int = 0
    response_tokens_cut: int = 0
    content_tokens: int = 0
    unknown_tokens: int = 0
    holds_control_tokens: bool = False

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def response_length(self) -> int:
        """Number of response tokens, at least 1."""
        return len(self.input_ids) - self.prompt_length

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens."""
        return self.input_ids[: self.prompt_length]

    @property
    def response_ids(self) -> list[int]:
        """The response's tokens."""
        return self.input_ids[self.prompt_length :]

    @property
    def response_mask(self) -> list[int]:
        """0 for each prompt token, 1 for each response token."""
        return [0] * self.prompt_length + [1] * self.response_length

    @property
    def truncated(self) -> bool:
        """Whether anything was cut to fit ``max_length``."""
        return self.prompt_tokens_cut > 0 or self.response_tokens_cut > 0

    @property
    def unknown_share(self) -> float:
        """Share of the words that the tokenizer does not know, from 0 to 1."""
        return self.unknown_tokens / self.content_tokens if self.content_tokens else 0.0


class ConversationEncoder:
    """Encodes conversations with a tokenizer's chat template, applied once, no special token added.

    The prompt is the conversation up to and including the assistant header, and what the template inserts
    behind it (Qwen3's empty think block). Its token ids are those of the prompt rendered with a generation
    prompt, so that every response of a prompt stands behind identical tokens, as when a model generates it;
    they are proven to begin the sequence. The response runs up to and including the terminator of the last
    turn; white space or an eos that the template puts behind it is dropped.

    A sequence longer than ``max_length`` loses the beginning of its prompt, never of its response: a leading
    bos token stays (models lean on it), then the oldest tokens go, up to the assistant header, which stays. Each
    response is cut by its own length alone, so that no score depends on the other responses of the prompt.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: longest sequence in tokens; ``None``: no limit. Callers pass the backbone's
            ``max_position_embeddings``.
        chat_template: Jinja text, or the path of a file with it, in place of the tokenizer's own.
        truncate_response: a response that does not fit behind its prompt, or half of `max_length` of it, loses its end and
            terminator instead of raising.

    Raises:
        ChatTemplateError: there is no usable chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        *,
        chat_template: str | Path | None = None,
        truncate_response: bool = False,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.max_length = max_length
        self.truncate_response = truncate_response
        self._template = ChatTemplate(tokenizer, chat_template)
        self._bos_id: int | None = self._template.tokenizer.bos_token_id
        self._pad_id: int | None = self._template.tokenizer.pad_token_id
        self._unknown_id: int | None = self._template.tokenizer.unk_token_id
        self._latest_prompt: tuple[str, list[int]] = ("", [])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self._template.tokenizer
        return tokenizer

    @property
    def facts(self) -> TemplateFacts:
        """What the template puts around an assistant turn."""
        return self._template.facts

    @property
    def boundary(self) -> TurnBoundary:
        """The same as token ids, for the model's configuration."""
        return self._template.facts.boundary

    def encode(self, messages: Conversation, response: str) -> EncodedRow:
        """Encode a prompt's messages (`Message` or mappings with role and content) and one response.

        Raises:
            EncodingError: empty response, a conversation that the template refuses or renders differently
                once it is answered, or a response longer than ``max_length``. ``error.field`` is ``"prompt"``
                or ``"response"``.
        """
        if not response.strip():
            raise EncodingError("response", "empty response")
        full = self._template.render([*messages, Message("assistant", response)])
        missing = self._template.left_out(messages, response, full)
        if missing is not None:
            field = "prompt" if missing.startswith("messages") else "response"
            raise EncodingError(field, f"the chat template leaves out {missing}; no judge would see it")
        prompt = self._prompt_text(messages, full)
        if not full.startswith(prompt):
            raise EncodingError(
                "prompt",
                "the chat template renders the prompt differently once it is answered: "
                f"{_difference(prompt, full)}; the prompt's tokens would not begin the sequence",
            )
        if self.facts.scaffold and full.startswith(self.facts.scaffold, len(prompt)):
            scaffold = self.facts.scaffold
        else:
            scaffold = ""
        prompt_ids = self._encode_prompt(prompt, scaffold)
        response_text = self._without_trailer(full[len(prompt) + len(scaffold) :])
        ids = self._template.encode_behind(prompt_ids, prompt + scaffold, response_text)
        contents = [m.content if isinstance(m, Message) else str(m.get("content")) for m in messages]
        marked = any(map(self._template.holds_control_token, [*contents, response]))
        return replace(self._fit(ids, len(prompt_ids)), holds_control_tokens=marked)

    def encode_rendered(self, text: str, *, add_bos: bool = False) -> EncodedRow:
        """Encode text that a chat template has been applied to already (OpenRLHF's ``query``).

        Special tokens in the text are recognised and none are added. Padding around it, a run of the pad
        token, is removed. The response is that of the last assistant header.

        Args:
            text: the conversation.
            add_bos: where the template begins with a bos token and the text does not, put it there (clients of vLLM
                take it off, because vLLM adds one).

        Raises:
            EncodingError: no assistant header, nothing behind it, or a response longer than ``max_length``.
        """
        ids = self._without_padding(self._template.encode(text))
        if add_bos and self._template.begins_with_bos and ids[:1] != [self._bos_id]:
            ids = self._template.encode(str(self._template.tokenizer.bos_token) + text)
        try:
            start, end = self.boundary.response_span(ids)
        except ValueError as error:
            raise EncodingError("query", f"cannot tell the response from the prompt: {error}") from None
        return self._fit(ids[:end], start)

    def _prompt_text(self, messages: Conversation, full: str) -> str:
        header = self.facts.header
        if messages:
            prompt = self._template.render(messages, generation_prompt=True)
            if not prompt.endswith(header) and full.startswith(prompt + header):
                prompt += header  # a template that knows no generation prompt
            return prompt
        start = full.find(header)
        if start < 0:
            raise EncodingError("prompt", "the chat template cannot render a response without a prompt")
        return full[: start + len(header)]

    def _encode_prompt(self, prompt: str, scaffold: str) -> list[int]:
        latest = self._latest_prompt  # read once, written once: several threads may encode
        if latest[0] != prompt:
            self._latest_prompt = latest = (prompt, self._template.encode(prompt))
        ids = latest[1]
        return self._template.encode_behind(ids, prompt, scaffold) if scaffold else list(ids)

    def _without_trailer(self, text: str) -> str:
        end = self.facts.turn_end
        if not end:
            return text.removesuffix(self.facts.trailer)
        position = text.rfind(end)
        return text if position < 0 else text[: position + len(end)]

    def _without_padding(self, ids: list[int]) -> list[int]:
        if self._pad_id is None or self._pad_id == self._unknown_id:  # an unknown word is no padding
            return ids
        real = [i for i, token_id in enumerate(ids) if token_id != self._pad_id]
        if not real:
            return []
        first, end = real[0], real[-1] + 1
        if self._pad_id == self._bos_id and first > 0:
            first -= 1
        if self.boundary.turn_end_ids[-1:] == [self._pad_id] and end < len(ids):
            end += 1
        return ids[first:end]

    def _fit(self, ids: list[int], prompt_length: int) -> EncodedRow:
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return self._counted(ids, prompt_length)
        prompt, response = ids[:prompt_length], ids[prompt_length:]
        least, room = self._least_prompt(prompt), limit - len(response)
        if room < least:
            if not self.truncate_response:
                behind = f"; {least} more stand before it" if room >= 0 else ""
                raise EncodingError(
                    "response", f"the response has {len(response)} tokens{behind}; max_length is {limit}"
                )
            room = min(least, limit - 1)
        kept = self._cut_prompt(prompt, room)
        answer = response[: limit - len(kept)]
        return self._counted(
            kept + answer,
            len(kept),
            prompt_tokens_cut=len(prompt) - len(kept),
            response_tokens_cut=len(response) - len(answer),
        )

    def _least_prompt(self, prompt: list[int]) -> int:
        """Tokens that stay of any prompt, at most all: bos and assistant header, without which a response is no answer; half
        of all where the response may be cut."""
        boundary = self.boundary
        header = len(boundary.assistant_header_ids) + len(boundary.scaffold_ids)
        least = header + (prompt[:1] == [self._bos_id])
        if self.truncate_response and self.max_length is not None:
            least = max(least, self.max_length // 2)
        return min(least, len(prompt))

    def _cut_prompt(self, prompt: list[int], room: int) -> list[int]:
        """At most ``room`` tokens: a leading bos, then the latest ones."""
        if len(prompt) <= room:
            return prompt
        if room == 0:
            return []
        if prompt[0] == self._bos_id:
            return prompt[:1] + prompt[len(prompt) - room + 1 :]
        return prompt[len(prompt) - room :]

    def _counted(
        self, ids: list[int], prompt_length: int, prompt_tokens_cut: int = 0, response_tokens_cut: int = 0
    ) -> EncodedRow:
        added = self._template.added_ids
        unknown = ids.count(self._unknown_id) if self._unknown_id is not None else 0
        words = sum(token_id not in added for token_id in ids)
        if self._unknown_id in added:
            words += unknown
        return EncodedRow(ids, prompt_length, prompt_tokens_cut, response_tokens_cut, words, unknown)


def _difference(prompt: str, full: str) -> str:
    position = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
    around = slice(max(0, position - 10), position + 20)
    return f"at character {position}, {prompt[around]!r} becomes {full[around]!r}"
