"""DR-IRL in JAX: inverse RL for category rewards, then GRPO with dynamic reward scaling."""

__version__ = "0.1.0"
