"""Before and beside a run: the plan of its memory and time, and the speed of its parts."""
