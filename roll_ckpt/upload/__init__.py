"""Where committed checkpoints are sent: `destination` is what the pipeline asks of a destination.

`file_system` copies to a directory, `hub/` pushes to the Hugging Face Hub. The pipeline and the command line import these.
"""
