"""Context-free grammars as constraints: the same language as the library's own acceptor, and as the derivations."""

import itertools

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, GrammarConstraint, JSONConstraint, RegexConstraint, TabularLM
from qstar_decoding.envs.constraints import Rules, StopStrings
from qstar_decoding.errors import ConfigurationError, ConstraintError
from qstar_decoding.rewards import as_reward

VOCABULARY = ["a", "b", "ab", "ba", "a", ""]  # two tokens of one text, and longer ones
LONGEST = 4
TEXTS = ["".join(t) for n in range(LONGEST + 1) for t in itertools.product("ab", repeat=n)]


def draw_rules(rng):
    """Return a random context-free grammar over a and b: by symbol, its alternatives."""
    symbols = ["start", "x", "y"][: rng.integers(1, 4)]
    return {
        symbol: [
            [str(rng.choice([*"aabb", *symbols])) for _ in range(rng.integers(0 if i else 1, 4))]
            for i in range(rng.integers(1, 4))
        ]
        for symbol in symbols
    }


def derived(rules):
    """Return every text of at most LONGEST letters that the grammar derives, by symbol."""
    texts = {symbol: set() for symbol in rules}
    while True:
        before = {symbol: set(found) for symbol, found in texts.items()}
        for symbol, alternatives in rules.items():
            for body in alternatives:
                parts = [texts[part] if part in rules else {part} for part in body]
                made = ("".join(choice) for choice in itertools.product(*parts))
                texts[symbol] |= {text for text in made if len(text) <= LONGEST}
        if texts == before:
            return texts


def as_lark(rules):
    def body(parts):
        return " ".join(part if part in rules else f'"{part}"' for part in parts) or '""'

    return "\n".join(f"{symbol}: {' | '.join(map(body, alternatives))}" for symbol, alternatives in rules.items())


def as_gbnf(rules):
    def name(part):
        return "root" if part == "start" else part

    def body(parts):
        return " ".join(name(part) if part in rules else f'"{part}"' for part in parts) or '""'

    return "\n".join(f"{name(symbol)} ::= {' | '.join(map(body, alts))}" for symbol, alts in rules.items())


def acceptor(lark):
    """Return the library's own acceptor: a matcher over single bytes."""
    start = LLMatcher(LLTokenizer("byte"), lark, log_level=0)

    def accepts(text):
        matcher = start.deep_copy()
        return matcher.try_consume_tokens([*text.encode()]) == len(text) and matcher.is_accepting()

    return accepts


def test_200_random_grammars_have_the_language_of_the_librarys_acceptor():
    model = TabularLM(np.ones((6, 6)), vocabulary=VOCABULARY)
    rng, judged, accepted = np.random.default_rng(0), 0, 0
    for number in range(200):
        rules = draw_rules(rng)
        language = derived(rules)["start"]
        grammar = (as_lark if number % 2 else as_gbnf)(rules)
        try:
            constraint = GrammarConstraint(grammar)
            rule = constraint.bind(model)
        except ConfigurationError:  # the library reads no grammar without a sentence, or whose only one is empty
            assert not language - {""}, grammar
            continue
        reads = acceptor(constraint.lark())
        for text in rng.choice(TEXTS, 8):
            judged += 1
            accepted += text in language
            assert rule.accepts(text, []) == reads(text) == (text in language), (grammar, text)
        # What may follow is what leads to a sentence. Longer sentences than LONGEST may be what it leads to.
        for ids in [(), (0,), (1,), (2,), (4, 1), (0, 3), (1, 2), (1, 2, 0)]:
            written = "".join(VOCABULARY[i] for i in ids)
            for token, may in enumerate(rule.allowed(ids)[:5]):
                text = written + VOCABULARY[token]
                if any(sentence.startswith(text) for sentence in language):
                    assert may, (grammar, ids, token)
                assert bool(may) == rule.can_become(text), (grammar, ids, token)
    assert judged > 1000
    assert accepted > 100


@pytest.mark.parametrize("seed", range(6))
def test_exactly_the_sentences_of_a_grammar_are_written(seed):
    rng = np.random.default_rng(seed)
    while not (language := derived(rules := draw_rules(rng))["start"]) - {""}:
        pass
    model = TabularLM(rng.random((6, 6)) + 0.1, vocabulary=VOCABULARY)
    reward = as_reward(lambda prompt, text: len(text) / 10, lower=0, upper=1)
    mdp = DecodingMDP(model, reward=reward, top_k=6, max_new_tokens=3, constraint=GrammarConstraint(as_lark(rules)))
    try:
        plan = AStarPlanner(mdp, n=10**6, margin=np.inf).plan("a")
    except ConstraintError:  # no sentence is short enough
        assert not any(2 * len(text) <= 3 for text in language)
        return
    written = {(c.text, len(c.token_ids), c.stop) for c in plan.completions}
    expected = {
        (text, len(ids), stop)
        for n in range(4)
        for ids in itertools.product(range(5), repeat=n)
        if (text := "".join(VOCABULARY[i] for i in ids)) in language or len(text) > LONGEST
        for stop in (["eos"] if n < 3 else ["length"])
    }
    assert {w for w in written if len(w[0]) <= LONGEST} == {
        (text, length + (stop == "eos"), stop) for text, length, stop in expected if len(text) <= LONGEST
    }


ARITHMETIC = """
start: term (("+" | "-") term)*
term: NUMBER | "(" start ")"
NUMBER: /[0-9]+/
"""


def test_a_language_that_is_not_regular():
    rule = GrammarConstraint(ARITHMETIC).bind(TabularLM(np.ones((6, 6)), vocabulary=["(", ")", "1", "+", "((", ""]))
    for text, right in (("((1+1)+1)", True), ("(1", False), ("((1)))", False), ("1+(1)", True), ("", False)):
        assert rule.accepts(text, []) is right
    assert rule.allowed([0, 2]).tolist() == [False, True, True, True, False, False]  # "(1": no end yet
    assert rule.allowed([2]).tolist() == [False, False, True, True, False, False]  # "1": nothing to close


def test_a_sentence_ends_at_a_stop_string_or_at_the_end_of_the_sequence():
    model = TabularLM(np.ones((6, 6)), vocabulary=["a", "b", ";", "a;", "x", ""])
    rules = Rules(GrammarConstraint('start: "a" start "b" | "a" "b"'), model, StopStrings(";"))
    assert rules.allowed([]).tolist() == [True, False, False, False, False, False]
    assert rules.allowed([0, 1]).tolist() == [False, False, True, False, False, True]  # "ab" may end by either
    assert rules.allowed([0, 0, 1]).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrammarConstraint(""), "non-empty"),
        (lambda: GrammarConstraint("start: missing"), "cannot be followed.*missing"),
        (lambda: GrammarConstraint('root ::= "a" ('), "GBNF|cannot be followed"),
        (lambda: RegexConstraint(r"(a)\1"), "cannot be followed.*backreferences"),
        (lambda: JSONConstraint({"type": "strin"}), "cannot be followed"),
        (lambda: JSONConstraint({1, 2}), "JSON schema"),
        (lambda: GrammarConstraint('start: "zz"').bind(TabularLM.random(4, 1)), "cannot be followed with the tokens"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigurationError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_objects_have_the_named_properties_only_unless_the_schema_says_otherwise():
    model = TabularLM(np.ones((4, 4)), vocabulary=["{", "[", "3", ""])
    inner = {"type": "object", "properties": {"properties": {"type": "null"}}}
    for schema, text, right in [
        (inner, '{"properties": null}', True),
        (inner, '{"properties":null}', True),
        (inner, '{"other": 1}', False),
        ({**inner, "additionalProperties": {"type": "integer"}}, '{"other": 1}', True),
        ({"type": "array", "items": inner}, '[{"other": 1}]', False),
        ({"type": "array", "items": inner}, "[{}, {}]", True),
        ({"type": "object"}, '{"other": 1}', True),
        ({"type": "integer", "maximum": 5}, "7", False),
    ]:
        assert JSONConstraint(schema).bind(model).accepts(text, []) is right, (schema, text)


def test_constraints_of_equal_grammars_are_equal():
    assert GrammarConstraint(ARITHMETIC) == GrammarConstraint(ARITHMETIC) != GrammarConstraint('start: "a"')
    constraint = JSONConstraint({"type": "object", "properties": {}})
    assert eval(repr(constraint)) == constraint
