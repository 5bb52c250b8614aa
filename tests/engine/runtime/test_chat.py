import pytest

from longshadow.engine.runtime.chat import encode_chat, encode_document
from tests.engine.runtime.engines import CHAT_TEMPLATE
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer(CHAT_TEMPLATE)


def text_of(tokens: list[int]) -> str:
    return str(TOKENIZER.decode(tokens))


def test_document_and_question_make_one_message() -> None:
    document = encode_document(TOKENIZER, "  A story.\n")
    question = encode_chat(TOKENIZER, [{"role": "user", "content": "Whose?"}], after_document=True)
    whole = encode_chat(TOKENIZER, [{"role": "user", "content": "A story.\n\nWhose?"}], after_document=False)
    assert text_of(document + question) == text_of(whole) == "<user>A story.\n\nWhose?</><assistant>"


def test_later_turns_follow_the_document() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Whose?"},
        {"role": "assistant", "content": "Ours."},
        {"role": "user", "content": "Why?"},
    ]
    expected = "\n\nBe brief.\n\nWhose?</><assistant>Ours.</><user>Why?</><assistant>"
    assert text_of(encode_chat(TOKENIZER, messages, after_document=True)) == expected


def test_without_a_template_a_document_is_its_text() -> None:
    assert text_of(encode_document(tiny_tokenizer(), " abc ")) == "abc"
    with pytest.raises(ValueError, match="no chat template"):
        encode_chat(tiny_tokenizer(), [{"role": "user", "content": "a"}], after_document=False)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="empty"):
        encode_document(TOKENIZER, " \n")
    with pytest.raises(ValueError, match="at least one message"):
        encode_chat(TOKENIZER, [], after_document=False)
    with pytest.raises(ValueError, match="first message must be the user's"):
        encode_chat(TOKENIZER, [{"role": "assistant", "content": "a"}], after_document=True)
    strict = tiny_tokenizer("{{ raise_exception('only one system message') }}")
    with pytest.raises(ValueError, match="refuses these messages: only one system message"):
        encode_chat(strict, [{"role": "user", "content": "a"}], after_document=False)
