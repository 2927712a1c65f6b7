"""Keys made, renewed, revoked and outlived in any order, against a model that has no store."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from vmcell_api import tenancy
from vmcell_api.identifiers import hash_api_key
from vmcell_api.store import api_keys
from vmcell_api.store.api_keys import ApiKeys
from vmcell_api.store.records import Store
from vmcell_api.store.tables import Base
from vmcell_protos.errors import CallerError

NEVER = 1 << 62


@dataclass
class Expected:
    """What the model knows of a key; `end` in milliseconds."""

    key_id: str
    scopes: tuple[str, ...]
    end: int
    revoked: bool = False

    def state(self, now: int) -> str:
        if self.revoked:
            return "revoked"
        return "expired" if self.end <= now else "active"


class KeyLifecycle(RuleBasedStateMachine):
    """`keys` are the secrets themselves, as their holders have them."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_764_000_000_000
        engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        Base.metadata.create_all(engine)
        self.store = Store(engine)
        self.team = self.store.ensure_team("one")
        self.expected: dict[str, Expected] = {}
        self.patches = [
            patch.object(module, "now_ms", self.clock) for module in (tenancy, api_keys)
        ]
        for each in self.patches:
            each.start()

    def clock(self) -> int:
        return self.now

    def teardown(self) -> None:
        for each in self.patches:
            each.stop()
        self.store.close()

    @rule(
        target=keys,
        life_s=st.none() | st.integers(1, 100),
        scopes=st.sampled_from([("*",), ("admin",), ("sandboxes:read", "team:*")]),
    )
    def create(self, life_s: int | None, scopes: tuple[str, ...]) -> str:
        key, record = tenancy.create_key(self.store, self.team, scopes=scopes, life_s=life_s)
        end = NEVER if life_s is None else self.now + life_s * 1000
        self.expected[key] = Expected(key_id=record.key_id, scopes=scopes, end=end)
        return key

    @rule(target=keys, old=keys, grace_s=st.integers(0, 100))
    def rotate(self, old: str, grace_s: int) -> str:
        known = self.expected[old]
        try:
            key, record = tenancy.rotate_key(self.store, known.key_id, grace_s=grace_s)
        except CallerError:
            assert known.state(self.now) != "active"
            return old
        assert known.state(self.now) == "active"
        self.expected[key] = Expected(key_id=record.key_id, scopes=known.scopes, end=known.end)
        known.end = min(known.end, self.now + grace_s * 1000)
        return key

    @rule(key=keys)
    def revoke(self, key: str) -> None:
        ApiKeys(self.store.engine).revoke(self.expected[key].key_id)
        self.expected[key].revoked = True

    @rule(seconds=st.integers(1, 60))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds * 1000

    @invariant()
    def every_key_is_what_the_model_says(self) -> None:
        keys = ApiKeys(self.store.engine)
        assert len(keys.list()) == len(self.expected)
        for key, known in self.expected.items():
            found = keys.find(hash_api_key(key))
            assert found is not None
            assert found.state(self.now) == known.state(self.now)
            assert (found.key_id, found.scopes) == (known.key_id, known.scopes)


KeyLifecycle.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestKeyLifecycle = KeyLifecycle.TestCase
