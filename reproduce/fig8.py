"""Figure 8: reverse KL while the student learns, with each strategy removed: it falls in all of them.

The paper:      it falls although what is said degenerates without length normalisation or the mixture: a low reverse KL
                is no success.
The tiny world, --world=paper: the runs of Table 4, their log.jsonl drawn as means over 32 updates.
Run:            python reproduce/fig8.py
"""

from table4 import commands
from worlds import run

if __name__ == "__main__":
    run(commands, "fig8")
