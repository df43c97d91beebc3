"""How a command is made of its config dataclass: options from the fields, values from flags and recipe."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from vfl_train.cli.main_group import CliState
from vfl_train.config import COMMANDS
from vfl_train.options import C, Config, Spec, coerce, specs
from vfl_train.recipe import PROJECT_FILE, Recipe

_HEADINGS = {"command": "Options", "model": "Model", "training": "Training"}


class FieldType(click.ParamType):
    """Converts an option's text by the rules of its field."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.name = "text" if spec.many else {int: "N", float: "X"}.get(spec.kind, "TEXT")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`value` as the field's type. Raises ConfigError."""
        return coerce(self.spec, value, self.spec.flag)


class ConfigCommand(click.Command):
    """A command whose parameters are the fields of `config_class`."""

    config_class: type[Config]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Arguments, then options under their headings."""
        known = specs(self.config_class)
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *_HEADINGS.values())}
        sections["Arguments"] = [(s.metavar, s.help) for s in known.values() if s.argument]
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                group = known[param.name].group if param.name in known else "command"
                names, text = record
                # `--no-x` is there to undo a recipe's `x: true`; listing it would only add noise.
                sections[_HEADINGS[group]].append((names.split(" / ")[0], text))
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def config_command(
    name: str, config_class: type[C], example: str
) -> Callable[[Callable[[C], None]], ConfigCommand]:
    """Decorator: the function, called with the config of the command line, as the command `name`.

    Its docstring is the help text; `example` stands below the options.
    """

    def decorate(function: Callable[[C], None]) -> ConfigCommand:
        def callback(**_: Any) -> None:
            ctx = click.get_current_context()
            quiet_libraries(ctx.find_object(CliState) or CliState())
            function(config_of(ctx, config_class))

        params: list[click.Parameter] = [_parameter(spec) for spec in specs(config_class).values()]
        if config_class in COMMANDS.values():
            params.append(_CONFIG)
        command = ConfigCommand(
            name,
            params=[*params, DEBUG],
            callback=callback,
            help=function.__doc__,
            epilog="\b\nExample:\n" + "\n".join("  " + line for line in example.strip().splitlines()),
        )
        command.config_class = config_class
        return command

    return decorate


def config_of(ctx: click.Context, config_class: type[C]) -> C:
    """The config that a parsed command line means: flags over the recipe over the defaults.

    Raises ConfigError.
    """
    flags = {
        name: value
        for name, value in ctx.params.items()
        if name in specs(config_class) and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if config_class not in COMMANDS.values():
        return config_class.bind(flags)
    return Recipe.find(ctx.params["config"]).config(config_class, flags)


def _parameter(spec: Spec) -> click.Parameter:
    if spec.argument:
        # Not required for click: a recipe may give it, and `Config.bind` asks for it otherwise.
        return click.Argument(
            [spec.name],
            type=str if spec.many else FieldType(spec),
            required=False,
            metavar=spec.metavar,
            nargs=-1 if spec.many else 1,
        )
    if spec.kind is bool:
        return click.Option(
            [f"{spec.flag}/--no-{spec.flag[2:]}", spec.name], default=None, help=_help(spec), is_flag=True
        )
    metavar = "|".join(spec.choices) or spec.metavar or None
    return click.Option([spec.flag, spec.name], type=FieldType(spec), metavar=metavar, help=_help(spec))


def _help(spec: Spec) -> str:
    if spec.required:
        return f"{spec.help} [required]"
    if spec.default is None or spec.default is False or spec.default == ():
        return spec.help
    return f"{spec.help} [{spec.default}]"


def _remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    state = ctx.find_object(CliState)
    if state is not None:
        state.debug = state.debug or value  # before or after the command's name


DEBUG = click.Option(
    ["--debug"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show tracebacks and the messages of the libraries underneath.",
)
_CONFIG = click.Option(
    ["--config"], metavar="RECIPE", help=f"YAML file with defaults for these options. [./{PROJECT_FILE}]"
)


def quiet_libraries(state: CliState) -> None:
    """Settings of the libraries a command will import; what the user set in the environment stays."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning after a fork says nothing here
    # Not importable here: bitsandbytes (when PEFT imports it) and transformers would fetch code with it.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    if state.debug:
        logging.getLogger("vfl_train").setLevel(logging.DEBUG)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it names kernels nobody asked for
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # ours go through logging
