"""For a file given to `--external_plugins`: importing this makes r3's GRPO trainer the one of `swift rlhf`."""

from swift.trainers import TrainerFactory

# By name: the trainer brings vLLM with it, which swift imports when the device is set.
TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__package__}.trainer.GRPOTrainer"
