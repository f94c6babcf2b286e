"""Command ``qstar``: the application, its help, and the errors that end it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import QStarError
from . import decode, evaluate, listings, serve, train
from .console import err, fail, out, replace_unprintable

__all__ = ["app", "main"]

app = typer.Typer(
    name="qstar",
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""
[bold]Q* = Q-learning + A*, for language-model decoding.[/bold]

A frozen language model proposes tokens. A reward says how good a finished text is. A learned Q estimates how good the
text will be after each token. A* searches with it for the text y that maximises

    J(y) = α · log π(y) + r(y)      weighted fluency (nats) plus reward.

Every search reports two bounds: LB, the best J found, and UB, which no text in the searched tree can exceed. When they
meet, the text is certified to be the best.

[bold]Examples[/bold]

  qstar demo                                        decoders side by side on held-out prompts

  qstar decode "The movie was"                      search with the shipped Q, 200 LM tokens

  qstar decode "The movie was" --decoder beam       the same budget for a beam search

  qstar decode "The movie was" --n 3 --json         the three best texts, for a script

  qstar train review --seed 0 --out runs/my-q       train a Q (about 10 minutes on 2 cores)

  qstar decode "The movie was" --q runs/my-q        search with it

  qstar decode --input prompts.jsonl --out results.jsonl --ray local

  qstar evaluate toy && qstar plot objective runs/evaluation/toy

[bold]For scripts[/bold]

With --json, standard output is one JSON object and nothing else. Notes and progress go to standard error.
'-' in place of a prompt or a file reads standard input. Exit codes: 0 all went well; 1 doctor found something broken,
or some lines of an input failed; 2 a mistake in the call, told in one line; 130 interrupted.
""",
)


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Print the version, or the help where no command is given."""
    if version:
        out.print(f"qstar-decoding {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


# In the order of the help.
for _command in (
    decode.decode,
    train.train,
    train.train_reward,
    decode.demo,
    evaluate.evaluate,
    evaluate.plot,
    serve.explore,
    serve.serve,
    listings.tasks,
    listings.decoders,
    listings.models,
    listings.doctor,
):
    app.command(_command.__name__.replace("_", "-"))(_command)


def main() -> None:
    """Run the command. A mistake of the user's is told in one line on standard error, with exit code 2."""
    replace_unprintable()
    try:
        code = app(prog_name="qstar", standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into this code and says nothing
            err.print("interrupted")
        sys.exit(code)
    except typer.TyperException as error:  # an unknown option, a missing argument, a number out of range
        context = getattr(error, "ctx", None)
        fail(f"{error.format_message().rstrip('.')}. See {context.command_path if context else 'qstar'} --help.")
    except QStarError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except (KeyboardInterrupt, typer.Abort):  # outside of a command, or at the end of standard input
        err.print("interrupted")
        sys.exit(130)
