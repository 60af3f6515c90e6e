"""A file imports only from layers below its own: the table is the architecture."""

import ast
import pathlib

import drirl_jax

ROOT = pathlib.Path(drirl_jax.__file__).parent

# Bottom first. A module may import from lines above its own; modules of one package on one line may import each other.
LAYERS = [
    ["drirl_jax", "drirl_jax.errors"],
    ["drirl_jax.types"],
    ["drirl_jax.config", "drirl_jax.equations"],
    ["drirl_jax.losses", "drirl_jax.scaling", "drirl_jax.runtime"],
    ["drirl_jax.models"],
    ["drirl_jax.rollout"],
    ["drirl_jax.data"],
    ["drirl_jax.judges"],
    ["drirl_jax.stages"],
    ["drirl_jax.reports"],
    ["drirl_jax.evals"],
    ["drirl_jax.checks"],
    ["drirl_jax.loading"],
    ["drirl_jax.attacks"],
    ["drirl_jax.train"],
    ["drirl_jax.costs"],
    ["drirl_jax.configs"],
    ["drirl_jax.commands.source"],
    ["drirl_jax.commands.help_text"],
    ["drirl_jax.commands.cli"],
    ["drirl_jax.commands", "drirl_jax.harness"],
    ["drirl_jax.main"],
    ["drirl_jax.__main__"],
]


def layer_of(module: str) -> tuple[int, str]:
    """The layer and the row that holds the module: the longest name that it lies in."""
    rows = [
        (len(name), i, name)
        for i, row in enumerate(LAYERS)
        for name in row
        if f"{module}.".startswith(f"{name}.") and (name != "drirl_jax" or module == name)
    ]
    assert rows, f"{module} stands in no layer: give it a line in LAYERS"
    _, i, name = max(rows)
    return i, name


def module_of(path: pathlib.Path) -> str:
    return ".".join(("drirl_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imports(path: pathlib.Path):
    modules = {module_of(p) for p in ROOT.rglob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("drirl_jax"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drirl_jax"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def test_layers_import_only_downwards():
    wrong = []
    for path in ROOT.rglob("*.py"):
        mine, row = layer_of(module_of(path))
        for target in imports(path):
            theirs, other = layer_of(target)
            if theirs > mine or (theirs == mine and row != other):
                wrong.append(f"{module_of(path)} imports {target}")
    assert not wrong


def test_equations_and_losses_know_neither_config_nor_input():
    for name in ("equations", "losses"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        found = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        found |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert found <= {"__future__", "fractions", "typing", "jax", "jaxtyping", "drirl_jax"}
