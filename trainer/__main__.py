"""The command `trainer`, also as `python -m trainer`."""

import os
import signal


def main() -> None:
    """Runs the command line."""
    # Control-C while Python still starts ends the process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The first file that is opened takes the number of a stdin, stdout or stderr that was closed,
    # and the processes we start would write into it.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    from trainer import cli

    cli.main()


if __name__ == "__main__":
    main()
