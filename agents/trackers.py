"""Experiment trackers beside TensorBoard: trackio and Weights & Biases, as outputs of stable-baselines3's logger."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from ..errors import ConfigurationError, UnknownNameError
from ..files import to_jsonable

__all__ = ["TRACKERS", "Tracking", "check_tracker"]

# By name, the package; both have init, log and finish.
TRACKERS = {"trackio": "trackio", "wandb": "wandb"}


class Tracking(BaseCallback, KVWriter):
    """A callback that sends all figures of a training to a tracker, for any agent of stable-baselines3.

    Figures that are logged without a number, and those excluded from the tracker by its name, are left out. The run is
    closed by :meth:`close`, or when the training ends.
    """

    def __init__(
        self,
        tracker: str,
        *,
        project: str = "qstar-decoding",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Begin a run.

        Args:
            tracker: ``"trackio"``, which keeps runs on this machine, or ``"wandb"``.
            project: The project that the run belongs to.
            name: The run's name; the tracker makes one up without it.
            config: Settings to show with the run; values that JSON lacks are shown as text.
            options: Further arguments of the tracker's ``init``.

        Raises:
            UnknownNameError: There is no such tracker.
            ConfigurationError: It is not installed, or cannot begin a run.
        """
        super().__init__()
        self.tracker = tracker
        module = check_tracker(tracker)
        try:
            module.init(project=project, name=name, config=to_jsonable(dict(config or {})), **options)
        except Exception as error:  # trackers raise errors of any kind
            raise ConfigurationError(
                f"{tracker} cannot begin a run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
        self._module, self._is_open = module, True

    def _on_training_start(self) -> None:
        if self not in self.logger.output_formats:
            self.logger.output_formats.append(self)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.logger.dump(self.num_timesteps)  # what was recorded since the last line
        self.close()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Send what the logger has; called by it.

        Args:
            key_values: Figures by name.
            key_excluded: By name, the outputs that a figure is not for.
            step: Time steps so far.
        """
        numbers = {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in key_values.items()
            if isinstance(value, (int, float, np.integer, np.floating))
            and self.tracker not in key_excluded.get(key, ())
        }
        if self._is_open and numbers:
            self._module.log(numbers, step=step)

    def close(self) -> None:
        """End the run; a second call does nothing."""
        if self._is_open:
            self._is_open = False
            self._module.finish()


def check_tracker(name: str) -> Any:
    """Return the module of a tracker.

    Raises:
        UnknownNameError: There is no such tracker.
        ConfigurationError: It is not installed.
    """
    if name not in TRACKERS:
        raise UnknownNameError("tracker", name, TRACKERS)
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ConfigurationError(
            f"the tracker {name!r} is not installed ({error}): pip install {TRACKERS[name]}"
        ) from error
