"""All contexts of the sandbox, by id, and the default one of each language."""

from __future__ import annotations

from collections.abc import Callable

from .context import Context
from .languages import JAVASCRIPT, PYTHON, language_named
from .requests import ContextRequest, ExecuteRequest, RequestError

DEFAULT_CWD = "/home/user"

# Takes language and directory.
MakeContext = Callable[[str, str], Context]


class Contexts:
    """The registry; Python's and JavaScript's are there from the start, their kernels later."""

    def __init__(self, make_context: MakeContext, *, default_cwd: str = DEFAULT_CWD) -> None:
        self._make_context = make_context
        self._default_cwd = default_cwd
        self._by_id: dict[str, Context] = {}
        self._default_ids: dict[str, str] = {}
        for language in (PYTHON, JAVASCRIPT):
            self.default(language)

    def default(self, language: str) -> Context:
        """The default context of a language, made when it is missing."""
        found = self._by_id.get(self._default_ids.get(language, ""))
        if found is None:
            found = self._add(language, self._default_cwd)
            self._default_ids[language] = found.id
        return found

    def for_run(self, request: ExecuteRequest) -> Context:
        """The context a run is for; raises RequestError 404, NoKernel."""
        if request.context_id:
            return self.named(request.context_id)
        return self.default(language_named(request.language))

    def named(self, context_id: str) -> Context:
        """The context of that id; raises RequestError 404."""
        found = self._by_id.get(context_id)
        if found is None:
            raise RequestError(404, f"Context {context_id[:80]} not found")
        return found

    def all(self) -> list[Context]:
        """Every context, oldest first."""
        return list(self._by_id.values())

    async def create(self, request: ContextRequest) -> Context:
        """A new context whose kernel takes code; raises NoKernel, KernelFailed."""
        context = self._add(language_named(request.language), request.cwd or self._default_cwd)
        try:
            await context.ready()
        except BaseException:
            self._by_id.pop(context.id, None)
            await context.remove()
            raise
        return context

    async def remove(self, context_id: str) -> None:
        """Ends a context; raises RequestError 404."""
        context = self.named(context_id)
        del self._by_id[context_id]
        await context.remove()

    async def close(self) -> None:
        """Ends all kernels."""
        for context_id in list(self._by_id):
            await self.remove(context_id)

    def _add(self, language: str, cwd: str) -> Context:
        context = self._make_context(language, cwd)
        self._by_id[context.id] = context
        return context
