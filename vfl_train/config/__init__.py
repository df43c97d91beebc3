"""The settings of every command, one frozen dataclass each.

A field is the option `--its-name` of the command line and the key `its_name` of a recipe; its help text is
what --help shows. Rules between fields stand in `check`. Nothing here imports torch.
"""

from __future__ import annotations

from vfl_train.config.inputs import DataConfig, ProbesConfig
from vfl_train.config.measuring import EvalConfig, KnockoutConfig, ProfileConfig
from vfl_train.config.projects import DemoConfig, RunConfig
from vfl_train.config.publishing import (
    MIGRATIONS,
    TARGETS,
    ExportConfig,
    MergeConfig,
    MigrateConfig,
    VerifyConfig,
)
from vfl_train.config.training import (
    ABLATIONS,
    ATTENTIONS,
    BUCKET_RULES,
    CONTROLS,
    EMITS,
    METHODS,
    OVERLONG,
    PARTS,
    SCHEDULERS,
    SELECT_EMITS,
    LoraConfig,
    PlanConfig,
    SelectConfig,
)
from vfl_train.options import Config

__all__ = [
    "ABLATIONS",
    "ATTENTIONS",
    "BUCKET_RULES",
    "COMMANDS",
    "CONTROLS",
    "EMITS",
    "METHODS",
    "MIGRATIONS",
    "OVERLONG",
    "PARTS",
    "SCHEDULERS",
    "SELECT_EMITS",
    "TARGETS",
    "DataConfig",
    "DemoConfig",
    "EvalConfig",
    "ExportConfig",
    "KnockoutConfig",
    "LoraConfig",
    "MergeConfig",
    "MigrateConfig",
    "PlanConfig",
    "ProbesConfig",
    "ProfileConfig",
    "RunConfig",
    "SelectConfig",
    "VerifyConfig",
]

# Commands that read a recipe, with the settings its section of that name may hold.
COMMANDS: dict[str, type[Config]] = {
    "profile": ProfileConfig,
    "probes": ProbesConfig,
    "select": SelectConfig,
    "lora": LoraConfig,
    "eval": EvalConfig,
    "knockout": KnockoutConfig,
    "merge": MergeConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
    "migrate": MigrateConfig,
    "plan": PlanConfig,
    "data": DataConfig,
}
