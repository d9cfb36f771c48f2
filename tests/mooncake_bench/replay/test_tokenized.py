"""Text of exactly so many tokens, by a tokenizer that the test makes."""

import json
from array import array

import pytest

from mooncake_bench.replay.errors import ReplayError
from mooncake_bench.replay.tokenized import TokenizedWords, load_words

WORDS = [a + b + c for a in "bdfg" for b in "aeiou" for c in "lmnr"]


class SpacesAndBeginning:
    """A stand-in for tokenizers.Tokenizer: words, and a first token of its own."""

    class Encoded:
        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

    def get_vocab(self) -> dict[str, int]:
        return {f"\u0120{word}": number for number, word in enumerate(WORDS)}

    def encode(self, text: str) -> "SpacesAndBeginning.Encoded":
        # A word that begins with "bal" is two tokens: it must not be used.
        return self.Encoded([0] + [1 for w in text.split() for _ in range(1 + (w == "bal"))])

    def encode_batch(self, texts: list[str]) -> list["SpacesAndBeginning.Encoded"]:
        return [self.encode(text) for text in texts]


def test_a_text_encodes_to_exactly_the_tokens_asked_for():
    """With the tokenizer's own first token counted; words that are several tokens stay out."""
    words = TokenizedWords(SpacesAndBeginning(), "made up")
    for count in (2, 3, 40, 5000):
        text = words.text(list(range(1000, 1000 + count)))
        assert len(SpacesAndBeginning().encode(text).ids) == count
        assert "bal" not in text.split()
    long, longer = words.text(range(1000, 1600)), words.text(range(1000, 2000))
    assert longer.startswith(long)


def test_a_path_without_a_tokenizer_is_one_line(tmp_path):
    """The extra, the file, or its content is named."""
    try:
        import tokenizers  # noqa: F401  # only whether it is there
    except ImportError:
        with pytest.raises(ReplayError, match=r"pip install 'mooncake-bench\[tokenizers\]'"):
            load_words(str(tmp_path))
        return
    with pytest.raises(ReplayError, match=r"no tokenizer\.json there; give a local"):
        load_words(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ReplayError, match=r"no tokenizer\.json \("):
        load_words(str(tmp_path))


def test_a_real_byte_level_tokenizer(tmp_path):
    """Trained here on a few words: a prompt of 3,000 tokens encodes to 3,000."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra [tokenizers] is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, special_tokens=["<s>"])
    tokenizer.train_from_iterator([" ".join(WORDS), *WORDS] * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = load_words(str(tmp_path))
    text = words.text(array("I", range(1000, 4000)))
    assert len(tokenizer.encode(text).ids) == 3000
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
