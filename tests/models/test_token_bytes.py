"""The bytes of tokens that are parts of characters, and constraints that follow them."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qstar_decoding.envs import GrammarConstraint, JSONConstraint, RegexConstraint

from .tokenizers_of_kinds import byte_level, language_model, sentencepiece


def byte_fallback():
    """As Llama 2: the bytes are no special tokens, so they have a text."""
    backend = json.loads(sentencepiece().backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(backend))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GrammarConstraint('start: "☃" /[éü]/ "日本"'), "☃é日本"),
        (lambda: RegexConstraint("☃+[éü]日本"), "☃é日本"),
        (lambda: JSONConstraint({"const": "☃é"}), '"☃é"'),
    ],
    ids=["grammar", "regex", "json"],
)
@pytest.mark.parametrize("kind", [byte_level, byte_fallback], ids=lambda kind: kind.__name__)
def test_tokens_that_are_parts_of_a_character_are_taken_where_the_character_is(make, text, kind):
    lm = language_model(kind())
    rule = make().bind(lm)
    pieces = [token for token in range(lm.vocab_size) if len(lm.token_bytes(token)) == 1]
    by_byte = {lm.token_bytes(token)[0]: token for token in pieces}
    ids = []
    for byte in text.encode():
        allowed = rule.allowed(ids)
        assert allowed[by_byte[byte]]
        assert not allowed[by_byte[0x80 if byte != 0x80 else 0x81]] or byte > 0x80
        ids.append(by_byte[byte])
    assert lm.decode_continuation(ids) == text
    assert rule.accepts(text, ids)
    assert not rule.accepts(lm.decode_continuation(ids[:-1]), ids[:-1])


@pytest.mark.parametrize("text", ["naïve ☃ 日本 😀", "the cat", "\x00\x7f tab\t"])
@pytest.mark.parametrize("kind", [byte_level, byte_fallback], ids=lambda kind: kind.__name__)
def test_the_bytes_of_tokens_join_to_the_bytes_of_the_text(text, kind):
    lm = language_model(kind())
    ids = lm.encode(text)
    joined = b"".join(lm.token_bytes(token) for token in ids if token not in lm.special_tokens.values())
    assert joined.decode().strip() == text.strip()
