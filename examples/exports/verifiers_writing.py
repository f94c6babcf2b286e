"""A task as an environment of verifiers: the model continues a prompt, learns its score, and tries again.

In its folder, ``PYTHONPATH=. vf-eval verifiers_writing -m MODEL --client.base-url URL`` plays it with a model.
"""

from collections.abc import Iterator

import verifiers.v1 as vf

from qstar_decoding.agents import WritingGame

__all__ = ["WritingEnv", "WritingTaskset"]


class WritingConfig(vf.TasksetConfig):
    writing: str = "sentiment"  # a task of qstar-decoding, or the path of its YAML file
    split: str = "test"


class WritingData(vf.TaskData):
    info: dict


class WritingTask(vf.Task[WritingData, vf.State, vf.TaskConfig]):
    pass


class WritingEnvConfig(vf.EnvConfig):
    # A plain chat in a process of this machine; the defaults of verifiers run the model in a container.
    writer: vf.AgentConfig = vf.AgentConfig(harness={"id": "null"}, runtime={"type": "subprocess"})
    turns: int = 2
    reference: int = 0  # LM tokens of Q*'s plan for the same prompt; 0 for none


class WritingEnv(vf.Env[WritingEnvConfig]):
    async def run(self, task, agents):
        info = task.data.info
        game = WritingGame(info["task"], split=info["split"], turns=self.config.turns)
        game.reset(index=info["index"])
        async with agents.writer.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated:
                turn = game.step(segment.last_reply)
                if turn.done:
                    break
                segment = await interaction.turn(turn.message)
        interaction.trace.record_reward("best_score", game.best or 0.0, 1.0)
        if self.config.reference:
            plan = game.reference(self.config.reference)
            interaction.trace.info["qstar"] = {"text": plan.text, "reward": plan.reward}


class WritingTaskset(vf.Taskset[WritingTask, WritingConfig]):
    def load(self) -> Iterator[WritingTask]:
        game = WritingGame(self.config.writing, split=self.config.split)
        for index, prompt in enumerate(game.prompts):
            info = {"task": self.config.writing, "split": self.config.split, "index": index}
            yield WritingTask(WritingData(prompt=game.instruction(prompt), info=info), self.config.task)
