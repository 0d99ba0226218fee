"""How fast a state moves to disk and back, and what training loses by it: ours and the peers, in one run."""
