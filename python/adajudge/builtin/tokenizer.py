"""The built-in judge's tokenizer: one token a word of its world, and a chat template of four special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adajudge.builtin.words import vocabulary

PAD, UNKNOWN, USER, ASSISTANT, SYSTEM, END = "<pad>", "<unk>", "<user>", "<assistant>", "<system>", "<end>"

MAX_LENGTH = 256

# <user> prompt <end> <assistant> response <end>
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words are what white space separates; a word that the world does not have becomes ``<unk>``."""
    special = [PAD, UNKNOWN, USER, ASSISTANT, SYSTEM, END]
    words = {word: number for number, word in enumerate([*special, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=MAX_LENGTH,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
    )
