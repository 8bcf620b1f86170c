"""Types of command line arguments that several commands take."""

import argparse
import os


def place(text: str) -> str:
    """A path, ~ expanded. An empty one, such as of a shell variable that is not set, would be the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it names no file or directory")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"there is no such user: {text[:80]}; a name that begins with ~ is ./~...")
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # Whether it must be there is the command's to say.
    except OSError as error:  # A name that is too long, links in a circle.
        raise argparse.ArgumentTypeError(f"{error.strerror}: {text[:80]}") from error
    return path
