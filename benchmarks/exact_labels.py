"""Q of a number puzzle from exact labels instead of searches: what the frozen model knows when labels are no limit.

    python benchmarks/exact_labels.py countdown-4 --problems 2000 --out runs/countdown-4-exact

Writes random legal answers and right ones to training problems. Brute force labels every legal token of every prefix:
1 where a right answer still begins so, else 0. Q, the network of `qstar train`, is regressed onto label + α · log π.
Prints the area under the ROC curve on dev problems, by number of operands written. The labels serve training only.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from rows import add_json_option, out, row, write

from qstar_decoding.agents import QFunction
from qstar_decoding.agents.learning.policies import TokenScorer
from qstar_decoding.agents.learning.q_function import QSpec
from qstar_decoding.envs import Finish, Observer, load_prompts
from qstar_decoding.tasks import load_task
from qstar_decoding.tasks.number_puzzles import solutions

DIMS = 32  # numbers per candidate token, as in TokenDecoding-v0
GROUP = 128  # problems whose prompts share one token tree


def beginnings(prompt, mdp):
    """Return every beginning of every right answer."""
    constraint, columns = mdp.constraint, prompt.columns
    numbers, target = tuple(sorted(columns["numbers"])), columns["target"]
    answers = solutions(numbers, target, constraint.format, constraint.operators)
    return answers, {answer[:end] for answer in answers for end in range(len(answer) + 1)}


def labelled(mdp, observer, prompts, rng):
    """Return observations, labels [n, k] (NaN where not legal) and operands written [n] of one walk each way."""
    solved = [beginnings(prompt, mdp) for prompt in prompts]
    walks = [(i, goal) for i in range(len(prompts)) for goal in (None, rng.choice(solved[i][0]))]
    nodes, parts = mdp.roots([prompts[i] for i, _ in walks]), []
    while len(nodes):
        legal, ends, texts = mdp.action_mask(nodes), mdp.finishes(nodes) != Finish.NO, mdp.texts(nodes)
        labels, chosen = np.full(legal.shape, np.nan), np.full(len(nodes), -1)
        for r, (i, goal) in enumerate(walks):
            answers, begun = solved[i]
            options = []
            for action in np.flatnonzero(legal[r]).tolist():
                if ends[r, action]:
                    labels[r, action] = texts[r] in answers
                    continue
                text = texts[r] + mdp.model.decode_continuation([int(mdp.tree.tokens[nodes[r], action])])
                labels[r, action] = text in begun
                options += [action] if goal is None or goal.startswith(text) else []
            chosen[r] = rng.choice(options) if options else -1
        observation = observer.observe(mdp.potential([prompts[i] for i, _ in walks], nodes), nodes)
        operands = np.array(
            [sum(not a.isdigit() and b.isdigit() for a, b in zip(f" {t}", t, strict=False)) for t in texts]
        )
        parts.append((observation, labels, operands))
        going = np.flatnonzero(chosen >= 0)
        nodes = mdp.tree.expand(nodes[going], chosen[going]) if len(going) else nodes[:0]
        walks = [walks[r] for r in going.tolist()]
    observations = {key: np.concatenate([part[0][key] for part in parts]) for key in parts[0][0]}
    return observations, np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def gather(mdp, prompts, rng, name, minutes, context):
    """Label prompts, a group at a time, for so many minutes; the hidden states are kept in half precision."""
    observer, parts, tokens, start = Observer(mdp, DIMS, context), [], 0, time.perf_counter()
    for first in range(0, len(prompts), GROUP):
        if parts and time.perf_counter() - start > 60 * minutes:
            break
        mdp = observer.mdp = mdp.with_empty_tree()
        observations, labels, operands = labelled(mdp, observer, load_prompts(prompts[first : first + GROUP]), rng)
        tokens += len(mdp.tree) - len(np.unique(mdp.tree.root[: len(mdp.tree)]))
        kept = {key: values.astype(np.float16) for key, values in observations.items() if key != "candidates"}
        parts.append((kept | {"candidates": observations["candidates"].astype(np.float16)}, labels, operands))
        done = first + len(prompts[first : first + GROUP])
        print(f"{name}: {done} problems, {tokens} LM tokens, {time.perf_counter() - start:.0f} s", flush=True)
    observations = {key: np.concatenate([part[0][key] for part in parts]) for key in parts[0][0]}
    return observations, *(np.concatenate([part[j] for part in parts]) for j in (1, 2)), tokens


def auc(scores, labels):
    """Return the area under the ROC curve."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    positive = labels > 0.5
    pairs = positive.sum() * (~positive).sum()
    return (ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2) / pairs if pairs else np.nan


def predict(scorer, observations):
    with torch.inference_mode():
        size = len(observations["hidden"])
        parts = [
            scorer({key: torch.from_numpy(v[i : i + 512]).float() for key, v in observations.items()}).numpy()
            for i in range(0, size, 512)
        ]
    return np.concatenate(parts)


def gathered(path, *arguments):
    """Return what the file holds of :func:`gather`; gather and write it first if need be."""
    if path.is_file():
        with np.load(path) as kept:
            names = [name for name in kept.files if name not in ("labels", "operands", "tokens")]
            return {name: kept[name] for name in names}, kept["labels"], kept["operands"], int(kept["tokens"])
    observations, labels, operands, tokens = gather(*arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **observations, labels=labels, operands=operands, tokens=tokens)
    return observations, labels, operands, tokens


def train(mdp, data, epochs, dropout, seed, context):
    """Return a scorer regressed onto label + α · log π."""
    torch.manual_seed(seed)
    observations, labels, _, _ = data
    rng, size = np.random.default_rng(seed), len(labels)
    scorer = TokenScorer(
        mdp.model.hidden_size, DIMS, dropout=dropout, context_tokens=context, logprob_weight=mdp.logprob_weight
    )
    scorer.standardize(torch.from_numpy(observations["hidden"]))
    targets = labels + mdp.logprob_weight * np.maximum(observations["logprobs"].astype(float), -50)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * (size // 128))
    for epoch in range(epochs):
        order, losses = rng.permutation(size), []
        for batch in order[: size // 128 * 128].reshape(-1, 128):
            target = torch.from_numpy(targets[batch]).float()
            q = scorer({key: torch.from_numpy(values[batch]).float() for key, values in observations.items()})
            legal = ~torch.isnan(target)
            loss = ((q - target)[legal] ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}", flush=True)
    return scorer.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="countdown-3, countdown-4 or game-of-24")
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=20, help="of labelling; what is labelled by then is used")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--context-tokens", type=int, default=0, help="last tokens that Q reads beside the state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder of the Q-function; the labelled states are kept beside it")
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    task, rng = load_task(arguments.task), np.random.default_rng(arguments.seed)
    mdp = task.mdp()
    context, beside = arguments.context_tokens, Path(arguments.out).parent
    kept = [beside / f"{task.name}-{part}-{context}-{arguments.seed}.npz" for part in ("train", "dev")]
    training, minutes = task.prompts.of("train")[: arguments.problems], arguments.minutes
    data = gathered(kept[0], mdp, training, rng, "train", minutes, context)
    held_out = gathered(kept[1], mdp, task.prompts.of("dev")[:64], rng, "dev", minutes / 5, context)
    scorer = train(mdp, data, arguments.epochs, arguments.dropout, arguments.seed, context)
    rows, (observations, labels, operands, _) = [], held_out
    q = predict(scorer, observations) - mdp.logprob_weight * observations["logprobs"].astype(float)
    lm = observations["logprobs"].astype(float)
    for count in [*range(int(operands.max()) + 1), None]:
        of = ~np.isnan(labels) & (np.ones(len(labels), bool) if count is None else operands == count)[:, None]
        value, prior = auc(q[of], labels[of]), auc(lm[of], labels[of])
        name = "all" if count is None else f"after {count} operands"
        out.print(
            f"{name}: AUC of Q {value:.3f}, of log π {prior:.3f}, {np.mean(labels[of]):.2f} right, {of.sum()} edges"
        )
        rows.append(row(f"{task.name}, {name}: AUC of Q from exact labels", value, "AUC"))
    minutes = round((time.perf_counter() - start) / 60, 1)
    q_function = QFunction(scorer, QSpec.of(mdp, DIMS, True, context), shaped=True, candidate_dims=DIMS)
    command = f"python benchmarks/exact_labels.py {task.name} --problems {arguments.problems} --seed {arguments.seed}"
    command += f" --context-tokens {context}" if context else ""
    q_function.save(
        Path(arguments.out),
        command=command,
        labels="exact",
        seed=arguments.seed,
        minutes=minutes,
        time_steps=int(data[3]),
    )
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
