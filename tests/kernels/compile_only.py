"""Compiles every launch of every Triton kernel for GPUs that need not be there, and reads what it costs them.

    python -m tests.kernels.compile_only                      # the table of registers, spills and shared memory
    python -m tests.kernels.compile_only attention --write    # one operator; put the whole table into docs/kernels.md

An operator registers its launches with `@launches("name")` in a file `tests/kernels/launches_*.py`: a function that
yields (label, call), where `call()` runs the operator's launch functions on tensors of the meta device. The launches
are recorded, with the block sizes and warps that the heuristics choose for the card, and each distinct one is
compiled. NVIDIA's numbers are those of `ptxas -v`, AMD's stand in the assembly.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from zoo.kernels.jit import Launch, TritonKernel, recorded_launches

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# shared memory that one block may have, in bytes
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
_BEGIN, _END = "<!-- compile_only: begin -->", "<!-- compile_only: end -->"
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages")

Cases = Callable[[], Iterator[tuple[str, Callable[[], object]]]]
_OPERATORS: dict[str, Cases] = {}


class Usage(NamedTuple):
    """What one compiled launch takes."""

    operator: str
    kernel: str
    label: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int
    seconds: float

    @property
    def problem(self) -> str | None:
        """Why this launch must not stay as it is."""
        if self.spills:
            return f"{self.spills} spilled"
        if self.shared > SHARED_LIMIT[self.target]:
            return f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.target]} exist"
        return None


def launches(operator: str) -> Callable[[Cases], Cases]:
    """Register the launches of `operator`: a function that yields (label, call)."""

    def register(cases: Cases) -> Cases:
        _OPERATORS[operator] = cases
        return cases

    return register


def operators() -> list[str]:
    """Every operator with registered launches."""
    for path in sorted(Path(__file__).parent.glob("launches_*.py")):
        importlib.import_module(f"tests.kernels.{path.stem}")
    return sorted(_OPERATORS)


def distinct_launches(operator: str, target: str) -> Iterator[tuple[str, Launch]]:
    """(label, launch) for each different kernel that `operator` launches on `target`."""
    operators()
    seen = set()
    for label, call in _OPERATORS[operator]():
        with recorded_launches(amd=TARGETS[target][0] == "hip") as recorded:
            call()
        assert recorded, f"{operator}, {label}: nothing was launched"
        for launch in recorded:
            key = (launch.kernel.__name__, *map(str, _specialised(launch)))
            if key not in seen:
                seen.add(key)
                yield label, launch


def compile_launch(operator: str, label: str, launch: Launch, target: str) -> Usage:
    """Compile one launch for `target` and read its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes, options = _specialised(launch)
    source = ASTSource(fn=launch.kernel.compiled, signature=signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    start = time.perf_counter()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if TARGETS[target][0] == "hip":
        registers, spills = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spills = _read_ptxas(log.getvalue())
    return Usage(
        operator,
        launch.kernel.__name__.strip("_"),
        label,
        target,
        options.get("num_warps", 4),
        registers,
        spills,
        compiled.metadata.shared,
        time.perf_counter() - start,
    )


def usages(operator: str, target: str, share: int = 1) -> Iterator[Usage]:
    """Every launch of `operator`, compiled for `target`; every `share`-th only, other ones for every target."""
    for i, (label, launch) in enumerate(distinct_launches(operator, target)):
        if (i + list(TARGETS).index(target)) % share == 0:
            yield compile_launch(operator, label, launch, target)


def digest(operator: str) -> str:
    """A hash of everything that `operator` launches on any target: sources, signatures and settings."""
    parts = set()
    for target in TARGETS:
        for label, launch in distinct_launches(operator, target):
            sources = sorted(set(_sources(launch.kernel)))
            parts.add(f"{target} {label} {_specialised(launch)} {' '.join(sources)}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]


def _sources(kernel: TritonKernel) -> Iterator[str]:
    """The source of a kernel and of those that it calls."""
    yield inspect.getsource(kernel.function)
    for name in kernel.function.__code__.co_names:
        called = kernel.function.__globals__.get(name)
        if isinstance(called, TritonKernel) and called is not kernel:
            yield from _sources(called)


def _specialised(launch: Launch) -> tuple[dict, dict, dict, dict]:
    """Signature, constants, attributes and options, as Triton's launcher would specialise these arguments."""
    function = launch.kernel.function
    options = {name: launch.kwargs[name] for name in _OPTIONS if name in launch.kwargs}
    bound = inspect.signature(function).bind(
        *launch.args, **{name: value for name, value in launch.kwargs.items() if name not in _OPTIONS}
    )
    bound.apply_defaults()
    signature, constants, attributes = {}, {}, {}

    def specialise(path: tuple[int, ...], value: object) -> object:
        if isinstance(value, tuple):
            return tuple(specialise((*path, i), element) for i, element in enumerate(value))
        if value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return _POINTERS[value.dtype]
        if isinstance(value, bool):
            return "i1"
        if isinstance(value, int):
            if value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        assert isinstance(value, float), f"{launch.kernel.__name__}: an argument is a {type(value).__name__}"
        return "fp32"

    for i, (name, value) in enumerate(bound.arguments.items()):
        if "constexpr" in str(inspect.signature(function).parameters[name].annotation):
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = specialise((i,), value)
    return signature, constants, attributes, options


def _read_ptxas(log: str) -> tuple[int, int]:
    """(registers a thread, bytes of spills) of `ptxas -v`."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert registers, f"ptxas reported no registers: {log!r}"
    assert spills, f"ptxas reported no spills: {log!r}"
    return int(registers[1]), sum(map(int, spills))


def _read_amd(assembly: str) -> tuple[int, int]:
    """(vector registers a thread, spilled registers) of the metadata in AMD's assembly."""
    counts = {
        name: int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    # scalar registers spill into lanes of a vector register, which costs no memory traffic
    return counts["vgpr_count"], counts["vgpr_spill_count"]


def table(rows: list[Usage]) -> str:
    """A Markdown table: a line for each launch, a column for each card."""
    by_launch: dict[tuple[str, str, str], dict[str, Usage]] = {}
    for row in rows:
        by_launch.setdefault((row.operator, row.kernel, row.label), {})[row.target] = row
    lines = [f"| kernel | launch | {' | '.join(TARGETS)} |", f"|---|---|{'---|' * len(TARGETS)}"]
    last = None
    for (operator, kernel, label), cells in by_launch.items():
        if operator != last:
            lines.append(f"| **{operator}** | digest {digest(operator)} |{' |' * len(TARGETS)}")
            last = operator
        columns = [
            f"{u.registers} r, {u.spills} s, {u.shared / 1024:.0f} K, {u.warps} w" if (u := cells.get(t)) else "-"
            for t in TARGETS
        ]
        lines.append(f"| {kernel} | {label} | {' | '.join(columns)} |")
    return "\n".join(lines)


def write(rows: list[Usage]) -> None:
    """Put the operators of `rows` into the document; others keep what stands there of them."""
    head, rest = DOCUMENT.read_text().split(_BEGIN)
    old, tail = rest.split(_END)
    title = "\n".join(table([]).splitlines())
    sections = {}
    for text in (old, table(rows)):
        for section in text.split("| **")[1:]:
            sections[section.split("**")[0]] = f"| **{section.strip()}"
    known = operators()
    body = "\n".join(sections[name] for name in sorted(sections) if name in known)
    DOCUMENT.write_text(f"{head}{_BEGIN}\n{title}\n{body}\n{_END}{tail}")


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; exit status 1 if anything spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.compile_only", description=__doc__.split("\n")[0])
    parser.add_argument("operators", nargs="*", help="all of them by default")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--write", action="store_true", help="put the operators' tables into docs/kernels.md")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: nothing is compiled under the interpreter", file=sys.stderr)
        return 2
    rows = []
    for operator in args.operators or operators():
        for target in args.targets:
            for row in usages(operator, target):
                rows.append(row)
                print(
                    f"{row.kernel:<24} {row.label:<34} {row.target:<7} {row.warps} warps {row.registers:>4} registers "
                    f"{row.spills:>5} spills {row.shared:>7} B shared {row.seconds:5.1f} s  {row.problem or ''}",
                    flush=True,
                )
    if args.write:
        write(rows)
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    # the operators register with the module as it is imported, not with this copy called __main__
    from tests.kernels.compile_only import main as imported_main

    sys.exit(imported_main())
