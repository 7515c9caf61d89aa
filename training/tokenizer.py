"""Step 3: a small tokenizer in the form of CLIP's, written as vocab.json and merges.txt.

The vocabulary is CLIP's in small: the 256 bytes, the same 256 with `</w>`, the merges, two specials. The byte
endings are added here because a trainer keeps only those it saw, and a word that ends in an unseen byte would
become the end token in mid-prompt.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END, ENDING = "<|startoftext|>", "<|endoftext|>", "</w>"
MAX_TOKENS = 77
VOCABULARY = 2304


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in byte-level BPE, in the order of GPT-2's and CLIP's tables."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def learn_merges(captions: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Learn at most `count` merges from captions, over letters where each word's last one carries `</w>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=ENDING))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    letters = byte_letters()
    trainer = trainers.BpeTrainer(
        # Twice the bytes, because the trainer's vocabulary counts the endings it saw.
        vocab_size=count + 2 * len(letters),
        initial_alphabet=letters,
        end_of_word_suffix=ENDING,
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges][:count]


def write_vocabulary(merges: list[tuple[str, str]], folder: Path) -> None:
    """Write vocab.json and merges.txt in CLIP's order: bytes, byte endings, merges, start, end."""
    letters = byte_letters()
    tokens = [*letters, *(letter + ENDING for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary: dict[str, int] = {}
    for token in tokens:
        vocabulary.setdefault(token, len(vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(text + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_tokenizer(folder: Path) -> "CLIPTokenizer":
    """A CLIPTokenizer over the vocab.json and merges.txt in a folder; padded with the end token, as SD 1.x."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as clean:
        for name in ("vocab.json", "merges.txt"):
            (Path(clean) / name).write_bytes((folder / name).read_bytes())
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS}
        specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        (Path(clean) / "tokenizer_config.json").write_text(json.dumps({**config, **specials}))
        return CLIPTokenizer.from_pretrained(clean)


def train(captions: Iterable[str], folder: Path, vocabulary: int = VOCABULARY) -> "CLIPTokenizer":
    """Learn the merges from captions, write the vocabulary to a folder and return the tokenizer."""
    write_vocabulary(learn_merges(captions, vocabulary - 2 * 256 - 2), folder)
    return build_tokenizer(folder)
