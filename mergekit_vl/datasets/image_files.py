"""Image files: which can be read, and their pixels, decoded within bounds."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.errors import UserError
from mergekit_vl.reporter import Reporter
from mergekit_vl.system.regular_files import read_regular

if TYPE_CHECKING:
    from PIL.Image import Image

THREADS = 4
MOST_MEGAPIXELS = 64
"""Of an image that is decoded, unless an option says otherwise: a small file can hold many more pixels than memory."""
LARGE_MEGAPIXELS = 16
"""Images from here on are checked one at a time, not by all threads at once."""
STARTS_PROGRAMS = {"EPS", "WMF"}
"""Formats that are not read: decoding them would run Ghostscript, or the system's own player, on the file."""

HEIC = (".heic", ".heif", ".hif")
LEFT_OUT = {
    **dict.fromkeys(HEIC, "pip install 'mergekit-vl[heic]' reads it"),
    **dict.fromkeys((".avif", ".jxl"), "convert it to PNG"),
    **dict.fromkeys((".svg", ".svgz", ".eps", ".wmf", ".emf"), "a drawing: convert it to PNG"),
    **dict.fromkeys(
        (".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".raw"), "raw data of a camera: convert it"
    ),
    **dict.fromkeys((".dcm", ".nii", ".exr", ".hdr"), "an array: convert it to PNG"),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), "a film: extract frames"),
    **dict.fromkeys((".xcf", ".kra", ".sketch"), "a drawing program's: export it as PNG"),
}
"""Endings of pictures that are not read, unless Pillow has a decoder, and the next step."""

MEGAPIXELS_HELP = "images with more million pixels are refused, before they are decoded"


@dataclass(frozen=True)
class FolderImages:
    """Image files under a root, read and decoded when asked for."""

    root: Path
    files: tuple[str, ...]
    """Relative to the root, sorted; the rows of a split are positions here."""
    key: str
    """sha256 over each file's relative path, size and content hash."""
    megapixels: float = MOST_MEGAPIXELS
    """A larger image is refused."""

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Image:
        """The image as RGB, upright by its EXIF orientation; raises UserError for a file that is gone or damaged since the dataset was."""
        file = self.root / self.files[index]
        try:
            return decode(file, megapixels=self.megapixels)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # PIL's decoders raise nearly anything
            raise UserError(
                f"cannot be read any more: {error}", where=str(file), hint="restore it, or load the dataset again"
            ) from None


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    try:  # the extra `heic`
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return tuple(sorted(set(Image.OPEN) - STARTS_PROGRAMS))


def readable_suffixes() -> set[str]:
    """Of the image files that can be decoded, in lower case with the dot."""
    from PIL import Image

    formats = _formats()
    return {ext for ext, kind in Image.registered_extensions().items() if kind in formats}


def told_left_out(counts: Mapping[str, int]) -> str:
    """In words: how many pictures of which endings are not read, and the next step for each."""
    total = sum(counts.values())
    kinds = [f"{n} {ending} ({LEFT_OUT[ending]})" for ending, n in sorted(counts.items())]
    return f"{total} picture{'s' * (total != 1)} left out that cannot be read here: {', '.join(kinds)}"


def verified(
    reporter: Reporter, root: Path, files: Sequence[str], megapixels: float
) -> tuple[FolderImages, dict[str, UserError | None]]:
    """The source of the files that decode, and those that do not, with what is to be said of those that are not merely damaged."""

    def look(file: str) -> str | UserError | None:
        try:
            data = _encoded(root / file, megapixels)
            decode(data, where=root / file, megapixels=megapixels, draft=True)
        except MemoryError:
            raise
        except UserError as error:
            return error
        except Exception:  # PIL's decoders raise nearly anything
            return None
        return f"{file}\0{len(data)}\0{hashlib.sha256(data).hexdigest()}\n"

    with ThreadPoolExecutor(THREADS) as pool:
        lines = []
        for line in pool.map(look, files):
            lines.append(line)
            reporter.progress(len(lines), len(files), f"reading the images of {root.name}")
    good = {file: line for file, line in zip(files, lines) if isinstance(line, str)}
    bad = {file: line for file, line in zip(files, lines) if not isinstance(line, str)}
    key = hashlib.sha256("".join(good.values()).encode()).hexdigest()
    return FolderImages(root, tuple(good), key, megapixels), bad


def check_megapixels(megapixels: float) -> None:
    if not 0 < megapixels <= 1e6:
        raise UserError(f"max_megapixels={megapixels}", hint="above 0, a million at most")


def _encoded(file: Path, megapixels: float) -> bytes:
    """A file's bytes, where it may be an image of so many pixels: 16 bytes a pixel are more than any format takes."""
    return read_regular(file, most=int(16e6 * megapixels) + 2**20)


_LARGE = threading.Lock()
_BOUND = threading.Lock()
_BOUNDS: list[int] = []
"""Those of the images that are decoded now."""
_BEFORE: list[int | None] = []
"""The process's own, while images are decoded."""


@contextmanager
def _pillow_bound(pixels: int) -> Iterator[None]:
    """Inside, Pillow's own bound, which holds for images inside of files too: it warns above this number, and refuses twice as much.

    The bound is the whole process's: it is the least of those that are asked for now, and afterwards what it was before.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    with _BOUND:
        if not _BOUNDS:
            _BEFORE.append(Image.MAX_IMAGE_PIXELS)
        _BOUNDS.append(pixels)
        Image.MAX_IMAGE_PIXELS = min(_BOUNDS)
    try:
        yield
    finally:
        with _BOUND:
            _BOUNDS.remove(pixels)
            Image.MAX_IMAGE_PIXELS = min(_BOUNDS) if _BOUNDS else _BEFORE.pop()


def decode(
    file: Path | bytes, *, where: Path | None = None, megapixels: float = MOST_MEGAPIXELS, draft: bool = False
) -> Image:
    """RGB; raises UserError for more pixels than are allowed, and whatever PIL raises for what is damaged.

    A draft reads all the bytes too, but a JPEG comes out small, which is much cheaper, and only a pixel is given back.
    """
    import io
    from contextlib import nullcontext

    from PIL import Image, ImageOps

    place = file if isinstance(file, Path) else where

    def refused() -> UserError:
        hint = "leave it out, or raise max_megapixels if you trust it"
        return UserError(f"it has more than {megapixels:g} million pixels", where=str(place or ""), hint=hint)

    data = file if isinstance(file, bytes) else _encoded(file, megapixels)
    try:
        with (
            _pillow_bound(max(1, int(megapixels * 1e6) // 2)),
            Image.open(io.BytesIO(data), formats=_formats()) as image,
        ):
            pixels = image.width * image.height
            if pixels > megapixels * 1e6:
                raise refused()
            with _LARGE if draft and pixels > 1e6 * LARGE_MEGAPIXELS else nullcontext():
                if draft:
                    image.draft("RGB", (1, 1))
                image.load()
                upright = image.crop((0, 0, 1, 1)) if draft else image
            ImageOps.exif_transpose(upright, in_place=True)
    except Image.DecompressionBombError:
        raise refused() from None
    if upright.mode.startswith(("I", "F")):  # PIL would clip where it should scale
        upright = Image.fromarray(_eight_bits(np.asarray(upright)))
    if "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Wider numbers scaled to 0 .. 255 by their range: of 16 bits, of 32 where a value is larger than that, of floats 0 .. 1, or the range of integers that they
    stay in; floats beyond are scaled by their own.
    """
    if values.dtype.kind != "f":
        wide = values.astype(np.int64) & 0xFFFFFFFF if values.dtype.itemsize > 2 else values.astype(np.int64)
        bits = 32 if wide.max(initial=0) > 0xFFFF else 16
        return (wide >> (bits - 8)).astype(np.uint8)
    finite = np.nan_to_num(values.astype(np.float64))
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    if low >= 0 and high <= 0xFFFF:
        low, high = 0.0, next(float(most) for most in (1, 0xFF, 0xFFFF) if high <= most)
    scaled = (finite - low) * (255 / (high - low if high > low else 1))
    return scaled.round().clip(0, 255).astype(np.uint8)
