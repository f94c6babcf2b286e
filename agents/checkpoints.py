"""Checkpoints without pickle: safetensors for arrays, JSON for everything else, folders that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from .policies import TokenQNetwork, TokenScorer
from .q_function import QFunction, QSpec

if TYPE_CHECKING:
    from .qstar import QStar

__all__ = ["load_agent", "load_q_function", "save_agent"]

_FORMAT = 1
_WEIGHTS, _CONFIG = "q_network.safetensors", "config.json"
_EXPERIENCE, _OPTIMIZER, _STATE = "experience.safetensors", "optimizer.safetensors", "training_state.json"

AgentT = TypeVar("AgentT", bound="QStar")


@contextlib.contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``folder`` once it is complete."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(old / folder.name)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_q(folder: Path, network: TokenQNetwork, spec: QSpec, description: Mapping[str, Any]) -> None:
    save_file({k: v.contiguous().cpu() for k, v in network.scorer.state_dict().items()}, folder / _WEIGHTS)
    config = {
        "format": _FORMAT,
        "trained_on": asdict(spec),
        "network": network.scorer_kwargs,
        "description": dict(description),
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_q_function(folder: Path) -> QFunction:
    """Read a Q-function.

    Raises:
        CheckpointError: The folder is not a checkpoint, is damaged, or was written by another version.
    """
    config = _read_config(folder)
    try:
        scorer = TokenScorer(**config["network"])
        scorer.load_state_dict(load_file(folder / _WEIGHTS))
        spec = QSpec(**config["trained_on"])
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {folder} is damaged ({error}); train or copy it again") from error
    return QFunction(scorer, spec, spec.shaped, spec.candidate_dims, config.get("description", {}))


def save_agent(agent: QStar, folder: Path, *, training_state: bool, description: Mapping[str, Any]) -> None:
    """Write an agent; see :meth:`QStar.save`."""
    q = agent.q_function()
    assert q.spec is not None
    with _atomic_folder(folder) as new:
        _write_q(new, agent.q_net, q.spec, description)  # type: ignore[arg-type]
        if not training_state:
            return
        arrays, moments = _flatten_optimizer(agent.policy.optimizer)
        save_file(arrays, new / _OPTIMIZER)
        experience = agent.experience.state() if agent.experience else {}
        save_arrays({k: np.ascontiguousarray(v) for k, v in experience.items()}, new / _EXPERIENCE)
        state = {
            "arguments": agent.arguments(),
            "num_timesteps": agent.num_timesteps,
            "total_timesteps": agent._total_timesteps,
            "n_updates": agent._n_updates,
            "episodes": agent._episode_num,
            "position": agent.experience.position if agent.experience else 0,
            "queue": agent._queue,
            "optimizer_steps": moments,
            "numpy_rng": agent.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state().tolist(),
        }
        (new / _STATE).write_text(json.dumps(state))


def load_agent(cls: type[AgentT], folder: Path, env: Any, overrides: Mapping[str, Any]) -> AgentT:
    """Read an agent; see :meth:`QStar.load`."""
    q = load_q_function(folder)
    state = _read_json(folder / _STATE) if (folder / _STATE).is_file() else None
    arguments = {**(state["arguments"] if state else {}), **overrides}
    width, dropout = q.network.state.out_features, q.network.dropout.p  # type: ignore[union-attr]
    agent = cls(env=env, **{"policy_kwargs": {"width": width, "dropout": dropout}, **arguments})
    from .planning import mdp_of

    assert q.spec is not None
    if env is not None:
        q.spec.check(mdp_of(agent.env))
    try:
        agent.q_net.scorer.load_state_dict(q.network.state_dict())  # type: ignore[union-attr]
        agent.q_net_target.scorer.load_state_dict(q.network.state_dict())  # type: ignore[union-attr]
        if state and env is not None:
            _restore(agent, folder, state)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {folder} does not fit or is damaged: {error}") from error
    return agent


def _restore(agent: QStar, folder: Path, state: Mapping[str, Any]) -> None:
    from .experience import SearchExperience
    from .planning import mdp_of

    arrays = load_arrays(folder / _EXPERIENCE)
    if arrays:
        mdp = mdp_of(agent.env)
        agent.experience = SearchExperience(mdp, agent._observer(mdp), agent.buffer_bytes)
        agent.experience.restore(arrays, state["position"])
    _restore_optimizer(agent.policy.optimizer, load_file(folder / _OPTIMIZER), state["optimizer_steps"])
    agent.num_timesteps, agent._total_timesteps = state["num_timesteps"], state["total_timesteps"]
    agent._n_updates, agent._episode_num = state["n_updates"], state["episodes"]
    agent._queue = list(state["queue"])
    agent.rng.bit_generator.state = state["numpy_rng"]
    torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Split Adam's state into tensors ("index.name") and step counts."""
    tensors: dict[str, torch.Tensor] = {}
    steps: dict[str, float] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        steps[str(index)] = float(entry["step"])
        tensors |= {f"{index}.{k}": v.contiguous() for k, v in entry.items() if k != "step"}
    return tensors, steps


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], steps: Mapping[str, float]
) -> None:
    state: dict[int, dict[str, Any]] = {int(i): {"step": torch.tensor(step)} for i, step in steps.items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / _CONFIG)
    if config.get("format") != _FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {config.get('format')!r}, this version reads {_FORMAT}")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a checkpoint: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it does not hold an object")
    return content
