"""Configs of whole runs, installed as drirl_jax.configs: each module's `get_config` starts from `config.default`."""
