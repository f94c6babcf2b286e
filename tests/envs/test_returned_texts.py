"""The returned text satisfies every constraint, and every text that does can be written: against an enumeration.

The judges here know no tokens and no automata: they look at the texts.
"""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, TabularLM, TransformersLM
from qstar_decoding.envs.constraints import (
    BannedStrings,
    Constraint,
    ForcedStrings,
    MinTokens,
    RegexConstraint,
    Rule,
    StopStrings,
)
from qstar_decoding.errors import ConfigurationError, ConstraintError, InternalError
from qstar_decoding.rewards import as_reward


class ByteLM(TabularLM):
    """A tabular model whose tokens are bytes: a character may take several, as in byte-level tokenizers."""

    def __init__(self, pieces, **kwargs):
        table = np.random.default_rng(0).random((len(pieces) + 1,) * 2) + 0.1
        super().__init__(table, vocabulary=[*(p.decode("latin1") for p in pieces), ""], **kwargs)
        self.pieces = [*pieces, b""]

    def decode(self, token_ids):
        kept = [self.pieces[t] for t in token_ids if t not in self.eos_token_ids]
        return b"".join(kept).decode("utf-8", errors="replace")


def whim(prompt, completion):
    return math.sin(sum((i + 1) * ord(c) for i, c in enumerate(completion)))


def make_mdp(model, constraint, *, horizon, stop=None, top_k=None):
    reward = as_reward(whim, lower=-1, upper=1)
    return DecodingMDP(
        model, reward=reward, top_k=top_k or model.vocab_size, max_new_tokens=horizon, stop=stop, constraint=constraint
    )


def written(mdp):
    """Every completion that a search finds, by its tokens."""
    try:
        plan = AStarPlanner(mdp, n=10**6, margin=math.inf).plan("a")
    except ConstraintError:
        return {}
    return {completion.token_ids: completion.text for completion in plan.completions}


def enumerated(model, horizon, stop, judge):
    """Every finished sequence whose returned text the judge accepts, by its tokens."""
    found = {}

    def visit(ids):
        for token in range(model.vocab_size):
            ends = token in model.eos_token_ids
            text = model.decode([*ids, *([] if ends else [token])])
            at = min((text.find(s) for s in stop if s in text), default=-1)
            if ends or at >= 0 or len(ids) + 1 == horizon:
                text = text[:at] if at >= 0 else text
                if judge(text, len(ids) + (not ends)):
                    found[(*ids, token)] = text
            else:
                visit([*ids, token])

    visit([])
    return found


LETTERS = [("a", "b", "c"), ("a", "ab", "b"), ("a", "\nb", "b\n"), ("a", "!", "b!"), ("x", "ba", "y", "a")]
RULES = {
    "banned": (lambda: BannedStrings("B", "ca"), lambda t, n: "b" not in t and "ca" not in t),
    "banned, long": (lambda: BannedStrings("aba"), lambda t, n: "aba" not in t),
    "forced": (lambda: ForcedStrings("b"), lambda t, n: "b" in t),
    "regex": (lambda: RegexConstraint("(a|b|x)*a"), lambda t, n: re.fullmatch("(a|b|x)*a", t)),
    "regex with a stop": (lambda: RegexConstraint("a+!?"), lambda t, n: re.fullmatch("a+!?", t)),
    "at least": (lambda: MinTokens(2), lambda t, n: n >= 2),
    "both": (
        lambda: [BannedStrings("bb"), ForcedStrings("a"), MinTokens(2)],
        lambda t, n: "bb" not in t and "a" in t and n >= 2,
    ),
}
STOPS = [(), ("\n",), ("!",), ("b",), ("ab",), ("abc",), ("xbay",), ("a\nb", "!")]


@pytest.mark.parametrize("letters", LETTERS, ids=repr)
@pytest.mark.parametrize("stop", STOPS, ids=repr)
@pytest.mark.parametrize("name", RULES)
def test_exactly_the_texts_that_satisfy_the_constraint_are_written(name, stop, letters):
    make, judge = RULES[name]
    size = len(letters) + 1
    model = TabularLM(np.random.default_rng(1).random((size, size)) + 0.1, vocabulary=[*letters, ""])
    assert written(make_mdp(model, make(), horizon=4, stop=stop)) == enumerated(model, 4, stop, judge)


PIECES = [b"a", b"\xf0\x9f", b"\x98", b"\x80", b"\x81"]  # U+1F600 and U+1F601 in three pieces each
CHARACTERS = [b"a", "é".encode()[:1], "é".encode()[1:], "É".encode()[1:], b"b\xc3"]


@pytest.mark.parametrize(
    ("pieces", "banned", "stop"),
    [
        (PIECES, "😀", ()),
        (PIECES, "a😀", ()),
        (PIECES, "😀😁", ()),
        (PIECES, "😀", ("😁",)),
        (PIECES, "a", ("😀",)),
        (CHARACTERS, "é", ()),
        (CHARACTERS, "É", ()),
        (CHARACTERS, "bé", ("a",)),
        ([b"a", "日本".encode()[:4], "日本".encode()[4:], "本".encode()[:1]], "日本", ()),
    ],
    ids=repr,
)
def test_a_banned_string_of_several_byte_tokens_is_never_written(pieces, banned, stop):
    model = ByteLM(pieces)
    horizon = 6 if len(pieces) < 5 else 5
    found = written(make_mdp(model, BannedStrings(banned), horizon=horizon, stop=stop))
    expected = enumerated(model, horizon, stop, lambda text, n: banned.casefold() not in text.casefold())
    # A text may turn from one with the string into one without it, where a stray byte spoils the character before it.
    assert all(banned.casefold() not in text.casefold() for text in found.values())
    assert found == {
        ids: text
        for ids, text in expected.items()
        if all(
            banned.casefold() not in StopStrings(stop).settled(model.decode(ids[:n])).casefold()
            for n in range(len(ids))
        )
    }
    assert len(found) > 50


@settings(max_examples=60, deadline=None)
@given(
    letters=st.lists(st.text("ab!\n", min_size=1, max_size=2), min_size=1, max_size=3, unique=True),
    banned=st.lists(st.text("ab!\n", min_size=1, max_size=3), min_size=1, max_size=2),
    forced=st.lists(st.text("ab!", min_size=1, max_size=2), max_size=1),
    stop=st.lists(st.text("ab!\n", min_size=1, max_size=3), max_size=2),
    seed=st.integers(0, 100),
)
def test_random_constraints_and_stops_agree_with_the_enumeration(letters, banned, forced, stop, seed):
    vocabulary = [*dict.fromkeys(["a", *letters]), ""]
    table = np.random.default_rng(seed).random((len(vocabulary),) * 2) + 0.1
    model = TabularLM(table, vocabulary=vocabulary)
    constraints = [BannedStrings(*banned), *([ForcedStrings(*forced)] if forced else [])]

    def judge(text, n):
        return not any(s in text for s in banned) and all(s in text for s in forced)

    mdp = make_mdp(model, constraints, horizon=4, stop=stop)
    expected = enumerated(model, 4, stop, judge)
    assert written(mdp) == expected
    if expected:
        plan = AStarPlanner(mdp.with_empty_tree()).plan("a")
        assert plan.certified
        assert plan.token_ids in expected


@pytest.mark.parametrize(
    ("letters", "banned", "text"),
    [
        ("ΑΣ", "ΑΣ", "ΑΣΑ"),  # "ΑΣΑ".lower() has another small sigma than "ΑΣ".lower()
        ("ας", "ΑΣ", "ας"),
        ("Ss", "ß", "sS"),
        ("ßa", "SS", "ß"),
        ("İi", "i", "İ"),
        ("Kk", "k", "\u212a"),  # the Kelvin sign
    ],
)
def test_case_folding_knows_no_context(letters, banned, text):
    vocabulary = [*dict.fromkeys([*letters, *text, "a"]), ""]
    model = TabularLM(np.ones((len(vocabulary),) * 2), vocabulary=vocabulary)
    texts = set(written(make_mdp(model, BannedStrings(banned), horizon=3)).values())
    assert text not in texts
    assert "" in texts
    forced = set(written(make_mdp(model, ForcedStrings(banned), horizon=3)).values())
    assert text in forced
    assert not texts & forced


@pytest.mark.parametrize("eos", [9999, -1, 4, -5])
@pytest.mark.parametrize("name", RULES)
def test_an_end_token_beyond_the_vocabulary_is_no_token(name, eos):
    make, judge = RULES[name]
    table = np.random.default_rng(1).random((4, 4)) + 0.1
    model = TabularLM(table, vocabulary=["a", "b", "c", "!"], eos_token_ids=[])
    model.eos_token_ids = frozenset([eos])
    assert written(make_mdp(model, make(), horizon=3)) == enumerated(model, 3, (), judge)


def test_an_end_token_beyond_the_vocabulary_stands_beside_a_real_one():
    table = np.random.default_rng(1).random((4, 4)) + 0.1
    model = TabularLM(table, vocabulary=["a", "b", "c", ""], eos_token_ids=[3])
    model.eos_token_ids = frozenset([3, 9999, -1])
    make, judge = RULES["regex"]
    assert written(make_mdp(model, make(), horizon=3)) == enumerated(model, 3, (), judge)


def byte_level_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback_tokenizer():
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}, "a": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("banned", ["😀", "日", "é", "ñ!"])
def test_real_byte_tokenizers_never_write_a_banned_string(make_tokenizer, banned):
    import torch

    tokenizer = make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    lm = TransformersLM(LlamaForCausalLM(config), tokenizer, name="bytes")
    # The model likes nothing but the banned string, byte by byte, over and over.
    liked = [tokenizer.convert_tokens_to_ids(token) for token in tokenizer.tokenize(banned)]
    head = torch.full((len(tokenizer), 8), -1.0)
    head[sorted(set(liked))] = 1.0
    lm.model.model.norm.weight.data.fill_(1.0)
    lm.model.lm_head.weight.data = head
    lm.model.model.embed_tokens.weight.data.fill_(1.0)
    length = len(liked)

    def reward(prompt, completion):
        return float(banned in completion)

    def plan(constraint):
        mdp = DecodingMDP(lm, reward=as_reward(reward, lower=0, upper=1), top_k=len(set(liked)),
                          max_new_tokens=length, constraint=constraint, logprob_weight=1e-3)  # fmt: skip
        return AStarPlanner(mdp, n=10**6).plan("a", 1500)

    assert banned in plan(None).text  # nothing keeps it from that otherwise
    found = plan(BannedStrings(banned))
    assert found.completions
    assert not any(banned in completion.text for completion in found.completions)


class Fickle(Constraint, Rule):
    """Allows everything and accepts everything, until it is told otherwise."""

    accepting = True

    def bind(self, model):
        self.size = model.vocab_size
        return self

    def allowed(self, token_ids):
        return np.ones(self.size, dtype=bool)

    def accepts(self, text, token_ids):
        return self.accepting


def test_a_completion_that_breaks_the_constraint_after_all_is_an_internal_error():
    rule = Fickle()
    mdp = make_mdp(TabularLM.random(3, 1, seed=0), rule, horizon=1)
    from qstar_decoding.envs import load_prompts

    prompts = load_prompts(["a"])
    nodes = mdp.roots(prompts)
    mdp.complete(prompts, nodes, np.array([0]))
    rule.accepting = False
    with pytest.raises(InternalError, match="breaks the constraint"):
        mdp.complete(prompts, nodes, np.array([0]))


@pytest.mark.parametrize("stop", [3, "", [""], ["a", 3], [None], 2.5, {"a": 1}.items()])
def test_a_stop_that_is_no_string_is_refused(stop):
    with pytest.raises(ConfigurationError, match="stop is a non-empty string or a list of them"):
        make_mdp(TabularLM.random(3, 1, seed=0), None, horizon=1, stop=stop)


@pytest.mark.parametrize(
    "pattern",
    ["(a|b)*a", "a(ba)*", "[ab]+(,[ab]+)*", "a?", "(ab|a)*", "a{2,3}b?", "(?i)A+b", ".*a", r"\w+,\w", "a+b$", "(a$|b)",
     "a$|ab|b$", "(a+,)*", "[^a]*", "[$a]+", r"a+\z", "(ab?)+,?", "|ab"],
)  # fmt: skip
def test_a_pattern_means_what_it_means_to_the_library_re(pattern):
    vocabulary = ["a", "b", ",", "ab", "$", ""]
    model = TabularLM(np.random.default_rng(2).random((6, 6)) + 0.1, vocabulary=vocabulary)

    def judge(text, n):
        return re.fullmatch(pattern.replace(r"\z", r"\Z"), text)

    assert written(make_mdp(model, RegexConstraint(pattern), horizon=4)) == enumerated(model, 4, (), judge)
