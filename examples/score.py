"""Score three pairs with the built-in judge, in ten lines."""

from adajudge import Scorer
from adajudge.data import read_rows

scorer = Scorer.from_pretrained()  # a folder's name here for a judge of your own
for result in scorer.score(list(read_rows("examples/pairs.jsonl"))[10:13]):
    chosen, rejected = result.scores
    print(
        f"{result.row.id}: margin {result.margin:+.2f}, view weights {[round(w, 2) for w in chosen.view_weights]}"
    )
    print(f"  chosen   {chosen.reward:+.2f}  {result.row.chosen}")
    print(f"  rejected {rejected.reward:+.2f}  {result.row.rejected}")
