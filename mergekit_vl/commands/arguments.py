"""Arguments and options that several commands have, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="a file, or the name of an installed recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, list items as tuned.0.tuner.epochs=5")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help="a run folder, micro, photo, clip:ARCH:PRETRAINED, vision:ARCH, or a folder that open_clip wrote"
    ),
]
AllowEnv = Annotated[
    list[str] | None,
    typer.Option(
        help="an environment variable that the recipe may read as ${oc.env:NAME}; once for each", metavar="NAME"
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="folder; default runs/<recipe>-<hash>, of a bench runs/bench-<recipe>-<hash>"),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Force = Annotated[bool, typer.Option("--force", help="do again what is done already")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress and no table")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
Row = Annotated[str | None, typer.Option(help="row of the run; default its main strategy")]
Checkpoint = Annotated[Path | None, typer.Option(help="tuned weights, a prompt or a head on the model")]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="plain|ema|KEY",
        help="of a file that holds several sets of weights, which: default plain, not averaged (EMA)",
    ),
]
