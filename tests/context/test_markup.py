"""What a person sees of a prompt that was cut down."""

from __future__ import annotations

import re
from html import unescape

from drafttrain.context.markup import marked_html, marked_text
from tests.conftest import build_tokenizer


def test_kept_text_is_shown_and_gaps_are_counted():
    tokenizer = build_tokenizer()
    ids = tokenizer("The word is apple. <b>What</b> is the word?")["input_ids"]
    kept = [*range(3), *range(len(ids) - 4, len(ids))]
    shown = marked_text(ids, kept, tokenizer)
    head, tail = re.split(r" \[\.\.\.\d+\] ", shown)
    assert head == tokenizer.decode(ids[:3]) and tail == tokenizer.decode(ids[-4:])
    assert f"[...{len(ids) - 7}]" in shown
    assert marked_text(ids, range(len(ids)), tokenizer) == tokenizer.decode(ids)


def test_the_page_holds_the_whole_prompt_and_no_markup_of_its_own():
    tokenizer = build_tokenizer()
    text = "The word is apple. <b>What</b> & why?"
    ids = tokenizer(text)["input_ids"]
    page = marked_html(ids, range(0, len(ids), 2), tokenizer)
    assert "<b>" not in page
    assert unescape(re.sub(r"<[^>]+>", "", page)) == text
    assert page.count("<mark") == -(-len(ids) // 2)
