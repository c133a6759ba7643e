"""``python -m exitlm``: the command line, for those who have not installed the ``exitlm`` command (torchrun too)."""

from exitlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
