"""Every failure a user can meet: a one-line message with cause and fix, and an exit code by contract."""

from __future__ import annotations


class VflError(Exception):
    """Base of all user-facing errors. `message` says what is wrong (naming file and row where there is
    one), `fix` what to do. The command line prints both on one line and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        self.message, self.fix = message.strip(), fix.strip()
        super().__init__(f"{self.message} ({self.fix})" if self.fix else self.message)


class ConfigError(VflError):
    """A wrong option, recipe key, plan, model or function name; an output folder with other content."""

    exit_code = 2


class DataError(VflError):
    """Rows, images or probe pairs that cannot be used."""

    exit_code = 3


class VerificationError(VflError):
    """A failed verification, regression gate or checkpoint check."""

    exit_code = 4


class NumericError(VflError):
    """A non-finite loss, gradient or parameter."""

    exit_code = 5


class DistributedError(VflError):
    """A dead, hanging or diverging rank."""

    exit_code = 6


class DiskError(VflError):
    """No space, or a folder that cannot be written."""

    exit_code = 7


class HubError(VflError):
    """The Hub refused or could not be reached."""

    exit_code = 8
