"""``python -m jetflow_cluster`` and the ``jetflow`` command."""

from __future__ import annotations


def main() -> None:
    """Runs the command line."""
    from jetflow_cluster.cli import app

    app(prog_name="jetflow")


if __name__ == "__main__":
    main()
