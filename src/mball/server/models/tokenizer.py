"""A tokenizer for random models: every byte is a token, and so is a made-up word for each other id.

Text is encoded byte by byte, and any id that a random model draws decodes to something readable.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mball.errors import ConfigError

BEGIN, END = "<|im_start|>", "<|im_end|>"
BEGIN_ID, END_ID = 0, 1
_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "added_tokens.json")
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]


def make(folder: Path, vocab_size: int, max_model_len: int) -> None:
    """Writes a tokenizer of `vocab_size` tokens (258 at least) into `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lengths = itertools.count(2)
    words = ("Ġ" + "".join(word) for length in lengths for word in itertools.product(_SYLLABLES, repeat=length))
    tokens = [BEGIN, END, *alphabet, *itertools.islice(words, vocab_size - len(alphabet) - 2)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BEGIN, END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": max_model_len,
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy(source: Path, folder: Path) -> int:
    """Copies the tokenizer's files of model folder `source`; returns its number of tokens. Raises ConfigError."""
    file = source / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{source}: no tokenizer.json to copy; name a model folder that has one")
    for path in itertools.chain.from_iterable(source.glob(pattern) for pattern in _FILES):
        shutil.copyfile(path, folder / path.name)
    return Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True)
