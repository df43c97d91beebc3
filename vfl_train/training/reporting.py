"""`--report-to`: experiment trackers, by transformers' own callbacks. train_log.jsonl is written anyway."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vfl_train.errors import ConfigError
from vfl_train.options import unknown_key

TENSORBOARD = "tensorboard"
# Where the module's name and pip's are not the tracker's own.
_MODULES = {"azure_ml": "azureml", "flyte": "flytekit", "neptune": "neptune_scale", "kubeflow": "kubeflow"}
_PIP = {"azure_ml": "azureml-mlflow", "neptune": "neptune-scale"}


def trackers(report_to: str) -> list[str]:
    """The trackers that `report_to` names: `none`, a name, or several with commas.

    Raises:
        ConfigError: a name nobody knows, or a tracker that is not installed, with the pip command for it.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_key(name, INTEGRATION_TO_CALLBACK, "tracker of --report-to")
        if importlib.util.find_spec(_MODULES.get(name, name)) is None:
            raise ConfigError(
                f"--report-to {name} needs the package {name}", f"pip install {_PIP.get(name, name)}"
            )
    return names


def tensorboard(folder: Path) -> Any:
    """transformers' TensorBoard callback, writing to `folder` of the run instead of beside a checkpoint."""
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = callback.logging_dir or str(folder)  # TENSORBOARD_LOGGING_DIR names another one
    return callback
