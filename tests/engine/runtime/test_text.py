import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshadow.engine.runtime.text import TextStream
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NUM_TOKENS = len(TOKENIZER)


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text).input_ids)


@given(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_make_the_text_of_all_tokens_at_once(tokens: list[int]) -> None:
    stream = TextStream(TOKENIZER)
    before = ""
    for token in tokens:
        stream.add(token)
        assert stream.text.startswith(before)
        before = stream.text
    stream.finish()
    assert stream.text.startswith(before)
    assert stream.text == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_half_characters_are_never_shown(text: str) -> None:
    stream = TextStream(TOKENIZER)
    for token in tokens_of(text):
        stream.add(token)
        assert text.startswith(stream.text)
    stream.finish()
    assert stream.text == text


@given(st.text("abé€", max_size=30), st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_ends_before_the_first_stop_text_and_shows_none_of_it(text: str, stops: list[str]) -> None:
    stream = TextStream(TOKENIZER, stops)
    found = None
    shown = [""]
    for token in tokens_of(text):
        found = stream.add(token)
        shown.append(stream.text)
        if found is not None:
            break
    else:
        stream.finish()
    # The text up to the character that completes the first stop text, and from there back to where it begins.
    ends = [end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    expected = text
    if ends:
        expected = text[: min(text[: ends[0]].find(stop) for stop in stops if stop in text[: ends[0]])]
    assert stream.text == expected
    assert (found is not None) == bool(ends)
    assert all(expected.startswith(piece) for piece in shown)


def test_holds_back_no_more_than_may_become_a_stop_text() -> None:
    stream = TextStream(TOKENIZER, ["###"])
    for token in tokens_of("a##"):
        stream.add(token)
    assert stream.text == "a"
    for token in tokens_of("b"):
        stream.add(token)
    assert stream.text == "a##b"


def test_stop_texts_pass_as_long_as_it_may_not_stop() -> None:
    stream = TextStream(TOKENIZER, ["x"])
    assert [stream.add(token, may_stop=False) for token in tokens_of("axb")] == [None] * 3
    assert [stream.add(token) for token in tokens_of("x")] == ["x"]
    assert stream.text == "axb"


@pytest.mark.parametrize("token", [0, 5])
def test_without_a_tokenizer_there_is_no_text(token: int) -> None:
    stream = TextStream(None, ())
    assert stream.add(token) is None
    stream.finish()
    assert stream.text == ""
