"""Talking to the Hub: which failures are tried again and for how long, and what is said of the others.

The Hub's client tries uploads again by itself (408, 429, 5xx, broken connections: five times, a minute in
all) but not the calls that create, validate and commit, and it has no timeout and no bound on what a
Retry-After header may ask for. `polite_client` gives it both, `trying` does for those calls what the
client does for uploads. Calls given to `trying` must bear being made twice.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
from huggingface_hub.errors import OfflineModeIsEnabled

from vfl_train.errors import HubError
from vfl_train.hub.privacy import without_secrets

T = TypeVar("T")
ATTEMPTS = 5
FIRST_WAIT, LONGEST_WAIT = 1.0, 8.0  # seconds; doubled each time
LONGEST_RETRY_AFTER = 300  # seconds a server may ask to wait before we give up instead
TIMEOUT = httpx2.Timeout(60.0, connect=15.0)  # seconds without a byte, not of a whole upload
FAILURES = (httpx2.HTTPError, OSError, RuntimeError, ValueError)  # what the client raises
RETRIED = (408, 429, 500, 502, 503, 504)
_ADDRESS = re.compile(r"https?://\S+?(?=[:.,;)'\"]*(?:\s|$))")  # may hold a signature
_AGAIN = "run the same command again: what is there already is not uploaded twice"
log = logging.getLogger(__name__)


@contextmanager
def polite_client() -> Iterator[None]:
    """Inside, the Hub's client has a timeout, says nothing by itself (its messages hold signed addresses),
    and gives up with a HubError where the server asks for a longer wait than LONGEST_RETRY_AFTER."""
    from huggingface_hub import get_session, set_client_factory

    hooks = get_session().event_hooks

    def polite() -> httpx2.Client:
        heeding = {**hooks, "response": [*hooks["response"], _heed]}
        return httpx2.Client(event_hooks=heeding, follow_redirects=True, timeout=TIMEOUT)

    def plain() -> httpx2.Client:
        return httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None)

    library = logging.getLogger("huggingface_hub")
    before = library.level
    set_client_factory(polite)
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        set_client_factory(plain)
        library.setLevel(before)


def _heed(response: httpx2.Response) -> None:
    """Say that a request will be made again; refuse a wait that is too long."""
    if response.status_code not in RETRIED:
        return
    asked = _retry_after(response)
    if asked is not None and asked > LONGEST_RETRY_AFTER:
        raise HubError(
            f"the Hub answers {response.status_code} and asks to wait {asked} seconds", _AGAIN + ", later"
        )
    log.info("the Hub answers %d to %s; trying again", response.status_code, _what(response.request))


def _retry_after(response: Any) -> int | None:
    """Seconds of a Retry-After header (a date is not read: the usual waits hold then)."""
    text = str(response.headers.get("Retry-After", "")).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _what(request: httpx2.Request) -> str:
    return f"{request.method} {request.url.path}"  # without the query, which may hold a signature


def trying(call: Callable[[], T], what: str) -> T:
    """The result of `call`, tried up to ATTEMPTS times while the failure may pass; `what` names it.

    Raises:
        HubError: it did not pass, or cannot.
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except FAILURES as e:
            if attempt == ATTEMPTS or not _may_pass(e):
                raise as_hub_error(e, what) from e
            response = getattr(e, "response", None)
            asked = None if response is None else _retry_after(response)
            log.info("%s: %s; trying again", what, reason_of(e))
            time.sleep(wait if asked is None else asked)
            wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError("unreachable")


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error: the client wraps those of uploads."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _broken(error: BaseException | None) -> BaseException | None:
    """The failure of the connection itself behind an error, if that is what it was (of uploads by Xet, which
    are no HTTP of ours, one of Python's own)."""
    while error is not None and not isinstance(error, httpx2.TransportError | ConnectionError | TimeoutError):
        error = error.__cause__
    return None if isinstance(error, OfflineModeIsEnabled) else error


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    return status in RETRIED if status is not None else _broken(error) is not None


def reason_of(error: BaseException) -> str:
    """What went wrong, in a few words, without addresses or tokens."""
    status, broken = _status(error), _broken(error)
    # Of a request that is wrong the client says why; elsewhere its text holds addresses.
    if status is not None and (status != 400 or isinstance(error, httpx2.HTTPError)):
        return f"the Hub answers {status}"
    if isinstance(broken, httpx2.TimeoutException | TimeoutError):
        return "the Hub does not answer"
    if broken is not None:
        return f"the connection to the Hub broke ({type(broken).__name__})"
    text = _ADDRESS.sub("the Hub", " ".join(str(error).split()))
    return without_secrets(text[:300]) or type(error).__name__


def as_hub_error(error: BaseException, what: str) -> HubError:
    """`error` as one sentence with its fix."""
    while error is not None and not isinstance(error, HubError) and isinstance(error.__cause__, HubError):
        error = error.__cause__  # the client wraps what `_heed` raises while it uploads
    if isinstance(error, HubError):
        return error
    status = _status(error)
    if status == 401:
        return HubError(
            f"{what}: the Hub does not accept the token (401)", "`hf auth login` with a valid one"
        )
    if status == 403 or isinstance(error, PermissionError):
        return HubError(
            f"{what}: the token gives no right to that (403)",
            "`hf auth login` with a token that may write there, from huggingface.co/settings/tokens",
        )
    if status == 404:
        return HubError(f"{what}: the Hub has no such repo, or gives no access (404)", "check the name")
    if status == 429:
        return HubError(f"{what}: the Hub takes no more requests for now (429)", _AGAIN + ", in some minutes")
    if _may_pass(error):
        return HubError(f"{what}: {reason_of(error)}, {ATTEMPTS} times and more", _AGAIN)
    return HubError(f"{what}: {reason_of(error)}")
