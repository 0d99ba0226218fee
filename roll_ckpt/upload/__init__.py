"""Where committed checkpoints are sent: `destination` is the interface, `file_system` and `hub/` implement it.

`file_system` copies to a directory, `hub/` pushes to the Hugging Face Hub, and `after_commit` sends and prunes after
each commit. The pipeline, the backends and the command line import these.
"""
