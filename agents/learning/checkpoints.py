"""Checkpoint folders: found by name, read as a whole, and replaced atomically."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ...checks import describe_invalid, first_line
from ...errors import CheckpointError, ConfigurationError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "PRETRAINED",
    "check_replaceable",
    "find_checkpoint",
    "flatten_optimizer",
    "locate_checkpoint",
    "pretrained_names",
    "read_json",
    "read_whole",
    "replacing",
    "restore_optimizer",
    "wrap_damage",
]

WEIGHTS, CONFIG = "q_network.safetensors", "config.json"
EXPERIENCE, OPTIMIZER, STATE = "experience.safetensors", "optimizer.safetensors", "training_state.json"
PRETRAINED = Path(__file__).parent / "pretrained"

# Settings that were given up, by their section and name, with the value that still means nothing.
_GIVEN_UP: dict[tuple[str, str], Any] = {
    ("network", "conditioned"): False,
    ("arguments", "weight_factors"): [1.0, 1.0],
}

T = TypeVar("T")


def pretrained_names() -> list[str]:
    """Return the tasks that the package ships a Q-function for."""
    return sorted(path.name for path in PRETRAINED.glob("*") if (path / CONFIG).is_file())


def find_checkpoint(folder: str | Path) -> Path | None:
    """Return where to read the checkpoint of ``folder``; None if there is none.

    That is ``folder`` itself, unless a save was killed between moving the old checkpoint away and moving the new one
    in. The old one is then found beside it, and the next save puts it back.
    """
    folder = Path(folder).resolve()
    _, old = _beside(folder)
    # The folder twice: a save under way may move it away before the first look, and has replaced it by the third.
    return next((path for path in (folder, old, folder) if (path / CONFIG).is_file()), None)


def check_replaceable(folder: Path) -> None:
    """Check that a checkpoint may be saved as ``folder``: a new or empty folder, or a checkpoint.

    Raises:
        ConfigurationError: It is something else.
    """
    is_free = not folder.exists() or (folder.is_dir() and ((folder / WEIGHTS).is_file() or not any(folder.iterdir())))
    if not is_free:
        raise ConfigurationError(f"{folder} holds something else than a checkpoint; save into a new or empty folder")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` once it is complete.

    Wherever the process is killed, :func:`find_checkpoint` finds the old checkpoint or the new one, whole. Only one
    process at a time may save into a folder.

    Raises:
        ConfigurationError: ``folder`` holds something else than a checkpoint.
    """
    folder = folder.resolve()
    new, old = _beside(folder)
    check_replaceable(folder)
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
    """Delete the leftovers of a save, finished or killed; the checkpoint is whole before, after and in between."""
    new, old = _beside(folder)
    shutil.rmtree(new, ignore_errors=True)
    if old.exists():
        # Renamed before it is deleted: find_checkpoint falls back on ``old``, so it must never be half there.
        old.rename(new if folder.exists() else folder)
        shutil.rmtree(new, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return the folder in which a new checkpoint is written, and that of the old one during the exchange."""
    return folder.parent / f".{folder.name}.new", folder.parent / f".{folder.name}.old"


def read_whole(folder: Path, read: Callable[[Path], T]) -> T:
    """Return the result of ``read`` on a checkpoint's folder; call it again if a save replaced the folder meanwhile."""
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


def locate_checkpoint(name: str | Path) -> Path:
    """Return the folder of a checkpoint, downloaded if need be.

    Args:
        name: The name of a shipped one, a folder that holds one (or one as ``q`` or ``checkpoint``, as ``qstar train``
            leaves them), or a repository ``"user/name"`` on the Hugging Face hub.

    Raises:
        UnknownNameError: There is no such folder or name.
        ConfigurationError: ``name`` is a file, such as the zip of stable-baselines3.
        CheckpointError: The repository cannot be downloaded, or holds no checkpoint.
    """
    for folder in (PRETRAINED / str(name), Path(name), Path(name) / "q", Path(name) / "checkpoint"):
        if find_checkpoint(folder):
            return folder
    if Path(name).suffix == ".zip" or Path(name).is_file():
        raise ConfigurationError(
            f"{str(name)!r} is a file, a checkpoint is a folder. An agent saved by stable-baselines3 is a pickle, "
            "which is not read by name: load it and give the agent, as in QHeuristic(DQN.load(path, env))"
        )
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists():
        return _download(name)
    hint = 'The folder of a saved one works too, or "user/name" on the Hugging Face hub.'
    raise UnknownNameError("checkpoint", str(name), pretrained_names(), hint)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    # By name: another kind of repository, a language model say, must not be downloaded.
    files = [CONFIG, WEIGHTS, EXPERIENCE, OPTIMIZER, STATE, "README.md"]
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
            f"the repository {repository!r} on the Hugging Face hub has no {CONFIG} and so is no checkpoint; "
            "upload one with push_to_hub, or the files of a folder that save() wrote"
        )
    return folder


def read_json(path: Path, content_type: type[T]) -> T:
    """Return a checkpoint's JSON file as an instance of a dataclass; unknown keys are ignored.

    Raises:
        CheckpointError: The file is missing, is not JSON, lacks a key, has a value of another type, or was written with
            a setting that was given up.
    """
    try:
        text = path.read_bytes()
        content = json.loads(text)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} is damaged: it does not hold an object")
        for (section, name), unused in _GIVEN_UP.items():
            settings = content.get(section)
            if isinstance(settings, dict) and settings.get(name, unused) != unused:
                raise CheckpointError(
                    f"{path} has {name}={settings[name]!r}, which this version no longer has; train it again without, "
                    "or use the version that wrote it"
                )
        return TypeAdapter(content_type).validate_json(text, strict=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a checkpoint: {path.name} is missing") from error
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {describe_invalid(error)}; train or copy it again") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {first_line(error)}; train or copy it again") from error


@contextlib.contextmanager
def wrap_damage(folder: Path) -> Iterator[None]:
    """Raise every error of the context as one that names the checkpoint.

    Raises:
        CheckpointError: The context raised an error: a file that was edited or cut can fail anywhere.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"the checkpoint {folder} is damaged or does not fit ({reason[:300]}); train or copy it again"
        ) from error


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Split Adam's state into tensors ("index.name") and step counts."""
    tensors: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        steps[str(index)] = float(entry["step"])
        tensors |= {f"{index}.{k}": v.contiguous() for k, v in entry.items() if k != "step"}
    return tensors, steps


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], steps: Mapping[str, float]
) -> None:
    """Give the state of :func:`flatten_optimizer` back.

    Raises:
        CheckpointError: It is another network's.
    """
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = {f"{i}.{name}": parameters[int(i)].shape for i in steps for name in ("exp_avg", "exp_avg_sq")}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise CheckpointError("the optimiser's state does not fit the network; train or copy the checkpoint again")
    state: dict[int, dict[str, Any]] = {int(i): {"step": torch.tensor(step)} for i, step in steps.items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
