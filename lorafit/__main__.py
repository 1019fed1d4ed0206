"""`python -m lorafit`, and the `lorafit` command."""

import sys


def main() -> None:
    """Run the command line and exit."""
    from lorafit.cli import main as run
    from lorafit.machine import wait_briefly

    wait_briefly()
    sys.exit(run())


if __name__ == "__main__":
    main()
