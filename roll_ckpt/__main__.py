"""python -m roll_ckpt: the command line where the script roll-ckpt is not on PATH."""

import sys

from roll_ckpt.cli.main import main

sys.exit(main())
