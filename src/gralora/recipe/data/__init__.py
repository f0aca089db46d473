"""Rows for training and scoring: reading them, splitting them, and encoding them as tokens.

`sources` reads items from files, datasets and streams, `formats` turns an item into a `Row`, and `encoding` turns
rows into tokens and labels. Training, scoring and answering use the same functions, so that the model sees the
same tokens at inference as in training.
"""

from gralora.recipe.data.encoding import (
    IGNORED,
    EncodedRows,
    check_prompts,
    encode,
    encode_prompt,
    template_stop_ids,
)
from gralora.recipe.data.formats import parse_rows
from gralora.recipe.data.reading import read_rows
from gralora.recipe.data.rows import Message, Row, Rows
from gralora.recipe.data.splitting import count_repeated, split_rows
from gralora.recipe.data.template import TemplateRefusal

__all__ = [
    "IGNORED",
    "EncodedRows",
    "Message",
    "Row",
    "Rows",
    "TemplateRefusal",
    "check_prompts",
    "count_repeated",
    "encode",
    "encode_prompt",
    "parse_rows",
    "read_rows",
    "split_rows",
    "template_stop_ids",
]
