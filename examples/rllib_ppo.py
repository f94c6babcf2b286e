"""RLlib trains on the environment with env runners in processes of their own. Half a minute on two CPU cores."""

import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.tasks import load_task

ROUNDS = 12
task = load_task("toy")  # a language of seven letters; the reward is for using many of them
prompts = task.prompts.of("train")

config = (
    PPOConfig()
    # The package's name before the colon registers the environment in every runner. Without shaping a return is J.
    .environment("qstar_decoding:TokenDecoding-v0", env_config={**task.env, "prompts": prompts, "shaping": False})
    .env_runners(
        num_env_runners=1,
        num_envs_per_env_runner=8,
        env_to_module_connector=lambda env=None, spaces=None, device=None: FlattenObservations(),
    )
    .training(gamma=1.0, lr=2e-3, train_batch_size_per_learner=800, minibatch_size=200, num_epochs=6)
    .debugging(seed=0, log_level="ERROR")
)
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
algorithm = config.build_algo()
returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(ROUNDS)]
algorithm.stop()
ray.shutdown()

best = [plan.objective for plan in AStarPlanner(task.mdp()).plan_many(prompts)]
print(f"mean J while training: {returns[0]:.3f} in the first round, {returns[-1]:.3f} in round {ROUNDS}")
print(f"the best there is, with a certificate of A*: {sum(best) / len(best):.3f}")
