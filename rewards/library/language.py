"""A reward that is learned from pairs of texts, of which one was preferred, on a language model's hidden states."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from ...checks import check_number
from ...errors import ConfigurationError
from ..checking import shown
from ..types import Column, FloatArray, RewardOptions, Scores, Texts, TokenIds
from .likelihood import Reader

if TYPE_CHECKING:
    import torch

    from ...models import TransformersLM

__all__ = ["Pair", "Preference", "read_pairs", "train_preference"]

_WEIGHTS, _CONFIG = "reward.safetensors", "reward.json"


class Preference(Reader):
    """The chance that a reader prefers the completion to an average one, 0 to 1, learned from pairs.

    A Bradley-Terry head (Bradley & Terry 1952; for language models Stiennon et al. 2020) on the hidden state that a
    frozen language model has at the end of the text. `train_preference` makes one. There is no potential, as with
    `Coherence`.
    """

    name, lower, upper = "preference", 0.0, 1.0

    def __init__(
        self,
        folder: str | Path,
        *,
        model: Any = None,
        batch_size: int = 16,
        **options: Unpack[RewardOptions],
    ) -> None:
        """Load a trained head.

        Args:
            folder: What :func:`train_preference` or ``qstar train-reward`` wrote.
            model: The language model, by default the one that the head was trained on, by name.
            batch_size: Texts a forward.
            **options: Those of every reward; see `RewardOptions`.

        Raises:
            ConfigurationError: The folder holds no head, or one for another model.
        """
        from safetensors.numpy import load_file

        try:
            folder = Path(folder)
            self.description = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            head = load_file(folder / _WEIGHTS)
            self._weight, self._mean = head["weight"].astype(np.float64), head["mean"].astype(np.float64)
            named = self.description["model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{folder} holds no trained preference ({error}); "
                f"make one with qstar train-reward pairs.jsonl --out {folder}"
            ) from error
        super().__init__(named if model is None else model, batch_size, **options)
        if self._lm().name != named or _width(self._lm()) != len(self._weight):
            raise ConfigurationError(
                f"the preference in {folder} was trained on {named!r}; it says nothing about {self._lm().name!r}"
            )

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the chance for each completion."""
        features = self._features(prompts, completions)
        return _sigmoid((features - self._mean) @ self._weight).tolist()  # type: ignore[no-any-return]

    def _features(self, prompts: Sequence[str], completions: Sequence[str]) -> FloatArray:
        """Return the last hidden states, float64 [n, d]."""
        import torch

        lm = self._lm()
        features = np.zeros((len(completions), _width(lm)))
        pairs = self._tokens(prompts, completions)
        for batch in self._batches([[*before, *after] for before, after in pairs]):
            with torch.inference_mode():
                states = lm.model.base_model(
                    input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
                ).last_hidden_state
            last = states[torch.arange(len(batch.rows)), batch.lengths - 1]
            features[batch.rows] = last.float().cpu().numpy()
        return features


class Pair(NamedTuple):
    """Two completions of a prompt, of which the first was preferred."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: str | Path) -> list[Pair]:
    """Read pairs from a JSONL file, or standard input (``"-"``): ``prompt``, ``chosen`` and ``rejected``.

    Each is a string or a list of chat messages. Conversations in ``chosen`` and ``rejected`` may begin with the
    prompt; the messages that both begin with then are the prompt, if there is no other. The text of several messages
    is their contents, one a line, as it is for prompts that are chats.

    Raises:
        ConfigurationError: The file cannot be read, has no pairs, or a line is not such an object; the line is named.
    """
    try:
        lines = (sys.stdin.read() if str(path) == "-" else Path(path).read_text(encoding="utf-8")).split("\n")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigurationError(f"the pairs {str(path)!r} cannot be read: {error}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(item, dict):
            raise ConfigurationError(
                f"{path}, line {number} is no JSON object with {', '.join(Pair._fields)}: {shown(item)}"
            )
        try:
            pairs.append(_pair(item))
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}, line {number}: {error}") from None
    if not pairs:
        raise ConfigurationError(
            f"{path} holds no pairs; write a line such as " + json.dumps(Pair("…", "…", "…")._asdict())
        )
    return pairs


def _pair(item: dict[str, Any]) -> Pair:
    fields = {name: _content(name, item[name]) for name in Pair._fields if name in item}
    prompt, chosen, rejected = (fields.get(name) for name in Pair._fields)
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise ConfigurationError(f"the field {name!r} is a string or a list of messages, but it is missing")
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        # A conversation without the prompt is answers alone; two equal answers are no beginning to take away.
        if chosen[0][0] != "assistant":
            prompt = chosen[:shared] if prompt is None else prompt
            chosen, rejected = chosen[shared:], rejected[shared:]
    if prompt is None:
        raise ConfigurationError("the field 'prompt' is a string or a list of messages, but it is missing")
    if (not chosen and isinstance(chosen, list)) or (not rejected and isinstance(rejected, list)):
        raise ConfigurationError("'chosen' and 'rejected' are the same conversation, or one begins with the other")
    return Pair(
        *("\n".join(text for _, text in of) if isinstance(of, list) else str(of) for of in (prompt, chosen, rejected))
    )


def _content(field: str, value: Any) -> str | list[tuple[str, str]]:
    """Return a string as it is, and chat messages as (role, text)."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ConfigurationError(f"the field {field!r} is a string or a list of messages, but it is {shown(value)}")
    messages = []
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
            content = "".join(str(part["text"]) for part in content)
        if not isinstance(content, str) or "role" not in message:
            raise ConfigurationError(
                f"a message of the field {field!r} is {{'role': …, 'content': …}} with a text, got {shown(message)}"
            )
        messages.append((str(message["role"]), content))
    return messages


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(text for _, text in content)


def train_preference(
    pairs: Sequence[Pair],
    folder: str | Path,
    *,
    model: Any = "smollm2-135m-instruct",
    held_out: float = 0.2,
    seed: int = 0,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Learn from pairs which texts are preferred, and write it into ``folder`` for `Preference`.

    Maximises the mean log σ(s(chosen) - s(rejected)) minus λ·|w|², s being linear in the language model's last hidden
    state, each number of which is divided by its spread. λ is the one of five with which the held-out pairs are
    likeliest; with it the head is then fitted to all pairs. It is convex: no learning rate, and the seed only chooses
    what is held out.

    Args:
        pairs: At least 10; see `read_pairs`.
        folder: Where to write; what it holds is replaced.
        model: What :func:`~qstar_decoding.envs.load_language_model` takes, or what it returned.
        held_out: The share of the pairs that chooses λ and measures the accuracy.
        seed: Of the drawing of the held-out pairs.
        command: Noted in the description.
        progress: Told how many texts are read, and of how many.

    Returns:
        What was written beside the weights: model, pairs, λ, and on the held-out pairs accuracy and log-likelihood,
        nats a pair.

    Raises:
        ConfigurationError: There are fewer than 10 pairs, or ``held_out`` is not from 0.01 to 0.5.
    """
    from safetensors.numpy import save_file

    check_number("held_out", held_out, low=0.01, high=0.5)
    if len(pairs) < 10:
        raise ConfigurationError(f"a preference is learned from at least 10 pairs, got {len(pairs)}")
    reader = _Features(model, 16)
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    blocks = []
    for start in range(0, len(texts), 64):
        progress(start, len(texts))
        blocks.append(reader._features(*map(list, zip(*texts[start : start + 64], strict=True))))
    features = np.concatenate(blocks)
    mean, spread = features.mean(0), features.std(0) + 1e-6
    differences = (features[::2] - features[1::2]) / spread
    order = np.random.default_rng(seed).permutation(len(pairs))
    count = max(int(len(pairs) * held_out), 1)
    test, train = differences[order[:count]], differences[order[count:]]
    fits = {penalty: _fit(train, penalty) for penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0)}
    likelihood = {penalty: float(_log_sigmoid(test @ weight).mean()) for penalty, weight in fits.items()}
    best = max(likelihood, key=lambda penalty: likelihood[penalty])
    description = {
        "format": 1,
        "model": reader._lm().name,
        "command": command,
        "pairs": len(pairs),
        "held_out_pairs": count,
        "held_out_accuracy": float((test @ fits[best] > 0).mean()),
        "held_out_log_likelihood": likelihood[best],
        "l2": best,
        "seed": seed,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weight = (_fit(differences, best) / spread).astype(np.float32)
    save_file({"weight": weight, "mean": mean.astype(np.float32)}, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


class _Features(Preference):
    """Reads features before there is a head."""

    def __init__(self, model: Any, batch_size: int) -> None:
        Reader.__init__(self, model, batch_size)


def _fit(differences: FloatArray, penalty: float) -> FloatArray:
    """Return the weights [d] of the penalised logistic regression of differences [n, d] that are all positive."""
    import torch

    x = torch.from_numpy(differences)
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = -torch.nn.functional.logsigmoid(x @ weight).mean() + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    fitted: FloatArray = weight.detach().numpy()
    return fitted


def _sigmoid(scores: FloatArray) -> FloatArray:
    return 0.5 * (1 + np.tanh(scores / 2))


def _log_sigmoid(scores: FloatArray) -> FloatArray:
    return -np.logaddexp(0, -scores)


def _width(lm: TransformersLM) -> int:
    return int(lm.model.config.get_text_config().hidden_size)
