"""What the control plane told this sandbox by `POST /init`, and who may tell it again."""

from __future__ import annotations

from collections.abc import Mapping

from vmcell_protos.errors import CallerError

from .accounts import Account, Accounts
from .wire.signature import same_secret

# E2B's own templates have it.
_STANDARD_USER = "user"
# How programs see that they are in a sandbox.
_MARKED = {"E2B_SANDBOX": "true"}
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Settings:
    """The sandbox's token, global environment and defaults; `environment` is the image's own.

    Processes see the image's environment, over it the global one, over it their own.

    The first `/init` wins: code in the sandbox reaches envd on the loopback and must not be able
    to set a token of its own, so later calls have to show the present one, and a sandbox that was
    initialised without a token never gets one.
    """

    def __init__(self, accounts: Accounts, environment: Mapping[str, str]) -> None:
        self.accounts = accounts
        self.access_token: str | None = None
        self.image_environment = {"PATH": _DEFAULT_PATH, **environment}
        self.global_environment = dict(_MARKED)
        self.default_workdir = ""
        self._default_user = _STANDARD_USER
        self._initialised = False

    def token_matches(self, given: str | None) -> bool:
        """Whether a request may pass: no token is set, or `given` is it."""
        if self.access_token is None:
            return True
        return given is not None and same_secret(given, self.access_token)

    def may_initialise(self, header_token: str | None, body_token: str | None) -> bool:
        if not self._initialised:
            return True
        if self.access_token is None:
            return not body_token
        return self.token_matches(header_token) or self.token_matches(body_token)

    def initialise(
        self,
        *,
        access_token: str | None,
        environment: Mapping[str, str] | None,
        default_user: str | None,
        default_workdir: str | None,
    ) -> None:
        """Take over what is not None (and not empty); `may_initialise` was asked before.

        `environment` replaces the one before it, so that a variable can be taken away too.
        """
        self._initialised = True
        if access_token:
            self.access_token = access_token
        if environment is not None:
            self.global_environment = {**_MARKED, **environment}
        if default_user:
            self._default_user = default_user
        if default_workdir:
            self.default_workdir = default_workdir

    def account(self, name: str | None) -> Account:
        """The account `name`, or the default one: set by /init, else `user`.

        An image that has no `user` is served as root, so that any image works. Raises CallerError
        unauthenticated for other unknown names, in the words the SDKs' tests look for.
        """
        wanted = name or self._default_user
        found = self.accounts.find(wanted)
        if found is None and name is None and wanted == _STANDARD_USER:
            found = self.accounts.find("root")
        if found is None:
            raise CallerError(f"invalid username: '{wanted}'", code="unauthenticated")
        return found
