"""Reads flags, options and their meanings from source files, without importing them: --help must not load jax."""

from __future__ import annotations

import ast
import functools
import io
import pathlib
import tokenize
from typing import Any, Iterator, NamedTuple

import drirl_jax
import drirl_jax.configs

ROOT = pathlib.Path(drirl_jax.__file__).parent


class Flag(NamedTuple):
    """A flag that a module defines by absl's `DEFINE_*`.

    Attributes:
        name: without dashes.
        default: None if it has none.
        meaning: its help.
        is_switch: whether it is --name or --noname.
    """

    name: str
    default: Any
    meaning: str
    is_switch: bool


@functools.cache
def module(name: str) -> "Source":
    """The source of one of this package's modules, such as "drirl_jax.config"."""
    if name.startswith("drirl_jax.configs."):  # in a checkout they lie outside the package
        path = pathlib.Path(drirl_jax.configs.__path__[0], *name.split(".")[2:])
    else:
        path = ROOT.joinpath(*name.split(".")[1:])
    return Source(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))


class Source:
    """A module's file: its docstring, and what its flags and options mean."""

    def __init__(self, path: pathlib.Path):
        text = path.read_text("utf-8")
        self.tree = ast.parse(text)
        self.docstring = ast.get_docstring(self.tree) or ""
        self.lines = text.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}
        self.functions = {node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef)}
        self.imports: dict[str, str] = {}  # local name -> this package's module or its member
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drirl_jax"):
                self.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def assigned(self, name: str) -> ast.expr:
        """The first expression that the module assigns to this name. Raises KeyError if there is none."""
        for node in self.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    return value
                case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                    return value
        raise KeyError(name)

    def value(self, node: ast.expr) -> Any:
        """The value of a literal, of another module's constant, or of a text made of them; the keys of a table.

        Raises:
            ValueError: the expression is of another form.
        """
        match node:
            case ast.JoinedStr():
                return "".join(str(self.value(part)) for part in node.values)
            case ast.FormattedValue():
                return self.value(node.value)
            case ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as comma), attr="join"), args=[names]):
                return comma.join(self.value(names))
            case ast.Attribute(value=ast.Name(id=alias), attr=name):
                other = module(self.imports[alias])
                return other.value(other.assigned(name))
            case ast.Dict():
                return [ast.literal_eval(key) for key in node.keys if key is not None]
            case _:
                return ast.literal_eval(node)

    def flags(self) -> Iterator[Flag]:
        """Yields the flags that the module defines, in its order."""
        for node in self.tree.body:
            match node:
                case ast.Assign(value=ast.Call(func=ast.Attribute(attr=kind), args=args)) if kind.startswith("DEFINE_"):
                    name, default, *_, meaning = map(self.value, args)
                    yield Flag(name, default, meaning, kind == "DEFINE_boolean")

    def meanings(self, function: str = "default") -> dict[str, str]:
        """The meaning of each dotted key of the config that a function of this module makes, and of each section.

        The meaning of an option is its comment: above its assignment, behind it, or both. That of a section is its
        comment too, or else the first paragraph of the docstring of the function that makes it.
        """
        meanings: dict[str, str] = {}
        for node in self.functions[function].body:
            for target in _names_set(node):
                assert isinstance(node, ast.Assign)
                key = ast.unparse(target).partition(".")[2]
                meanings |= self._section(key, node.value)
                if comment := self.comment(node):
                    meanings[key] = comment
        if function == "default":
            for name, maker in self.table("SECTIONS").items():
                meanings |= self._section(name, ast.Call(maker, [], []))
        return meanings

    def table(self, name: str) -> dict[str, ast.expr]:
        """The rows of a dict that the module assigns to this name; {} if there is no such dict."""
        try:
            rows = self.assigned(name)
        except KeyError:
            return {}
        pairs = zip(rows.keys, rows.values) if isinstance(rows, ast.Dict) else ()
        return {ast.literal_eval(key): value for key, value in pairs if key is not None}

    def _section(self, key: str, value: ast.expr) -> dict[str, str]:
        """The meanings inside a section that a call makes; {} if the value is no call of this package's functions."""
        match value:
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                source = self
            case ast.Call(func=ast.Attribute(value=ast.Name(id=alias), attr=name)) if alias in self.imports:
                source = module(self.imports[alias])
            case _:
                return {}
        docstring = ast.get_docstring(source.functions[name]) or ""
        inner = {f"{key}.{option}": meaning for option, meaning in source.meanings(name).items()}
        return {key: " ".join(docstring.partition("\n\n")[0].split())} | inner

    def comment(self, node: ast.stmt) -> str:
        """The comments directly above a statement and behind it, in one line; "" if there are none."""
        first = node.lineno
        while self.lines[first - 2].lstrip().startswith("#"):
            first -= 1
        above = " ".join(self.comments[line] for line in range(first, node.lineno))
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        trailing = " ".join(self.comments[line] for line in lines if line in self.comments)
        if above and trailing and not above.endswith("."):
            above += "."
        return f"{above} {trailing}".strip()


def _names_set(node: ast.stmt) -> list[ast.Attribute]:
    """The attributes that a statement such as `c.steps = 4` or `o.b1, o.b2 = 0.9, 0.99` assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    flat = [x for target in targets for x in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [target for target in flat if isinstance(target, ast.Attribute)]
