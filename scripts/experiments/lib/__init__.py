"""What several experiments share, and what of them is tested; no part of the installed package."""
