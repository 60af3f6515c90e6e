"""Checks the names of categories, study variants and runs, and derives their file names and scalar names.

Published data sets call their categories `hate/threatening` or `drug_abuse,weapons,banned_substance`. So a name may
have every printable character. `file_name` and `scalar_name` escape the characters that a path or a tool cannot hold.
Both leave a plain name unchanged, and two names that pass `check` never get the same form.
"""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Collection, Iterable
from urllib.parse import unquote

from drirl_jax.errors import InputError

LONGEST = 100  # most characters of a name
LONGEST_FILE = 200  # most bytes of a file name: file systems allow 255, and temporary names are longer
# Names that stand for all categories in metrics, tables and figures.
AGGREGATES = ("all", "all categories", "overall")
# Path separators of Unix and Windows, characters of patterns, and the escape character.
UNSAFE = frozenset('/\\:*?"<>|[]%')
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows devices, in every folder
WHILE_WRITING = (".tmp", ".old")  # endings of a folder while another one takes its place
PATTERN = "[]*?"  # orbax takes these for patterns of file names, which match other files or none


def folded(name: str) -> str:
    """The name without differences that readers, file systems or tools ignore: case, Unicode form, blanks, `_`."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(plain.replace("_", " ").split())


def check(list_name: str, names: Iterable[str], reserved: Collection[str] = ()) -> None:
    """Checks the names of one list.

    Args:
        list_name: the list, such as `config.data.categories`, for messages.
        names: all names of the list; each may appear once.
        reserved: names with another meaning there, in any case and Unicode form.

    Raises:
        InputError: a name is empty, too long, reserved or not printable, or can be confused with another one.
    """
    folded_reserved = {folded(name) for name in reserved}
    name_by_folded: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{list_name} has the name {name!r}, which is no text: put it in quotes.")
        if not name.strip():
            raise InputError(f"{list_name} has an empty name: give each one a name.")
        if len(name) > LONGEST:
            raise InputError(
                f"{list_name} has a name of {len(name)} characters ({name[:30]!r}...): take at most {LONGEST}."
            )
        if not name.isprintable() or name != name.strip():
            raise InputError(
                f"{list_name} has the name {ascii(name)}: a name has no line end, no character that does not print, "
                "and no blank at its ends."
            )
        if folded(name) in folded_reserved:
            raise InputError(
                f"{list_name} has the name {name!r}, which means something else there: choose another one."
            )
        other = name_by_folded.setdefault(folded(name), name)
        if other is not name:
            raise InputError(
                f"{list_name} has the names {other!r} and {name!r}, which differ in nothing, or only in case, blanks "
                "or Unicode form: change one of them."
            )
        file_name(name)


def file_name(name: str) -> str:
    """The file name for this name: the name itself, with `%` and hexadecimal numbers for unsafe characters.

    `urllib.parse.unquote` restores the name. The result has no path separator, is neither "." nor "..", and is no
    Windows device.

    Raises:
        InputError: the name is empty, or the result is too long for a file system.
    """
    if not name:
        raise InputError("an empty name is no name of a file: give it a name.")
    unsafe = {i for i, c in enumerate(name) if c in UNSAFE or not c.isprintable()}
    unsafe |= {i for i in (0, len(name) - 1) if name[i] in ". "}
    unsafe |= {len(name) - len(end) for end in WHILE_WRITING if name.casefold().endswith(end)}
    unsafe |= {0} if DEVICES.fullmatch(name) else set()
    escaped = "".join(_escaped(c, "%") if i in unsafe else c for i, c in enumerate(name))
    if len(os.fsencode(escaped)) > LONGEST_FILE:
        raise InputError(f"the name {name[:30]!r}... is too long for a file of its name: shorten it.")
    return escaped


def name_of_file(file: str) -> str:
    """The name for which `file_name` returns `file`."""
    return unquote(file, errors="surrogatepass")


def scalar_name(key: str) -> str:
    """A key of metrics.jsonl, METRIC or METRIC/NAME, in a form that TensorBoard, W&B and MLflow accept.

    They replace or refuse every character but letters, digits, `_`, `-`, `.` and `/`. Two categories could become one
    curve, or the sink could fail. So other characters of NAME, and `.` and `/` in it, become `.` and the hexadecimal
    numbers of their bytes.
    """
    metric, slash, name = key.partition("/")
    return metric + slash + "".join(c if c.isalnum() or c in "_-" else _escaped(c, ".") for c in name)


def need_place_of_run(place: object) -> None:
    """Checks the whole path of a run's workdir, with the folders above it.

    Raises:
        InputError: the path has a character that orbax takes for a pattern, or that is not printable.
    """
    path = str(place)
    if unsafe := [c for c in path if c in PATTERN or not c.isprintable()]:
        raise InputError(
            f"the workdir {path} holds {ascii(unsafe[0])}: checkpoints in such a place cannot be read again; take "
            "another folder, also of those above it."
        )


def _escaped(c: str, mark: str) -> str:
    """The character's bytes as hexadecimal numbers, each after the mark."""
    return "".join(f"{mark}{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))
