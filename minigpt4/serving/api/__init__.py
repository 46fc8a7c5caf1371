"""An API in the words of OpenAI's: chat completions over an `Engine`, for programs."""
