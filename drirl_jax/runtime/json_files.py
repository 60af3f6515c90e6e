"""Reads the JSON and JSONL files of a workdir and checks them; an error names the file and the line.

A form describes a value:

    a type, or several        dict, (float, type(None)); a float may be written as an integer, but not as a boolean
    [form]                    a list of such values
    {name: form, ...: form}   an object with these names; a Maybe may be missing; `...` has the form of other values

This module needs no jax, because `status` reads workdirs with it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from drirl_jax.errors import InputError

NUMBER = (float, type(None))  # null stands for NaN and infinity
ROW = {"stage": str, "step": int}  # a row of any JSONL file that a run writes step by step
SCALARS = ROW | {...: NUMBER}
HINT = "put a whole copy of the file there"


class Maybe(str):
    """A name that may be missing in an object."""


def fault(value: Any, form: Any, name: str = "") -> str | None:
    """A description of the first part of the value that does not have the form; None if all parts have it."""
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name or 'it'} is no list"
        return next(filter(None, (fault(item, form[0], f"{name}[{i}]") for i, item in enumerate(value))), None)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{name or 'it'} is no object"
        if missing := [key for key in form if key is not ... and key not in value and not isinstance(key, Maybe)]:
            return f"{f'{name} has ' if name else 'it has '}no {missing[0]!r}"
        forms = {key: form.get(key, form.get(..., object)) for key in value}
        faults = (fault(value[key], key_form, f"{name}.{key}".lstrip(".")) for key, key_form in forms.items())
        return next(filter(None, faults), None)
    types = form if isinstance(form, tuple) else (form,)
    fits = isinstance(value, (*types, int) if float in types else types) and not (
        isinstance(value, bool) and not {bool, object} & set(types)
    )
    type_names = " or ".join("null" if expected is type(None) else expected.__name__ for expected in types)
    return None if fits else f"{name or 'it'} is {json.dumps(value)[:40]}, not of type {type_names}"


def _parsed(text: bytes, form: Any) -> Any:
    """The JSON value. Raises ValueError if the text is no JSON, or the value does not have the form."""
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError as error:  # too many nested brackets
        raise ValueError(str(error)) from error
    if reason := fault(value, form):
        raise ValueError(reason)
    return value


def load(path: Any, form: Any = dict, hint: str = HINT) -> Any:
    """The value of a JSON file.

    Args:
        path: a file, local or in a bucket.
        form: see above.
        hint: what the user can do if the file is damaged.

    Raises:
        InputError: the file cannot be read, is empty or incomplete, or does not have the form.
    """
    try:
        return _parsed(path.read_bytes(), form)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): {hint}.") from error


def need_run(workdir: Any) -> None:
    """Raises InputError if the folder does not exist, or has no config.json: every run writes that file first."""
    if not (workdir / "config.json").is_file():
        reason = "it has no config.json" if workdir.is_dir() else "there is no such folder"
        raise InputError(f"{workdir} holds no run, as {reason}: name the workdir of a run.")


def lines(path: Any, form: Any = ROW, hint: str = HINT, tail: int = 0) -> list[tuple[dict, str]]:
    """(row, line) of each complete line of a JSONL file; [] if the file does not exist.

    An incomplete last line, which a killed run may leave, is ignored.

    Args:
        tail: only lines within so many bytes at the end of the file are read; 0: all lines.

    Raises:
        InputError: another line is damaged, or does not have the form; the message gives its number.
    """
    if not path.exists():
        return []
    rows_and_lines = []
    try:
        with path.open("rb") as file:
            first_byte = max(0, os.fstat(file.fileno()).st_size - tail) if tail else 0
            file.seek(first_byte)
            complete_lines = file.read().split(b"\n")[first_byte > 0 : -1]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {hint}.") from error
    for number, line in enumerate(complete_lines, start=1):
        try:
            rows_and_lines.append((_parsed(line, form), f"{line.decode('utf-8')}\n"))
        except ValueError as error:
            place = f"line {number}" if not first_byte else "a line near its end"
            raise InputError(f"{path}, {place} is damaged ({error}): {hint}.") from error
    return rows_and_lines


def rows(path: Any, form: Any = ROW, hint: str = HINT, tail: int = 0) -> list[dict]:
    """The rows of `lines`."""
    return [row for row, _ in lines(path, form, hint, tail)]
