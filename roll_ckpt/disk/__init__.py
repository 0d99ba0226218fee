"""All access to the disk from Python; nothing else in roll_ckpt touches a file, except csrc/file.

`writes` changes the disk, `reads` opens files, `tree` looks at names and sizes, `locks` holds record locks; `missing`
and `retry` name ways to handle an error. Tests observe and stop operations through `failpoints`. Every room above
imports these modules.
"""
