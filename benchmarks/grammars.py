"""Time of a mask over the vocabulary, by the kinds of constraints that llguidance follows.

    python benchmarks/grammars.py --texts 20 --json grammars.json

A mask is asked for after every prefix of random texts that keep the constraint. The time of a mask includes reading the
prefix anew.
"""

import argparse
import time

import numpy as np
from rows import add_json_option, row, write

from qstar_decoding.envs import GrammarConstraint, JSONConstraint, RegexConstraint, load_language_model

ARITHMETIC = r"""
start: term (("+" | "-") term)*
term: factor (("*" | "/") factor)*
factor: /[0-9]+/ | "(" start ")"
%ignore / +/
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "stars": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["title", "stars", "tags"],
}
CONSTRAINTS = {
    "regex": RegexConstraint(r" [A-Z][^.]*\."),
    "JSON": JSONConstraint(SCHEMA),
    "grammar": GrammarConstraint(ARITHMETIC),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--texts", type=int, default=20, help="random texts of each constraint")
    parser.add_argument("--length", type=int, default=40, help="tokens of a text, at most")
    add_json_option(parser)
    arguments = parser.parse_args()
    model = load_language_model(arguments.model)
    rows = []
    print(f"{model.name}: {model.vocab_size:,} tokens; a mask after every prefix of random texts")
    print(f"{'constraint':<12}{'compile':>10}{'median':>10}{'99 %':>10}{'masks':>8}")
    CONSTRAINTS["regex"].bind(model)  # the first reads the vocabulary, once for all
    for name, constraint in CONSTRAINTS.items():
        started = time.perf_counter()
        rule = constraint.bind(model)
        compiled, seconds = time.perf_counter() - started, []
        for seed in range(arguments.texts):
            rng, ids = np.random.default_rng(seed), []
            while len(ids) < arguments.length:
                started = time.perf_counter()
                allowed = rule.allowed(ids)
                seconds.append(time.perf_counter() - started)
                if not allowed.any():
                    break
                ids.append(int(rng.choice(np.flatnonzero(allowed))))
        median, slow = 1e3 * np.median(seconds), 1e3 * np.quantile(seconds, 0.99)
        print(f"{name:<12}{1e3 * compiled:>7.1f} ms{median:>7.3f} ms{slow:>7.3f} ms{len(seconds):>8}")
        rows.append(row(f"mask of {name}, median", median, "ms", 1.0, higher_is_better=False))
        rows.append(row(f"mask of {name}, 99 %", slow, "ms", higher_is_better=False))
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
