"""Paths that a user gives, and functions that replace files and folders as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

from drirl_jax.errors import InputError

REPLY_KINDS = ("replies", "judgements")  # the files of servers' answers: see `replies_file`


def expand_path(name: str | os.PathLike) -> pathlib.Path:
    """The path of this name. `~` or `~user` at its beginning is a home folder, as in a shell.

    Every option that names a file or a folder uses this function, because a shell expands `--workdir ~/x` but not
    `--workdir=~/x`.

    Raises:
        InputError: the name is blank or holds a NUL, or there is no such home folder.
    """
    if not str(name).strip() or "\0" in str(name):
        raise InputError(f"{str(name)!r} is no path: name a file or a folder.")
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError as error:  # no such user
        raise InputError(f"{name} is in a home folder that does not exist here: write the path in full.") from error


def replace_file(path: pathlib.Path, text: str, errors: str = "strict") -> None:
    """Writes a text file in UTF-8 and puts it in place as a whole. If writing fails, the old file stays.

    Missing folders above it are made. If the path is a link, its target is replaced. If it is no regular file
    (/dev/stdout), the text is written to it directly.

    Args:
        path: the file.
        text: the new contents; line ends are written unchanged.
        errors: how to handle characters that UTF-8 cannot hold, as for `str.encode`.

    Raises:
        InputError: the path is a folder.
    """
    if not isinstance(path, pathlib.Path):  # in a bucket, where an object appears as a whole anyway
        path.write_text(text)
        return
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
    """Checks that a command does not overwrite a file that it reads.

    Raises:
        InputError: `out` is one of the sources.
    """
    for source in sources:
        if out.exists() and source.exists() and out.samefile(source):
            raise InputError(f"{out} is read and would be written over: name another file for the result.")


def replies_file(out: pathlib.Path, kind: str) -> pathlib.Path:
    """The file beside `out` in which a command keeps the answers of servers; `kind` is one of REPLY_KINDS."""
    return out.with_suffix(f".{kind}.jsonl")


def is_replies_file(path: pathlib.Path) -> bool:
    """Whether the path is a file of `replies_file`, by its name and its first line, and so not the user's own data."""
    if not (path.is_file() and path.name.endswith(tuple(f".{kind}.jsonl" for kind in REPLY_KINDS))):
        return False
    with path.open("rb") as file:
        return file.readline().startswith(b'{"request":')


@contextlib.contextmanager
def replace_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder that replaces `folder` at the end of the block. If the block fails, the old folder stays."""
    new, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    # Only renames touch the folder's name. So a killed process never leaves half a model, new or old, under this name.
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(file: pathlib.Path, value: dict) -> None:
    """Writes a JSON file for people and for Hugging Face: indented, not escaped."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
