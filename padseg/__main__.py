"""`python -m padseg`, and the command `padseg`."""

from __future__ import annotations

import gc


def start() -> int:
    """Run the command that the arguments of this process name; its exit code."""
    try:
        from padseg.system.streams import close_stdout, open_streams

        open_streams()
        from padseg.commands import main

        code = close_stdout(main())
        gc.freeze()  # or the end of the process would search all that was imported for garbage
        return code
    except KeyboardInterrupt:  # while libraries were imported
        return 130


if __name__ == '__main__':
    raise SystemExit(start())
