"""The terminal: where text goes, and how errors read."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from jetflow_cluster.env import Environment
from jetflow_cluster.types import InvalidRequestError

REQUEST_ERROR, FAILURE, INTERRUPTED = 2, 1, 130

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, soft_wrap=True)


class Commands(TyperGroup):
    """Turns errors into one line each: exit code 2 for a request that cannot be honoured, 1 for any other."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except InvalidRequestError as error:
            _fail(error, REQUEST_ERROR)
        except KeyboardInterrupt:
            stderr.print("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            _fail(error, FAILURE)


def _fail(error: Exception, code: int) -> NoReturn:
    if logging.getLogger("jetflow_cluster").isEnabledFor(logging.DEBUG):
        stderr.print_exception()
    message = str(error) or type(error).__name__
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    stderr.print(f"[bold red]error:[/bold red] {escape(message + cause)}")
    raise typer.Exit(code) from error


def print_json(value: Any) -> None:
    """One object on standard output, as JSON that any reader takes: other encodings than UTF-8 get ASCII."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    typer.echo(json.dumps(value, ensure_ascii=not is_utf8))


def apply_environment(environment: Environment) -> None:
    """Sets the log level, and the CPU threads of torch where the environment names them.

    Characters that the encoding of an output lacks are escaped there, and end nothing.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("jetflow_cluster").setLevel(environment.log_level.upper())
    if environment.num_threads is not None:
        import torch

        torch.set_num_threads(environment.num_threads)
