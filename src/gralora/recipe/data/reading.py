"""Reading the rows of one or several sources."""

from collections.abc import Sequence

from gralora.recipe.data.formats import RowParser, ignored_note
from gralora.recipe.data.rows import Row, Rows, raise_for
from gralora.recipe.data.sources import read_items


def read_rows(sources: str | Sequence[str], option: str = "data") -> Rows:
    """Read the rows of a file, a dataset or a stream, or of several, one after the other.

    Args:
        sources: Names of sources, as in `read_items`. Each may have a format of its own.
        option: Name of the option that holds them, for messages.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: Rows are bad (the message describes the first few), or a source has none.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise ValueError(f"`{option}` must name at least one source; got none.")
    rows: list[Row] = []
    problems: list[str] = []
    notes: list[str] = []
    for name in names:
        parser = RowParser()
        several = len(names) > 1
        for where, item in read_items(name, option):
            parser.add(f"{where} of {name!r}" if several else where, item)
        if not parser.rows and not parser.problems:
            raise ValueError(f"`{option}` must have at least one row; {name!r} is empty.")
        rows += parser.rows
        problems += parser.problems
        notes += ignored_note(parser.ignored_fields, name if several else None)
    raise_for(problems, names)
    return Rows(tuple(rows), tuple(notes))
