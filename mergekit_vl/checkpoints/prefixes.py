"""The one prefix that names of a file have before those that are looked for: `model.`, `clipmodel.`, `module.`, whatever a wrapper is called."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ANCHORS = 64
"""Names from which prefixes are guessed; every guess is then counted over all names."""
MOST_GUESSES = 8
SHARE = 0.9
"""Of the names of the smaller side, those that must be found again with their shapes."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Prefixes:
    """Names `wanted + x` are `given + x` in the file."""

    wanted: str
    given: str

    def renamed(self, name: str) -> str | None:
        """What a name of the file is called where it is wanted; None for one beside the prefix."""
        return self.wanted + name.removeprefix(self.given) if name.startswith(self.given) else None

    def told(self) -> str:
        """In words."""
        if not self.wanted:
            return f"its names begin with {self.given!r}, which is taken off"
        if not self.given:
            return f"its names are put under {self.wanted!r}"
        return f"its names begin with {self.given!r}, which is read as {self.wanted!r}"


def same(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes are equal but for axes of length 1."""
    return a == b or [n for n in a if n != 1] == [n for n in b if n != 1]


def find(wanted: Shapes, given: Shapes) -> tuple[Prefixes | None, list[Prefixes]]:
    """The prefixes under which most names fit, or None where names fit as they are or none does; and the best guesses, which a message may show.

    Two guesses that fit equally well are no answer.
    """
    fitting = sum(name in given and same(given[name], shape) for name, shape in wanted.items())
    if not wanted or not given or fitting >= SHARE * min(len(wanted), len(given)):
        return None, []
    guesses = [guess for guess, _ in _guesses(list(wanted), list(given), wanted, given).most_common(MOST_GUESSES)]
    counted = {guess: _count(guess, wanted, given) for guess in guesses}
    best = sorted(guesses, key=lambda guess: (-counted[guess], len(guess.wanted) + len(guess.given)))
    if not best:
        return None, []
    found = counted[best[0]]
    under = sum(name.startswith(best[0].given) for name in given)
    enough = found > fitting and found >= SHARE * min(len(wanted), max(1, under))
    alone = len(best) == 1 or counted[best[1]] < found
    return (best[0] if enough and alone else None), best


def _guesses(names: Sequence[str], others: Sequence[str], wanted: Shapes, given: Shapes) -> Counter[Prefixes]:
    by_end: dict[str, list[str]] = defaultdict(list)
    for other in others:
        by_end[other.rpartition(".")[2]].append(other)
    step = max(1, len(names) // ANCHORS)
    found: Counter[Prefixes] = Counter()
    for name in names[::step]:
        for other in by_end[name.rpartition(".")[2]][:1000]:
            if same(wanted[name], given[other]):
                found[_apart(name, other)] += 1
    return found


def _apart(name: str, other: str) -> Prefixes:
    """What stands before the longest end, in whole words, that two names share."""
    a, b = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(a), len(b)) and a[-1 - shared] == b[-1 - shared]:
        shared += 1
    before = [".".join(words[: len(words) - shared]) for words in (a, b)]
    return Prefixes(*(f"{words}." if words else "" for words in before))


def _count(guess: Prefixes, wanted: Shapes, given: Shapes) -> int:
    count = 0
    for name, shape in given.items():
        to = guess.renamed(name)
        count += to is not None and to in wanted and same(wanted[to], shape)
    return count
