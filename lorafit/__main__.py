"""`python -m lorafit`, and the `lorafit` command."""

import sys


def main() -> None:
    """Run the command line and exit."""
    from lorafit.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
