"""The tables and figures of the paper: a script for each of them."""
