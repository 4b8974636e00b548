"""A strict reader of zip directories: at which bytes each member lies. An archive that two programs could read differently is refused.

A checkpoint that shows other weights to another program would be an attack. So the file must be one archive from its first byte to its last, every
member must lie where the directory says, under the same name, once, and no two members may share bytes.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from mergekit_vl.checkpoints.unpickler import Damaged

MOST_MEMBERS = 100_000
MOST_DIRECTORY = 16 << 20
END, END64, LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
MANY, LARGE = 0xFFFF, 0xFFFFFFFF
"""What stands where the number itself is in a field of 64 bits elsewhere."""
SIZES_FOLLOW = 8
"""The flag of a member whose size and CRC stand after it; torch's have it."""
DESCRIPTORS = (0, 12, 16, 20, 24)
"""How long these may be."""


@dataclass(frozen=True, slots=True)
class Member:
    start: int
    size: int
    crc: int
    stored: bool
    """Whether it is stored uncompressed."""


@dataclass(frozen=True)
class Archive:
    members: dict[bytes, Member]
    """By name, without the folder that holds them all."""
    crcs: bool
    """Whether CRCs were recorded; torch.serialization.set_crc32_options(False) writes zeros."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    flags: int
    method: int
    crc: int
    compressed: int
    size: int
    offset: int


def read_archive(descriptor: int) -> Archive:
    """The members of an open file that is one zip from start to end; raises Damaged for any other file."""
    try:
        entries, end = _directory(descriptor)
        return _located(descriptor, entries, end)
    except (struct.error, OverflowError):
        raise Damaged("its directory ends early") from None


def _directory(descriptor: int) -> tuple[list[_Entry], int]:
    """What the directory lists, and where it begins."""
    at, disk, first, here, count, length, start = _end(descriptor, os.fstat(descriptor).st_size)
    if disk or first or here != count:
        raise Damaged("a zip in several parts")
    if start + length != at:
        raise Damaged("a zip with something before it, or inside it")
    if count > MOST_MEMBERS or length > MOST_DIRECTORY:
        raise Damaged(
            f"a zip of more than {MOST_MEMBERS:,} members, or with a directory above {MOST_DIRECTORY >> 20} MB"
        )
    directory, place, entries = os.pread(descriptor, length, start), 0, []
    for _ in range(count):
        entry, place = _entry(directory, place)
        entries.append(entry)
    if place != length:
        raise Damaged("a zip whose directory holds more than it counts")
    return entries, start


def _end(descriptor: int, size: int) -> tuple[int, ...]:
    """Where the end of the archive begins, and its numbers: of 64 bits where there are such."""
    tail = os.pread(descriptor, min(size, 22 + MANY), max(0, size - 22 - MANY))
    ends = _ends(tail)
    if not ends:
        raise Damaged("a zip without its end: it was cut short, or something was added")
    if len(ends) > 1:
        raise Damaged("a zip with two ends")
    at = size - len(tail) + ends[0]
    narrow = struct.unpack_from("<4H2I", tail, ends[0] + 4)
    if at < 20 or os.pread(descriptor, 4, at - 20) != LOCATOR:
        return at, *narrow
    _, where, _ = struct.unpack("<IQI", os.pread(descriptor, 16, at - 16))
    sign, rest, _, _, *wide = struct.unpack("<4sQ2H2I4Q", os.pread(descriptor, 56, min(where, size)))
    if sign != END64 or where + 12 + rest != at - 20:
        raise Damaged("a zip whose end is not where it says")
    if any(n not in (w, MANY if i < 4 else LARGE) for i, (n, w) in enumerate(zip(narrow, wide))):
        raise Damaged("a zip with two different ends")
    return where, *wide


def _ends(tail: bytes) -> list[int]:
    """Where an end begins whose comment reaches exactly to the end of the file."""
    ends, place = [], tail.find(END)
    while place >= 0:
        comment = int.from_bytes(tail[place + 20 : place + 22], "little")
        if place + 22 <= len(tail) and place + 22 + comment == len(tail):
            ends.append(place)
        place = tail.find(END, place + 1)
    return ends


def _entry(directory: bytes, at: int) -> tuple[_Entry, int]:
    sign, _, _, flags, method, _, _, crc, compressed, size, named, more, told, disk, _, _, offset = struct.unpack_from(
        "<4s6H3I5H2I", directory, at
    )
    at += 46
    name, extra = directory[at : at + named], directory[at + named : at + named + more]
    at += named + more + told
    if sign != b"PK\x01\x02" or at > len(directory):
        raise Damaged("its directory is broken")
    size, compressed, offset = _widened(extra, (size, compressed, offset))
    if disk or flags & 1:
        raise Damaged("a zip that is encrypted, or in several parts")
    return _Entry(name, flags, method, crc, compressed, size, offset), at


def _widened(extra: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of 32 bits, or those of 64 bits that an extra field has in their stead."""
    if LARGE not in numbers:
        return numbers
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide, out = at + 4, []
            for number in numbers:
                if number == LARGE:
                    if wide + 8 > at + 4 + length:
                        break
                    (number,) = struct.unpack_from("<Q", extra, wide)
                    wide += 8
                out.append(number)
            if len(out) == len(numbers):
                return tuple(out)
            break
        at += 4 + length
    raise Damaged("its directory is broken")


def _located(descriptor: int, entries: list[_Entry], end: int) -> Archive:
    if not entries:
        raise Damaged("a zip with nothing in it")
    if b"/" not in entries[0].name:
        raise Damaged("a zip whose members are in no folder, as torch.save puts them")
    root = entries[0].name.split(b"/")[0] + b"/"
    members: dict[bytes, Member] = {}
    expected, described = 0, False
    for entry in sorted(entries, key=lambda entry: entry.offset):
        gap = entry.offset - expected
        if gap not in (DESCRIPTORS if described else (0,)):
            raise Damaged(f"{_shown(entry.name)} is not where the member before it ends")
        start = _start(descriptor, entry)
        described, expected = bool(entry.flags & SIZES_FOLLOW), start + entry.compressed
        if not entry.name.startswith(root):
            raise Damaged(f"two archives in one: {_shown(entry.name)} is beside {_shown(root)}")
        name = entry.name[len(root) :]
        if name in members:
            raise Damaged(f"{_shown(entry.name)} is in it twice")
        members[name] = Member(start, entry.compressed, entry.crc, not entry.method)
    if end - expected not in (DESCRIPTORS if described else (0,)):
        raise Damaged("its directory is not where its last member ends")
    return Archive(members, any(entry.crc for entry in entries))


def _start(descriptor: int, entry: _Entry) -> int:
    """Where a member's bytes begin, after a header of its own, which must agree with the directory."""
    local = os.pread(descriptor, 30 + len(entry.name), entry.offset)
    named: int
    more: int
    sign, _, flags, method, _, _, crc, compressed, size, named, more = struct.unpack_from("<4s5H3I2H", local)
    same = sign == b"PK\x03\x04" and local[30:] == entry.name and named == len(entry.name)
    same = same and method == entry.method and (flags ^ entry.flags) & (1 | SIZES_FOLLOW) == 0
    start = entry.offset + 30 + named + more
    if same and not method:
        same = entry.compressed == entry.size
    if same:
        follow = flags & SIZES_FOLLOW
        if LARGE in (compressed, size) and not follow:
            extra = os.pread(descriptor, more, start - more)
            size, compressed = _widened(extra, (size, compressed))
        same = crc == entry.crc or bool(follow and crc == 0)
        for told, known in ((compressed, entry.compressed), (size, entry.size)):
            same = same and (told == known or bool(follow and told in (0, LARGE)))
    if not same:
        raise Damaged(f"its directory and its member {_shown(entry.name)} do not agree")
    return start


def _shown(name: bytes) -> str:
    return name[:200].decode("utf-8", "replace")
