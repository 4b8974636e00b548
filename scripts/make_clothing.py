"""Make the small set of photographs that ships in the package from the clothing set (CC0).

git clone https://github.com/alexeygrigorev/clothing-dataset-small
python scripts/make_clothing.py clothing-dataset-small mergekit_vl/assets/clothing.zip

40 pictures a class, at most 160 pixels a side: of its own train, validation and test folders the first 20, 8 and 12 in the order of their
names' hashes. (The repository calls its validation folder `validation`; here it is `val`.)
"""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path

from PIL import Image, ImageOps

SIZE = 160
QUALITY = 80
COUNTS = {"train": 20, "val": 8, "test": 12}
WHEN = (1980, 1, 1, 0, 0, 0)
"""Of every member, so that the same pictures give the same file."""


def main(source: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for part, count in COUNTS.items():
            for folder in sorted((source / part).iterdir()):
                named = sorted(folder.iterdir(), key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
                for i, file in enumerate(named[:count]):
                    archive.writestr(zipfile.ZipInfo(f"{part}/{folder.name}/{i:02}.webp", WHEN), _small(file))
        archive.writestr(zipfile.ZipInfo("LICENSE", WHEN), (source / "LICENSE").read_bytes())
    print(target, target.stat().st_size, "bytes")


def _small(file: Path) -> bytes:
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "webp", quality=QUALITY, method=6)
    return out.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
