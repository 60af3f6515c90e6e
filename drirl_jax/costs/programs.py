"""The cost of a program, with every loop counted as often as it runs: operations from its jaxpr, the rest from its HLO.

The rest is time and traffic. XLA's own `cost_analysis` counts the body of a loop once, so for a scan over layers it
gives the cost of one layer.
"""

from __future__ import annotations

import math
import re
from typing import Callable, Iterator, NamedTuple

from jax.extend import core
from jax.interpreters import partial_eval

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def without_dead_code(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The jaxpr without operations that no result needs (gradients of frozen weights); a compiler removes these too."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def operations(jaxpr: core.Jaxpr, trips: Callable[[int], float], kernels: bool = False) -> float:
    """Multiplications and additions of all matrix products in a jaxpr, summed over all devices.

    Pallas kernels are counted separately. Every block of a kernel's grid counts in full, even if it is masked.

    Args:
        jaxpr: of a traced function.
        trips: (length of a loop) -> how often to count it. A while loop has length 0, because the jaxpr does not say
            how often it runs.
        kernels: whether to count only the operations inside kernels, instead of only those outside.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            if kernels:
                blocks = math.prod(eqn.params["grid_mapping"].grid)
                total += blocks * sum(operations(j, trips) for value in eqn.params.values() for j in _jaxprs(value))
            continue
        if eqn.primitive.name == "dot_general" and not kernels:
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        times = 1.0
        if eqn.primitive.name == "scan":
            times = trips(eqn.params["length"])
        elif eqn.primitive.name == "while":
            times = trips(0)
        elif eqn.primitive.name == "shard_map":  # its jaxpr is the part of one device
            times = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
        inner = [operations(j, trips, kernels) for value in eqn.params.values() for j in _jaxprs(value)]
        # A cond runs one of its branches: the most expensive one counts.
        total += times * (max(inner, default=0.0) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(value):
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _jaxprs(item)


class Traffic(NamedTuple):
    """The work of one device in a program: cycles of its fusions as the TPU compiler estimates them, and bytes received
    in collectives, by kind."""

    cycles: float
    collective_bytes: dict[str, float]


class _Computation(NamedTuple):
    cycles: float
    collective_bytes: dict[str, float]
    calls: list[tuple[str, float]]  # other computations, and how often one run of this one calls each


def traffic(hlo: str, trips: float) -> Traffic:
    """Reads cycles and traffic from the text of a compiled program.

    Args:
        hlo: `compiled.as_text()`.
        trips: how often a loop runs if its condition compares with no constant.
    """
    # Metadata may span several lines inside an instruction.
    hlo = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", hlo, flags=re.S)
    blocks = {}
    for name, body in re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.M | re.S):
        blocks[name] = body
    entry = _first_group(r"(?m)^ENTRY %?([\w.\-]+)", hlo)
    computations = {name: _computation(body, blocks, trips) for name, body in blocks.items()}

    def total(name: str) -> Traffic:
        computation = computations[name]
        cycles, bytes_by_kind = computation.cycles, dict(computation.collective_bytes)
        for callee, times in computation.calls:
            inner = total(callee)
            cycles += times * inner.cycles
            for kind, size in inner.collective_bytes.items():
                bytes_by_kind[kind] = bytes_by_kind.get(kind, 0.0) + times * size
        return Traffic(cycles, bytes_by_kind)

    return total(entry)


def _first_group(pattern: str, text: str) -> str:
    """The first group of the pattern's first match. Raises ValueError if the text is no HLO that has one."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in {text[:80]!r}")
    return match[1]


INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")


def _computation(body: str, blocks: dict[str, str], trips: float) -> _Computation:
    cycles, bytes_by_kind, calls = 0.0, {}, []
    # The compiler may put one collective into several fusions, to overlap it with them. They all have its channel.
    for kind, size in dict(_collectives(body, blocks)).values():
        bytes_by_kind[kind] = bytes_by_kind.get(kind, 0.0) + size
    for line in body.splitlines():
        instruction = INSTRUCTION.match(line)
        if not instruction:
            continue
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles += int(estimate[1])
        if instruction[2] == "while":
            loop_body, condition = (_first_group(rf"{part}=%?([\w.\-]+)", line) for part in ("body", "condition"))
            calls.append((loop_body, _trips(blocks[condition], blocks, trips)))
        elif instruction[2] == "conditional":
            branch_list = re.search(r"branch_computations=\{([^}]*)\}", line)
            branches = (
                re.findall(r"[\w.\-]+", branch_list[1])
                if branch_list
                else re.findall(r"_computation=%?([\w.\-]+)", line)
            )
            calls.append((max(branches, key=lambda name: len(blocks[name])), 1.0))
        elif instruction[2] in ("call", "async-start"):
            calls += [(name, 1.0) for name in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line)]
    return _Computation(cycles, bytes_by_kind, calls)


def _collectives(body: str, blocks: dict[str, str]) -> Iterator[tuple[str, tuple[str, float]]]:
    """Yields (channel, (kind, bytes received)) of the collectives in a computation and in its fusions."""
    for line in body.splitlines():
        instruction = INSTRUCTION.match(line)
        if not instruction:
            continue
        result, opcode = instruction.groups()
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", line)
            yield channel[1] if channel else line, (kind, _received(result, started=opcode != kind))
        elif opcode == "fusion":
            for name in re.findall(r"calls=%?([\w.\-]+)", line):
                yield from _collectives(blocks.get(name, ""), blocks)


def _received(result: str, started: bool) -> float:
    """Bytes of a collective's result. The result of a "-start" instruction also holds its operand."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    sizes = [BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes]
    return float(max(sizes) if started else sum(sizes))


def _trips(condition: str, blocks: dict[str, str], unknown: float) -> float:
    """The constant that a loop's condition compares its counter with; `unknown` if there is no single one."""
    text = condition + "".join(blocks.get(name, "") for name in re.findall(r"calls=%?([\w.\-]+)", condition))
    constants = [int(n) for n in re.findall(r"[su]32\[\][^=]*? constant\((\d+)\)", text)]
    return float(constants[0]) if len(constants) == 1 and "compare" in text else unknown
