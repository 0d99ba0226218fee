"""The Hugging Face Hub: `client` and `sending` speak with it, `push` and `pull` move a checkpoint.

`push_queue` knows what is owed, `worker` is the process that pushes it, `uploader` the training process's side of that.
"""
