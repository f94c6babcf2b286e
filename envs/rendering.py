"""Renderings of an episode: the prompt, the text so far and the candidates, as text and as a picture."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .episodes import Episodes
from .mdp import DecodingMDP

__all__ = ["Candidate", "Screen"]

_WIDTH, _MARGIN, _LINE = 640, 16, 22  # pixels
_TEXT_LINES, _ROWS = 7, 16  # lines of text, and most candidates in a picture
_INK, _PALE, _PAPER, _BAR = (30, 30, 30), (150, 150, 150), (255, 255, 255), (120, 170, 230)


class Candidate(NamedTuple):
    """A candidate token: its text, its probability, and whether it is legal."""

    text: str
    probability: float
    legal: bool


class Screen(NamedTuple):
    """Content of a rendering.

    Attributes:
        prompt: The prompt's text; None before the first episode.
        completion: The text so far, or the finished one.
        status: One line about the rest of the horizon, or about the end.
        candidates: The k candidates, most likely first; empty where there is no state.
        top_k: k.
    """

    prompt: str | None
    completion: str
    status: str
    candidates: list[Candidate]
    top_k: int

    @classmethod
    def of(cls, mdp: DecodingMDP, episodes: Episodes, index: int = 0) -> Screen:
        """Describe one of the episodes."""
        prompt, node, end = episodes.prompt[index], int(episodes.node[index]), episodes.ended[index]
        if prompt is None:
            return cls(None, "", "before reset", [], mdp.top_k)
        if end is not None:
            scores = f"reward {end.reward:.3f}, log-prob {end.logprob:.2f} nats, J {end.objective:.3f}"
            return cls(prompt.text, end.text, f"finished    {end.stop}: {scores}", [], mdp.top_k)
        nodes = np.array([node])
        texts = mdp.edge_texts(np.full(mdp.top_k, node), np.arange(mdp.top_k))
        rows = zip(texts, np.exp(mdp.logprobs(nodes)[0]).tolist(), mdp.action_mask(nodes)[0].tolist(), strict=True)
        candidates = [Candidate(*row) for row in rows]
        status = f"remaining   {int(mdp.remaining(nodes)[0])} of {mdp.max_new_tokens} tokens"
        return cls(prompt.text, mdp.text(node), status, candidates, mdp.top_k)

    def show(self, mode: str) -> str | npt.NDArray[np.uint8] | None:
        """Return the screen as text (``"ansi"``) or as a picture (``"rgb_array"``), or print it (``"human"``)."""
        if mode == "rgb_array":
            return self.as_image()
        if mode == "ansi":
            return self.as_text()
        print(self.as_text(), end="\n\n")
        return None

    def as_text(self) -> str:
        """Return the screen as lines of text."""
        if self.prompt is None:
            return f"({self.status})"
        lines = [f"prompt      {self.prompt!r}", f"completion  {self.completion!r}", self.status]
        for rank, (text, probability, legal) in enumerate(self.candidates):
            lines.append(f"  {rank:>3}  {probability:6.1%}  {text!r}{'' if legal else '  masked'}")
        return "\n".join(lines)

    def as_image(self) -> npt.NDArray[np.uint8]:
        """Return the screen as a picture, uint8 [H, W, 3]; H depends on k only, so that frames make a video."""
        from PIL import Image, ImageDraw, ImageFont

        rows = min(self.top_k, _ROWS)
        size = (_WIDTH, 2 * _MARGIN + (_TEXT_LINES + 2 + rows) * _LINE)
        image = Image.new("RGB", size, _PAPER)
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)

        def write(line: int, text: str, ink: tuple[int, int, int], x: int = _MARGIN) -> None:
            draw.text((x, _MARGIN + line * _LINE), text, ink, font)

        # The end of the text is shown where it is longer than the picture.
        lines = [(line, _PALE) for line in _wrapped(self.prompt or "")] + [(x, _INK) for x in _wrapped(self.completion)]
        for at, (line, ink) in enumerate(lines[-_TEXT_LINES:]):
            write(at, line, ink)
        write(_TEXT_LINES + 1, " ".join(self.status.split()), _INK)
        for rank, (text, probability, legal) in enumerate(self.candidates[:rows]):
            at = _TEXT_LINES + 2 + rank
            top, left, ink = _MARGIN + at * _LINE, _WIDTH // 2, _INK if legal else _PALE
            write(at, f"{rank}   {text!r}"[:40], ink)
            write(at, f"{probability:.1%}", ink, left - 70)
            end = left + probability * (_WIDTH - left - _MARGIN)
            draw.rectangle((left, top + 3, end, top + _LINE - 4), _BAR if legal else _PALE)
        return np.asarray(image, dtype=np.uint8)


def _wrapped(text: str) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, 78) or [""]]
