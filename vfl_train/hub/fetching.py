"""What a failed download from the Hub means to the user: one place for models, data sets and profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vfl_train.errors import ConfigError, HubError


@contextmanager
def fetching(
    missing: ConfigError,
    failed: Callable[[str], HubError],
    *,
    unreachable: HubError | None = None,
    no_revision: ConfigError | None = None,
    no_entry: ConfigError | None = None,
) -> Iterator[None]:
    """Failures of the Hub's client inside the block, as the caller's errors.

    Args:
        missing: no repo of that name, or no access to it.
        failed: makes the error of everything else from its reason in one line; of what the others say, too,
            where they are left out.
        unreachable: no connection (or offline mode), and not in the cache.
        no_revision: the repo is there, the revision is not.
        no_entry: the repo is there, the one file asked for is not.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # of the HTTP library that the Hub's client uses
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    told: tuple[tuple[tuple[type[Exception], ...], ConfigError | HubError | None], ...] = (
        ((HFValidationError, RepositoryNotFoundError), missing),
        ((RevisionNotFoundError,), no_revision),
        ((RemoteEntryNotFoundError,), no_entry),
        ((LocalEntryNotFoundError,), unreachable),
    )
    try:
        yield
    except (HFValidationError, OSError, HTTPError) as e:
        for kinds, error in told:
            if isinstance(e, kinds) and error is not None:
                raise error from e
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise failed(reason) from e
