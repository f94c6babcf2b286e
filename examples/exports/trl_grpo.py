"""GRPO of TRL on a task of qstar-decoding: its prompts and its reward, for any causal language model."""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from qstar_decoding.agents import trl_reward
from qstar_decoding.envs import load_prompts
from qstar_decoding.tasks import load_task


def train(model, task="sentiment", steps=10, **settings):
    """Train a model, or one of this name, on the prompts of a task; return the trainer."""
    spec = load_task(task)
    prompts = [{"prompt": prompt.text, **prompt.columns} for prompt in load_prompts(spec.prompts.of("train"))]
    options = {
        "output_dir": "runs/grpo",
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": spec.env.get("max_new_tokens", 24),
        "report_to": "none",
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[trl_reward(spec.env["reward"])],
        args=GRPOConfig(**{**options, **settings}),
        train_dataset=Dataset.from_list(prompts),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
