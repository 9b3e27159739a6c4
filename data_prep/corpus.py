"""The reference corpus: the running interpreter's own standard library, split once into train and held-out modules.

It is real text that is present wherever Python is, so the whole chain runs without a download. Modules are split by a
hash of their name, which keeps a module on its side whatever the Python version. Tests are left out (many
distributions do not ship them); data tables such as encodings are kept with a small weight.

    python data_prep/corpus.py --config recipes/reference/target.yaml --run runs/target
"""

import hashlib
import os
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drafttrain.errors import UserError, run_program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
_TABLES = ("pydoc_data/", "encodings/", "html/entities", "keyword", "opcode", "stringprep")
_HELD_OUT_PERCENT = 10
_TRIES = 500  # places to begin a prefix at; of the lengths that some modules have, a few do


@dataclass(frozen=True)
class Module:
    """One source file: its path below the library's root, its text, and whether it is mostly a table of data."""

    name: str
    text: str
    table: bool

    @property
    def held_out(self) -> bool:
        """Whether the module is never trained on: a stable tenth of all names."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < _HELD_OUT_PERCENT


@lru_cache(maxsize=1)
def modules() -> tuple[Module, ...]:
    """Every readable module of the standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in _SKIPPED or part.startswith("_sysconfigdata") for part in Path(name).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            found.append(Module(name, text, name.startswith(_TABLES)))
    return tuple(found)


def train_modules() -> list[Module]:
    """Modules that models may be trained on."""
    return [module for module in modules() if not module.held_out]


def held_out_modules() -> list[Module]:
    """Modules reserved for evaluation, data tables left out."""
    return [module for module in modules() if module.held_out and not module.table]


def code_prefix(seed: int, tokens: int, tokenizer: "PreTrainedTokenizerFast", held_out: bool) -> list[int]:
    """A stretch of library code to continue: token ids, BOS first, starting at a line break of a random module.

    Args:
        seed: chooses module and place; the result is a pure function of the arguments and the Python version.
        tokens: length of the result, BOS included.
        tokenizer: the target's.
        held_out: draw from the modules that no model was trained on.

    Raises:
        UserError: no module is so long.
    """
    draw = random.Random(f"code/{held_out}/{seed}")
    pool = [module for module in (held_out_modules() if held_out else train_modules()) if not module.table]
    for _ in range(_TRIES):
        module = draw.choices(pool, weights=[len(module.text) for module in pool])[0]
        lines = module.text.splitlines(keepends=True)
        text = "".join(lines[draw.randrange(len(lines)) :])[: 12 * tokens]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: tokens - 1]
        if len(ids) == tokens - 1:
            return [tokenizer.bos_token_id, *ids]
    raise UserError(f"no module of the standard library gives {tokens} tokens of code; lower prompts.length.")


def _task_texts(documents: int, seed: int) -> Iterator[str]:
    """Text of every task kind, for the tokenizer to learn the words of the procedural tasks."""
    from drafttrain.evaluation.tasks import KINDS, generate

    for number in range(documents):
        kind = list(KINDS)[number % len(KINDS)]
        for turn in generate(kind, seed + number, 300, _count_words).turns:
            yield turn.user
            yield turn.answer


def _count_words(text: str) -> int:
    return len(text.split())


def write_corpus(
    folder: Path, vocab_size: int, task_documents: int, table_weight: float, seed: int, of: str | None = None
) -> None:
    """Train the tokenizer, or take that of the model `of`, and write both sides of the corpus as token ids.

    Leaves in `folder`: `tokenizer/`, and `train.npy` and `held_out.npy` (uint16 token ids, each module led by BOS and
    closed by EOS). Data tables enter the training side with probability `table_weight`. The folder appears whole or
    not at all.
    """
    import numpy as np

    from data_prep.tokenizer import train_tokenizer
    from drafttrain.models.loading import load_tokenizer

    draw = random.Random(f"corpus/{seed}")
    train = [module.text for module in train_modules() if not module.table or draw.random() < table_weight]
    if of is None:
        tokenizer = train_tokenizer([*train, *_task_texts(task_documents, seed)], vocab_size)
    else:
        tokenizer = load_tokenizer(of)
    unfinished = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer.save_pretrained(unfinished / "tokenizer")
    for name, texts in {"train": train, "held_out": [module.text for module in held_out_modules()]}.items():
        np.save(unfinished / f"{name}.npy", np.array(_token_ids(tokenizer, texts), dtype=np.uint16))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def _token_ids(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> list[int]:
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [token for row in rows for token in (tokenizer.bos_token_id, *row, tokenizer.eos_token_id)]


@run_program
def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    from drafttrain.config import parse
    from drafttrain.distributed import is_main
    from drafttrain.run_folder import RunFolder

    parsed = parse(__doc__, ("corpus",), argv)
    if not is_main():  # a launcher started several; the work is one process's
        return
    settings = parsed.recipe.corpus
    folder = RunFolder(parsed.run)
    if parsed.plan:
        print(f"would write tokenizer and token ids of {len(modules())} modules to {folder.path / 'corpus'}")
        return
    folder.record(parsed, "data_prep/corpus.py")
    write_corpus(
        folder.path / "corpus",
        settings.vocab_size,
        settings.task_documents,
        settings.data_table_weight,
        settings.seed,
        settings.tokenizer,
    )
    print(f"corpus and tokenizer are in {folder.path / 'corpus'}")


if __name__ == "__main__":
    main()
