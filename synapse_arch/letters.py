"""The letters in which byte-level tokenizers' files spell bytes (Radford et al. 2019)."""

from __future__ import annotations


def byte_letters() -> dict[str, int]:
    """The byte behind each letter, 256 in all.

    Printable Latin-1 stands for itself; the others are numbered from U+0100 in their order.

    >>> letters = byte_letters()
    >>> letters["a"], letters["Ġ"], len(letters)
    (97, 32, 256)
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (value for value in range(256) if value not in printable)
    return {chr(value): value for value in printable} | {chr(256 + n): value for n, value in enumerate(others)}
