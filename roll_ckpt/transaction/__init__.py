"""How files that ranks have written become a checkpoint under its name, or nothing; and what lies there afterwards.

No torch from here down: the command line answers at once, and a crash test forks a thousand processes. The rooms above
import any module of it.
"""
