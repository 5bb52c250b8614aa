"""The least number of tokens of a text: never more than it has, and near enough to be of use."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longshadow.engine.runtime.token_bound import TokenBound
from tests.tiny_models import tiny_tokenizer

WORDS = (
    *("the", "gate", "of", "a", "northern", "city", "was", "moved", "in", "May", "1874,", "by", "30", "men;", "its"),
    *("code", "is", "7412.", "for", "i", "in", "range(10):\n\t\tx", "+=", "i"),
)
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def texts():
    rng = random.Random(0)
    for _ in range(400):
        yield " ".join(rng.choices(WORDS, k=40)) + rng.choice(["", "   ", "\n\n", "====", "e\u0301é中文字"])


def trained(*, normalizer=None, pre_tokenizer=None, added=(), **options):
    """A tokenizer over the words above."""
    tokenizer = Tokenizer(models.BPE(**options))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = [chr(code) for code in range(32, 127)] if options.get("byte_fallback") else BYTES.alphabet()
    special = [f"<0x{byte:02X}>" for byte in range(256)] if options.get("byte_fallback") else []
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_pieces(**options):
    """As Llama 2's and Gemma's."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(normalizer=spaces, byte_fallback=True, fuse_unk=True, unk_token="<0x00>", **options)


TOKENIZERS = {
    "bytes": lambda: trained(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "no words": lambda: trained(pre_tokenizer=BYTES),
    "split, NFC": lambda: trained(
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), BYTES]),
    ),
    "lower case, NFKC": lambda: trained(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), pre_tokenizer=BYTES
    ),
    "added": lambda: trained(
        pre_tokenizer=BYTES,
        added=[AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("the gate of the city"), AddedToken("    ")],
    ),
    "sentence pieces": sentence_pieces,
    "tiny": tiny_tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def bound(tokenizer):
    return TokenBound.of(tokenizer)


PARTS = st.one_of(
    st.sampled_from(
        [*WORDS, " ", "  ", "\n", "<mask>", "▁", "the gate of the city", "e\u0301", "ﬁ", "Å", "=====", "aaaa"]
    ),
    st.text(max_size=5),
    st.text("ab \t19.,<é\u0301▁", max_size=12),
)


@given(parts=st.lists(PARTS, max_size=30))
@settings(deadline=None, max_examples=60)
def test_no_text_has_fewer(tokenizer, bound, parts):
    text = "".join(part for part in parts if part.isprintable() or part.isspace())
    assert bound.least_tokens([text], 10**9) <= len(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    "unit", ["word ", "a", " ", "7", "=", "é", "\u0301", "e\u0301", "▁", "\x00", "<mask> ", "the gate of the city"]
)
def test_repeated_texts_have_no_fewer(tokenizer, bound, unit):
    text = unit * 500
    assert bound.least_tokens([text], 10**9) <= len(tokenizer(text, add_special_tokens=False).input_ids)


def test_texts_count_together(bound):
    one = bound.least_tokens(["word " * 100], 10**9)
    assert one * 49 <= bound.least_tokens(["word " * 100] * 50, 10**9) <= one * 50
    assert bound.least_tokens([], 10) == 0 == bound.least_tokens([""], 10)


@pytest.mark.parametrize("name", ["bytes", "split, NFC"])
def test_it_is_near_for_text(name):
    tokenizer = TOKENIZERS[name]()
    text = " ".join(texts())
    real = len(tokenizer(text).input_ids)
    assert real / 2 < TokenBound.of(tokenizer).least_tokens([text], 10**9) <= real


def test_counting_stops(bound):
    def endless():
        while True:
            yield "word " * 1000

    assert 5000 < bound.least_tokens(endless(), 5000) < 20_000


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        lambda: Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
        lambda: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
        lambda: Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)),
        lambda: with_parts(normalizers.Strip(), BYTES),
        lambda: with_parts(normalizers.Replace(Regex("a+"), "a"), BYTES),
        lambda: with_parts(None, pre_tokenizers.Sequence([pre_tokenizers.Split("a", "removed"), BYTES])),
        lambda: with_parts(None, pre_tokenizers.WhitespaceSplit()),
    ],
)
def test_tokenizers_that_can_lose_text_have_no_bound(make):
    assert TokenBound.of(PreTrainedTokenizerFast(tokenizer_object=make())) is None


def with_parts(normalizer, pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer
