"""JPEG files to read: drawn with the spectrum of photos, or own photos, in a chosen size, in a folder and in a tar."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt4.common.errors import ConfigError

QUALITY = 90
DISTINCT = 16
"""Drawn pictures; more files repeat them."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def drawn(width: int, height: int, seed: int) -> Image.Image:
    """Noise in which, as in photos, a detail is the weaker the finer it is, and the channels are alike."""
    chance = np.random.default_rng(seed)
    fine = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).clip(1 / max(width, height))
    waves = (chance.normal(size=(2, *fine.shape)) / fine**1.2 for _ in range(4))
    grey, *colours = (np.fft.irfft2(real + 1j * imaginary, (height, width)) for real, imaginary in waves)
    levels = [128 + 50 * grey / grey.std() + 15 * colour / colour.std() for colour in colours]
    return Image.fromarray(np.stack(levels, axis=-1).clip(0, 255).astype(np.uint8))


def pictures(width: int, height: int, count: int, photos: Path | None) -> Iterator[bytes]:
    """`count` JPEG files; ConfigError if the folder `photos` holds none."""
    if photos is None:
        distinct = [_encoded(drawn(width, height, seed)) for seed in range(min(count, DISTINCT))]
    else:
        files = sorted(path for path in photos.glob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise ConfigError(f"--photos: {photos} holds no {', '.join(SUFFIXES)}")
        distinct = [_encoded(_resized(file, width, height)) for file in files[:count]]
    for number in range(count):
        yield distinct[number % len(distinct)]


def _resized(file: Path, width: int, height: int) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_folder(folder: Path, files: Sequence[bytes]) -> None:
    """`image/<n>.jpg` and `filter_cap.json`, as stage 2 has them."""
    (folder / "image").mkdir(parents=True)
    for number, content in enumerate(files):
        (folder / "image" / f"{number}.jpg").write_bytes(content)
    records = [{"image_id": str(number), "caption": "A picture."} for number in range(len(files))]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": records}))


def write_tar(path: Path, files: Sequence[bytes]) -> None:
    """A shard as img2dataset writes it: image, caption and metadata of each sample."""
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(files):
            metadata = json.dumps({"caption": "A picture.", "url": "http://localhost/picture.jpg", "status": "success"})
            for suffix, data in (("jpg", content), ("txt", b"A picture."), ("json", metadata.encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
