"""A task as an environment of gem (axon-rl): text in, text out, so that its runners and wrappers take it."""

import gem

from qstar_decoding.agents import WritingGame


class WritingEnv(gem.Env):
    """The model continues a prompt; each turn pays what the answer adds to the best score."""

    def __init__(self, task="sentiment", turns=2, **options):
        self.game = WritingGame(task, turns=turns, **options)

    def reset(self, seed=None):
        super().reset(seed)
        return self.game.reset(seed=seed), {}

    def step(self, action):
        turn = self.game.step(action)
        return turn.message, turn.reward, turn.done, False, {"score": turn.score}

    def sample_random_action(self):
        return " and so on"

    def spawn(self, same_state=False, **kwargs):
        return WritingEnv(self.game.task, self.game.turns, **kwargs)


gem.register("qstar:Writing-v0", WritingEnv)

if __name__ == "__main__":
    env = gem.make("qstar:Writing-v0", task="sentiment")
    print(env.reset(seed=0)[0])
    print(env.step(" a joy from beginning to end."))
