"""Checkpoints without pickle: safetensors for arrays, JSON for everything else, folders that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from ...checks import first_line
from ...envs import DecodingMDP
from ...envs.mdp import mdp_of
from ...errors import CheckpointError, ConfigurationError, UnknownNameError
from .policies import TokenQPolicy, TokenScorer
from .q_function import PRETRAINED, QFunction, QSpec, QuantileMean, as_q_function, pretrained_names

if TYPE_CHECKING:
    from .qstar import QStar

__all__ = [
    "export_sb3",
    "find_checkpoint",
    "load_agent",
    "load_q_function",
    "locate_checkpoint",
    "save_agent",
    "save_q_function",
]

_FORMAT = 1
_WEIGHTS, _CONFIG = "q_network.safetensors", "config.json"
_EXPERIENCE, _OPTIMIZER, _STATE = "experience.safetensors", "optimizer.safetensors", "training_state.json"

AgentT = TypeVar("AgentT", bound="QStar")
T = TypeVar("T")


# -- folders that are whole or absent ---------------------------------------------------------------------------------


def find_checkpoint(folder: str | Path) -> Path | None:
    """Return where the checkpoint of ``folder`` is to be read from; None if there is none.

    That is ``folder`` itself, unless a save was killed just when it had moved the old checkpoint away and had not yet
    moved the new one in. The old one is then found beside it, and the next save puts it back.
    """
    folder = Path(folder).resolve()
    _, old = _beside(folder)
    # Twice, as a save may be under way: what was moved away at the first look is replaced by the third.
    return next((path for path in (folder, old, folder) if (path / _CONFIG).is_file()), None)


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` once it is complete.

    Wherever the process is killed, :func:`find_checkpoint` finds the old checkpoint or the new one, whole. Only one
    process at a time may save into a folder.
    """
    folder = folder.resolve()
    new, old = _beside(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _WEIGHTS).is_file():
        raise ConfigurationError(f"{folder} holds something else than a checkpoint; save into a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(folder)
    new.mkdir()
    try:
        yield new
        mode = new.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
        for file in new.iterdir():
            file.chmod(mode)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        _clean_up(folder)


def _clean_up(folder: Path) -> None:
    """Put away what a save has left, or what a killed one has; the checkpoint is whole before, after and in between."""
    new, old = _beside(folder)
    shutil.rmtree(new, ignore_errors=True)
    if old.exists():
        # Renamed before it is deleted: ``old`` is what find_checkpoint falls back on, so it must never be half there.
        old.rename(new if folder.exists() else folder)
        shutil.rmtree(new, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return where a new checkpoint is written, and where the old one is while the new one takes its place."""
    return folder.parent / f".{folder.name}.new", folder.parent / f".{folder.name}.old"


def _read_whole(folder: Path, read: Callable[[Path], T]) -> T:
    """Return what ``read`` makes of a checkpoint's files; it reads them again if a save replaced them meanwhile."""
    while True:
        found = find_checkpoint(folder) or folder
        before = _identity(found)
        try:
            content = read(found)
        except CheckpointError:
            if _identity(found) == before:
                raise
        else:
            if _identity(found) == before:
                return content


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


# -- Q-functions ------------------------------------------------------------------------------------------------------


def locate_checkpoint(name: str | Path) -> Path:
    """Return the folder of a checkpoint, downloaded if need be; see :meth:`QFunction.from_pretrained`.

    Args:
        name: The name of a shipped one, a folder that holds one (or one as ``q`` or ``checkpoint``, as ``qstar train``
            leaves them), or a repository ``"user/name"`` on the Hugging Face hub.

    Raises:
        UnknownNameError: There is no such folder or name.
        CheckpointError: The repository cannot be downloaded, or holds no checkpoint.
    """
    for folder in (PRETRAINED / str(name), Path(name), Path(name) / "q", Path(name) / "checkpoint"):
        if find_checkpoint(folder):
            return folder
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists():
        return _download(name)
    hint = 'The folder of a saved one works too, or "user/name" on the Hugging Face hub.'
    raise UnknownNameError("checkpoint", str(name), pretrained_names(), hint)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    # By name: a repository that is something else, a language model say, is not worth its gigabytes.
    files = [_CONFIG, _WEIGHTS, _EXPERIENCE, _OPTIMIZER, _STATE, "README.md"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # the hub's own, the network's, the disk's
        raise CheckpointError(
            f"there is no folder {repository!r} here, and it could not be had from the Hugging Face hub: "
            f"{first_line(error).rstrip('.')}. Check the name and the connection (HF_HUB_OFFLINE=1 forbids it), or "
            "copy the checkpoint's folder here"
        ) from error
    if not find_checkpoint(folder):
        raise CheckpointError(
            f"the repository {repository!r} on the Hugging Face hub has no {_CONFIG} and so is no checkpoint; "
            "upload one with push_to_hub, or the files of a folder that save() wrote"
        )
    return folder


def load_q_function(folder: str | Path) -> QFunction:
    """Read a Q-function.

    Raises:
        CheckpointError: The folder is not a checkpoint, is damaged, or was written by another version.
    """
    return _read_whole(Path(folder), _read_q)


def _read_q(folder: Path) -> QFunction:
    config = _read_json(folder / _CONFIG)
    if config.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {config.get('format')!r}, this version reads {_FORMAT}; "
            "train it again, or use the version that wrote it"
        )
    try:
        scorer = TokenScorer(**config["network"])
        # Constants of the network that an older checkpoint knows nothing of stay as they are made: without effect.
        scorer.load_state_dict({**dict(scorer.named_buffers()), **load_file(folder / _WEIGHTS)})
        # JSON knows lists only, where the spec has tuples.
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["trained_on"].items()}
        spec = QSpec(**given)
    except (OSError, AttributeError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {folder} is damaged ({error}); train or copy it again") from error
    network = scorer if scorer.n_quantiles is None else QuantileMean(scorer)
    return QFunction(network, spec, spec.shaped, spec.candidate_dims, config.get("description", {}))


def save_q_function(q: QFunction, folder: Path, description: Mapping[str, Any]) -> None:
    """Write a Q-function; see :meth:`QFunction.save`."""
    with _replacing(folder) as new:
        _write_q(new, q, description)


def _write_q(folder: Path, q: QFunction, description: Mapping[str, Any]) -> None:
    scorer = _scorer(q)
    if q.spec is None or q.spec.model is None:
        raise ConfigurationError(
            "a checkpoint says what its Q-function was trained on, and of this one it is not known; "
            "load the agent with its environment: DQN.load(path, env)"
        )
    save_file({k: v.contiguous().cpu() for k, v in scorer.state_dict().items()}, folder / _WEIGHTS)
    config = {
        "format": _FORMAT,
        "trained_on": asdict(q.spec),
        "network": {
            "hidden_size": q.spec.hidden_size,
            "candidate_dims": q.spec.candidate_dims,
            **_policy_kwargs(scorer),
            "n_quantiles": scorer.n_quantiles,
        },
        "description": dict(description),
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_sb3(q: Any, path: str | Path, env: Any) -> Path:
    """Write a Q-function as the zip file of stable-baselines3's own ``DQN``, for programs that know only that.

    ``DQN.load(path)`` gives an agent with :class:`TokenQPolicy` that takes the same greedy actions. That file is a
    pickle; this package never reads one, and neither should you where you do not know who wrote it.

    Args:
        q: A :class:`QStar`, or anything else that :func:`as_q_function` takes whose network is a TokenQPolicy's.
        path: The file; ``.zip`` is added where there is no suffix.
        env: The environment whose spaces the agent gets, with the arguments that Q was trained with.

    Returns:
        The file's path.

    Raises:
        ConfigurationError: Q has another network, or is quantiles.
        CheckpointError: Q was trained for another model, k or observation layout than ``env`` has.
    """
    from stable_baselines3 import DQN

    q = as_q_function(q)
    scorer = _scorer(q)
    if scorer.n_quantiles is not None:
        raise ConfigurationError("DQN has no quantiles; export the agent that learned them by its own save()")
    # A buffer that fits into memory, for whoever goes on training.
    agent = DQN(TokenQPolicy, env, gamma=1.0, buffer_size=10_000, policy_kwargs=_policy_kwargs(scorer))
    _check(q, agent.env)
    for network in (agent.q_net, agent.q_net_target):
        network.scorer.load_state_dict(scorer.state_dict())  # type: ignore[union-attr]
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".zip")
    agent.save(path)
    return path


def _scorer(q: QFunction) -> TokenScorer:
    """Return the network that does the work, inside whatever an agent has put around it."""
    network: Any = q.network.network if isinstance(q.network, QuantileMean) else q.network
    scorer = getattr(network, "scorer", network)
    if not isinstance(scorer, TokenScorer):
        raise ConfigurationError(
            f"only the network of a TokenQPolicy can be written, not {type(scorer).__name__}; train with "
            "TokenQPolicy, or use the save() of stable-baselines3"
        )
    return scorer


def _policy_kwargs(scorer: TokenScorer) -> dict[str, Any]:
    """Return the arguments of a TokenQPolicy that make such a network."""
    return {
        "width": scorer.state.out_features,
        "dropout": scorer.dropout.p,
        "dueling": scorer.value is not None,
        "heads": scorer.heads,
    }


def _check(q: QFunction, env: Any) -> None:
    """Compare what Q was trained on with an agent's environment, down to the observations that it makes."""
    mdp: DecodingMDP = mdp_of(env)
    q.check(mdp)
    dims = env.observation_space["candidates"].shape[0] // mdp.top_k
    if dims != q.candidate_dims:
        raise CheckpointError(
            f"this Q-function was trained with candidate_dims={q.candidate_dims}, the environment has {dims}; "
            "use the env arguments it was trained with"
        )


# -- agents -----------------------------------------------------------------------------------------------------------


def save_agent(agent: QStar, folder: Path, *, training_state: bool, description: Mapping[str, Any]) -> None:
    """Write an agent; see :meth:`QStar.save`."""
    with _replacing(folder) as new:
        _write_q(new, agent.q_function(), description)
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


def load_agent(cls: type[AgentT], name: str | Path, env: Any, overrides: Mapping[str, Any]) -> AgentT:
    """Read an agent; see :meth:`QStar.load`.

    Raises:
        UnknownNameError: There is no such folder or name.
        CheckpointError: The checkpoint is none, is damaged, cannot be downloaded, or belongs to another environment.
        ConfigurationError: There is no environment.
    """
    if env is None:
        raise ConfigurationError(
            f"{cls.__name__} needs the environment that it goes on learning in: give env=…; "
            "QHeuristic(folder) and QFunction.from_pretrained(folder) need none"
        )
    q, training = _read_whole(Path(name), lambda folder: (_read_q(folder), _read_training(folder)))
    scorer = _scorer(q)
    arguments = {**(training[0]["arguments"] if training else {}), **overrides}
    agent = cls(env=env, **{"policy_kwargs": _policy_kwargs(scorer), **arguments})
    _check(q, agent.env)
    try:
        for network in (agent.q_net, agent.q_net_target):
            network.scorer.load_state_dict(scorer.state_dict())  # type: ignore[union-attr]
        if training:
            _restore(agent, *training)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint {name} does not fit or is damaged: {error}") from error
    return agent


Training = tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]


def _read_training(folder: Path) -> Training | None:
    """Return training state, experience and optimiser; None where only Q was saved."""
    if not (folder / _STATE).is_file():
        return None
    state = _read_json(folder / _STATE)
    try:
        return state, load_arrays(folder / _EXPERIENCE), load_file(folder / _OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {folder} is damaged ({error}); train or copy it again") from error


def _restore(
    agent: QStar, state: Mapping[str, Any], arrays: Mapping[str, Any], optimizer: Mapping[str, torch.Tensor]
) -> None:
    from .experience import SearchExperience

    if arrays:
        mdp = mdp_of(agent.env)
        agent.experience = SearchExperience(mdp, agent._observer(mdp), agent.buffer_bytes)
        agent.experience.restore(arrays, state["position"])
    _restore_optimizer(agent.policy.optimizer, optimizer, state["optimizer_steps"])
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
