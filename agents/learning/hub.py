"""Checkpoints on the Hugging Face hub: repositories of their files and a model card made from ``config.json``."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...checks import first_line
from ...errors import CheckpointError, ConfigurationError
from ...models.embedded_model import EMBEDDED_MODELS
from .checkpoints import CONFIG

__all__ = ["model_card", "push_folder"]

_SHAPED = "It estimates the return less the potential φ(s), which `QHeuristic` adds back."
_TERMS = """
Each of the reward's terms has a head of its own. The weights in training were {terms}. `plan(…, reward="…")` with other
weights of these terms needs no training; far from these weights it knows less.
"""
_CARD = """\
# {title}

A Q-function of qstar-decoding (`pip install qstar-decoding`): it says how good each of the {top_k} likeliest next
tokens of a language model will turn out to be. A\\* searches with it for the best completion.

## Use

```python
import gymnasium as gym
from qstar_decoding.agents import AStarPlanner, QHeuristic

env = gym.make("qstar_decoding:TokenDecoding-v0", {arguments})
planner = AStarPlanner(env, heuristic=QHeuristic("{repository}"))
print(planner.plan("The movie was", budget=200).text)
```

Give the environment the reward and the length that it was trained for. Nothing is unpickled: the weights are
safetensors, the rest is JSON.

## Training

{facts}{figures}
## Limits

It means something for {model} with k = {top_k} only; a checkpoint that does not fit is refused. It raises what its
reward counts, which need not be what a reader values, and is known to be good only for prompts like those that it was
trained on.
{estimate}
"""


def model_card(source: Any, repository: str) -> str:
    """Return the README.md of a repository, made from a checkpoint's description.

    Args:
        source: The content of ``config.json``, or a Q-function, which has it as ``config()``.
        repository: ``"user/name"``.
    """
    from huggingface_hub import ModelCardData

    config = source if isinstance(source, Mapping) else source.config()
    spec, description = config["trained_on"], config["description"]
    known = EMBEDDED_MODELS.get(str(spec["model"]))
    base = known.hub_id if known else str(spec["model"])
    data = ModelCardData(
        library_name="qstar-decoding",
        tags=["qstar-decoding", "reinforcement-learning", "text-generation", "decoding"],
        # The hub can link to a model's id, not to a local folder.
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
    )
    arguments: dict[str, Any] = {
        "model": spec["model"],
        "top_k": spec["top_k"],
        "candidate_dims": spec["candidate_dims"],
    }
    if spec["hidden_layers"]:
        arguments["hidden_layers"] = [*spec["hidden_layers"]]
    if spec.get("context_tokens"):
        arguments["context_tokens"] = spec["context_tokens"]
    terms = spec.get("terms", {})
    if terms:
        arguments["components"] = True
    tables = {key: value for key, value in description.items() if _is_table(value)}
    facts = {key: value for key, value in description.items() if key not in tables}
    card = _CARD.format(
        title=repository.rpartition("/")[2],
        repository=repository,
        model=f"`{spec['model']}`",
        top_k=spec["top_k"],
        arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()),
        facts="".join(f"- {_words(key)}: {_code(key, value)}\n" for key, value in facts.items())
        or "Its maker has not said how it was trained.\n",
        figures="".join(f"\n### {_words(key)}\n\n{_table(value)}" for key, value in tables.items()),
        estimate=(_SHAPED if spec["shaped"] else "") + (_TERMS.format(terms=_weighted(terms)) if terms else ""),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{card.rstrip()}\n"


def push_folder(
    repository: str, write: Callable[[Path], object], *, private: bool | None, token: str | None, message: str
) -> str:
    """Write a checkpoint with its card into a new folder and upload that; return the repository's address.

    Args:
        repository: ``"user/name"``; made if there is none.
        write: Given the folder, writes the checkpoint there.
        private: Whether a new repository is private; None is the account's own setting.
        token: Instead of the one that ``hf auth login`` has stored.
        message: Of the commit.

    Raises:
        ConfigurationError: ``repository`` is no such name.
        CheckpointError: The hub cannot be reached, or does not let us; the reason is in it.
    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(repository)):
        raise ConfigurationError(f'a repository on the hub is "user/name", got {repository!r}')
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoint"
        write(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        card = model_card(config, repository)
        (folder / "README.md").write_text(card, encoding="utf-8")
        api = HfApi(token=token)
        try:
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        except Exception as error:  # the hub's own, the network's
            raise CheckpointError(
                f"could not write to {repository!r} on the Hugging Face hub: {first_line(error).rstrip('.')}. "
                "Log in with `hf auth login` (or give token=) and an account that may write there, check the "
                "connection (HF_HUB_OFFLINE=1 forbids it), or save() into a folder and upload that later"
            ) from error
    return str(url)


def _weighted(terms: Mapping[str, float]) -> str:
    return ", ".join(f"{weight:g} for {_plain(name)}" for name, weight in terms.items())


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(row, Mapping) for row in value.values())


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *map(_words, columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_number(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    # A* is no emphasis, and a bar in a name no new column.
    return "".join(f"| {' | '.join(_plain(cell) for cell in line)} |\n" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    return re.sub(r"([*|\n])", lambda found: {"\n": " "}.get(found[0], "\\" + found[0]), text)


def _code(key: str, value: Any) -> str:
    return f"`{value}`" if key == "command" else _plain(_number(value))


def _words(key: str) -> str:
    return key.replace("_", " ")
