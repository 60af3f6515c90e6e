"""Configs of whole runs, installed as drirl_jax.configs.

Each module's `get_config` starts from `config.default`, that of attack.py from `attacks.options.default`.
"""
