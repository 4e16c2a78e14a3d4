"""Runs golden cases of any family through its adapter and collects what was measured.

An adapter is a module of this package with

    claims(case) -> bool                                   # is it mine?
    run(case, dtype, folded) -> Iterator[Check]            # build, load through zoo.load_checkpoint, compare

`run` raises `NoSuchForm` where a case has no folded or no float32 form, and `NotUnderstood` where the case
asks for something that zoo does not know. In eager float64 it must check every entry of `outputs`.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
import traceback
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

import tests.parity as package
from tests.parity.golden import Case

# The bars of the project: deviation in units of the recorded std; gradients relative.
BARS = {torch.float64: 1e-9, torch.float32: 1e-4}
GRADIENT_BAR = 1e-4
_NOT_ADAPTERS = {"golden", "runner", "__main__"}


class NoSuchForm(Exception):  # noqa: N818 - a signal, not an error
    """The case is not defined in this form (folded, or in this dtype)."""


class NotUnderstood(Exception):  # noqa: N818
    """The case describes something that no adapter can build."""


class Check(NamedTuple):
    """One comparison: the record's name, the measured error, and the bar that it must not exceed."""

    output: str
    error: float
    bar: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bar


class Row(NamedTuple):
    """One line of the table: a case in one form."""

    case: str
    form: str
    checks: list[Check]
    problem: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        return self.problem is None and all(c.passed for c in self.checks)

    @property
    def worst(self) -> Check | None:
        return max(self.checks, key=lambda c: c.error / c.bar if c.bar else (c.error > 0), default=None)


def adapters() -> list:
    """Every adapter module of this package."""
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _NOT_ADAPTERS)
    return [importlib.import_module(f"tests.parity.{name}") for name in names]


def adapter_for(case: Case):
    """The adapter that claims `case`.

    Raises:
        NotUnderstood: none does.
    """
    for adapter in adapters():
        if adapter.claims(case):
            return adapter
    raise NotUnderstood(f"no adapter knows cases of {case.get('source') or case.get('what') or case.path}")


def run_form(case: Case, dtype: torch.dtype, folded: bool) -> Row | None:
    """Run `case` in one form; None if it is not defined in this form."""
    form = f"{str(dtype).removeprefix('torch.')} {'folded' if folded else 'eager'}"
    start = time.perf_counter()
    checks: list[Check] = []
    problem = None
    try:
        checks.extend(adapter_for(case).run(case, dtype, folded))
        unchecked = set(case.get("outputs") or ()) - {c.output for c in checks}
        if not checks:
            problem = "the adapter checked nothing"
        elif unchecked and not folded and dtype is torch.float64:
            problem = f"outputs not checked: {', '.join(sorted(unchecked))}"
    except NoSuchForm:
        return None
    except NotUnderstood as reason:
        problem = f"not understood: {reason}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {error} ({frame.name}, line {frame.lineno})"
    return Row(case.name, form, checks, problem, time.perf_counter() - start)


def run_case(case: Case) -> Iterator[Row]:
    """Run `case` in every form that it has: float64 and float32, eager and folded."""
    for folded in (False, True):
        for dtype in (torch.float64, torch.float32):
            row = run_form(case, dtype, folded)
            if row is not None:
                yield row


def print_rows(rows: Iterable[Row], verbose: bool = False) -> bool:
    """Print one line a row (each check with `verbose`); True if all passed."""
    header = f"{'case':<44} {'form':<15} {'output':<28} {'error/std':>10} {'bar':>8}  pass  seconds"
    print(header)
    print("-" * len(header))
    good = True
    for row in rows:
        good &= row.passed
        if row.problem:
            print(f"{row.case:<44} {row.form:<15} {row.problem}  FAIL", flush=True)
            continue
        failed = [c for c in row.checks if not c.passed]
        for check in row.checks if verbose else failed or [row.worst]:
            verdict = "yes" if check.passed else "FAIL"
            print(
                f"{row.case:<44} {row.form:<15} {check.output[:28]:<28} {check.error:>10.1e} {check.bar:>8.0e}"
                f"  {verdict:<4}  {row.seconds:.1f}",
                flush=True,
            )
    return good
