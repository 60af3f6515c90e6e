"""What a name may be: of a category, a variant of a study, a run; and which names they have as files and as scalars.

Published data sets call their categories `hate/threatening` or `drug_abuse,weapons,banned_substance`. So a name may
hold every character that prints. `file_name` and `scalar_name` write what a path or a tool cannot hold in another form.
Both leave a plain name as it is, and two names that pass `check` never get the same form.
"""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Collection, Iterable
from urllib.parse import unquote

from drirl_jax.errors import InputError

LONGEST = 100  # characters of a name
LONGEST_FILE = 200  # bytes of a file's name: file systems take 255, and temporary names are longer
# What stands for all categories in metrics, tables and figures.
AGGREGATES = ("all", "all categories", "overall")
# Separators of paths here and on Windows, marks of patterns, and the escape itself.
UNSAFE = frozenset('/\\:*?"<>|[]%')
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows, in every folder
WHILE_WRITING = (".tmp", ".old")  # what a folder is called while another one takes its place
PATTERN = "[]*?"  # of these orbax makes patterns of file names, which find other files or none


def folded(name: str) -> str:
    """The name without what readers, file systems and tools do not tell apart: case, Unicode form, blanks and `_`."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(plain.replace("_", " ").split())


def check(what: str, names: Iterable[str], reserved: Collection[str] = ()) -> None:
    """Checks names that stand beside each other.

    Args:
        what: what has these names, as `config.data.categories`.
        names: all of them; each may stand there once.
        reserved: names that mean something else there, in any case and Unicode form.

    Raises:
        InputError: a name is empty, overlong or reserved, does not print, or can be taken for another one.
    """
    taken = {folded(name) for name in reserved}
    before: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{what} has the name {name!r}, which is no text: put it in quotes.")
        if not name.strip():
            raise InputError(f"{what} has an empty name: give each one a name.")
        if len(name) > LONGEST:
            raise InputError(f"{what} has a name of {len(name)} characters ({name[:30]!r}...): take at most {LONGEST}.")
        if not name.isprintable() or name != name.strip():
            raise InputError(
                f"{what} has the name {ascii(name)}: a name has no line end, no character that does not print, and no "
                "blank at its ends."
            )
        if folded(name) in taken:
            raise InputError(f"{what} has the name {name!r}, which means something else there: choose another one.")
        other = before.setdefault(folded(name), name)
        if other is not name:
            raise InputError(
                f"{what} has the names {other!r} and {name!r}, which differ in nothing, or only in case, blanks or "
                "Unicode form: change one."
            )
        file_name(name)


def file_name(name: str) -> str:
    """The name of the name's file or folder: itself, with percent signs and numbers for what a path cannot hold.

    `urllib.parse.unquote` gives the name again. The result is no path: it has no separator, is neither "." nor "..",
    and is no device of Windows.

    Raises:
        InputError: the name is empty, or its file's name too long for a file system.
    """
    if not name:
        raise InputError("an empty name is no name of a file: give it a name.")
    odd = {i for i, c in enumerate(name) if c in UNSAFE or not c.isprintable()}
    odd |= {i for i in (0, len(name) - 1) if name[i] in ". "}
    odd |= {len(name) - len(end) for end in WHILE_WRITING if name.casefold().endswith(end)}
    odd |= {0} if DEVICES.fullmatch(name) else set()
    out = "".join(_escaped(c, "%") if i in odd else c for i, c in enumerate(name))
    if len(os.fsencode(out)) > LONGEST_FILE:
        raise InputError(f"the name {name[:30]!r}... is too long for a file of its name: shorten it.")
    return out


def name_of_file(file: str) -> str:
    """The name whose `file_name` this is."""
    return unquote(file, errors="surrogatepass")


def scalar_name(key: str) -> str:
    """A key of metrics.jsonl, METRIC or METRIC/NAME, as TensorBoard, W&B and MLflow take it.

    They replace or refuse what is neither a letter nor a digit nor one of `_`, `-`, `.` and `/`. Two categories would
    become one curve, or the sink would fail. So other characters of NAME are written as `.` and the hexadecimal numbers
    of their bytes, and so are `.` and `/` in it.
    """
    metric, slash, name = key.partition("/")
    return metric + slash + "".join(c if c.isalnum() or c in "_-" else _escaped(c, ".") for c in name)


def need_place_of_run(place: object) -> None:
    """Checks the whole path of a run's workdir, with the folders above it.

    Raises:
        InputError: it holds what orbax takes for a pattern, or what does not print.
    """
    text = str(place)
    if odd := [c for c in text if c in PATTERN or not c.isprintable()]:
        raise InputError(
            f"the workdir {text} holds {ascii(odd[0])}: checkpoints in such a place cannot be read again; take another "
            "folder, also of those above it."
        )


def _escaped(c: str, mark: str) -> str:
    """The character's bytes as hexadecimal numbers, the mark before each."""
    return "".join(f"{mark}{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))
