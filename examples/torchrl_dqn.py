"""TorchRL trains on the environment through its GymWrapper: masked double DQN. Half a minute on a CPU core."""

import gymnasium as gym
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import ActionMask, CatTensors, Compose, DTypeCastTransform, GymWrapper, TransformedEnv
from torchrl.modules import MLP, EGreedyModule, QValueModule
from torchrl.objectives import DQNLoss, SoftUpdate

from qstar_decoding.tasks import load_task

FRAMES = 6_400
task = load_task("toy")  # a language of seven letters; the reward is for using many of them
torch.manual_seed(0)


def make(split):
    env = gym.make(
        "qstar_decoding:TokenDecoding-v0", prompts=task.prompts.of(split), top_p=0.95, shaping=False, **task.env
    )
    seen = CatTensors(["hidden", "candidates", "logprobs", "remaining"], "seen", del_keys=False)
    mask = DTypeCastTransform(torch.int8, torch.bool, in_keys=["action_mask"])
    return TransformedEnv(GymWrapper(env, categorical_action_encoding=True), Compose(seen, mask, ActionMask()))


env = make("train")
q = TensorDictModule(MLP(out_features=env.action_spec.n, num_cells=[128, 64]), ["seen"], ["action_value"])
greedy = TensorDictSequential(q, QValueModule(spec=env.action_spec, action_mask_key="action_mask"))
greedy(env.reset())
explore = EGreedyModule(env.action_spec, annealing_num_steps=FRAMES // 2, eps_end=0.05, action_mask_key="action_mask")
loss_module = DQNLoss(greedy, action_space="categorical", double_dqn=True, delay_value=True)
loss_module.make_value_estimator(gamma=1.0)
update = SoftUpdate(loss_module, eps=0.98)
optimizer = torch.optim.Adam(loss_module.parameters(), 1e-3)
memory = TensorDictReplayBuffer(storage=LazyTensorStorage(FRAMES), batch_size=128)
test = make("test")


def mean_return():
    with torch.no_grad():
        return sum(test.rollout(20, greedy)["next", "reward"].sum().item() for _ in range(50)) / 50


before = mean_return()
policy = TensorDictSequential(greedy, explore)
settings = {"frames_per_batch": 64, "total_frames": FRAMES, "auto_register_policy_transforms": True}
for batch in Collector(env, policy, **settings):
    memory.extend(batch), explore.step(batch.numel())
    for _ in range(8):
        loss = loss_module(memory.sample())["loss"]
        optimizer.zero_grad(), loss.backward(), optimizer.step(), update.step()
print(f"mean J of arg max Q on held-out prompts: {before:.3f} untrained, {mean_return():.3f} after {FRAMES:,} steps")
