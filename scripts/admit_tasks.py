"""Print the zero-shot accuracy of every microworld task, and check that `ADMITTED` follows from it alone.

python scripts/admit_tasks.py
"""

from __future__ import annotations

from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.datasets.microworld import Microworld
from mergekit_vl.microworld.tasks import ADMITTED, CANDIDATES, TASKS
from mergekit_vl.models.evaluate import evaluate
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import Single
from mergekit_vl.protocols.base_to_novel import METRIC, BaseToNovel


def main() -> None:
    store, model = FeatureStore(), Single(Micro().build("cpu"), ZeroShot())
    admitted = []
    for name in TASKS:
        dataset = Microworld(name).load()
        runs = [
            [evaluate(model, c, split, store)[0].acc1 for _, c, split in BaseToNovel().task(dataset, seed).tests]
            for seed in (1, 2, 3)
        ]
        base, novel = (100 * sum(column) / 3 for column in zip(*runs))
        hm = METRIC.score([base, novel])
        admitted += [name] if name in CANDIDATES and 50 <= hm <= 80 else []
        print(
            f"{name:28s} base {base:5.1f}  novel {novel:5.1f}  HM {hm:5.1f}",
            "" if name in CANDIDATES else "(development)",
        )
    assert tuple(admitted) == ADMITTED, admitted
    print(len(admitted), "tasks admitted, as the package says")


if __name__ == "__main__":
    main()
