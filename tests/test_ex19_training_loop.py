"""Specs for exercise 19: a training loop."""

import math
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kata.testing import assert_close

pytestmark = pytest.mark.cpu

VOCAB_SIZE, SEQ_LEN, WIDTH = 7, 3, 5


class Net(nn.Module):
    """A small model that notes how it is used: (examples, train mode, grad mode, dtype inside)."""

    def __init__(self, p=0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.drop = nn.Dropout(p)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE)
        self.register_buffer("n_trained", torch.tensor(0))
        self.seen = []

    def forward(self, x):
        inner = self.inner(self.drop(self.embed(x)))
        note = (len(x), self.training, torch.is_grad_enabled(), str(inner.dtype))
        self.seen.append(note)
        self.n_trained += len(x) * self.training
        return self.head(torch.tanh(inner))


class CharModel(nn.Module):
    """Reads characters with a GRU and scores the next one."""

    def __init__(self, n_chars, width):
        super().__init__()
        self.embed = nn.Embedding(n_chars, 32)
        self.rnn = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, n_chars)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0])


class Given:
    """Batches in the order in which they are given, then an error."""

    def __init__(self, batches, error=LookupError):
        self.batches, self.poison, self.error = list(batches), None, error

    def __next__(self):
        if not self.batches:
            raise self.error("no more batches")
        return self.batches.pop(0)

    def state_dict(self):
        return {"left": len(self.batches), "poison": self.poison}

    def load_state_dict(self, state):
        self.batches = self.batches[-state["left"] :]


def falling(step):
    """A schedule, which rests for one step."""
    return 0.5 / (1 + step) * (step != 1)


def make_net(seed, p=0.0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Net(p).to(dtype)


def sgd(model):
    """Two groups, with rates of their own."""
    biases = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": others}, {"params": biases, "lr": 0.05}]
    return torch.optim.SGD(groups, lr=0.2, momentum=0.5)


def numbers_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- run on the code under test ------------------------------------------------------------------


def heard_by(ex, events, name):
    """A callback that writes down all it is told."""

    class Heard(ex.Callback):
        def on_fit_start(self, trainer, n_steps):
            events.append((name, "fit start", trainer.step, n_steps))

        def on_step_end(self, trainer, loss):
            events.append((name, "step end", trainer.step, loss))
            trainer.model.eval()  # as a callback may leave it

        def on_evaluate(self, trainer, losses):
            events.append((name, "evaluate", trainer.step, losses))

        def on_fit_end(self, trainer):
            events.append((name, "fit end", trainer.step, None))

    return Heard()


def trained(ex, batches, options):
    """The parameters, losses and rates after one step on each batch, and the model's notes."""
    model, events = make_net(0), []
    optimizer = sgd(model)
    model.eval()  # as somebody left it
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    options = {**options, "schedule": falling if options.get("schedule") else None}
    callbacks = [heard_by(ex, events, "")]
    trainer = ex.Trainer(model, optimizer, Given(batches), callbacks=callbacks, **options)
    trainer.fit(len(batches))
    return {
        "parameters": numbers_of(model),
        "losses": [what for _, event, _, what in events if event == "step end"],
        "evaluations": sum(event == "evaluate" for _, event, *_ in events),
        "rates": [group["lr"] for group in optimizer.param_groups],
        "examples": sum(n for n, *_ in model.seen),
        "at once": max(n for n, *_ in model.seen),
        "always in train mode": all(mode for _, mode, *_ in model.seen),
    }


def trained_by_hand(batches, options):
    """What `trained` should give: whole batches, without a trainer."""
    model, losses = make_net(0), []
    optimizer = sgd(model)
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        if options.get("max_norm") is not None:
            nn.utils.clip_grad_norm_(model.parameters(), options["max_norm"])
        for group in optimizer.param_groups:
            group["lr"] = falling(step) if options.get("schedule") else group["lr"]
        optimizer.step()
        losses.append(loss.item())
    rates = [group["lr"] for group in optimizer.param_groups]
    return {
        "parameters": numbers_of(model),
        "losses": losses,
        "evaluations": 0,
        "rates": rates,
        "examples": sum(len(x) for x, _ in batches),
        "at once": max(len(x) for x, _ in batches),
        "always in train mode": True,
    }


def run_in_parts(ex, x, y, stops, eval_every=0, scheduled=True):
    """Train with dropout, in parts: each begins from nothing but the file of the one before."""
    losses = []
    with TemporaryDirectory() as folder:
        path = f"{folder}/run.pt"
        for part, stop in enumerate(stops):
            events = []
            model = make_net(part, p=0.4, dtype=torch.float64)
            trainer = ex.Trainer(
                model,
                torch.optim.AdamW(model.parameters(), lr=0.1 + part),
                ex.Batches(x, y, batch_size=3, seed=part),
                eval_sets={"val": (x[:4], y[:4])},
                schedule=falling if scheduled else None,
                max_norm=0.5,
                micro_batch=2,
                callbacks=[heard_by(ex, events, "")],
            )
            if part:
                trainer.load(path)
            trainer.save(path)  # what is written later counts
            trainer.fit(stop, eval_every)
            trainer.save(path)
            losses += [what for _, event, _, what in events if event == "step end"]
    return {
        "parameters": numbers_of(model),
        "buffer": model.n_trained,
        "losses": losses,
        "n_steps": events[0][-1],
        "step": trainer.step,
        "rate": trainer.optimizer.param_groups[0]["lr"],
        "next batch": next(trainer.train)[0],
        "random numbers": torch.rand(3),
    }


def estimated(ex, eval_sets, micro_batch, training):
    """The losses of a model with dropout, and whether anything else has changed."""
    model = make_net(0, p=0.5).train(training)
    model.inner.train(not training).requires_grad_(False)  # as somebody left it
    trainer = ex.Trainer(model, None, None, eval_sets=eval_sets, micro_batch=micro_batch)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    torch.manual_seed(1)
    losses = trainer.estimate_loss()
    return {
        "gradients": {float(g) for p in model.parameters() for g in p.grad.flatten()} == {2.0},
        "losses": losses,
        "train mode inside": any(mode for _, mode, *_ in model.seen),
        "at once": max(n for n, *_ in model.seen),
        "grad mode inside": any(mode for _, _, mode, _ in model.seen),
        "train mode after": {name: module.training for name, module in model.named_modules()},
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "random numbers": torch.rand(3),
    }


def estimated_in_vain(ex, eval_sets, training):
    """The modes after an estimate that an error ends, and whether gradients are recorded."""
    model = make_net(0).train(training)
    model.inner.train(not training)
    trainer = ex.Trainer(model, None, None, eval_sets=eval_sets)
    try:
        trainer.estimate_loss()
        end = "in peace"
    except IndexError:
        end = "an error"
    modes = {name: module.training for name, module in model.named_modules()}
    return {"end": end, "train mode after": modes, "grad mode after": torch.is_grad_enabled()}


def modes_by_hand(training):
    modes = dict.fromkeys(["", "embed", "drop", "head"], training)
    return {**modes, "inner": not training}


def estimated_by_hand(eval_sets, training):
    """What `estimated` should give."""
    model, losses = make_net(0).eval(), {}
    for name, (x, y) in eval_sets.items():
        summed = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum")
        losses[name] = summed.item() / max(1, (y != -100).sum().item())
    torch.manual_seed(1)
    return {
        "gradients": True,
        "losses": losses,
        "train mode inside": False,
        "at once": max(len(x) for x, _ in eval_sets.values()),
        "grad mode inside": False,
        "train mode after": modes_by_hand(training),
        "frozen": ["inner.weight", "inner.bias"],
        "random numbers": torch.rand(3),
    }


def events_of(ex, batches, n_steps, eval_every):
    """What two callbacks hear, and how the run ended; a bar and a plot listen too."""
    model, events = make_net(0), []
    plot = ex.LossPlot()
    callbacks = [heard_by(ex, events, "a"), ex.ProgressBar(), plot, heard_by(ex, events, "b")]
    sets = {"train": batches[0], "val": batches[1]}
    trainer = ex.Trainer(model, sgd(model), Given(batches), sets, callbacks=callbacks)
    try:
        trainer.fit(n_steps, eval_every)
        end = "in peace"
    except LookupError:
        end = "no more batches"
    told = [what for who, event, _, what in events if (who, event) == ("a", "evaluate")]
    return {
        "events": [(who, event, step) for who, event, step, _ in events],
        "end": end,
        "n_steps": events[0][-1],
        "last estimate": told[-1] if told else None,
        "estimate now": trainer.estimate_loss(),
        "plotted": {name: [step for step, _ in curve] for name, curve in plot.curves.items()},
        "lines": len(plot.draw().axes[0].lines) if eval_every else 0,
    }


def fit_and_fit_again(ex, batches, stops, error, eval_every=0, raises_at=None):
    """What is heard of one fit after another; each may end by an error."""
    model, events = make_net(0), []

    class Raises(ex.Callback):
        def on_step_end(self, trainer, loss):
            if trainer.step == raises_at:
                raise error("enough")

    callbacks = [heard_by(ex, events, ""), Raises()]
    trainer = ex.Trainer(
        model, sgd(model), Given(batches, error), {"val": batches[0]}, callbacks=callbacks
    )
    for stop in stops:
        try:
            trainer.fit(stop, eval_every)
        except error:
            events.append(("", error.__name__, trainer.step, None))
    return [(event, step) for _, event, step, _ in events]


def fit_again(ex, batches, stops, **options):
    return fit_and_fit_again(ex, batches, stops, LookupError, **options)


def interrupted(ex, batches, stop):
    return fit_and_fit_again(ex, batches, [stop], KeyboardInterrupt)


def saved_badly(ex, batches):
    """The step of the file that is left when a second save fails half-way."""
    with TemporaryDirectory() as folder:
        path = f"{folder}/run.pt"
        for part in range(2):
            model = make_net(part)
            trainer = ex.Trainer(model, sgd(model), Given(batches))
            if part:
                trainer.load(path)
                return trainer.step, numbers_of(model)
            trainer.fit(2)
            trainer.save(path)
            trainer.fit(3)
            trainer.train.poison = (i for i in "no file holds a generator")
            try:
                trainer.save(path)
            except NotImplementedError:
                raise
            except Exception:
                pass


def under_autocast(ex, device, batches, autocast):
    """The dtypes inside, of the weights and of the gradients; the losses; the weights."""
    model = make_net(0, dtype=torch.float32).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dtype = getattr(torch, autocast) if autocast else None
    trainer = ex.Trainer(model, optimizer, Given(batches), {"val": batches[0]}, autocast=dtype)
    loss, val = trainer.train_step(), trainer.estimate_loss()["val"]
    return {
        "dtypes inside": sorted({dtype for *_, dtype in model.seen}),
        "dtypes": sorted(
            {str(t.dtype) for p in model.parameters() for t in (p, p.grad) if t is not None}
        ),
        "loss": torch.tensor(loss),
        "val": torch.tensor(val),
        "parameters": numbers_of(model).cpu(),
    }


def under_autocast_by_hand(device, batches):
    """What `under_autocast` should give for bfloat16, without a trainer."""
    model = make_net(0, dtype=torch.float32).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        x, y = (part.to(device) for part in batches[0])
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(x)
        losses.append(F.cross_entropy(logits.float().flatten(0, -2), y.flatten()))
        if len(losses) == 1:
            losses[0].backward()
            optimizer.step()
    return {
        "dtypes inside": ["torch.bfloat16"],
        "dtypes": ["torch.float32"],
        "loss": losses[0].detach().cpu(),
        "val": losses[1].detach().cpu(),
        "parameters": numbers_of(model).cpu(),
    }


def learn_the_manual(ex, n_chars, seq_len, width, n_steps):
    """Train a character model on the Python manual; every tenth window is kept back."""
    text = "\n".join(topics[name] for name in sorted(topics))[:n_chars]
    chars = sorted(set(text))
    ids = torch.tensor([chars.index(c) for c in text])
    n = (len(ids) - 1) // seq_len
    x, y = ids[: n * seq_len].view(n, seq_len), ids[1 : n * seq_len + 1].view(n, seq_len)
    val = torch.arange(n) % 10 == 9

    torch.manual_seed(0)
    model = CharModel(len(chars), width)
    trainer = ex.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        ex.Batches(x[~val], y[~val], batch_size=32),
        {"train": (x[~val][:64], y[~val][:64]), "val": (x[val], y[val])},
        schedule=lambda step: 1e-2 * min(1.0, (step + 1) / 20, (n_steps - step) / 100),
        max_norm=1.0,
    )
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on two, far slower on a busy machine
    try:
        start = trainer.estimate_loss()
        trainer.fit(n_steps)
        return start["val"], trainer.estimate_loss()["val"], len(chars)
    finally:
        torch.set_num_threads(n_threads)


def compare(results, expected, micro_batch):
    """Judge; a micro-batch may be smaller than it must be."""
    most = min(micro_batch or 99, expected["at once"])
    assert results["at once"] <= most, f"{results['at once']} examples at once, allowed are {most}"
    assert_close(results, {**expected, "at once": results["at once"]})


# --- specs ---------------------------------------------------------------------------------------


def make_batch(rng, n, hidden=0.3, shape=(SEQ_LEN,)):
    """x and y of n examples; about that share of y is no target, the first one always is."""
    x, y = (torch.randint(VOCAB_SIZE, (n, *shape), generator=rng) for _ in range(2))
    y[torch.rand(y.shape, generator=rng) < hidden] = -100
    y.view(-1)[0] = 4
    return x, y


@pytest.mark.parametrize(
    ("micro_batch", "hidden"),
    [(1, 0.6), (3, 0.0), (3, 0.6), (7, 0.6), (None, 0.6)],
    ids=["one by one", "all targets, threes", "threes", "sevens", "whole"],
)
def test_takes_the_step_of_the_big_batch_however_it_is_cut(attempt, rng, micro_batch, hidden):
    batches = [make_batch(rng, n, hidden) for n in (8, 5)]

    results = attempt(trained, batches, {"micro_batch": micro_batch})

    compare(results, trained_by_hand(batches, {}), micro_batch)


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["one", "a table"])
def test_takes_any_number_of_targets_for_each_example(attempt, rng, shape):
    batches = [make_batch(rng, n, shape=shape) for n in (8, 5)]

    results = attempt(trained, batches, {"micro_batch": 3})

    compare(results, trained_by_hand(batches, {}), 3)


@pytest.mark.parametrize("max_norm", [0.2, 0.0])
def test_sets_the_rate_of_every_group_and_clips_the_whole_gradient(attempt, rng, max_norm):
    batches = [make_batch(rng, n) for n in (8, 5, 7)]
    options = {"schedule": True, "max_norm": max_norm, "micro_batch": 3}

    results = attempt(trained, batches, options)

    compare(results, trained_by_hand(batches, options), 3)


def test_does_not_move_on_a_batch_without_targets(attempt, rng):
    x, y = make_batch(rng, 4)

    results = attempt(trained, [(x, torch.full_like(y, -100))], {"micro_batch": 3})

    assert_close((results["parameters"], results["losses"]), (numbers_of(make_net(0)), [0.0]))


@pytest.mark.parametrize("scheduled", [True, False], ids=["a schedule", "no schedule"])
def test_goes_on_after_an_interruption_as_if_there_had_been_none(attempt, rng, scheduled):
    x, y = make_batch(rng, 10)  # four batches an epoch, the last of one example

    whole = attempt(run_in_parts, x, y, [11], scheduled=scheduled)
    parts = attempt(run_in_parts, x, y, [4, 5, 11], scheduled=scheduled)

    assert_close(parts, whole, rtol=0.0, atol=0.0)  # bit for bit


def test_goes_on_after_an_evaluation_as_if_there_had_been_none(attempt, rng):
    x, y = make_batch(rng, 10)

    without = attempt(run_in_parts, x, y, [7])
    evaluated = attempt(run_in_parts, x, y, [7], eval_every=2)

    assert_close(evaluated, without, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("micro_batch", "training"),
    [(3, True), (None, False)],
    ids=["threes, from train mode", "whole, from eval mode"],
)
def test_estimates_losses_in_eval_mode_and_changes_nothing(attempt, rng, micro_batch, training):
    eval_sets = {"train": make_batch(rng, 70), "val": make_batch(rng, 5, hidden=0.7)}
    eval_sets["no targets"] = eval_sets["val"][0], torch.full((5, SEQ_LEN), -100)

    results = attempt(estimated, eval_sets, micro_batch, training)

    compare(results, estimated_by_hand(eval_sets, training), micro_batch)


@pytest.mark.parametrize("training", [True, False], ids=["from train mode", "from eval mode"])
def test_leaves_every_module_in_its_mode_when_an_estimate_fails(attempt, rng, training):
    x, y = make_batch(rng, 4)
    x[2, 1] = VOCAB_SIZE  # no such row

    results = attempt(estimated_in_vain, {"val": (x, y)}, training)

    modes = modes_by_hand(training)
    expected = {"end": "an error", "train mode after": modes, "grad mode after": True}
    assert_close(results, expected)


def test_tells_its_callbacks_what_happens_in_order(attempt, rng):
    batches = [make_batch(rng, 2) for _ in range(5)]

    results = attempt(events_of, batches, 5, eval_every=2)

    steps = [[("step end", n)] + [("evaluate", n)] * (n in (2, 4, 5)) for n in range(1, 6)]
    events = [("fit start", 0), *(event for step in steps for event in step), ("fit end", 5)]
    assert results["events"] == [(who, *event) for event in events for who in "ab"]
    assert_close((results["n_steps"], results["end"]), (5, "in peace"))
    assert_close(results["last estimate"], results["estimate now"])
    plotted = {"batch": [1, 2, 3, 4, 5], "train": [2, 4, 5], "val": [2, 4, 5]}
    assert_close((results["plotted"], results["lines"]), (plotted, 3))


def test_tells_them_of_the_end_even_if_an_error_ends_the_run(attempt, rng):
    batches = [make_batch(rng, 2) for _ in range(2)]

    results = attempt(events_of, batches, 5, eval_every=0)

    events = [("fit start", 0), ("step end", 1), ("step end", 2), ("fit end", 2)]
    assert results["events"] == [(who, *event) for event in events for who in "ab"]
    assert results["end"] == "no more batches"


def test_tells_them_of_the_end_when_somebody_presses_ctrl_c(attempt, rng):
    events = attempt(interrupted, [make_batch(rng, 2)], 5)

    expected = [("fit start", 0), ("step end", 1), ("fit end", 1), ("KeyboardInterrupt", 1)]
    assert_close(events, expected)


def test_tells_them_of_the_end_when_one_of_them_raises(attempt, rng):
    batches = [make_batch(rng, 2) for _ in range(5)]

    events = attempt(fit_again, batches, [5], raises_at=2)

    told = [("fit start", 0), ("step end", 1), ("step end", 2), ("fit end", 2)]
    assert_close(events, [*told, ("LookupError", 2)])


def test_evaluates_by_the_steps_of_all_fits_and_once_at_the_last(attempt, rng):
    batches = [make_batch(rng, 2) for _ in range(7)]

    events = attempt(fit_again, batches, [1, 4, 7], eval_every=2)

    assert_close([step for event, step in events if event == "evaluate"], [1, 2, 4, 6, 7])


def test_makes_only_the_steps_that_are_left(attempt, rng):
    events = attempt(fit_again, [make_batch(rng, 2) for _ in range(3)], [0, 2, 2, 3])

    first = [("fit start", 0), ("fit end", 0)]
    first += [("fit start", 0), ("step end", 1), ("step end", 2), ("fit end", 2)]
    none = [("fit start", 2), ("fit end", 2)]
    assert_close(events, [*first, *none, ("fit start", 2), ("step end", 3), ("fit end", 3)])


def test_keeps_the_earlier_file_when_a_save_fails(attempt, rng):
    batches = [make_batch(rng, 2) for _ in range(3)]

    step, parameters = attempt(saved_badly, batches)

    assert_close((step, parameters), (2, trained_by_hand(batches[:2], {})["parameters"]))


@pytest.mark.gpu
def test_runs_the_model_in_bfloat16_and_all_else_in_float32(attempt, rng, device):
    batches = [make_batch(rng, 6)]

    results = attempt(under_autocast, device, batches, "bfloat16")

    expected = under_autocast_by_hand(device, batches)
    # Who divides by the number of targets after the walk back rounds other numbers to bfloat16.
    # That moves the parameters by up to 1e-4, where the step itself moves them by 2e-2.
    for name in ("parameters", "val"):  # val is the loss after the step
        assert_close(results.pop(name), expected.pop(name), rtol=0, atol=3e-4)
    assert_close(results, expected)


def test_rejects_autocast_to_float16(attempt, rng):
    with pytest.raises(ValueError, match=r"(?<!b)float16"):
        attempt(under_autocast, "cpu", [make_batch(rng, 2)], "float16")


@pytest.mark.train
def test_learns_to_write_like_the_python_manual(attempt):
    before, after, n_chars = attempt(learn_the_manual, 200_000, 64, 128, 160)

    assert abs(before - math.log(n_chars)) < 0.2, f"begins at {before:.2f}, not near ln {n_chars}"
    assert after < 2.0, f"a val loss of {after:.2f} nats a character; 1.86 is what others reach"
