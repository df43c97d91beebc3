"""Cases that end their process, or would leave threads behind, in children that cost no imports.

`nursery` starts a process that has imported everything and trained nothing; a case that runs there calls
`forked` for each of its runs. (A fork after the first backward could hang in autograd's threads.)
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["resume_cases", "resume_faults", "vfl_train.training.run", "vfl_train.training.trainer"]


def forked(case: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """Run `case(*arguments)` in a fork of this process. Returns its exit code (negative: the signal that
    ended it) and what it returned, as JSON; an exception is exit code 1 and its traceback."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            answer, code = case(*arguments), 0
        except SystemExit as e:
            answer, code = None, e.code if isinstance(e.code, int) else 1
        except BaseException:
            answer = traceback.format_exc()
        finally:
            with os.fdopen(writer, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(text) if text else None


def raise_young(tiny: Path) -> None:
    """Make runs of this process and its forks cheap: the model is loaded once, what comes after training and
    has its own tests is left out."""
    import deepspeed  # noqa: F401  (accelerate imports it in every trainer)

    import vfl_train.hub.samples
    import vfl_train.report.training
    from vfl_train.models import VisionLanguageModel

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # a child of a fork server has its method
    vlm = VisionLanguageModel.load(str(tiny / "base"), device="cpu")
    VisionLanguageModel.load = lambda *a, **k: vlm  # type: ignore[method-assign]
    vfl_train.hub.samples.make_reference = lambda *a, **k: {}
    vfl_train.report.training.training_png = lambda *a, **k: b""
    gc.collect()
    gc.freeze()  # a collection costs half a second otherwise, and a run makes one


def _serve(case: Callable[..., Any], tiny: Path, arguments: tuple[Any, ...], answer: Any) -> None:
    try:
        raise_young(tiny)
        answer.send((True, case(tiny, *arguments)))
    except BaseException:
        answer.send((False, traceback.format_exc()))


def nursery(case: Callable[..., Any], tiny: Path, *arguments: Any, timeout: float = 600) -> Any:
    """Run `case(tiny, *arguments)` in a process that has imported everything and trained nothing, from which
    it may call `forked`. Returns what it returned; raises AssertionError with its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(case, tiny, arguments, writer))
    process.start()
    writer.close()
    try:
        assert reader.poll(timeout), f"no answer in {timeout} s"
        good, value = reader.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"{case.__name__} died with exit code {process.exitcode}") from None
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
    assert good, value
    return value
