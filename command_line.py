"""What the scripts' command lines share: numbers, places to write to, and what to record of the arguments."""

import argparse
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def positive_int(text: str) -> int:
    """An argparse type: a whole number, 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more; got {text!r}")
    return number


def require_writable(arguments: argparse.Namespace) -> None:
    """Makes the folders of --json and --plot. Raises ValueError where nothing can be written there."""
    if arguments.json and arguments.json.is_dir():
        raise ValueError(f"--json {arguments.json} is a folder: expected the name of a file")
    places = {"--json": (arguments.json, arguments.json and arguments.json.parent), "--plot": (arguments.plot,) * 2}
    for option, (path, folder) in places.items():
        if path is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"{option} {path} cannot be written: {error.strerror}") from None


def recorded(arguments: argparse.Namespace) -> dict:
    """Every argument; a path inside the repository from its root, of one outside only the name: no machine shows."""

    def plain(value: object) -> object:
        if not isinstance(value, Path):
            return value
        if not value.is_absolute():
            return value.as_posix()
        inside = value.resolve().is_relative_to(ROOT)
        return value.resolve().relative_to(ROOT).as_posix() if inside else value.name

    return {name: plain(value) for name, value in vars(arguments).items()}
