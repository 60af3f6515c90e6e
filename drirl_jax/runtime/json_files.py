"""The JSON and JSONL files of a workdir: read whole and checked, or refused with file and line; written whole.

A form says what a value must be:

    a type, or several        dict, (float, type(None)); a float may be written as an integer, a truth value may not
    [form]                    a list of such values
    {name: form, ...: form}   an object that has these names, a Maybe perhaps; after `...` the form of all other values

This module needs no jax: `status` reads workdirs with it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from drirl_jax.errors import InputError

NUMBER = (float, type(None))  # null stands for what is not finite
ROW = {"stage": str, "step": int}  # of every JSONL file that a run writes step by step
SCALARS = ROW | {...: NUMBER}
HINT = "put a whole copy of the file there"


class Maybe(str):
    """A name that an object may lack."""


def fault(value: Any, form: Any, name: str = "") -> str | None:
    """What in the value is not of the form, in words; None where all is."""
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{name or 'it'} is no list"
        return next(filter(None, (fault(one, form[0], f"{name}[{i}]") for i, one in enumerate(value))), None)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{name or 'it'} is no object"
        if missing := [key for key in form if key is not ... and key not in value and not isinstance(key, Maybe)]:
            return f"{f'{name} has ' if name else 'it has '}no {missing[0]!r}"
        forms = {key: form.get(key, form.get(..., object)) for key in value}
        found = (fault(value[key], of, f"{name}.{key}".lstrip(".")) for key, of in forms.items())
        return next(filter(None, found), None)
    types = form if isinstance(form, tuple) else (form,)
    fits = isinstance(value, (*types, int) if float in types else types) and not (
        isinstance(value, bool) and not {bool, object} & set(types)
    )
    kinds = " or ".join("null" if of is type(None) else of.__name__ for of in types)
    return None if fits else f"{name or 'it'} is {json.dumps(value)[:40]}, not of type {kinds}"


def _parsed(text: bytes, form: Any) -> Any:
    """The JSON value. Raises ValueError for what is none, or not of the form."""
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError as error:  # brackets without end
        raise ValueError(str(error)) from error
    if why := fault(value, form):
        raise ValueError(why)
    return value


def load(path: Any, form: Any = dict, hint: str = HINT) -> Any:
    """The value of a JSON file.

    Args:
        path: a file, also one in a bucket.
        form: see above.
        hint: what the user can do where it is damaged.

    Raises:
        InputError: it cannot be read, is empty or torn, or not of the form.
    """
    try:
        return _parsed(path.read_bytes(), form)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): {hint}.") from error


def lines(path: Any, form: Any = ROW, hint: str = HINT, tail: int = 0) -> list[tuple[dict, str]]:
    """(row, line) of each whole line of a JSONL file; [] where there is none.

    A last line without its end, which a killed run leaves, is not among them.

    Args:
        tail: bytes at the end of the file in which whole lines are looked for; 0: all.

    Raises:
        InputError: another line is damaged, or not of the form: the sentence gives its number.
    """
    if not path.exists():
        return []
    found = []
    try:
        with path.open("rb") as file:
            first = max(0, os.fstat(file.fileno()).st_size - tail) if tail else 0
            file.seek(first)
            whole = file.read().split(b"\n")[first > 0 : -1]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {hint}.") from error
    for number, line in enumerate(whole, start=1):
        try:
            found.append((_parsed(line, form), f"{line.decode('utf-8')}\n"))
        except ValueError as error:
            where = f"line {number}" if not first else "a line near its end"
            raise InputError(f"{path}, {where} is damaged ({error}): {hint}.") from error
    return found


def rows(path: Any, form: Any = ROW, hint: str = HINT, tail: int = 0) -> list[dict]:
    """The rows of `lines`."""
    return [row for row, _ in lines(path, form, hint, tail)]
