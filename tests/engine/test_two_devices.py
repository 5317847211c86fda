"""The hooks in a model that is spread over devices, played by tensors that carry a device's name and refuse those of another."""

import types

import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from steerkit.engine.decode import select_rows
from steerkit.engine.edits import on
from steerkit.engine.receipt import Receipt, Tally
from steerkit.engine.steer import Ablate, Add, Boost, Steering
from steerkit.features import ordinary_positions

D = tiny.D_MODEL


class Tagged(torch.Tensor):
    """A tensor on the CPU that says it is elsewhere."""

    @staticmethod
    def __new__(cls, inner, device):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype, device=device)

    def __init__(self, inner, device):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, places = dict(kwargs or {}), []

        def bare(x):
            if isinstance(x, torch.Tensor) and x.ndim:  # a number may come from the CPU
                places.append(x.device)
            return x.inner if isinstance(x, Tagged) else x

        name = func.overloadpacket.__name__
        plain, named = tree_map(bare, args), tree_map(bare, kwargs)
        where = kwargs.get("device") or (places[0] if places else args[0].device)
        moves = name in ("_to_copy", "copy_", "lift_fresh")
        index = name in ("index", "index_put_", "index_put")  # a device's tensor may be indexed by the CPU's
        if not moves and len({p for p in places if not (index and p.type == "cpu")}) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device, got {places}")
        if "device" in named:
            named["device"] = torch.device("cpu")
        wrap = lambda x: Tagged(x, where) if isinstance(x, torch.Tensor) and torch.device(where).type != "cpu" else x  # noqa: E731
        found = func(*plain, **named)
        return args[0] if name.endswith("_") and name != "_to_copy" and isinstance(args[0], torch.Tensor) else tree_map(wrap, found)

    def tolist(self):
        return self.inner.tolist()


class Elsewhere(TorchFunctionMode):
    """Tensors made on, or sent to, a device that does not exist are tagged with it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "to":
            settings = [*args[1:], *kwargs.values()]
            settings = [part for s in settings for part in ((s.device, s.dtype) if isinstance(s, torch.Tensor) else (s,))]
            inner = args[0].inner if isinstance(args[0], Tagged) else args[0]
            inner = inner.to(next((s for s in settings if isinstance(s, torch.dtype)), inner.dtype))
            target = torch.device(next((s for s in settings if isinstance(s, str | torch.device)), args[0].device))
            return inner if target.type == "cpu" else Tagged(inner, target)
        if name == "cpu":
            return args[0].inner if isinstance(args[0], Tagged) else args[0]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu" and not any(isinstance(a, Tagged) for a in args):
            return Tagged(func(*args, **kwargs | {"device": "cpu"}), torch.device(device))
        if name == "tolist" and isinstance(args[0], Tagged):
            return args[0].inner.tolist()
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def elsewhere():
    with Elsewhere():
        yield


def test_the_stand_in_refuses_what_two_devices_refuse():
    a, b = Tagged(torch.ones(2), "meta:0"), Tagged(torch.ones(2), "meta:1")
    with pytest.raises(RuntimeError, match="one device"):
        a + b
    assert (a + b.to("meta:0")).device == torch.device("meta:0") and (a + b.to(a.device)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("receipt", [Receipt, lambda: Tally(2)], ids=["receipt", "tally"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda v: Add(2, v[0], 3.0),
        lambda v: Add(2, v, torch.tensor([3.0, 4.0])),
        lambda v: Ablate(2, v),
        lambda v: Boost(2, tiny.planted_sae(), torch.tensor([5, 6]), torch.tensor([2.0, 3.0])),
    ],
    ids=["add", "add a row", "ablate", "boost"],
)
def test_ids_on_one_device_and_a_block_on_another_give_what_one_device_gives(edit, receipt):
    """The mask lies where the ids are, the block and its output elsewhere, the SAE on the CPU."""
    rng = torch.Generator().manual_seed(0)
    vectors, resid = torch.randn(2, D, generator=rng), torch.randn(2, 5, D, generator=rng)
    ids, mask = torch.tensor([[0, 7, 8, 9, 9], [5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = []
    for first, second in (("cpu", "cpu"), ("meta:0", "meta:1")):
        run = Steering([on(edit(vectors), torch.device(second))], window="last", prompt_length=torch.tensor([3, 4]), receipt=receipt())
        run.enter(None, (), {"input_ids": ids.to(first), "attention_mask": mask.to(first)})
        out = run.hook(2)(None, (), (resid.to(second),))[0]
        assert out.device == torch.device(second)
        count = run.receipt.count if isinstance(run.receipt, Tally) else [run.receipt.changed(row) for row in (0, 1)]
        found.append((out.cpu(), count.cpu().tolist() if isinstance(count, torch.Tensor) else count))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert (found[0][0] != resid).any(-1).sum(1).tolist() == [2, 2]


def test_caches_and_positions_that_count_follow_their_layers():
    keys = torch.arange(6.0).view(3, 2)

    def layer(device):
        held = types.SimpleNamespace(keys=keys.to(device))
        held.batch_select_indices = lambda index: setattr(held, "keys", held.keys[index])
        return held

    cache = types.SimpleNamespace(layers=[layer("meta:0"), layer("meta:1")])
    select_rows(cache, torch.tensor([2, 0, 2]).to("meta:0"))
    assert [held.keys.tolist() for held in cache.layers] == [keys[[2, 0, 2]].tolist()] * 2
    ids, resid = torch.tensor([[1, 5, 6, 7]]), torch.ones(1, 4, D)
    resid[0, 2] = 100.0
    streams = {0: resid.to("meta:0"), 1: resid.to("meta:1")}
    assert ordinary_positions(ids.to("meta:0"), None, streams, special=[]).tolist() == [[False, True, False, True]]
