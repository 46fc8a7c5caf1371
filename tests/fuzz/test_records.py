"""Annotation files, shards and lists that somebody damaged: read, or refused by name; no caption is made up."""

import codecs
import csv
import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt4.common.binding import bind
from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets import builder_of
from minigpt4.evaluation.caption_data import read_references, read_results
from minigpt4.evaluation.hallucination import read_object_questions, read_synonyms, read_truth
from minigpt4.inference.image_list import find_images
from minigpt4.models.prompting import read_prompts

ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16")
JSON_ENCODINGS = (*ENCODINGS, "utf-16-be")
WORDS = (
    *("a dog", "é", "東京", "🗼", ",", ";", "|", '"', '12" record', '"Open"', '" stop', "\\", "{}", "'"),
    *("<image>", "."),
)
INSIDE_QUOTES = ("\n", "\t", "\r\n", "\n\n", '\n"')
PIECES = [
    *(b'"', b'""', b",", b"\t", b"\n", b"\r", b"|", b"\0", b"\\", b"\xe9", b"\xff\xfe", b"[" * 3000, b"{", b"}", b"]"),
    *(codecs.BOM_UTF8, rb"\ud83d", b"\xed\xa0\xbd", "\ufffd".encode(), b"null", b'"caption": 1,', b"1e999", b"NaN"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(6):
        Image.new("RGB", (2, 2)).save(folder / f"{number}.jpg")
    return folder


def caption(number: int, chance: random.Random, more: tuple[str, ...] = ()) -> str:
    words = chance.choices(WORDS, k=chance.randint(0, 4))
    words += chance.choices(more, k=chance.randint(0, 2)) if more else []
    chance.shuffle(words)
    return " ".join([*words, f"<{number}>"] if chance.random() < 0.5 else [f"<{number}>", *words])


def annotations(chance: random.Random) -> tuple[str, list[dict[str, str]], str]:
    """Ending, records and text of a good file."""
    kind = chance.choice(["json", "jsonl", "csv", "tsv", "plain", "coco"])
    inside = () if kind == "plain" else INSIDE_QUOTES
    records = [{"image": f"{n}.jpg", "caption": caption(n, chance, inside)} for n in range(chance.randint(1, 6))]
    write = partial(json.dumps, ensure_ascii=chance.random() < 0.5)
    if kind == "json":
        return ".json", records, write(records, indent=chance.choice([None, 1]))
    if kind == "coco":
        named = [{"id": n, "file_name": record["image"]} for n, record in enumerate(records)]
        texts = [{"image_id": n, "caption": record["caption"]} for n, record in enumerate(records)]
        return ".json", records, write({"images": named, "annotations": texts})
    if kind == "jsonl":
        return ".jsonl", records, "".join(write(record) + "\n" for record in records)
    if kind == "plain":
        rows = [["image", "caption"], *(list(record.values()) for record in records)]
        return ".tsv", records, "".join("\t".join(row) + "\n" for row in rows)
    out, quoting = io.StringIO(), chance.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.DictWriter(out, ["image", "caption"], delimiter="\t" if kind == "tsv" else ",", quoting=quoting)
    writer.writeheader()
    writer.writerows(records)
    return f".{kind}", records, out.getvalue()


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content after one edit."""
    start = chance.randint(0, len(content))
    end = min(len(content), start + chance.choice([0, 0, 1, 2]))
    return content[:start] + chance.choice([b"", *PIECES, bytes([chance.randrange(256)])]) + content[end:]


def unescaped(text: str) -> str:
    """JSON's escapes as characters."""
    plain = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
    codes = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
    found = codes.sub(lambda code: chr(int(code[1], 16)) if code[1] else plain.get(code[2], code[2]), text)
    return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def stands_in(text: str, content: bytes) -> bool:
    """Whether the text is in the bytes, in one of the encodings and ways to write that files have."""
    for encoding, shift in (("utf-8", 0), ("utf-16-le", 0), ("utf-16-le", 1), ("utf-16-be", 0), ("utf-16-be", 1)):
        source = content[shift:].decode(encoding, "replace")
        if text in source or text.replace('"', '""') in source or text in unescaped(source):
            return True
    return False


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What the call returns, or None and the error."""
    try:
        return call(), ""
    except MiniGPT4Error as error:
        return None, str(error)


def answers(builder: str, **info: str) -> list[str]:
    """The captions that training would see; bad samples are left out, and named."""
    section = {"builder": builder, "build_info": info}
    config = bind(DatasetConfig, section, section="datasets.mine", source="a.yaml")
    dataset = builder_of("mine", config).build("train")
    dataset.text_processor = str  # shards have one: without it captions stay as they are
    samples = [outcome(sample.load) for sample in dataset.quick_samples()]
    assert all(error == "" or "/mine." in error for _, error in samples)
    return [sample["answer"] for sample, error in samples if not error]


def test_annotation_files_are_read_as_written_or_refused_by_name(random_cases, images, tmp_path):
    for name, chance in random_cases(450):
        suffix, records, text = annotations(chance)
        content = text.encode(chance.choice(JSON_ENCODINGS if suffix.startswith(".json") else ENCODINGS))
        file = tmp_path / f"mine{suffix}"
        read = partial(answers, "image_caption_json", ann_path=str(file), image_path=str(images))
        file.write_bytes(content)
        found, error = outcome(read)
        if error:  # a TSV may hold text that looks quoted
            assert re.fullmatch(rf"{tmp_path}/mine\.tsv: line \d+: .*", error), name
        else:
            assert found == [record["caption"] for record in records], name
        content = damaged(content, chance)
        file.write_bytes(content)
        found, error = outcome(read)
        assert not error or str(file) in error, (name, error)
        for answer in found or ():
            assert stands_in(answer, content), (name, answer)
            assert len(set(re.findall(r"<\d>", answer))) <= 1, (name, answer)  # no row took another in


def test_shards_are_read_as_written_or_refused_by_name(random_cases, tmp_path):
    file, picture = tmp_path / "mine.tar", io.BytesIO()
    Image.new("RGB", (2, 2)).save(picture, "PNG")
    for name, chance in random_cases(250):
        good = []
        with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(chance.randint(1, 3)):
                text, kind = caption(number, chance, INSIDE_QUOTES), chance.choice(["txt", "json"])
                body = (text if kind == "txt" else json.dumps({"caption": text})).encode(chance.choice(ENCODINGS))
                if chance.random() < 0.3:
                    body = damaged(body, chance)
                else:
                    good.append(text)
                for member, content in ((f"{number}.png", picture.getvalue()), (f"{number}.{kind}", body)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        assert set(good) <= set(answers("image_caption_shards", storage=str(file))), name
        content = damaged(file.read_bytes(), chance)
        file.write_bytes(content)
        for answer in answers("image_caption_shards", storage=str(file)):
            assert stands_in(answer, content), (name, answer)


INSTANCES = """{"categories": [{"id": 1, "name": "dog"}], "images": [{"id": 1, "file_name": "a.jpg"}],
"annotations": [{"image_id": 1, "category_id": 1}]}"""
KARPATHY = '{"images": [{"filename": "a.jpg", "split": "test", "cocoid": 1, "sentences": [{"raw": "a"}]}]}'
QUESTION = '{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes", "object": "dog"}'
single, joined = partial(read_references, mode="separate"), partial(read_references, mode="joined")
listed = partial(find_images, folder=None, limit=None, seed=0)
READERS = {
    "references.json": (single, '[{"image_id": 1, "caption": ["a", "b"]}]'),
    "karpathy.json": (joined, KARPATHY),
    "results.json": (read_results, '[{"image_id": 1, "caption": "a"}, {"image": "b.jpg", "caption": "b"}]'),
    "flickr.csv": (single, 'raw,split,filename\n"[""a"", ""b""]",test,1.jpg\n'),
    "kaggle.csv": (joined, "image_name| comment_number| comment\n1.jpg| 0| a\n1.jpg| 4   b\n"),
    "prompts.txt": (lambda file: read_prompts(str(file), "[{}]"), "<Img><ImageHere></Img> What?\n"),
    "list.txt": (listed, "a.jpg\nb/c.png\n"),
    "list.json": (listed, '["a.jpg", {"image_id": "b"}]'),
    "objects.txt": (read_synonyms, "dog: puppy\n- dog house\n"),
    "truth.json": (read_truth, '{"1": ["dog"], "2": {"objects": ["cat"], "file": "2.jpg"}}'),
    "instances.json": (read_truth, INSTANCES),
    "questions.jsonl": (read_object_questions, f"{QUESTION}\n"),
}


@pytest.mark.parametrize("name", READERS)
def test_lists_and_truths_are_read_or_refused_by_name(name, random_cases, tmp_path):
    read, text = READERS[name]
    for case, chance in random_cases(120):
        file = Path(tmp_path, name)
        file.write_bytes(damaged(text.encode(chance.choice(ENCODINGS)), chance))
        _, error = outcome(partial(read, file))
        assert not error or name in error, (case, error)
