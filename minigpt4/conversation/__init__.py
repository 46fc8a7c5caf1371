"""What is said to the LLM: conversation templates, and the cleaning of its answers.

Imports neither torch nor transformers; `conversation.conversation`, the published module, does.
"""

from minigpt4.conversation.decoding import clean_answer, clean_generated
from minigpt4.conversation.templates import (
    IMAGE_MESSAGE,
    IMAGE_PLACEHOLDER,
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    Conversation,
    SeparatorStyle,
    get_template,
    prompt_template_from_tokenizer,
)
