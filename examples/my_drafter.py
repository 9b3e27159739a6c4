r"""A drafter of your own in one file: when the text ends as it did before, propose what followed then (prompt lookup).

    python -c "import drafttrain.testing as t, examples.my_drafter as m; t.check_drafter(lambda engine: m.MyDrafter())"
    PAIR="--target.path checkpoints/reference-target --drafter.path checkpoints/reference-drafter"
    drafttrain evaluate $PAIR --run runs/mine --prompts.mixture '{"revise": 72, "code": 72}' --prompts.length 256 \
        --allow-code --evaluate.methods '["examples.my_drafter.MyDrafter(n=3, k=8)", "Model(drafter, length=4)"]'
    drafttrain lossless $PAIR --run runs/mine_proof --allow-code --method "examples.my_drafter.MyDrafter(n=3, k=8)"
"""

from collections.abc import Sequence

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter
from drafttrain.errors import UserError
from drafttrain.ops.random import Draws


class MyDrafter(Drafter):
    """Copies what followed the latest earlier occurrence of the last n tokens. It keeps nothing between rounds.

    Args:
        n: tokens that must match; fewer propose more often, and worse.
        k: most tokens to copy in a round.
    """

    def __init__(self, n: int = 3, k: int = 8) -> None:
        if n < 1 or k < 1:
            raise UserError(f"MyDrafter's n and k must be at least 1, not {n} and {k}")
        self.name = "copy"
        self.max_length = k
        self.n = n

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: object | None = None,
    ) -> Draft:
        """Copied tokens are deterministic: they declare no distribution, and the target's stays exact."""
        texts = committed.extended(prefix)
        return Draft.of([self._copied(text)[:most] for text, most in zip(texts, budget, strict=True)], self.name)

    def _copied(self, text: list[int]) -> list[int]:
        ending = text[-self.n :]
        for start in range(len(text) - self.n - 1, -1, -1):
            if text[start : start + self.n] == ending:
                return text[start + self.n :][: self.max_length]
        return []
