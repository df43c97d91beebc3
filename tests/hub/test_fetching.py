"""Which of the caller's errors a failure of the Hub's client becomes."""

from __future__ import annotations

import pytest
from huggingface_hub import errors

from vfl_train.errors import ConfigError, HubError
from vfl_train.hub.fetching import fetching

MISSING, REVISION, ENTRY = ConfigError("no repo"), ConfigError("no revision"), ConfigError("no file")
UNREACHABLE = HubError("no connection")


def answered(kind: type[errors.HfHubHTTPError], text: str = "first line\nsecond") -> Exception:
    """An error as the client raises it for an answer of the Hub."""
    import httpx2

    return kind(text, response=httpx2.Response(404, request=httpx2.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (errors.HFValidationError("a name of three/parts/x"), MISSING),
        (answered(errors.RepositoryNotFoundError), MISSING),
        (answered(errors.GatedRepoError), MISSING),
        (answered(errors.RevisionNotFoundError), REVISION),
        (answered(errors.RemoteEntryNotFoundError), ENTRY),
        (errors.LocalEntryNotFoundError("offline"), UNREACHABLE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_failure_is_told_as_the_caller_says_it(failure: Exception, expected: Exception) -> None:
    with (
        pytest.raises(type(expected)) as caught,
        fetching(MISSING, HubError, unreachable=UNREACHABLE, no_revision=REVISION, no_entry=ENTRY),
    ):
        raise failure
    assert caught.value is expected and caught.value.__cause__ is failure


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (answered(errors.RevisionNotFoundError), "first line"),
        (answered(errors.RemoteEntryNotFoundError), "first line"),
        (errors.LocalEntryNotFoundError("offline"), "offline"),
        (errors.HTTPError("timed out"), "timed out"),
        (PermissionError(), "PermissionError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_rest_is_told_with_its_reason_in_one_line(failure: Exception, reason: str) -> None:
    with pytest.raises(HubError) as caught, fetching(MISSING, lambda text: HubError(f"failed: {text}")):
        raise failure
    assert caught.value.message == f"failed: {reason}"


def test_errors_of_our_own_pass() -> None:
    own = ConfigError("too large")
    with pytest.raises(ConfigError) as caught, fetching(MISSING, HubError):
        raise own
    assert caught.value is own
