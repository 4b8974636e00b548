"""WordNet 3.0's nouns as its database files hold them (Debian's package `wordnet-base`; format: wndb(5WN))."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PHYSICAL = "00001930"
"""The synset of `physical entity`."""


@dataclass(frozen=True)
class Synset:
    lemmas: tuple[str, ...]
    above: tuple[str, ...]
    """Offsets of its hypernyms, and of what it is an instance of."""
    instance: bool
    file: int
    """Lexicographer's file: 5 animals, 6 artefacts, 8 bodies, 13 food, 17 objects, 18 persons, 20 plants, 27 substances."""
    gloss: str
    """The definition without examples."""


@dataclass(frozen=True)
class Nouns:
    folder: Path

    @cached_property
    def synsets(self) -> dict[str, Synset]:
        """By offset."""
        return {offset: synset for offset, synset in map(_synset, _lines(self.folder / "data.noun"))}

    @cached_property
    def senses(self) -> dict[str, tuple[str, ...]]:
        """Offsets by lemma (small letters, underscores), the most frequent sense first."""
        parts = (line.split() for line in _lines(self.folder / "index.noun"))
        return {words[0]: tuple(words[-int(words[2]) :]) for words in parts}

    @cached_property
    def counts(self) -> dict[str, dict[int, int]]:
        """How often each sense of a noun was tagged in texts: by lemma and the sense's number from 1."""
        out: dict[str, dict[int, int]] = {}
        for line in (self.folder / "cntlist.rev").read_text().splitlines():
            key, sense, count = line.split()
            lemma, _, rest = key.partition("%")
            if rest.startswith("1:"):
                out.setdefault(lemma, {})[int(sense)] = int(count)
        return out

    def adjectives(self, most: int) -> list[str]:
        """The adjectives tagged most often in texts, one word each."""
        total: dict[str, int] = {}
        for line in (self.folder / "cntlist.rev").read_text().splitlines():
            key, _, count = line.split()
            lemma, _, rest = key.partition("%")
            if rest[0] in "35" and lemma.isalpha():
                total[lemma] = total.get(lemma, 0) + int(count)
        return sorted(total, key=lambda lemma: (-total[lemma], lemma))[:most]

    def distances(self, offset: str) -> dict[str, int]:
        """Steps up from a synset to each of those above it, itself at 0."""
        out, queue = {offset: 0}, [offset]
        for at in queue:
            for above in self.synsets[at].above:
                if above not in out:
                    out[above] = out[at] + 1
                    queue.append(above)
        return out

    @cached_property
    def physical(self) -> frozenset[str]:
        """All synsets of physical things."""
        below: dict[str, list[str]] = {}
        for offset, synset in self.synsets.items():
            for above in synset.above:
                below.setdefault(above, []).append(offset)
        found, queue = {PHYSICAL}, [PHYSICAL]
        for at in queue:
            queue += (new := [offset for offset in below.get(at, ()) if offset not in found])
            found.update(new)
        return frozenset(found)


def _lines(file: Path) -> Iterable[str]:
    """Without the licence, whose lines begin with a space."""
    with file.open(encoding="latin-1") as lines:
        yield from (line for line in lines if not line.startswith(" "))


def _synset(line: str) -> tuple[str, Synset]:
    fields, _, gloss = line.partition(" | ")
    parts = fields.split()
    count = int(parts[3], 16)
    pointers = parts[5 + 2 * count :]
    above = [(pointers[i], pointers[i + 1]) for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i")]
    return parts[0], Synset(
        lemmas=tuple(parts[4 + 2 * i] for i in range(count)),
        above=tuple(offset for _, offset in above),
        instance=any(kind == "@i" for kind, _ in above),
        file=int(parts[1]),
        gloss=re.split(r'; "|; (?=[a-z])', gloss)[0].strip(),
    )
