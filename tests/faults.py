"""What goes wrong in the middle of a long computation: the process ends, or memory does not suffice."""


def dies(monkeypatch, module, name: str, *, at: int, error=KeyboardInterrupt) -> list[int]:
    """Let call number `at` of a module's function raise `error`; return a list that grows by one with each call."""
    calls, real = [], getattr(module, name)

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)
    return calls


def short_of_memory(monkeypatch, module, name: str, *, rows: int, error: Exception) -> list[int]:
    """Let a module's function, whose second argument is a batch, raise `error` above `rows`; return the growing list of sizes asked for."""
    sizes, real = [], getattr(module, name)

    def small(model, batch, *args, **kwargs):
        sizes.append(len(batch))
        if sizes[-1] > rows:
            raise error
        return real(model, batch, *args, **kwargs)

    monkeypatch.setattr(module, name, small)
    return sizes
