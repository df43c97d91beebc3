"""The command line: `vfl-train COMMAND`. One thin module a command: options -> config -> one call."""

from __future__ import annotations

import click

from vfl_train import __version__
from vfl_train.cli import (
    data,
    demo,
    env,
    evaluate,
    export,
    knockout,
    lora,
    merge,
    migrate,
    plan,
    probes,
    profile,
    run,
    select,
    verify,
)
from vfl_train.cli.command import DEBUG
from vfl_train.cli.main_group import MainGroup

__all__ = ["main"]


@click.group(
    cls=MainGroup,
    invoke_without_command=True,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    epilog="\b\nStart here:\n  vfl-train demo          everything once on the bundled model, on a CPU\n"
    "  vfl-train COMMAND -h    what a command does, its options, an example",
)
@click.version_option(__version__, prog_name="vfl-train")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Fine-tune vision-language models on their vision function layers.

    A few decoder layers read each vision function (ocr, count, grounding, ...) out of the image. `profile`
    finds them, `select` picks training data by them, `lora` trains them alone, `eval` shows what was gained
    and what was lost, `merge`, `export` and `verify` ship the result.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


main.params.append(DEBUG)
# In the order in which they are used; --help keeps it.
for command in (
    demo.demo,
    run.run,
    profile.profile,
    probes.probes,
    select.select,
    lora.lora,
    evaluate.evaluate,
    knockout.knockout,
    merge.merge,
    export.export,
    verify.verify,
    migrate.migrate,
    plan.plan,
    data.data,
    env.env,
):
    main.add_command(command)
