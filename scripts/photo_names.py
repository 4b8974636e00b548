"""What the text tower of `photo` learns: nouns with the leaves (ImageNet's 1,000 classes) that stand for each, and rows of the vocabulary.

A class and its synonyms stand for that class, a hypernym for all classes below it. Any other noun for a thing takes the classes below its
nearest hypernym that has some; where these are many, the classes whose definition names the noun, or that the noun's definition names
(a face is what masks and face powder are for, Snoopy is a beagle). Of several senses the cheapest counts: frequent, near, an animal, thing or food.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import open_clip
from open_clip import SimpleTokenizer
from timm.data import ImageNetInfo
from wordnet import Nouns

WORTH = {5: 3.0, 6: 2.5, 13: 2.5, 8: 1.5, 17: 1.5, 20: 1.5, 18: 1.2, 27: 1.0}
"""Of a noun, by lexicographer's file; 0.5 for others."""
FAR = {5: 0.0, 6: 0.0, 13: 0.3, 8: 0.5, 17: 0.7, 20: 0.7, 27: 1.0, 18: 1.2}
"""What a sense of a file costs beside another; 3 for others."""
FEW = 10
"""Classes that a relative may stand for before definitions are asked."""


@dataclass(frozen=True)
class Noun:
    name: str
    leaves: dict[int, float]
    """How much each class stands for it; the sum is 1."""
    core: bool
    """A class, a synonym of one, or a hypernym."""


class Relatives:
    """From a synset to the classes that stand for it."""

    def __init__(self, nouns: Nouns) -> None:
        self.nouns = nouns
        self.leaves = [name[1:] for name in ImageNetInfo().label_names()]
        self.below: dict[str, set[int]] = {}
        for i, leaf in enumerate(self.leaves):
            for above in nouns.distances(leaf):
                self.below.setdefault(above, set()).add(i)
        self.named_in: dict[str, set[int]] = defaultdict(set)  # phrases of the classes' definitions
        for i, leaf in enumerate(self.leaves):
            for phrase in _phrases(nouns.synsets[leaf].gloss):
                self.named_in[phrase].add(i)
        self.named: dict[str, set[int]] = {}  # names of few classes; of one word only a class's own
        for offset, classes in self.below.items():
            for lemma in nouns.synsets[offset].lemmas:
                if len(classes) <= FEW and ("_" in lemma or offset in self.leaves):
                    self.named.setdefault(_plain(lemma), classes)

    def of(self, offset: str) -> tuple[set[int], float] | None:
        """Classes, and what it costs to take them for the synset; None where there are none."""
        synset = self.nouns.synsets[offset]
        if offset in self.below:
            return self.below[offset], 0.0
        physical, classes, cost = offset in self.nouns.physical, set[int](), 3.0
        if physical:
            up = self.nouns.distances(offset)
            steps, _, nearest = min((d, len(self.below[o]), o) for o, d in up.items() if o in self.below)
            classes, cost = self.below[nearest], 0.5 * steps
            if len(classes) <= FEW:
                return classes, cost
            names = [_plain(lemma) for lemma in synset.lemmas]
            told = set().union(*(self.named_in.get(form, set()) for name in names for form in (name, name + "s")))
            if 0 < len(told) <= 4 * FEW:
                return told, cost + 1
        for phrase in _phrases(synset.gloss):
            if phrase in self.named:
                return self.named[phrase], cost + 1.5
        return (classes, cost + (1.5 if len(classes) <= 4 * FEW else 3)) if physical else None

    def of_noun(self, lemma: str) -> tuple[dict[int, float], bool] | None:
        """Its senses' classes, each sense by its cost; and whether the cheapest is a class or above one."""
        senses, counts = self.nouns.senses[lemma], self.nouns.counts.get(lemma, {})
        total = sum(counts.values()) + 0.5 * len(senses)
        found: list[tuple[float, str, set[int]]] = []
        for rank, offset in enumerate(senses):
            if (made := self.of(offset)) is not None:
                classes, cost = made
                cost += FAR.get(self.nouns.synsets[offset].file, 3.0)
                cost += 0.7 * rank - math.log((counts.get(rank + 1, 0) + 0.5) / total)
                found.append((cost, offset, classes))
        if not found:
            return None
        least, cheapest, _ = min(found, key=lambda each: each[0])
        return _mixed([(classes, math.exp(least - cost)) for cost, _, classes in found]), cheapest in self.below


def _mixed(parts: list[tuple[set[int], float]]) -> dict[int, float]:
    total = sum(share for _, share in parts)
    out: dict[int, float] = defaultdict(float)
    for classes, share in parts:
        for i in sorted(classes):
            out[i] += share / total / len(classes)
    return dict(out)


def core_nouns(nouns: Nouns, relatives: Relatives) -> dict[str, Noun]:
    """open_clip's names of the classes, and the lemmas of every synset at or above them."""
    own: dict[str, set[int]] = defaultdict(set)
    for i, name in enumerate(open_clip.IMAGENET_CLASSNAMES):
        own[_plain(name)].add(i)
    found = {name: Noun(name, _mixed([(classes, 1.0)]), True) for name, classes in own.items()}
    for offset in relatives.below:
        for lemma in nouns.synsets[offset].lemmas:
            name = _plain(lemma)
            made = relatives.of_noun(lemma.lower())
            assert made is not None
            found.setdefault(name, Noun(name, made[0], True))
    return found


def other_nouns(nouns: Nouns, relatives: Relatives, core: dict[str, Noun]) -> dict[str, Noun]:
    """Every other noun that has a sense which is a thing, or whose definition names a class; of three words at most."""
    found = {}
    for lemma in nouns.senses:
        name = _plain(lemma)
        if name in core or len(name.split()) > 3 or not re.fullmatch(r"[a-z]([a-z'_-]*[a-z])?", lemma):
            continue
        made = relatives.of_noun(lemma)
        if made is None:
            continue
        leaves = made[0]
        if name.endswith("s") and name[:-1] in core:  # pants are underpants, and more than one pant; shoes are shoes
            own = 0.5 if any(offset in nouns.physical for offset in nouns.senses[lemma]) else 0.0
            leaves = defaultdict(float, {i: own * share for i, share in leaves.items()})
            for i, share in core[name[:-1]].leaves.items():
                leaves[i] += (1 - own) * share
        found[name] = Noun(name, dict(leaves), False)
    return found


def chosen_rows(core: list[str], worth: dict[str, float], tokenizer: SimpleTokenizer, size: int) -> list[int]:
    """Token ids: all of the names in `core`, then what the names in `worth` need most; `size` in all, sorted."""
    rows = {token for name in core for token in tokenizer.encode(name)}
    most: dict[int, float] = defaultdict(float)
    total: dict[int, float] = defaultdict(float)
    for name, value in worth.items():
        tokens = tokenizer.encode(name)
        missing = set(tokens) - rows
        value *= 0.3 if " " in name else 1.0
        if len(tokens) == 1:
            value += 3.0 * (value >= 1) + 1.5 * (1 - tokens[0] / 49408)  # smaller ids are more frequent words
        for token in missing:
            part = value / len(missing) ** 0.25
            most[token] = max(most[token], part)
            total[token] += part
    score = {token: most[token] + 0.1 * (total[token] - most[token]) for token in most}
    return sorted(rows | set(sorted(score, key=lambda t: (-score[t], t))[: size - len(rows)]))


def plural(name: str) -> str:
    """As most nouns have it."""
    if re.search(r"[^aeiou]y$", name):
        return name[:-1] + "ies"
    return name + ("es" if re.search(r"(s|x|z|ch|sh)$", name) else "s")


def worth_of(nouns: Nouns, name: str) -> float:
    """Of a noun's row in the vocabulary; names of single persons and places count less."""
    out = 0.0
    for offset in nouns.senses[name.replace(" ", "_")]:
        synset = nouns.synsets[offset]
        value = WORTH.get(synset.file, 0.5)
        proper = synset.instance or not any(lemma.replace("_", " ") == name for lemma in synset.lemmas)
        out = max(out, min(value, 0.7) if proper else value)
    return out


def _plain(name: str) -> str:
    """As folders of classes are read: no underscores, no brackets, small letters."""
    return re.sub(r"\s+", " ", re.sub(r"[_()]", " ", name.lower())).strip(" .")


def _phrases(text: str) -> list[str]:
    """Of three words, two and one."""
    words = re.findall(r"[a-z]+", text.lower())
    return [" ".join(words[at : at + n]) for n in (3, 2, 1) for at in range(len(words) - n + 1)]
