"""Figure 8: reverse KL while the student learns, with all three strategies, and without each.

The paper:      it always falls, though the answers degenerate without length normalisation or
                without the mixture. A low reverse KL alone is not success.
Both worlds:    the runs of Table 4. Their log.jsonl is drawn as means over 32 updates.
Run:            python -m reproduce.fig8
"""

from reproduce.table4 import commands
from reproduce.worlds import run

if __name__ == "__main__":
    run(commands, "fig8")
