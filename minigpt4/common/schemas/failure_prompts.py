"""Schema of the YAML section `run.failure_prompts:`, what a measurement of the failure rate asks."""

from dataclasses import dataclass


@dataclass
class FailurePrompts:
    """One prompt a task, with one `<ImageHere>`, put into `model.prompt_template`."""

    detail: str = "<Img><ImageHere></Img> Describe this image in detail."
    """Asks for prose."""

    poem: str = "<Img><ImageHere></Img> Write a poem about this image."
    """Asks for verse."""
