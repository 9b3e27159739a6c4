"""A prompt as a person sees what was kept of it: plain text with the gaps marked, and HTML."""

# S tokens of a prompt

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

GAP = "[...]"

STYLE = "mark.kept { background:#cdeee2; color:inherit } .dropped { color:#a8b0b8 }"
"""What the HTML needs in a page's style sheet."""


def pieces(ids: Sequence[int], kept: Collection[int], tokenizer: Any) -> Iterator[tuple[bool, str, int]]:
    """Runs of kept and of dropped tokens.

    Args:
        ids: the prompt.
        kept: indices of the tokens that were kept.
        tokenizer: of the prompt.

    Yields:
        whether the run was kept, its text, its tokens.
    """
    chosen = set(kept)
    for own, run in groupby(range(len(ids)), key=chosen.__contains__):
        tokens = [ids[at] for at in run]
        yield own, tokenizer.decode(tokens), len(tokens)


def marked_text(ids: Sequence[int], kept: Collection[int], tokenizer: Any) -> str:
    """What was kept, with `[...]` and the number of dropped tokens in its place: "The code [...12] is 48213."."""
    parts = []
    for own, text, count in pieces(ids, kept, tokenizer):
        parts.append(text if own else f" {GAP[:-1]}{count}] ")
    return "".join(parts)


def marked_html(ids: Sequence[int], kept: Collection[int], tokenizer: Any) -> str:
    """The whole prompt, what was kept marked; one <pre> element, for a page with `STYLE`."""
    parts = []
    for own, text, count in pieces(ids, kept, tokenizer):
        tag, what = ("mark", "kept") if own else ("span", "dropped")
        title = f"{count} token{'s' if count != 1 else ''} {what}"
        parts.append(f"<{tag} class='{what}' title='{title}'>{escape(text)}</{tag}>")
    return f"<pre class='prompt'>{''.join(parts)}</pre>"
