"""Workers that decode with the newest Q of a learner in another process, and send it their lessons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ....envs import DecodingMDP, Prompt
from ...distributed.batch import BatchDecoder
from ...distributed.jobs import Job, Workers
from ...planning.astar import AStarPlanner
from ...search.budget import Budget
from ..q_function import QFunction
from ..q_heuristic import QHeuristic
from .guard import Guard
from .learner import News, OnlineLearner, Watcher
from .lessons import Lesson

__all__ = ["LearningDecoder", "LearningWorkers"]


class _Collector(Watcher):
    """Collects the lessons of this process, and searches with what the learner has sent last."""

    def __init__(self, mdp: DecodingMDP) -> None:
        """Watch searches in ``mdp``."""
        super().__init__(Guard(seed=None))
        self.mdp = mdp
        self._q: QFunction | None = None
        self.lessons: list[Lesson] = []

    def fits(self, mdp: DecodingMDP) -> bool:
        """Return whether it is the MDP of this worker."""
        return mdp is self.mdp

    def enter(self, lessons: Sequence[Lesson]) -> None:
        """Keep lessons until they are sent."""
        self.lessons += lessons

    def learn(self, seconds: float | None = None) -> bool:
        """Do nothing: the learner is elsewhere."""
        return False

    def receive(self, news: News) -> None:
        """Search with a newer Q from now on."""
        news.q.check(self.mdp)
        self._q, self._guard.results, self._bound_targets = news.q, news.guard.results, news.bound_targets
        if news.version:
            self._heuristics["learned"] = QHeuristic(news.q)

    @property
    def _newest(self) -> QFunction:
        assert self._q is not None  # sent before the first job
        return self._q


class LearningDecoder:
    """A worker's object that decodes prompts, and returns lessons beside the records."""

    def __init__(self, make: Callable[[], DecodingMDP], options: Mapping[str, Any], budget: Budget, n: int = 1) -> None:
        """Decode by A* in the MDP that ``make`` returns, which equals the learner's.

        Args:
            make: Returns the MDP.
            options: Arguments of :class:`AStarPlanner`.
            budget: Of each prompt.
            n: How many texts of each prompt are reported.
        """
        mdp = make()
        self._collector = _Collector(mdp)
        self._decoder = BatchDecoder(AStarPlanner(mdp, **options, learn=self._collector), "astar", budget, n)

    def receive(self, news: News) -> None:
        """Search with a newer Q from now on.

        Raises:
            CheckpointError: It was made for another model, k or observation layout.
        """
        self._collector.receive(news)

    def decode(self, prompts: Sequence[Prompt]) -> tuple[list[dict[str, Any]], list[Lesson]]:
        """Return a record for each prompt, see :meth:`BatchDecoder.decode`, and the lessons of its searches."""
        records = self._decoder.decode(prompts)
        lessons, self._collector.lessons = self._collector.lessons, []
        return records, lessons


class LearningWorkers:
    """Workers, each with a :class:`LearningDecoder`, that teach a learner of this process.

    Q learns here while they search. A job gets the newest version that there is when it is handed out.
    """

    def __init__(self, workers: Workers, learner: OnlineLearner) -> None:
        """Let ``learner`` learn from the jobs of ``workers``."""
        self._workers, self._learner = workers, learner

    def run(
        self, jobs: Iterable[Job], *, keep_going: bool = False, started: Callable[[Job], None] | None = None
    ) -> Iterator[tuple[Job, Any]]:
        """See :class:`Workers`; the lessons are taken out of the results."""
        self._workers.share(self._learner.news())
        for job, result in self._workers.run(jobs, keep_going=keep_going, started=started):
            if isinstance(result, Exception):
                yield job, result
                continue
            records, lessons = result
            yield job, records  # before learning, so that a kill does not lose what is decoded
            self._learner.enter(lessons)
            self._learner.learn()
            self._workers.share(self._learner.news())

    def share(self, value: Any) -> None:
        """See :class:`Workers`."""
        self._workers.share(value)
