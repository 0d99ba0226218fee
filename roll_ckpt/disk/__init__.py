"""Python's half of the seam to the disk: nothing else in roll_ckpt, but csrc/file, touches a file.

`writes` changes the disk, `reads` opens files, `tree` looks at names and sizes, `locks` holds record locks. Tests watch
and stop them through `failpoints`. Every room above imports these modules.
"""
