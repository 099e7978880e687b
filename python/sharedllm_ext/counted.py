"""Counts in messages: ``1 chunk``, ``2 chunks``."""


def counted(number: int, noun: str, form: str = "") -> str:
    """A number and a noun, which is singular for 1 alone.

    Args:
        number: how many.
        noun: in the singular; its plural is regular ("query" makes "queries", "index" "indexes").
        form: of the number, as in :func:`format`; ``","`` groups its digits.
    """
    if number == 1:
        plural = noun
    elif noun.endswith(("s", "x", "ch", "sh")):
        plural = f"{noun}es"
    elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
        plural = f"{noun[:-1]}ies"
    else:
        plural = f"{noun}s"
    return f"{number:{form}} {plural}"
