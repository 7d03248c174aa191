"""Specs for exercise 76: pipeline parallelism."""

import re

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
    layers = [nn.Tanh() for _ in range(n_layers)]
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
    with pytest.raises(ValueError, match=r"3\D+4|4\D+3"):
        attempt(split, 3, 4)


# --- schedules -----------------------------------------------------------------------------------

SCHEDULES = {"GPipe": "gpipe_schedule", "1F1B": "one_f_one_b_schedule"}
TIME = {"forward": 1, "backward": 2}


def plan(ex, name, n_stages, n_micro):
    schedule = getattr(ex, SCHEDULES[name])(n_stages, n_micro)
    return [[(kind, m) for kind, m in actions] for actions in schedule]


def simulate(schedule):
    """When all is done, if messages take no time; fails if ranks wait for each other."""
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
                clocks[rank] = max(clocks[rank], ended.get(before, 0)) + TIME[kind]
                ended[kind, rank, m] = clocks[rank]
                positions[rank] += 1
                moved = True
    waiting = [rank for rank in range(n_stages) if positions[rank] < len(schedule[rank])]
    assert not waiting, "the ranks wait for each other: " + "; ".join(
        f"rank {rank} for the {kind} of micro-batch {m} on rank {other}"
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


def own_stage(weights, cuts, turned=False):
    rank = dist.get_rank()
    blocks = [Block(weight, turned) for weight in weights]
    return nn.Sequential(*blocks[cuts[rank] : cuts[rank + 1]])


def hidden_elsewhere(x, targets):
    """x as the first rank sees it and targets as the last: the others get NaN in their place."""
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    nothing = torch.full_like(targets, torch.nan if targets.is_floating_point() else -1)
    nothing_x = torch.full_like(x, torch.nan)
    return x if rank == 0 else nothing_x, targets if rank == n_ranks - 1 else nothing


def run_batches(ex, weights, cuts, schedules, batches, turned=False):
    """A pass over each batch, by the schedule of its own; dtypes are the batch's."""
    stage = own_stage(weights, cuts, turned)
    losses = []
    for schedule, (x, targets) in zip(schedules, batches, strict=True):
        x, targets = hidden_elsewhere(x, targets)
        losses.append(ex.run_pipeline(stage, schedule, x, targets, F.mse_loss))
    return {"losses": losses, "grads": [p.grad for p in stage.parameters()]}


def label_loss(out, labels):
    return F.cross_entropy(out.flatten(0, 1), labels.flatten())


def run_labels(ex, weights, cuts, schedule, x, labels):
    """With labels for targets; where x is not used it lies in memory in another order."""
    stage = own_stage(weights, cuts)
    x, labels = hidden_elsewhere(x, labels)
    x = x if dist.get_rank() == 0 else x.mT.contiguous().mT
    loss = ex.run_pipeline(stage, schedule, x, labels, label_loss)
    return {"losses": [loss], "grads": [p.grad for p in stage.parameters()]}


def run_with_idle(ex, weights, idle, schedule, x, targets):
    """One block a rank. On those in `idle` it has no parameters, or its own are frozen."""
    rank = dist.get_rank()
    stage = idle_or_block(weights[rank], idle.get(rank))
    x, targets = hidden_elsewhere(x, targets)
    loss = ex.run_pipeline(stage, schedule, x, targets, F.mse_loss)
    return {"losses": [loss], "grads": [p.grad for p in stage.parameters() if p.requires_grad]}


def idle_or_block(weight, kind):
    if kind == "no parameters":
        return nn.Tanh()
    return Block(weight).requires_grad_(kind != "frozen")


def refusals(ex, weights, cuts, schedule, x, targets):
    """What each rank says."""
    stage = own_stage(weights, cuts)
    try:
        ex.run_pipeline(stage, schedule, x, targets, F.mse_loss)
    except ValueError as error:
        return str(error)
    return "no ValueError"


def run_own_plan(ex, weights, schedule_name, n_micro, x, targets):
    """The whole of the learner's: stages, schedule and run."""
    n_stages = dist.get_world_size()
    stage = ex.split_stages([Block(weight) for weight in weights], n_stages)[dist.get_rank()]
    schedule = getattr(ex, SCHEDULES[schedule_name])(n_stages, n_micro)
    x, targets = hidden_elsewhere(x, targets)
    loss = ex.run_pipeline(stage, schedule, x, targets, F.mse_loss)
    return {"losses": [loss], "grads": [p.grad for p in stage.parameters()]}


class Kept:
    """A tensor that autograd keeps for backward; counts its numbers until it is let go."""

    def __init__(self, tensor, count):
        # Detached: an output that holds its own graph would never be let go.
        self.tensor, self.count = tensor.detach(), count
        count["now"] += tensor.numel()
        count["most"] = max(count["most"], count["now"])

    def __del__(self):
        self.count["now"] -= self.tensor.numel()


def run_watched(ex, weights, cuts, schedule, n_micro, x, targets):
    """The most that was kept at once: numbers saved for backward, and inputs still in memory."""
    stage = own_stage(weights, cuts)
    x, targets = hidden_elsewhere(x, targets)
    rows = len(x) // n_micro
    count, inputs, alive = {"now": 0, "most": 0}, {}, []

    def entered(_, args):
        storage = StorageWeakRef(args[0].untyped_storage())
        inputs[storage.cdata] = storage  # once, however often the stage is applied to it
        alive.append(sum(not storage.expired() for storage in inputs.values()))

    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: Kept(tensor, count), lambda kept: kept.tensor
    ):
        out = stage(x[:rows].clone().requires_grad_())
        if dist.get_rank() == dist.get_world_size() - 1:
            out = F.mse_loss(out, targets[:rows])
        one = count["most"]
        del out
        count["most"] = count["now"]
        stage.register_forward_pre_hook(entered)
        ex.run_pipeline(stage, schedule, x, targets, F.mse_loss)
    return {"saved for one": one, "saved": count["most"], "inputs": max(alive)}


def parse(text):
    """ "F0 B0" stands for [("forward", 0), ("backward", 0)]."""
    kinds = {"F": "forward", "B": "backward"}
    return [(kinds[word[0]], int(word[1:])) for word in text.split()]


GPIPE = [parse("F0 F1 F2 F3 B0 B1 B2 B3")] * 2
GPIPE_REVERSED = [parse("F0 F1 F2 F3 B3 B2 B1 B0")] * 2
ONE_F_ONE_B = [
    parse("F0 F1 F2 B0 F3 B1 B2 B3"),
    parse("F0 F1 B0 F2 B1 F3 B2 B3"),
    parse("F0 B0 F1 B1 F2 B2 F3 B3"),
]
# Each rank plans otherwise, and neither forwards nor backwards come in the order of their numbers.
MIXED = [
    parse("F2 F0 F3 F1 B0 B2 B1 B3"),
    parse("F2 F0 F3 B0 B2 F1 B1 B3"),
    parse("F2 F0 B0 F3 B2 F1 B1 B3"),
]
ALONE = [parse("F0 F1 B0 F2 B2 B1")]
CUTS = {1: [0, 7], 2: [0, 3, 7], 3: [0, 2, 4, 7]}


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def model_and_batches(rng, n_batches=1):
    """The weight of each layer, and batches of (x, targets)."""
    shape = BATCH, SEQ_LEN, D_MODEL
    weights = [randn(rng, D_MODEL, D_MODEL) for _ in range(N_LAYERS)]
    return weights, [(randn(rng, *shape), randn(rng, *shape)) for _ in range(n_batches)]


def on_one_rank(stages, batches, loss_fn=F.mse_loss):
    """The oracle: the whole model on whole batches."""
    model, losses = nn.Sequential(*stages), []
    for x, targets in batches:
        loss = loss_fn(model(x), targets)
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())
    return losses, [p.grad for p in model.parameters() if p.requires_grad]


def check(ranks, stages, batches, loss_fn=F.mse_loss):
    losses, grads = on_one_rank(stages, batches, loss_fn)
    nowhere = [None] * len(batches)
    assert_close([r["losses"] for r in ranks], [nowhere] * (len(ranks) - 1) + [losses])
    assert_close([grad for r in ranks for grad in r["grads"]], grads)


@pytest.mark.parametrize(
    "schedule",
    [GPIPE, GPIPE_REVERSED, ONE_F_ONE_B, MIXED, ALONE],
    ids=["GPipe", "GPipe reversed", "1F1B", "another on each rank", "one stage alone"],
)
def test_gives_the_loss_and_the_gradients_of_the_whole_batch(attempt, rng, schedule):
    weights, batches = model_and_batches(rng)
    n = len(schedule)

    ranks = attempt.ranks(n)(run_batches, weights, CUTS[n], [schedule], batches)

    check(ranks, map(Block, weights), batches)


def test_adds_its_gradients_to_those_of_an_earlier_batch(attempt, rng):
    weights, batches = model_and_batches(rng, n_batches=3)
    batches[1] = tuple(each[:4] for each in batches[1])  # shorter, and longer again
    schedules = [GPIPE, GPIPE, GPIPE_REVERSED]

    ranks = attempt.ranks(2)(run_batches, weights, CUTS[2], schedules, batches)

    check(ranks, map(Block, weights), batches)


def test_takes_targets_of_another_shape_and_dtype_than_x(attempt, rng):
    weights, [(x, _)] = model_and_batches(rng)
    labels = torch.randint(D_MODEL, (BATCH, SEQ_LEN), generator=rng)

    ranks = attempt.ranks(2)(run_labels, weights, CUTS[2], GPIPE, x, labels)

    check(ranks, map(Block, weights), [(x, labels)], label_loss)


@pytest.mark.parametrize(
    "idle",
    [{0: "no parameters"}, {0: "frozen", 1: "no parameters"}, {2: "no parameters"}],
    ids=["the first", "the first two", "the last"],
)
def test_runs_stages_that_have_nothing_to_learn(attempt, rng, idle):
    weights, [(x, targets)] = model_and_batches(rng)

    ranks = attempt.ranks(3)(run_with_idle, weights, idle, ONE_F_ONE_B, x, targets)

    stages = [idle_or_block(weights[rank], idle.get(rank)) for rank in range(3)]
    check(ranks, stages, [(x, targets)])


def test_passes_on_outputs_that_are_not_contiguous(attempt, rng):
    weights, batches = model_and_batches(rng)

    ranks = attempt.ranks(2)(run_batches, weights, CUTS[2], [GPIPE], batches, turned=True)

    check(ranks, map(Block, weights), batches)


def test_lets_go_of_a_micro_batch_after_its_backward(attempt, rng):
    weights, [(x, targets)] = model_and_batches(rng)

    ranks = attempt.ranks(3)(run_watched, weights, CUTS[3], ONE_F_ONE_B, 4, x, targets)

    for rank, kept in enumerate(ranks):
        assert kept["saved"] <= (3 - rank) * kept["saved for one"]
        # The first rank's are all pieces of x. Elsewhere, one more may just have been received.
        assert rank == 0 or kept["inputs"] <= 3 - rank + 1


def test_trains_on_its_own_stages_and_its_own_schedule(attempt, rng):
    weights, batches = model_and_batches(rng)

    ranks = attempt.ranks(2)(run_own_plan, weights, "1F1B", 6, *batches[0])

    check(ranks, map(Block, weights), batches)


def test_refuses_on_every_rank_a_batch_that_cannot_be_divided(attempt, rng):
    weights, [(x, targets)] = model_and_batches(rng)

    said = attempt.ranks(2)(refusals, weights, CUTS[2], GPIPE, x[:-1], targets[:-1])

    assert all(re.search(r"\d", each) for each in said), f"rank by rank: {said}"
