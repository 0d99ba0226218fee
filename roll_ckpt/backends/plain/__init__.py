"""State dictionaries of a script that uses no framework: one file for each rank, under the same commit.

The public module `roll_ckpt.state` imports `saver`; nobody else does.
"""
