"""A tokenizer whose ids can be read off the text: the word "17" is id 17."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS, PAD, UNK, BOS = 1000, 1001, 1002, 1003
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"
# Words of the template above.
SYSTEM, USER, ASSISTANT = 1004, 1005, 1006


def build_tokenizer(*, adds_bos: bool = False, eos: str | None = "</s>", chat_template: str | None = None):
    vocab = {str(number): number for number in range(EOS)}
    vocab |= {
        "</s>": EOS,
        "<pad>": PAD,
        "<unk>": UNK,
        "<s>": BOS,
        "system": SYSTEM,
        "user": USER,
        "assistant": ASSISTANT,
    }
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return build_tokenizer(adds_bos=True, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable:
    return build_tokenizer


@pytest.fixture(scope="session")
def count_text() -> Callable[[int, int], str]:
    """Returns the text of the numbers start..stop-1, whose token ids are these numbers."""
    return lambda start, stop: " ".join(map(str, range(start, stop)))
