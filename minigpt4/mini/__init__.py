"""The mini world: drawn scenes, small frozen parts and a small LLM, so that the whole method runs on a laptop.

Everything here makes files in the formats of the real thing; training and evaluation are the project's own.
"""
