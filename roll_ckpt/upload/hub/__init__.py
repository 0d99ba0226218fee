"""The Hugging Face Hub: `push` and `pull` move one checkpoint, `client`, `push_client` and `sending` make the requests.

`push_queue` records what is owed, `worker` is the process that pushes it, `uploader` the training process's side of
it, `destination` what the pipeline uses. Only `worker` and the command line import `push`.
"""
