"""A restricted interpreter for the pickles of checkpoints: it imports nothing, calls nothing, and hashes nothing but names.

It builds the containers and tensor descriptions that `pickles.py` reads. Every other object becomes an `Object`, the name of its class beside its
state as data, made anew each time, or the constant `INERT`, which has no state; so no file can change how the next one is read. Dictionaries are kept as pairs: keys from a stranger are never hashed, since
deep, shared or colliding ones would cost more than their bytes. Every count is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

MOST_BYTES = 32 << 20
MOST_OPERATIONS = 2_000_000
MOST_VALUES = 500_000
"""Values that are kept or remembered. A tensor takes about 18, so this is a checkpoint of 27,000 tensors."""
DEEPEST = 100
"""Tuples in tuples. A tensor's arguments are 3 deep."""
LONGEST = 4096
"""Bytes of a string that may be a tensor's name; longer ones are skipped."""
LARGEST_INTEGER = 16
"""Bytes of an integer that may be a size, or the magic number of a file; longer ones are skipped."""


class Damaged(Exception):
    """What is wrong with a file, in words; `pickles.py` adds the file's name."""


class _Inert:
    """Stands for every object that is not ours to build."""

    __slots__ = ()


INERT = _Inert()
TOO_LONG = _Inert()
"""Stands for a string that is too long, or not text, to be a name."""
_MARK = _Inert()


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; nothing is looked up."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class Pairs:
    """A dictionary as (key, value) pairs, in the order of the file."""

    items: list[tuple[object, object]] | tuple[()] = ()

    def named(self) -> dict[str, object]:
        """What stands under names; integers are names too, as torch writes them."""
        return {str(key): value for key, value in self.items if isinstance(key, str) or type(key) is int}


@dataclass(slots=True, eq=False)
class Script:
    """A module of a TorchScript archive."""

    state: Pairs | None = None


@dataclass(slots=True, eq=False)
class Object:
    """An object of a class that is not ours to build: a module of torch, say."""

    kind: Global
    state: Pairs | None = None
    """Its attributes by name, or what a dictionary of its own class holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    kind: str
    """The name of its class, FloatStorage for instance."""
    key: object
    elements: object


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor as the file describes it, before any check."""

    storage: object
    offset: object
    shape: object
    strides: object
    dtype: str = ""
    """As torch names it, where the storage does not tell."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A tensor of a kind that cannot be merged."""

    kind: str


ORDERED = Global("collections", "OrderedDict")
STORAGES = ("torch", "torch.storage", "torch.cuda")


def load(data: bytes, start: int = 0, storages: list[Storage] | None = None) -> tuple[object, int]:
    """The object pickled at `start`, and where its pickle ends; the storages that it names are added to `storages`. Raises Damaged."""
    try:
        return _Reader(data, start, [] if storages is None else storages).run()
    except (IndexError, struct.error):
        raise Damaged("its pickle ends early, or takes more from its stack than is there") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise Damaged("its pickle is broken") from None


class _Reader:
    def __init__(self, data: bytes, start: int, storages: list[Storage]) -> None:
        self.data, self.at, self.storages = data, start, storages
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.depths: dict[int, int] = {}
        """Of tuples by their ids: each sets its own when it is made, so a number that is used again holds what is there now."""
        self.operations = self.values = 0

    def run(self) -> tuple[object, int]:
        operations, data = OPERATIONS, self.data
        while True:
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.pop(), self.at
            self.operations += 1
            if self.operations > MOST_OPERATIONS:
                raise Damaged(f"its pickle has more than {MOST_OPERATIONS:,} operations")
            operation = operations[code]
            if operation is None:
                raise Damaged(f"its pickle has an operation {code:#04x}, which no checkpoint needs")
            operation(self)

    def count(self, values: int) -> None:
        self.values += values
        if self.values > MOST_VALUES:
            raise Damaged(f"its pickle has more than {MOST_VALUES:,} values")

    def keep(self, value: object) -> None:
        self.count(1)
        self.stack.append(value)

    def keep_tuple(self, values: tuple[object, ...]) -> None:
        depth = 1 + max((self.depths.get(id(value), 0) for value in values if type(value) is tuple), default=0)
        if depth > DEEPEST:
            raise Damaged(f"its pickle has tuples more than {DEEPEST} deep")
        self.depths[id(values)] = depth
        self.keep(values)

    def pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def top(self) -> object:
        value = self.stack[-1]
        if value is _MARK:
            raise IndexError
        return value

    def mark(self) -> None:
        self.marks.append(len(self.stack))
        self.stack.append(_MARK)

    def to_mark(self) -> list[object]:
        place = self.marks.pop()
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise IndexError
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        found: int
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return found

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + LONGEST + 1)
        if end < 0:
            raise Damaged(f"its pickle has a line of more than {LONGEST} bytes, or one without an end")
        found = self.data[self.at : end]
        self.at = end + 1
        return found

    def text(self, length: int, encoding: str) -> None:
        if length > LONGEST:
            self.skip(length)
            self.keep(TOO_LONG)
            return
        raw = self.take(length)
        try:
            self.keep(raw.decode(encoding))
        except UnicodeDecodeError:
            self.keep(TOO_LONG)

    def skip(self, length: int) -> None:
        if length < 0 or length > len(self.data) - self.at:
            raise IndexError
        self.at += length

    def remember(self, index: int) -> None:
        if index > self.operations:  # picklers count from 0
            raise Damaged(f"its pickle remembers a value as number {index:,} after {self.operations:,} operations")
        if index not in self.memo:
            self.count(1)
        self.memo[index] = self.top()

    def integer(self, raw: bytes) -> None:
        self.keep(int.from_bytes(raw, "little", signed=True))

    def long(self, length: int) -> None:
        if length <= LARGEST_INTEGER:
            self.integer(self.take(length))
        else:
            self.skip(length)
            self.stack.append(INERT)

    def decimal(self) -> None:
        line = self.line().rstrip(b"L")
        if line in (b"00", b"01"):
            self.stack.append(line == b"01")
        else:
            self.keep(int(line) if len(line) <= 40 else INERT)

    def set_items(self, values: list[object]) -> None:
        if len(values) % 2:
            raise IndexError
        target = self.top()
        if isinstance(target, Object):
            if target.state is None:
                target.state = Pairs()
            target = target.state
        if isinstance(target, Pairs):
            target.items = target.items or []
            target.items.extend(zip(values[::2], values[1::2]))

    def add_items(self, values: list[object]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Script | Object) and isinstance(state, Pairs):
            target.state = state

    def call(self, function: object, arguments: object) -> None:
        if not isinstance(arguments, tuple):
            raise IndexError
        if function == ORDERED and arguments and isinstance(arguments[0], list):
            self.count(len(arguments[0]))
        self.keep(_made(function, arguments))

    def persistent(self, pid: object) -> None:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module" and isinstance(pid[1], Global):
            self.stack.append(pid[1])  # before 1.6, a module's class with its source, which is passed over
            return
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            self.stack.append(INERT)
            return
        if len(pid) > 5 and pid[5] is not None:
            raise Damaged("it has a view of a storage, as torch wrote them before 0.4")
        kind = pid[1].name if isinstance(pid[1], Global) and pid[1].module in STORAGES else "unknown"
        storage = Storage(kind, pid[2], pid[4])
        self.keep(storage)
        self.storages.append(storage)

    def name(self, module: str, name: str) -> Global:
        self.count(3)
        return Global(module, name)

    def constant(self) -> None:
        module, name = self.line(), self.line()
        self.stack.append(self.name(module.decode(), name.decode()))


def _made(function: object, arguments: tuple[object, ...]) -> object:
    """What calling a class or function gives: plain data for the few that describe tensors, an Object by name for all others."""
    if not isinstance(function, Global):
        return INERT
    module, name = function.module, function.name
    if function == ORDERED:
        pairs = arguments[0] if arguments else []
        if not isinstance(pairs, list) or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            return Pairs()
        return Pairs([(key, value) for key, value in pairs])
    if module.split(".")[0] == "__torch__":
        return Script()
    if (module, name) == ("torch", "Size") and len(arguments) == 1:
        return arguments[0]
    if module in ("torch._utils", "torch._tensor") and name.startswith("_rebuild"):
        return _rebuilt(name, arguments)
    if (module, name) in (("torch.nn.parameter", "Parameter"), ("torch", "Tensor")):
        return Foreign(name)
    if name == "_reconstructor" and module in ("copyreg", "copy_reg") and arguments:
        return Object(arguments[0]) if isinstance(arguments[0], Global) else INERT
    if (
        name == "set"
        and module in ("builtins", "__builtin__")
        and len(arguments) == 1
        and isinstance(arguments[0], list)
    ):
        return tuple(arguments[0])
    return Object(function)


def _rebuilt(name: str, arguments: tuple[object, ...]) -> object:
    """torch/_utils.py: a tensor by the function that builds it again."""
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and arguments:
        return arguments[0]
    if name == "_rebuild_from_type_v2" and len(arguments) == 4:
        function, kind, inner, _ = arguments
        ours = isinstance(kind, Global) and (kind.module, kind.name) in (
            ("torch", "Tensor"),
            ("torch._tensor", "Tensor"),
            ("torch.nn.parameter", "Parameter"),
        )
        direct = isinstance(function, Global) and function.name != name
        if ours and direct and isinstance(inner, tuple):
            return _made(function, inner)
        return Foreign("tensor of a subclass")
    if name == "_rebuild_tensor" and len(arguments) == 4:
        return _tensor(arguments)
    if name == "_rebuild_tensor_v2" and 6 <= len(arguments) <= 7:
        flags = arguments[6] if len(arguments) > 6 else None
        if flags is not None and not (isinstance(flags, Pairs) and not flags.items):
            return Foreign("tensor with a conjugate or negative bit")
        return _tensor(arguments)
    if name == "_rebuild_tensor_v3" and 7 <= len(arguments) <= 8:
        dtype = arguments[6]
        flags = arguments[7] if len(arguments) > 7 else None
        plain = flags is None or (isinstance(flags, Pairs) and not flags.items)
        if not plain or not isinstance(dtype, Global):
            return Foreign("tensor of an unknown kind")
        return _tensor(arguments, dtype.name)
    return Foreign(name.removeprefix("_rebuild_").replace("_", " ").removesuffix(" tensor") + " tensor")


def _tensor(arguments: tuple[object, ...], dtype: str = "") -> Tensor:
    storage, offset, shape, strides = arguments[:4]
    return Tensor(storage, offset, shape, strides, dtype)


def _push(value: object) -> Callable[[_Reader], None]:
    return lambda r: r.stack.append(value)


def _passing(count: int, value: object) -> Callable[[_Reader], None]:
    def operation(r: _Reader) -> None:
        r.skip(count)
        r.stack.append(value)

    return operation


def _tuple_of(count: int) -> Callable[[_Reader], None]:
    def operation(r: _Reader) -> None:
        values = tuple(r.stack[-count:])
        if len(values) < count or _MARK in values:
            raise IndexError
        del r.stack[-count:]
        r.keep_tuple(values)

    return operation


def _text(form: str, encoding: str) -> Callable[[_Reader], None]:
    return lambda r: r.text(r.number(form), encoding)


def _raw(form: str) -> Callable[[_Reader], None]:
    def operation(r: _Reader) -> None:
        r.skip(r.number(form))
        r.stack.append(INERT)

    return operation


def _call(r: _Reader) -> None:
    arguments, function = r.pop(), r.pop()
    r.call(function, arguments)


def _call_with_options(r: _Reader) -> None:
    _, arguments, function = r.pop(), r.pop(), r.pop()
    r.call(function, arguments)


def _instance(r: _Reader) -> None:
    module, name = r.line(), r.line()
    r.call(r.name(module.decode(), name.decode()), tuple(r.to_mark()))


def _instance_of(r: _Reader) -> None:
    function, *arguments = r.to_mark()
    r.call(function, tuple(arguments))


def _global_by_names(r: _Reader) -> None:
    name, module = r.pop(), r.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Damaged("its pickle names a class by something else than text")
    r.stack.append(r.name(module, name))


def _pairs(r: _Reader) -> None:
    values = r.to_mark()
    r.keep(Pairs())
    r.set_items(values)


def _set_item(r: _Reader) -> None:
    value, key = r.pop(), r.pop()
    r.set_items([key, value])


def _append(r: _Reader) -> None:
    value = r.pop()
    r.add_items([value])


def _discard(r: _Reader) -> None:
    if r.stack and r.stack[-1] is _MARK:
        r.to_mark()
    else:
        r.pop()


def _forget_line(r: _Reader) -> None:
    r.line()
    r.stack.append(INERT)


def _line_of_text(*, quoted: bool) -> Callable[[_Reader], None]:
    def operation(r: _Reader) -> None:
        line = r.line()
        if quoted:
            if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
                raise Damaged("its pickle has a string without quotes")
            line = line[1:-1]
        r.keep(TOO_LONG if b"\\" in line else line.decode("latin1"))

    return operation


def _protocol(r: _Reader) -> None:
    if r.take(1)[0] > 5:
        raise Damaged("its pickle is of an unknown protocol")


def _frozen(r: _Reader) -> None:
    r.to_mark()
    r.stack.append(INERT)


def _table() -> list[Callable[[_Reader], object] | None]:
    table: list[Callable[[_Reader], object] | None] = [None] * 256
    table[ord("(")] = _Reader.mark
    table[ord("0")] = _discard
    table[ord("1")] = _Reader.to_mark
    table[ord("2")] = lambda r: r.stack.append(r.top())
    table[ord("F")] = _forget_line
    table[ord("I")] = table[ord("L")] = _Reader.decimal
    table[ord("J")] = lambda r: r.integer(r.take(4))
    table[ord("K")] = lambda r: r.keep(r.number("<B"))
    table[ord("M")] = lambda r: r.keep(r.number("<H"))
    table[ord("N")] = _push(None)
    table[ord("P")] = _forget_line
    table[ord("Q")] = lambda r: r.persistent(r.pop())
    table[ord("R")] = _call
    table[ord("S")], table[ord("V")] = _line_of_text(quoted=True), _line_of_text(quoted=False)
    table[ord("T")], table[ord("U")] = _text("<i", "latin1"), _text("<B", "latin1")
    table[ord("X")] = _text("<I", "utf-8")
    table[ord("a")] = _append
    table[ord("b")] = _Reader.build
    table[ord("c")] = _Reader.constant
    table[ord("d")] = _pairs
    table[ord("}")] = lambda r: r.keep(Pairs())
    table[ord("e")] = lambda r: r.add_items(r.to_mark())
    table[ord("g")] = lambda r: r.stack.append(r.memo[int(r.line())])
    table[ord("h")] = lambda r: r.stack.append(r.memo[r.number("<B")])
    table[ord("j")] = lambda r: r.stack.append(r.memo[r.number("<I")])
    table[ord("i")] = _instance
    table[ord("l")] = lambda r: r.keep(r.to_mark())
    table[ord("]")] = lambda r: r.keep([])
    table[ord("o")] = _instance_of
    table[ord("p")] = lambda r: r.remember(int(r.line()))
    table[ord("q")] = lambda r: r.remember(r.number("<B"))
    table[ord("r")] = lambda r: r.remember(r.number("<I"))
    table[ord("s")] = _set_item
    table[ord("t")] = lambda r: r.keep_tuple(tuple(r.to_mark()))
    table[ord(")")] = _push(())
    table[ord("u")] = lambda r: r.set_items(r.to_mark())
    table[ord("G")] = _passing(8, INERT)
    table[0x80] = _protocol
    table[0x81] = _call
    table[0x85], table[0x86], table[0x87] = _tuple_of(1), _tuple_of(2), _tuple_of(3)
    table[0x88], table[0x89] = _push(True), _push(False)
    table[0x8A], table[0x8B] = lambda r: r.long(r.number("<B")), lambda r: r.long(r.number("<i"))
    table[ord("B")], table[ord("C")] = _raw("<I"), _raw("<B")
    table[0x8C], table[0x8D] = _text("<B", "utf-8"), _text("<Q", "utf-8")
    table[0x8E], table[0x96] = _raw("<Q"), _raw("<Q")
    table[0x8F] = _push(INERT)
    table[0x90] = lambda r: r.to_mark() and None
    table[0x91] = _frozen
    table[0x92] = _call_with_options
    table[0x93] = _global_by_names
    table[0x94] = lambda r: r.remember(len(r.memo))
    table[0x95] = lambda r: r.skip(8)
    return table


OPERATIONS = _table()
