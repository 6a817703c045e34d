"""Fused weights share memory with the parameters, and no way of writing to one leaves a stale answer."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.passes.program import FusedWeight
from fxfuse.passes.weights import RowMap, TensorSpec, Transform
from fxfuse.runtime import live_weights
from fxfuse.runtime.live_weights import CopiedSlot, LiveWeights, SharedSlot
from fxfuse.runtime.refusals import refusals

Make = Callable[..., Any]
INNERS = ["eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]

# The memory of one group: parameters, the packed weight, and how a compiled graph asks for it.


def parameters(count: int = 3, columns: int = 4) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(2 + i, columns)) for i in range(count)]


def shared(members: list[nn.Parameter]) -> LiveWeights:
    return LiveWeights([SharedSlot()], [range(len(members))])


def fused(live: LiveWeights, members: list[nn.Parameter]) -> Tensor:
    (tensor,) = live.fused(members)
    assert tensor is not None
    return tensor


def own_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0


def test_packing_keeps_objects_and_values_and_gives_each_a_storage_of_its_own() -> None:
    members = parameters()
    before, objects = [m.detach().clone() for m in members], list(members)
    whole = fused(shared(members), members)
    assert torch.equal(whole, torch.cat(before))
    for member, value, same in zip(members, before, objects, strict=True):
        assert member is same and torch.equal(member, value)
        assert own_storage(member) and member.is_contiguous() and member.requires_grad
        assert live_weights.is_packed(member)
    assert len({m.untyped_storage().data_ptr() for m in members}) == len(members)
    assert sum(m.nbytes for m in members) == whole.nbytes == live_weights.packed_bytes(members)


def test_writes_in_place_are_seen_without_packing_again() -> None:
    members = parameters()
    live = shared(members)
    whole = fused(live, members)
    with torch.no_grad():
        members[0].fill_(7)
        members[1].data.copy_(torch.full_like(members[1], 8))
        members[2].detach().numpy()[:] = 9
    assert fused(live, members) is whole and live.packs == 1
    assert torch.equal(whole, torch.cat([m.detach() for m in members]))
    assert whole[0, 0] == 7 and whole[2, 0] == 8 and whole[-1, 0] == 9


def _exchanged_data(members: list[nn.Parameter]) -> None:
    members[1].data = torch.randn_like(members[1])


def _another_object(members: list[nn.Parameter]) -> None:
    members[1] = nn.Parameter(torch.randn_like(members[1]))


def _there_and_back(members: list[nn.Parameter]) -> None:
    for member in members:
        member.data = member.data.to(torch.bfloat16).to(torch.float32)


def _set_storage(members: list[nn.Parameter]) -> None:
    with torch.no_grad():
        members[2].set_(torch.randn_like(members[2]))


def _swapped_within_the_group(members: list[nn.Parameter]) -> None:
    members[0].data, members[1].data = members[1].data, members[0].data


@pytest.mark.parametrize(
    "change", [_exchanged_data, _another_object, _there_and_back, _set_storage, _swapped_within_the_group]
)
def test_what_breaks_the_sharing_is_mended_at_the_next_call(
    change: Callable[[list[nn.Parameter]], None],
) -> None:
    members = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    live = shared(members)
    fused(live, members)
    change(members)
    expected = torch.cat([m.detach().clone() for m in members])
    assert torch.equal(fused(live, members), expected)
    assert live.packs == 2 and all(own_storage(m) for m in members)
    with torch.no_grad():
        members[1].add_(1)
    assert torch.equal(fused(live, members), torch.cat([m.detach() for m in members]))
    assert live.packs == 2


def test_packing_again_goes_into_the_same_memory_where_nobody_else_sees_it() -> None:
    members = parameters()
    live = shared(members)
    address = fused(live, members).data_ptr()
    members[0].data = torch.randn_like(members[0])
    assert fused(live, members).data_ptr() == address


def test_a_tensor_taken_before_keeps_its_values_when_others_are_assigned() -> None:
    members = parameters()
    live = shared(members)
    fused(live, members)
    taken = [m.detach() for m in members]  # as state_dict() does
    values = [t.clone() for t in taken]
    for member in members:
        member.data = torch.randn_like(member)
    expected = torch.cat([m.detach().clone() for m in members])
    assert torch.equal(fused(live, members), expected)
    assert all(torch.equal(t, v) for t, v in zip(taken, values, strict=True))


def test_parameters_swapped_between_two_groups_follow_their_new_place() -> None:
    first, second = parameters(), parameters()
    live = [shared(first), shared(second)]
    for each, members in zip(live, (first, second), strict=True):
        fused(each, members)
    first[1], second[1] = second[1], first[1]
    expected = [torch.cat([m.detach().clone() for m in members]) for members in (first, second)]
    for _ in range(2):
        for each, members, value in zip(live, (first, second), expected, strict=True):
            assert torch.equal(fused(each, members), value)
    assert [each.packs for each in live] == [2, 2]


def test_a_parameter_that_comes_to_stand_in_two_places_is_not_packed() -> None:
    """Its memory would be in one of them, and a write to it would not reach the other."""
    first, second = parameters(), parameters()
    live = LiveWeights([SharedSlot(), SharedSlot()], [range(3), range(3, 6)])
    live.fused([*first, *second])
    for other in ([first[0], second[1], second[2]], [second[0], second[0], second[2]]):
        pointers = [m.data_ptr() for m in (*first, *other)]
        for _ in range(2):
            with pytest.raises(live_weights.Refused, match="one parameter is now in two places"):
                live.fused([*first, *other])
        assert [m.data_ptr() for m in (*first, *other)] == pointers
    whole = torch.cat([m.detach().clone() for m in first])
    assert all(torch.equal(tensor, whole) for tensor in live.fused([*first, *first]) if tensor is not None)


def test_two_graphs_share_one_packed_weight() -> None:
    members = parameters()
    prefill, decode = shared(members), shared(members)
    whole = fused(prefill, members)
    for _ in range(3):
        assert fused(decode, members).data_ptr() == whole.data_ptr() == fused(prefill, members).data_ptr()
    assert (prefill.packs, decode.packs) == (1, 1)


def test_equal_addresses_in_memory_that_was_given_back_are_not_taken_for_the_packed_weight() -> None:
    """A caching allocator may hand out the very addresses again, to tensors that share nothing."""
    members, slot = parameters(), SharedSlot()
    live = LiveWeights([slot], [range(len(members))])
    fused(live, members)
    assert slot._packed is not None and live._filled is not None
    slot._packed.tensor = live._filled[1][0] = lambda: None  # the packed weight is gone, the addresses stay
    with torch.no_grad():
        members[0].fill_(7)
    assert torch.equal(fused(live, members), torch.cat([m.detach() for m in members]))


def test_a_packing_that_fails_half_way_gives_back_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    members = parameters()
    before, live = [m.detach().clone() for m in members], shared(members)
    from_dlpack, calls = torch.from_dlpack, []

    def fails(part: Tensor) -> Tensor:
        calls.append(part)
        if len(calls) == 2:
            raise MemoryError
        return from_dlpack(part)

    monkeypatch.setattr(torch, "from_dlpack", fails)
    with pytest.raises(MemoryError):
        fused(live, members)
    assert not any(map(live_weights.is_packed, members)) and all(map(own_storage, members))
    assert all(torch.equal(m, value) for m, value in zip(members, before, strict=True))
    assert torch.equal(fused(live, members), torch.cat(before))


def test_of_two_groups_over_one_weight_the_later_gives_up_after_a_few_times() -> None:
    q, k, v = (nn.Parameter(torch.randn(2, 4)) for _ in range(3))
    first, second = shared([q, k]), shared([q, v])
    refused = 0
    for _ in range(10):
        assert torch.equal(fused(first, [q, k]), torch.cat([q.detach(), k.detach()]))
        try:
            assert torch.equal(fused(second, [q, v]), torch.cat([q.detach(), v.detach()]))
        except live_weights.Refused:
            refused += 1
    assert (first.packs, second.packs, refused) == (4, 3, 7)
    live_weights.unpack([q, k, v])
    assert torch.equal(fused(second, [q, v]), torch.cat([q.detach(), v.detach()]))


@pytest.mark.parametrize("how", ["dtype", "unpack", "forget"])
def test_packed_memory_is_freed_when_its_members_leave(how: str) -> None:
    members = parameters()
    live = shared(members)
    held = weakref.ref(fused(live, members))
    assert held() is not None
    if how == "dtype":
        for member in members:
            member.data = member.data.to(torch.bfloat16)
    elif how == "unpack":
        assert live_weights.unpack(members) == len(members)
    else:
        members.clear()
    gc.collect()
    assert held() is None


def test_unpack_gives_back_memory_bits_and_strides() -> None:
    members = parameters()
    before = [m.detach().clone() for m in members]
    whole = fused(shared(members), members)
    live_weights.unpack(members)
    for member, value in zip(members, before, strict=True):
        assert torch.equal(member, value) and member.stride() == value.stride() and own_storage(member)
        assert not live_weights.is_packed(member)
    with torch.no_grad():
        members[0].fill_(5)
    assert torch.equal(whole, torch.cat(before))
    assert live_weights.unpack(members) == 0


def test_packing_under_inference_mode_leaves_parameters_that_can_be_trained() -> None:
    members = parameters()
    with torch.inference_mode():
        fused(shared(members), members)
    assert not any(m.is_inference() for m in members)
    members[0].square().sum().backward()
    assert members[0].grad is not None


def pair() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))]


def copied() -> LiveWeights:
    specs = TensorSpec("fused", (4, 4), "F32")
    rows = RowMap.concat([("a", 2), ("b", 2)])
    slot = CopiedSlot(FusedWeight("fused", ("a", "b"), Transform(specs, rows), False), ["a", "b"])
    return LiveWeights([slot], [[0, 1]])


def test_a_permuted_copy_is_renewed_after_writes_that_autograd_sees() -> None:
    members, live = pair(), copied()
    first = fused(live, members)
    assert torch.equal(first, torch.cat([m.detach() for m in members]))
    assert [copy.nbytes for copy in live.copies] == [first.nbytes]
    address = first.data_ptr()
    with torch.no_grad():
        members[0].fill_(3)
    members[1].data = torch.full_like(members[1], 4)
    again = fused(live, members)
    assert torch.equal(again, torch.cat([m.detach() for m in members])) and again.data_ptr() == address


def test_a_permuted_copy_is_renewed_when_the_allocator_gives_an_old_address_again() -> None:
    members, live = pair(), copied()
    fused(live, members)
    for i in range(20):
        for _ in range(2):  # the second may lie where the one before the first did
            members[1].data = torch.full_like(members[1], torch.rand(()))
        assert torch.equal(fused(live, members), torch.cat([m.detach() for m in members])), i


def test_a_permuted_copy_is_shared_by_graphs_and_never_stale_in_one_of_them() -> None:
    members, first, second = pair(), copied(), copied()
    whole = fused(first, members)
    assert fused(second, members) is whole and first.copies == second.copies
    values = members[0].data
    members[0].data = torch.randn_like(values)
    assert torch.equal(fused(second, members), torch.cat([m.detach() for m in members]))
    members[0].data = values  # as the first graph knows it, but the copy has been renewed since
    assert torch.equal(fused(first, members), torch.cat([m.detach() for m in members]))


@pytest.mark.parametrize("how", ["unpack", "forget"])
def test_a_permuted_copy_is_freed_with_its_members(how: str) -> None:
    members, live = pair(), copied()
    held = weakref.ref(fused(live, members))
    if how == "unpack":
        live_weights.unpack(members)
    else:
        members.clear()
    gc.collect()
    assert held() is None and live.copies == []
    if members:
        assert torch.equal(fused(live, members), torch.cat([m.detach() for m in members]))


def test_refusals_name_what_makes_a_weight_immovable() -> None:
    base = torch.randn(8, 4)
    tied = nn.Parameter(torch.randn(4, 4))
    half = nn.Parameter(torch.empty(0))
    half.data = tied.data
    found = refusals(
        {
            "plain": nn.Parameter(torch.randn(4, 4)),
            "strided": nn.Parameter(torch.randn(4, 4).t()),
            "slice": nn.Parameter(base[:4]),
            "tied": tied,
            "other": half,
            "between_processes": nn.Parameter(torch.randn(4, 4).share_memory_()),
        }
    )
    assert "plain" not in found
    assert "not contiguous" in found["strided"]
    assert "slice of larger memory" in found["slice"]
    assert "shares memory with other" in found["tied"] and "shares memory with tied" in found["other"]
    assert "between processes" in found["between_processes"]


# The whole way: a model whose weights change under a compiled graph.


@pytest.fixture(scope="module", params=INNERS)
def running(request: pytest.FixtureRequest, make_model: Make, prompt: Tensor) -> Any:
    model = fxfuse.optimize(make_model(), inner=request.param)
    with torch.no_grad():
        model(prompt)
    return model


def answers(model: Any, prompt: Tensor) -> Tensor:
    calls = model.optimization_report.calls
    with torch.no_grad():
        logits = model(prompt).logits
    assert model.optimization_report.calls == calls + 1
    return logits


def replace(model: Any, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


def _in_place(model: Any, name: str, value: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(value)


def _unseen(model: Any, name: str, value: Tensor) -> None:
    model.get_parameter(name).data.copy_(value)


def _data(model: Any, name: str, value: Tensor) -> None:
    model.get_parameter(name).data = value.clone()


def _parameter(model: Any, name: str, value: Tensor) -> None:
    replace(model, name, nn.Parameter(value.clone()))


def _load(model: Any, name: str, value: Tensor) -> None:
    model.load_state_dict({name: value}, strict=False)


def _assign(model: Any, name: str, value: Tensor) -> None:
    model.load_state_dict({name: value.clone()}, strict=False, assign=True)


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("inner", INNERS)
def test_parameters_that_torch_swaps_as_a_whole_are_packed_again(
    inner: str, make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor], swapping: None
) -> None:
    model = fxfuse.optimize(make_model(), inner=inner)
    answers(model, prompt)
    objects = list(model.parameters())
    model.to(torch.float64)
    torch.testing.assert_close(answers(model, prompt), plain_logits(model, prompt))
    model.load_state_dict({name: torch.rand_like(p) * 0.1 for name, p in model.state_dict().items()})
    torch.testing.assert_close(answers(model, prompt), plain_logits(model, prompt))
    assert all(p is same for p, same in zip(model.parameters(), objects, strict=True))
    assert sum(map(live_weights.is_packed, objects)) > 2


WAYS = [_in_place, _unseen, _data, _parameter, _load, _assign]


@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_changed_in_any_way_changes_the_answer(
    running: Any, prompt: Tensor, plain_logits: Callable[..., Tensor], way: Callable[[Any, str, Tensor], None]
) -> None:
    graphs = len(running.optimization_report.graphs)
    last = answers(running, prompt)
    for name, parameter in list(running.named_parameters()):
        way(running, name, torch.randn_like(parameter) * 0.1 + 0.1)
        now = answers(running, prompt)
        torch.testing.assert_close(now, plain_logits(running, prompt), atol=1e-4, rtol=1e-4)
        assert not torch.equal(now, last), name
        last = now
    assert len(running.optimization_report.graphs) == graphs


def _a_then_b_then_a(
    running: Any, fresh: list[Any], prompt: Tensor, plain_logits: Callable[..., Tensor], assign: bool
) -> None:
    got = []
    for source in (fresh[0], fresh[1], fresh[0]):
        pointers = [p.data_ptr() for p in running.parameters()]
        running.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        if not assign:
            assert [p.data_ptr() for p in running.parameters()] == pointers
        got.append(answers(running, prompt))
        torch.testing.assert_close(got[-1], plain_logits(source, prompt), atol=1e-5, rtol=1e-4)
    assert torch.equal(got[0], got[2])
    assert (got[0] - got[1]).abs().max() > 1e-2


@pytest.mark.parametrize("assign", [False, True])
def test_weights_a_then_b_then_a_answer_as_a_fresh_model(
    running: Any, make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor], assign: bool
) -> None:
    fresh = [make_model(seed=seed) for seed in (0, 1)]
    _a_then_b_then_a(running, fresh, prompt, plain_logits, assign)


@pytest.mark.inductor
def test_weights_a_then_b_then_a_through_inductor(
    make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor]
) -> None:
    """The least of the slow tests above, for every run."""
    layers = ("full_attention",)
    model = make_model(layers=layers).optimize()
    for assign in (False, True):
        fresh = [make_model(layers=layers, seed=seed) for seed in (0, 1)]
        _a_then_b_then_a(model, fresh, prompt, plain_logits, assign)
    assert len(model.optimization_report.graphs) == 1


def test_a_state_dict_taken_before_keeps_its_values(running: Any, make_model: Make, prompt: Tensor) -> None:
    answers(running, prompt)
    taken = running.state_dict()
    values = copy.deepcopy(taken)
    running.load_state_dict(make_model(seed=2).state_dict(), assign=True)
    answers(running, prompt)
    assert all(torch.equal(taken[name], values[name]) for name in values)


def test_the_state_dict_that_was_assigned_is_not_written_to(
    running: Any, make_model: Make, prompt: Tensor
) -> None:
    given = make_model(seed=3).state_dict()
    values = copy.deepcopy(given)
    running.load_state_dict(given, assign=True)
    answers(running, prompt)
    running.load_state_dict(make_model(seed=4).state_dict(), assign=True)
    answers(running, prompt)
    assert all(torch.equal(given[name], values[name]) for name in values)


def test_a_deepcopy_is_a_plain_model_with_its_own_weights(
    running: Any, prompt: Tensor, plain_logits: Callable[..., Tensor]
) -> None:
    before = answers(running, prompt)
    twin = copy.deepcopy(running)
    assert twin._compiled_call_impl is None and twin.optimization_report is None
    theirs = {p.data_ptr() for p in running.parameters()}
    for parameter in twin.parameters():
        assert own_storage(parameter) and parameter.data_ptr() not in theirs
        assert not live_weights.is_packed(parameter)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(answers(running, prompt), before)


def test_a_pickled_model_is_a_plain_one_of_the_same_size(
    running: Any, make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor]
) -> None:
    answers(running, prompt)
    data = pickle.dumps(running)
    twin = pickle.loads(data)
    assert twin._compiled_call_impl is None
    assert torch.equal(plain_logits(twin, prompt), plain_logits(running, prompt))
    assert len(data) <= len(pickle.dumps(make_model())) * 1.01


def test_two_threads_may_call_while_weights_are_reloaded_between_calls(
    running: Any, make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor]
) -> None:
    sources = [make_model(seed=seed) for seed in (6, 7)]
    expected = [plain_logits(source, prompt) for source in sources]
    wrong: list[str] = []
    rounds, barrier = 6, threading.Barrier(3, timeout=60)

    def caller() -> None:
        for i in range(rounds):
            barrier.wait()
            with torch.no_grad():
                got = running(prompt).logits
            if not torch.allclose(got, expected[i % 2], atol=1e-4):
                wrong.append(f"round {i}: off by {(got - expected[i % 2]).abs().max():.3g}")
            barrier.wait()

    threads = [threading.Thread(target=caller) for _ in range(2)]
    calls = running.optimization_report.calls
    for thread in threads:
        thread.start()
    for i in range(rounds):
        running.load_state_dict(copy.deepcopy(sources[i % 2].state_dict()), assign=i % 3 != 2)
        barrier.wait()
        barrier.wait()
    for thread in threads:
        thread.join()
    assert not wrong
    assert running.optimization_report.calls > calls


MEMORY = """
    import torch, fxfuse
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    def resident(which):
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    config = Qwen3_5TextConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, layer_types=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=256, tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config).eval()
    model.to_empty(device="cpu")
    ids = torch.ones(1, 2, dtype=torch.long)
    layer = max(sum(p.nbytes for p in block.parameters()) for block in model.model.layers)
    whole = sum(p.nbytes for p in model.parameters())

    fxfuse.optimize(model, inner="eager")
    with torch.no_grad():
        for again in range(3):  # the first time compiles, which needs memory of its own
            for p in model.parameters():
                p.data = torch.empty_like(p).fill_(0.01)
            open("/proc/self/clear_refs", "w").write("5")
            before = resident("VmRSS")
            model(ids)
            peak, after = resident("VmHWM") - before, resident("VmRSS") - before
    packed = model.optimization_report.packed_bytes
    print(layer, whole, packed, peak, after)
"""


def test_packing_needs_at_most_one_layer_on_top_and_leaves_nothing_behind() -> None:
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    layer, whole, packed, peak, after = map(int, found.stdout.split()[-5:])
    assert packed > 0.5 * whole > 1e8
    assert peak <= layer, f"{peak / 1e6:.0f} MB on top of {whole / 1e6:.0f}, a layer has {layer / 1e6:.0f}"
    assert after <= 0.01 * whole, f"{after / 1e6:.1f} MB more than before"
