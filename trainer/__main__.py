"""The command `trainer`, also as `python -m trainer`."""

import signal


def main() -> None:
    """Runs the command line."""
    # Control-C while Python still starts ends the process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from trainer import cli

    cli.main()


if __name__ == "__main__":
    main()
