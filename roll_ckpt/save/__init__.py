"""One rank's side of a save: agree to begin, stage, write, vote, and wait for the outcome.

`begin` starts a save, `save` and `cluster_save` are its parts, `pending` holds all that have not ended, `claims` the
claimed output directories, `arena` the staging memory. Imported by `backends`, `pipeline` and `upload`.
"""
