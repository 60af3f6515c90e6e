"""What a program costs, every loop counted as often as it runs: operations from its jaxpr, time, traffic from its HLO.

XLA's own `cost_analysis` counts the body of a loop once, so that of a scan over layers it tells one layer.
"""

from __future__ import annotations

import math
import re
from typing import Callable, Iterator, NamedTuple

from jax.extend import core
from jax.interpreters import partial_eval

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def used(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The jaxpr without what none of its results needs, as a compiler leaves it out: gradients of frozen weights."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def operations(jaxpr: core.Jaxpr, trips: Callable[[int], float], kernels: bool = False) -> float:
    """Multiplications and additions of all matrix products in a jaxpr, of all devices together.

    Those of Pallas kernels are counted apart, every block of a kernel's grid as if nothing in it were masked.

    Args:
        jaxpr: of a traced function.
        trips: the number of times that a loop is counted which runs so often; 0 stands for a while loop, whose number
            the jaxpr does not tell.
        kernels: count what is in kernels, and that alone.
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
        elif eqn.primitive.name == "shard_map":  # of which the jaxpr tells one device's part
            times = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
        inner = [operations(j, trips, kernels) for value in eqn.params.values() for j in _jaxprs(value)]
        # Of the branches of a cond one is taken: the dearest.
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
    """What one device does in a program: cycles that the TPU compiler expects of its fusions, and bytes that it gets in
    collectives, by kind."""

    cycles: float
    moved: dict[str, float]


class _Computation(NamedTuple):
    cycles: float
    moved: dict[str, float]
    calls: list[tuple[str, float]]  # other computations, and how often each runs in one run of this one


def traffic(hlo: str, trips: float) -> Traffic:
    """Reads the text of a compiled program.

    Args:
        hlo: `compiled.as_text()`.
        trips: how often a loop runs whose condition compares with no constant.
    """
    hlo = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", hlo, flags=re.S)  # lines inside an instruction
    blocks = {}
    for name, body in re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.M | re.S):
        blocks[name] = body
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.M)[1]
    read = {name: _computation(body, blocks, trips) for name, body in blocks.items()}

    def total(name: str) -> Traffic:
        one = read[name]
        cycles, moved = one.cycles, dict(one.moved)
        for callee, times in one.calls:
            inner = total(callee)
            cycles += times * inner.cycles
            for kind, size in inner.moved.items():
                moved[kind] = moved.get(kind, 0.0) + times * size
        return Traffic(cycles, moved)

    return total(entry)


INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")


def _computation(body: str, blocks: dict[str, str], trips: float) -> _Computation:
    cycles, moved, calls = 0.0, {}, []
    # The compiler lays one collective into several fusions, to overlap it with them: it has one channel.
    for kind, size in dict(_collectives(body, blocks)).values():
        moved[kind] = moved.get(kind, 0.0) + size
    for line in body.splitlines():
        found = INSTRUCTION.match(line)
        if not found:
            continue
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles += int(estimate[1])
        if found[2] == "while":
            inner, condition = (re.search(rf"{part}=%?([\w.\-]+)", line)[1] for part in ("body", "condition"))
            calls.append((inner, _trips(blocks[condition], blocks, trips)))
        elif found[2] == "conditional":
            named = re.search(r"branch_computations=\{([^}]*)\}", line)
            branches = re.findall(r"[\w.\-]+", named[1]) if named else re.findall(r"_computation=%?([\w.\-]+)", line)
            calls.append((max(branches, key=lambda name: len(blocks[name])), 1.0))
        elif found[2] in ("call", "async-start"):
            calls += [(name, 1.0) for name in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line)]
    return _Computation(cycles, moved, calls)


def _collectives(body: str, blocks: dict[str, str]) -> Iterator[tuple[str, tuple[str, float]]]:
    """(channel, (kind, bytes received)) of the collectives in a computation, and in what its fusions hold."""
    for line in body.splitlines():
        found = INSTRUCTION.match(line)
        if not found:
            continue
        result, opcode = found.groups()
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", line)
            yield channel[1] if channel else line, (kind, _received(result, started=opcode != kind))
        elif opcode == "fusion":
            for name in re.findall(r"calls=%?([\w.\-]+)", line):
                yield from _collectives(blocks.get(name, ""), blocks)


def _received(result: str, started: bool) -> float:
    """Bytes of a collective's result; one that is only started has its operand first."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    sizes = [BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes]
    return float(max(sizes) if started else sum(sizes))


def _trips(condition: str, blocks: dict[str, str], unknown: float) -> float:
    """The constant with which a loop's condition compares its counter."""
    text = condition + "".join(blocks.get(name, "") for name in re.findall(r"calls=%?([\w.\-]+)", condition))
    constants = [int(n) for n in re.findall(r"[su]32\[\][^=]*? constant\((\d+)\)", text)]
    return float(constants[0]) if len(constants) == 1 and "compare" in text else unknown
