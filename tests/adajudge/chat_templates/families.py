"""Tokenizers of the five template families, trained on the spot with their real special tokens."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent
NAMES = ("qwen3", "llama3", "phi3.5", "gemma", "mistral")

# The rule of Qwen and Llama 3: white space before a newline is one piece with it, so "\n" + "\n" can merge.
_PIECES = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "user assistant model system sentinel question answer hello world, what is two plus two? It is four.",
    "The sky is blue.\n\nThe grass is green.\n \n\n\nAnother line:\n- one\n- two\n",
    "[INST] hello [/INST] Hello there, how are you? [INST] a question [/INST] an answer",
] * 20

_SPECIAL = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "phi3.5": ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<unk>", "<s>", "</s>"],
}
_NAMED = {
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "phi3.5": {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
    },
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
}
_STRIPPING = {
    "</s>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
}  # Phi-3.5: they swallow white space


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer like the family's, with its chat template; it adds a bos unless told not to, as theirs do."""
    tokenizer = _sentence_piece() if name == "mistral" else _byte_level()
    special = []
    for token in _SPECIAL[name]:
        strips = name == "phi3.5" and token in _STRIPPING
        special.append(AddedToken(token, special=True, normalized=False, rstrip=strips))
    tokenizer.add_special_tokens(special)
    if name == "qwen3":
        tokenizer.add_tokens(
            [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
        )
    named = _NAMED[name]
    if "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return fast


def word_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with an unknown token, like the built-in judge's."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[UNK]", "[PAD]", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.train_from_iterator(["the sky is blue"], trainers.WordLevelTrainer(special_tokens=special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.chat_template = template
    return fast


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _sentence_piece() -> Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer
