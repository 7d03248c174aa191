"""Specs for exercise 76: pipeline parallelism."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from kata.testing import assert_close

pytestmark = pytest.mark.multiprocess

N_LAYERS, BATCH, SEQ_LEN, D_MODEL = 7, 12, 3, 5


# --- stages --------------------------------------------------------------------------------------


def split(ex, n_layers, n_stages):
    """Which layers each stage holds, by their numbers; −1 is none of those that were given."""
    layers = [nn.Linear(2, 2) for _ in range(n_layers)]
    numbers = {id(layer): i for i, layer in enumerate(layers)}
    stages = ex.split_stages(layers, n_stages)
    return [[numbers.get(id(layer), -1) for layer in stage] for stage in stages]


@given(n_stages=st.integers(1, 6), more=st.integers(0, 9))
def test_cuts_the_layers_in_order_into_stages_of_almost_equal_length(attempt, n_stages, more):
    n_layers = n_stages + more

    stages = attempt(split, n_layers, n_stages)

    assert_close(len(stages), n_stages)
    assert_close([i for stage in stages for i in stage], list(range(n_layers)))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_refuses_more_stages_than_layers(attempt):
    with pytest.raises(ValueError, match="layers"):
        attempt(split, 3, 4)


# --- schedules -----------------------------------------------------------------------------------

SCHEDULES = {"GPipe": "gpipe_schedule", "1F1B": "one_f_one_b_schedule"}


def plan(ex, name, n_stages, n_micro):
    schedule = getattr(ex, SCHEDULES[name])(n_stages, n_micro)
    return [[(kind, m) for kind, m in actions] for actions in schedule]


def simulate(schedule):
    """When everything is done, if a forward takes 1, a backward 2, and a message no time."""
    n_stages = len(schedule)
    ended: dict[tuple[str, int, int], int] = {}
    clocks, positions = [0] * n_stages, [0] * n_stages

    def awaited(rank):
        """What must have ended elsewhere before this rank's next action can start."""
        kind, m = schedule[rank][positions[rank]]
        other = rank - 1 if kind == "forward" else rank + 1
        return (kind, other, m) if 0 <= other < n_stages else None

    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule):
            while positions[rank] < len(actions):
                kind, m = actions[positions[rank]]
                before = awaited(rank)
                if before is not None and before not in ended:
                    break
                clocks[rank] = max(clocks[rank], ended.get(before, 0)) + (1 if kind == "forward" else 2)
                ended[kind, rank, m] = clocks[rank]
                positions[rank] += 1
                moved = True
    waiting = [rank for rank in range(n_stages) if positions[rank] < len(schedule[rank])]
    assert not waiting, "the ranks wait for each other: " + "; ".join(
        "rank {} for the {} of micro-batch {} on rank {}".format(rank, kind, m, other)
        for rank in waiting
        for kind, other, m in [awaited(rank)]
    )
    return max(clocks)


def under_way(actions):
    """The most micro-batches that are ever between their forward and the end of their backward."""
    most = now = 0
    for kind, _ in actions:
        now += 1 if kind == "forward" else -1
        most = max(most, now)
    return most


def check_rules(schedule, n_stages, n_micro):
    """The rules that gpipe_schedule's docstring states."""
    assert_close(len(schedule), n_stages)
    each_once = [(kind, m) for kind in ("backward", "forward") for m in range(n_micro)]
    for rank, actions in enumerate(schedule):
        assert sorted(actions) == each_once, f"rank {rank} must do each action once: {actions}"
        for m in range(n_micro):
            assert actions.index(("forward", m)) < actions.index(("backward", m)), (
                f"on rank {rank} the backward of micro-batch {m} comes before its forward"
            )
    for kind in ("forward", "backward"):
        orders = [[m for k, m in actions if k == kind] for actions in schedule]
        assert_close(orders, [orders[0]] * n_stages)
    simulate(schedule)


n_stages_drawn, n_micro_drawn = st.integers(1, 6), st.integers(1, 9)


@given(n_stages=n_stages_drawn, n_micro=n_micro_drawn)
def test_gpipe_does_all_forwards_and_then_all_backwards(attempt, n_stages, n_micro):
    schedule = attempt(plan, "GPipe", n_stages, n_micro)

    check_rules(schedule, n_stages, n_micro)
    for actions in schedule:
        assert_close([kind for kind, _ in actions], ["forward"] * n_micro + ["backward"] * n_micro)


@given(n_stages=n_stages_drawn, n_micro=n_micro_drawn)
def test_one_f_one_b_does_everything_once_and_never_deadlocks(attempt, n_stages, n_micro):
    schedule = attempt(plan, "1F1B", n_stages, n_micro)

    check_rules(schedule, n_stages, n_micro)


@given(n_stages=n_stages_drawn, n_micro=n_micro_drawn)
def test_one_f_one_b_keeps_at_most_n_stages_minus_rank_under_way(attempt, n_stages, n_micro):
    schedule = attempt(plan, "1F1B", n_stages, n_micro)

    for rank, actions in enumerate(schedule):
        assert under_way(actions) <= n_stages - rank, f"{under_way(actions)} on rank {rank}"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rank_is_idle_for_no_more_than_the_bubble(attempt, name):
    n_stages, n_micro = 4, 6

    schedule = attempt(plan, name, n_stages, n_micro)

    check_rules(schedule, n_stages, n_micro)
    idle = 1 - 3 * n_micro / simulate(schedule)
    assert_close(idle, (n_stages - 1) / (n_micro + n_stages - 1))


# --- running -------------------------------------------------------------------------------------


class Block(nn.Module):
    """A linear layer and a tanh; where `turned`, the output lies in memory in another order."""

    def __init__(self, weight, turned=False):
        super().__init__()
        self.linear = nn.Linear(*weight.shape, dtype=weight.dtype)
        self.linear.weight.data.copy_(weight)
        self.linear.bias.data.copy_(weight[0])
        self.turned = turned

    def forward(self, x):
        out = torch.tanh(self.linear(x))
        return out.mT.contiguous().mT if self.turned else out


class Watch:
    """Counts what a stage keeps: saved numbers, and inputs that are still in memory."""

    def __init__(self, stage):
        self.saved = self.most_saved = self.most_inputs = 0
        self.inputs = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.Saved(self).pack, self.Saved.unpack)
        stage.register_forward_pre_hook(self.enter)

    def enter(self, stage, args):
        reference = StorageWeakRef(args[0].untyped_storage())
        self.inputs[reference.cdata] = reference
        self.inputs = {k: r for k, r in self.inputs.items() if not r.expired()}
        self.most_inputs = max(self.most_inputs, len(self.inputs))

    class Saved:
        pass


def own_part(weights, cuts, rank, turned):
    blocks = [Block(w, turned) for w in weights]
    return nn.Sequential(*blocks[cuts[rank] : cuts[rank + 1]])
