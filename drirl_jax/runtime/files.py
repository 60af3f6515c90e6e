"""Files and folders that a user names: which path is meant, and how a file is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

from drirl_jax.errors import InputError

KEPT_BESIDE = ("replies", "judgements")


def expand_path(name: str | os.PathLike) -> pathlib.Path:
    """The path that this name means; a `~` or `~user` at its beginning is a home folder, as in a shell.

    Every option that names a file or a folder passes through here: a shell expands `--workdir ~/x` but not
    `--workdir=~/x`.

    Raises:
        InputError: the name is blank or holds a NUL, or there is no such home.
    """
    if not str(name).strip() or "\0" in str(name):
        raise InputError(f"{str(name)!r} is no path: name a file or a folder.")
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError as error:  # no such user
        raise InputError(f"{name} is in no home folder that is known here: write the path in full.") from error


def replace_file(path: pathlib.Path, text: str, errors: str = "strict") -> None:
    """Writes a text file, in UTF-8, that appears whole: what was there stays until then, also where writing fails.

    Folders above it are made. Of a link the file behind it is replaced; what is no file (/dev/stdout) is written to.

    Args:
        path: the file.
        text: what it holds then; line ends are written as they are.
        errors: what to do with what UTF-8 cannot hold, as `str.encode` has it.

    Raises:
        InputError: there is a folder of this name.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file in it.")
    data = text.encode("utf-8", errors)
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    target = path.resolve() if path.is_symlink() else path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.write_bytes(data)
        if target.exists():
            with contextlib.suppress(OSError):  # a file system without modes
                shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def need_apart(out: pathlib.Path, *sources: pathlib.Path) -> None:
    """Checks that a command does not write over what it reads.

    Raises:
        InputError: `out` is one of the sources.
    """
    for source in sources:
        if out.exists() and source.exists() and out.samefile(source):
            raise InputError(f"{out} is read and would be written over: name another file for the result.")


def beside(out: pathlib.Path, what: str) -> pathlib.Path:
    """The file in which a command that writes `out` keeps what servers answered; `what` is one of KEPT_BESIDE."""
    return out.with_suffix(f".{what}.jsonl")


def is_beside(path: pathlib.Path) -> bool:
    """Whether it is a file of `beside`, by its name and its first line: the product's own, and no data of a user's."""
    if not (path.is_file() and path.name.endswith(tuple(f".{what}.jsonl" for what in KEPT_BESIDE))):
        return False
    with path.open("rb") as file:
        return file.readline().startswith(b'{"request":')


@contextlib.contextmanager
def replace_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder that takes the other's place and name at the end, unless writing into it was cut."""
    new, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    # Renames alone touch the folder's name, so that no kill leaves half a model, new or old, under it.
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(file: pathlib.Path, value: dict) -> None:
    """Writes what is read by people and by Hugging Face: indented, not escaped."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
