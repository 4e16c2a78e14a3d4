"""Checkpoints that hold objects besides tensors, read without importing or calling anything that they name.

Training scripts store their configuration, optimiser and schedules with the weights, as pickled objects of their own
classes. Python's unpickler would import and call whatever a file names. Here a pickle is a list of instructions for a
stack machine that knows tensors, numbers, text and containers; every other class that a file names becomes an `Inert`
object, which holds what the file says about it and has no behaviour.

The machine is written out, rather than derived from `pickle.Unpickler`, so that no instruction can reach a real object
by attribute, and because the C unpickler allocates what a file's indices claim. Sizes, strides and offsets of tensors
are checked against their storage, storages against the size of the file; members of a zip file must not be compressed.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_DIMS = 64


class UnpicklingRefused(ValueError):  # noqa: N818 - a refusal, the caller words the error
    """The file is not what it pretends to be; the message says in what."""


class Global(NamedTuple):
    """A class or function that a file names: its name only, nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """What a file says about an object of a class that is not run: arguments, state, and items of its containers."""

    __slots__ = ("arguments", "entries", "items", "kind", "state")

    def __init__(self, kind: str, arguments: Any = ()):
        self.kind, self.arguments = kind, arguments
        self.state: Any = None
        self.items: list = []
        self.entries: dict = {}

    def __repr__(self) -> str:
        return f"<{self.kind}, not run>"

    @property
    def is_module(self) -> bool:
        """Whether this is a pickled model (an `nn.Module`) rather than its weights."""
        return isinstance(self.state, dict) and {"_parameters", "_modules"} <= self.state.keys()


class Unpickled(NamedTuple):
    """The content of a file and the names of the classes whose objects are inert in it."""

    content: Any
    replaced: tuple[str, ...]


def read(path: str | PathLike) -> Unpickled:
    """The content of a file written by `torch.save` (either format) or `pickle.dump`.

    Dictionaries of every kind are plain ones, arrays of numpy are tensors, sets are lists.

    Raises:
        UnpicklingRefused: the file is damaged, lies about sizes, or is a TorchScript program.
    """
    path = Path(path)
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_stream(path)
    except UnpicklingRefused:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        UnicodeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise UnpicklingRefused(f"it is damaged ({type(error).__name__}: {str(error)[:120]})") from error


# ---- the two formats of torch.save


def _read_zip(path: Path) -> Unpickled:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = sorted((name for name in members if name.split("/")[1:] == ["data.pkl"]), key=len)
        if not pickles:
            raise UnpicklingRefused("it is a zip archive, not a file of torch.save")
        root = pickles[0].split("/")[0]
        if f"{root}/constants.pkl" in members or any(name.startswith(f"{root}/code/") for name in members):
            raise UnpicklingRefused("it is a TorchScript program, which zoo does not run")
        if f"{root}/byteorder" in members and archive.read(f"{root}/byteorder") != sys.byteorder.encode():
            raise UnpicklingRefused("its numbers have the byte order of another kind of machine")
        left = path.stat().st_size

        def record(name: str) -> bytes:
            nonlocal left
            info = members.get(f"{root}/{name}")
            if info is None:
                raise UnpicklingRefused(f"its member {name} is missing")
            left -= info.file_size
            if info.compress_type != zipfile.ZIP_STORED or left < 0:
                raise UnpicklingRefused("its members are compressed or overlap, which torch.save never does")
            return archive.read(info)

        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
            if key not in storages:
                data = bytearray(record(f"data/{key}"))
                if len(data) != numel * dtype.itemsize:
                    raise UnpicklingRefused(f"storage {key} claims {numel} numbers and has {len(data)} bytes")
                storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return _of(storages[key], dtype, numel, key)

        machine = _Machine(storage)
        return machine.finish(machine.run(io.BytesIO(record("data.pkl"))))


def _read_stream(path: Path) -> Unpickled:
    data = path.read_bytes()
    stream = io.BytesIO(data)
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        if key not in storages:
            # the numbers follow later in the file; no more of them are believed than it can hold
            used = sum(t.numel() * t.dtype.itemsize for t in storages.values())
            if used + numel * dtype.itemsize > len(data):
                raise UnpicklingRefused(f"storage {key} claims {numel} numbers, more than the file can hold")
            storages[key] = torch.zeros(numel, dtype=dtype)
        return _of(storages[key], dtype, numel, key)

    machine = _Machine(storage)
    content = machine.run(stream)
    if content != _LEGACY_MAGIC or isinstance(content, bool):
        return machine.finish(content)  # a plain pickle
    if machine.run(stream) != _LEGACY_PROTOCOL:
        raise UnpicklingRefused("it has an unknown version of torch.save's format")
    about = machine.run(stream)
    if isinstance(about, Mapping) and about.get("little_endian", True) != (sys.byteorder == "little"):
        raise UnpicklingRefused("its numbers have the byte order of another kind of machine")
    content = machine.run(stream)
    keys = machine.run(stream)
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(storages):
        raise UnpicklingRefused("its list of storages does not fit its tensors")
    for key in keys:
        tensor = storages[key]
        (numel,) = struct.unpack("<q", stream.read(8))
        raw = stream.read(tensor.numel() * tensor.dtype.itemsize)
        if numel != tensor.numel() or len(raw) != tensor.numel() * tensor.dtype.itemsize:
            raise UnpicklingRefused(f"storage {key} claims {tensor.numel()} numbers and the file ends or says {numel}")
        if raw:
            tensor.copy_(torch.frombuffer(bytearray(raw), dtype=tensor.dtype))
    return machine.finish(content)


def _of(storage: Tensor, dtype: torch.dtype, numel: int, key: str) -> Tensor:
    if storage.dtype != dtype or storage.numel() != numel:
        raise UnpicklingRefused(f"storage {key} is described in two ways")
    return storage


# ---- the machine


class _Machine:
    """Runs the instructions of a pickle; `storage(dtype, key, numel)` gives the flat tensor behind a key."""

    def __init__(self, storage: Callable[[torch.dtype, str, int], Tensor]):
        self.storage = storage
        self.replaced: dict[str, None] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """The object that one pickle describes; the stream is left behind it."""
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self.pop()
            operation = _OPERATIONS.get(opcode.name)
            if operation is None:
                raise UnpicklingRefused(f"its pickle uses the instruction {opcode.name}")
            operation(self, argument)
        raise UnpicklingRefused("its pickle has no end")

    def pop(self) -> Any:
        if self.marks and self.marks[-1] >= len(self.stack):
            raise UnpicklingRefused("its pickle takes more than it put")
        return self.stack.pop()

    def pop_to_mark(self) -> list:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def call(self, function: Any, arguments: Any) -> Any:
        """What a file's "call this with that" stands for: a tensor, plain data, or an inert object."""
        if not isinstance(function, Global):
            raise UnpicklingRefused("its pickle calls something that is no class")
        rebuild = _REBUILD.get(str(function))
        if rebuild is not None and isinstance(arguments, tuple):
            return rebuild(self, *arguments)
        return self.inert(function, arguments)

    def inert(self, kind: Global, arguments: Any = ()) -> Inert:
        self.replaced[str(kind)] = None
        return Inert(str(kind), arguments)

    def finish(self, content: Any) -> Unpickled:
        """Arrays as tensors and inert mappings as plain ones, in the containers of the content."""
        top = [content]
        waiting: list = [top]
        seen = {id(top)}
        while waiting:
            container = waiting.pop()
            places = container.items() if isinstance(container, dict) else enumerate(container)
            for key, value in list(places):
                if isinstance(value, _Array):
                    value = value.tensor()
                elif isinstance(value, Global):
                    value = _DTYPES.get(str(value), value)
                elif isinstance(value, Inert) and value.entries and not value.is_module:
                    value = value.entries
                container[key] = value
                if isinstance(value, dict | list) and id(value) not in seen:
                    seen.add(id(value))
                    waiting.append(value)
        return Unpickled(top[0], tuple(self.replaced))


def _append(machine: _Machine, values: list) -> None:
    target = machine.stack[-1]
    if isinstance(target, Inert):
        target.items.extend(values)
    elif isinstance(target, list):
        target.extend(values)
    else:
        raise UnpicklingRefused("its pickle appends to something that is no list")


def _set_items(machine: _Machine, values: list) -> None:
    target = machine.stack[-1]
    entries = target.entries if isinstance(target, Inert) else target
    if not isinstance(entries, dict) or len(values) % 2:
        raise UnpicklingRefused("its pickle puts entries into something that is no dictionary")
    entries.update((_key(k), v) for k, v in zip(values[::2], values[1::2]))


def _key(value: Any) -> Any:
    """A key that can be hashed in no time: text, number, or a short tuple of them; its address for anything else."""
    plain = (str, bytes, int, float, bool, type(None))
    if isinstance(value, plain) or (type(value) is tuple and all(isinstance(part, plain) for part in value)):
        return value
    return f"<{type(value).__name__} at {id(value)}>"


def _build(machine: _Machine, _: Any) -> None:
    state, target = machine.pop(), machine.stack[-1]
    if isinstance(target, Inert):
        target.state = state
    elif isinstance(target, _Array | _Dtype):
        target.set_state(state)
    # attributes of dictionaries and tensors (a state dict's versions, say) have no meaning here


def _inst(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(machine.call(Global(module, name), tuple(machine.pop_to_mark())))


def _obj(machine: _Machine, _: Any) -> None:
    function, *arguments = machine.pop_to_mark()
    machine.stack.append(machine.call(function, tuple(arguments)))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.stack.append(machine.call(function, arguments))


def _new_with_keywords(machine: _Machine, _: Any) -> None:
    keywords, arguments, function = machine.pop(), machine.pop(), machine.pop()
    if not isinstance(function, Global):
        raise UnpicklingRefused("its pickle calls something that is no class")
    machine.stack.append(machine.inert(function, (arguments, keywords)))


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(Global(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise UnpicklingRefused("its pickle names a class by something that is no text")
    machine.stack.append(Global(module, name))


def _dict(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.stack.append({})
    _set_items(machine, values)


def _add(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()  # a set, which is a list here
    _append(machine, values)


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def operation(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return operation


def _push(make: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(make(argument))


def _get(machine: _Machine, index: int) -> None:
    machine.stack.append(machine.memo[index])


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _single(operation: Callable[[_Machine, list], None], count: int) -> Callable[[_Machine, Any], None]:
    def run(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        operation(machine, values[::-1])

    return run


def _persistent(machine: _Machine, _: Any) -> None:
    machine.stack.append(_load_storage(machine, machine.pop()))


_VALUES = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8"
_VALUES += " STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **{name: _push(lambda argument: argument) for name in _VALUES.split()},
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_SET": _push(lambda _: []),
    "EMPTY_DICT": _push(lambda _: {}),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.stack.pop() if not _at_mark(machine) else machine.marks.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "DICT": _dict,
    "APPEND": _single(_append, 1),
    "APPENDS": lambda machine, _: _append(machine, machine.pop_to_mark()),
    "ADDITEMS": _add,
    "SETITEM": _single(_set_items, 2),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_to_mark()),
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": _inst,
    "OBJ": _obj,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "BUILD": _build,
    "BINPERSID": _persistent,
}


def _at_mark(machine: _Machine) -> bool:
    return bool(machine.marks) and machine.marks[-1] == len(machine.stack)


# ---- tensors

_DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
_STORAGES = {
    f"torch.{kind}Storage": getattr(torch, name)
    for kind, name in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
        "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}  # fmt: skip
_STORAGES |= {name.replace("torch.", "torch.cuda.", 1): dtype for name, dtype in _STORAGES.items()}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise UnpicklingRefused("a size in its pickle is no number, or none that a tensor can have")
    return value


def _load_storage(machine: _Machine, about: Any) -> Tensor | Global:
    if isinstance(about, tuple) and len(about) == 4 and about[0] == "module" and isinstance(about[1], Global):
        return about[1]  # the class of a whole pickled model, with its source
    if (
        not isinstance(about, tuple)
        or len(about) not in (5, 6)
        or about[0] != "storage"
        or about[5:] not in ((), (None,))
    ):
        raise UnpicklingRefused("its pickle refers to something that is no storage of numbers")
    kind, key, numel = about[1], about[2], _count(about[4])
    dtype = _STORAGES.get(str(kind)) if isinstance(kind, Global) else None
    if dtype is None or not isinstance(key, str) or not re.fullmatch(r"\w+", key):
        raise UnpicklingRefused("it has a storage of an unknown kind")
    return machine.storage(dtype, key, numel)


def _rebuild_tensor(
    machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: torch.dtype | None = None
) -> Tensor:
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise UnpicklingRefused("a tensor in its pickle has no storage")
    if dtype is not None and dtype != storage.dtype:
        if storage.dtype != torch.uint8 or storage.numel() % dtype.itemsize:
            raise UnpicklingRefused("a tensor in its pickle is of another type than its storage")
        storage = storage.view(dtype)
    if (
        not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or len(size) != len(stride)
        or len(size) > _MAX_DIMS
    ):
        raise UnpicklingRefused("a tensor in its pickle has no proper shape")
    offset, size, stride = _count(offset), tuple(map(_count, size)), tuple(map(_count, stride))
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if numel else 0
    if numel > storage.numel() or (numel and last >= storage.numel()):
        raise UnpicklingRefused(f"a tensor of shape {list(size)} does not fit into its {storage.numel()} numbers")
    return torch.as_strided(storage, size, stride, offset) if numel else storage.new_empty(size)


def _rebuild_typed(machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    dtype = _DTYPES.get(str(rest[2])) if len(rest) > 2 and isinstance(rest[2], Global) else None
    if dtype is None:
        raise UnpicklingRefused("a tensor in its pickle has an unknown type")
    return _rebuild_tensor(machine, storage, offset, size, stride, dtype=dtype)


def _rebuild_parameter(machine: _Machine, data: Any = None, *rest: Any) -> Any:
    return data if isinstance(data, Tensor) else machine.inert(Global("torch.nn", "Parameter"), (data, *rest))


def _rebuild_subclass(machine: _Machine, function: Any = None, kind: Any = None, arguments: Any = (), *_: Any) -> Any:
    known = isinstance(function, Global) and str(function) in _TENSORS
    inner = machine.call(function, arguments) if known else None
    return inner if isinstance(inner, Tensor) else machine.inert(Global("torch", "Tensor"), arguments)


# ---- arrays and numbers of numpy


class _Dtype:
    """A type of numpy's numbers, as `np.dtype` pickles it: its code first, its byte order afterwards."""

    def __init__(self, code: Any):
        self.code = code if isinstance(code, str) else ""
        self.order = "<" if sys.byteorder == "little" else ">"

    def set_state(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    def numpy(self) -> np.dtype:
        match = re.fullmatch(r"[<>=|]?([fiu][1248]|b1|\?)", self.code)
        if match is None:
            raise UnpicklingRefused(f"it has an array of the type {self.code[:20]!r}")
        return np.dtype(self.order + match[1])


class _Array:
    """An array of numpy, empty until its state arrives."""

    def __init__(self):
        self.state: Any = None

    def set_state(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Any:
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return Inert("numpy.ndarray")
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray) or not isinstance(shape, tuple):
            return Inert("numpy.ndarray")  # of objects, say
        return _as_tensor(raw, dtype, shape, bool(fortran))


def _as_tensor(raw: bytes, dtype: _Dtype, shape: tuple, fortran: bool = False) -> Tensor:
    kind = dtype.numpy()
    shape = tuple(map(_count, shape))
    if math.prod(shape) * kind.itemsize != len(raw) or len(shape) > _MAX_DIMS // 2:
        raise UnpicklingRefused(f"an array of shape {list(shape)} has {len(raw)} bytes")
    values = np.frombuffer(raw, kind).astype(kind.newbyteorder("="))
    return torch.from_numpy(values.reshape(shape, order="F" if fortran else "C").copy())


def _scalar(machine: _Machine, dtype: Any = None, raw: Any = None) -> Any:
    if isinstance(dtype, _Dtype) and isinstance(raw, bytes) and len(raw) <= 16:
        return _as_tensor(raw, dtype, ()).item()
    return machine.inert(Global("numpy", "generic"))


def _from_buffer(machine: _Machine, raw: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C") -> Any:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", raw)
    return array


def _encode(machine: _Machine, text: Any = "", encoding: Any = "utf-8") -> Any:
    if isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8", "ascii"):
        return text.encode(encoding)
    return machine.inert(Global("_codecs", "encode"))


# ---- plain containers


def _pairs(machine: _Machine, values: Any = (), *_: Any) -> dict:
    if isinstance(values, dict):
        return dict(values)
    pairs = values if isinstance(values, list | tuple) else ()
    return {_key(p[0]): p[1] for p in pairs if isinstance(p, list | tuple) and len(p) == 2}


def _sequence(machine: _Machine, values: Any = (), *_: Any) -> list:
    return list(values) if isinstance(values, list | tuple) else []


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_REBUILD: dict[str, Callable[..., Any]] = {
    **_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
    "torch.Size": lambda machine, values=(), *_: tuple(_sequence(machine, values)),
    "torch.device": lambda machine, *parts: ":".join(str(part) for part in parts if isinstance(part, str | int)),
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": lambda machine, factory=None, *values: _pairs(machine, *values),
    "_codecs.encode": _encode,
    "numpy.dtype": lambda machine, code="", *_: _Dtype(code),
    **{f"builtins.{name}": _sequence for name in ("list", "set", "frozenset")},
    **{f"__builtin__.{name}": _sequence for name in ("list", "set", "frozenset")},
    **{f"{name}.dict": _pairs for name in ("builtins", "__builtin__")},
}
for _core in ("numpy.core", "numpy._core"):
    _REBUILD[f"{_core}.multiarray._reconstruct"] = lambda machine, *_: _Array()
    _REBUILD[f"{_core}.multiarray.scalar"] = _scalar
    _REBUILD[f"{_core}.numeric._frombuffer"] = _from_buffer


def named_modules(content: Any) -> Iterator[str]:
    """The classes of whole models that a file holds instead of weights, at the top and one level below."""
    values = [content, *(content.values() if isinstance(content, dict) else ())]
    yield from (value.kind for value in values if isinstance(value, Inert) and value.is_module)
