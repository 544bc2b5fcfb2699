"""`python -m merge`: the programs of the package; without the name of one, the merge itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from merge.cli import COMMANDS
from merge.cli import main as merge_main


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program that the first word names, else a merge with the words as its options."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in COMMANDS or words[0] == "ties":
        return merge_main(words[1:] if words[:1] == ["ties"] else words, prog="python -m merge")
    return int(importlib.import_module(f"merge.{words[0]}").main(words[1:]))


if __name__ == "__main__":
    sys.exit(main())
