"""How much of people's captions a description covers, by a judge: the two published protocols.

    captions   for each of an image's five captions, whether the description covers it; the score is the mean number of
               covered captions, 0 to 5 (the paper's Table 2, its appendix A.3)
    objects    whether the description covers all objects and relations of one caption, the first; the score is the
               share of such images (earlier versions of the paper)

The words of the published prompts are not used; these are our own, and stand in the results.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from minigpt4.common.errors import SampleError
from minigpt4.evaluation.bootstrap import ratio_interval, wilson
from minigpt4.evaluation.judge import Judge, Question
from minigpt4.evaluation.yes_no import yes_no, yes_no_lines

Protocol = Literal["captions", "objects"]
MOST_CAPTIONS = 5
SYSTEM = (
    "You compare texts about images. You read carefully and answer in the form that is asked for, and nothing else."
)
PROMPTS: dict[Protocol, str] = {
    "captions": """Here is a description of an image:
<description>
{description}
</description>

And here are captions that people wrote for the same image:
{captions}

Decide for each caption whether the description covers it, that is, whether what the caption says can also be learnt \
from the description. The words may differ, and the description may say more. A caption is not covered if the \
description misses or contradicts an important part of it.

Answer with exactly {count} lines, one for each caption in their order: its number, a full stop, and yes or no.
""",
    "objects": """Here is a description of an image:
<description>
{description}
</description>

And here is a caption that a person wrote for the same image:
<caption>
{captions}
</caption>

Does the description mention all objects of the caption, and all relations between them that the caption tells? The \
words may differ, and the description may say more.

Answer with one word: yes or no.
""",
}


def coverage(
    judge: Judge, descriptions: Mapping[str, str], captions: Mapping[str, Sequence[str]], protocol: Protocol
) -> list[dict[str, Any]]:
    """Ask the judge about every description; one question an image.

    Returns `image_id`, the judge's `answer` as it came, and `covered`, by caption, of each image; None where the answer
    could not be read. SampleError where an image has no captions.
    """
    bare = [image_id for image_id in descriptions if not captions.get(image_id)]
    if bare:
        raise SampleError(f"{len(bare)} images have no captions, such as {bare[0]}")
    most, questions, counts = 1 if protocol == "objects" else MOST_CAPTIONS, [], []
    for image_id, text in descriptions.items():
        lines = [" ".join(caption.split()) for caption in captions[image_id][:most]]
        if protocol == "captions":
            lines = [f"{number}. {caption}" for number, caption in enumerate(lines, start=1)]
        prompt = PROMPTS[protocol].format(description=text.strip(), captions="\n".join(lines), count=len(lines))
        questions.append(Question(prompt, system=SYSTEM))
        counts.append(len(lines))
    judged = []
    for image_id, answer, count in zip(descriptions, judge.ask_all(questions), counts, strict=True):
        covered = yes_no_lines(answer, count)
        if protocol == "objects":
            covered = None if (whole := yes_no(answer)) is None else [whole]
        judged.append({"image_id": image_id, "answer": answer, "covered": covered})
    return judged


def score(judged: Sequence[Mapping[str, Any]], protocol: Protocol) -> dict[str, Any]:
    """The score over the images whose answers could be read, its 95% interval, and which could not.

    The interval is Wilson's for `objects`, and a bootstrap over images for `captions`.
    """
    rows = [one["covered"] for one in judged if one["covered"] is not None]
    counts, interval = [sum(row) for row in rows], None
    if protocol == "captions":
        interval = ratio_interval(counts, [1] * len(counts))
    elif counts:
        interval = wilson(sum(counts), len(counts))
    return {
        "protocol": protocol,
        "score": sum(counts) / len(counts) if counts else None,
        "interval": interval,
        "covered": sum(counts),
        "images": len(rows),
        "images_with_fewer_captions": 0 if protocol == "objects" else sum(len(row) < MOST_CAPTIONS for row in rows),
        "unparsable": [one["image_id"] for one in judged if one["covered"] is None],
    }
