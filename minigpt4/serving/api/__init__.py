"""An OpenAI-compatible API: chat completions over an `Engine`."""
