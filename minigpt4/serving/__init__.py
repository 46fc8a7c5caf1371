"""The model behind a web page and an OpenAI-compatible API."""

VLLM_ARCHITECTURE = "MiniGPT4ForConditionalGeneration"


def vllm_plugin() -> None:
    """What vLLM calls when it starts (entry point `vllm.general_plugins`): names the model without importing it."""
    from vllm import ModelRegistry

    if VLLM_ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(VLLM_ARCHITECTURE, f"minigpt4.serving.vllm_model:{VLLM_ARCHITECTURE}")
