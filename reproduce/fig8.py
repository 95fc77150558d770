"""Figure 8: reverse KL while the student learns, with all three strategies and without each of them.

The paper:      it always falls, though without length normalisation or the mixture the answers degenerate: a low
                reverse KL alone is no success.
Both worlds:    the runs of Table 4, their log.jsonl drawn as means over 32 updates.
Run:            python reproduce/fig8.py
"""

from table4 import commands
from worlds import run

if __name__ == "__main__":
    run(commands, "fig8")
