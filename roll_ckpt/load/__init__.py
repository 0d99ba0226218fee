"""Opens, verifies and reads a committed checkpoint, on one rank (`checkpoint`, `reader`) or all (`together`, `newest`).

`compare` refuses another model, `trust` knows what pickles may hold. Imported by `backends`, `pipeline` and `cli`. A
load writes nothing.
"""
