"""The measures of the reference tasks on models whose answers are known, and the curves of their pictures."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from tiny_models import tiny_model
from torch import nn

from vmd_scale.checkpoints import TrainedModel
from vmd_scale.config import DataConfig
from vmd_scale.data.corpora.toy2d import toy2d_distribution, toy2d_draws
from vmd_scale.data.loader import evaluation_batches
from vmd_scale.data.prepare import prepare
from vmd_scale.data.shards import ShardReader
from vmd_scale.diffusion.likelihood import Rows, elbo, importance_weighted, vmd_surrogate
from vmd_scale.diffusion.noise import Noise
from vmd_scale.diffusion.sampler import Sampler
from vmd_scale.report.figures import STYLE
from vmd_scale.reproduction import figures, measures
from vmd_scale.reproduction.task import MeasuredModel, Row, Sizes

CELLS = 81


class Known(nn.Module):
    """In the place of a denoiser: what it predicts for xt is given as log p [B, L, V]; it hears no z."""

    has_plain_head = False

    def __init__(self, log_p):
        super().__init__()
        self.log_p, self.weight = log_p, nn.Parameter(torch.zeros(()))

    def forward(self, noisy, z, attend=None, mask_ratio=None, clean=None, modulations=None):
        return self.log_p(noisy)

    def modulations(self, z):
        return None

    def logits(self, hidden):
        return hidden


def known_model(log_p, **changes):
    model = tiny_model(0, **changes)
    model.denoiser = Known(log_p)
    return model


def trained(model, data=None, variant="", other_data=None, objective="nelbo", paths="balanced", **sizes):
    """What a measure is given, with those parts of a configuration that measures read."""
    config = SimpleNamespace(
        data=data,
        diffusion=SimpleNamespace(objective=objective, paths=paths),
        training=SimpleNamespace(micro_batch=16),
    )
    return MeasuredModel(TrainedModel(model, config, None, 7, "ema", None), variant, Sizes(**sizes), other_data or {})


def one(found, **wanted):
    """The one measurement with these values."""
    (measurement,) = [m for m in found if all(getattr(m, name) == value for name, value in wanted.items())]
    return measurement


# ---- two-dimensional toys


def test_toy2d_is_the_divergence_of_the_histogram_of_cells():
    """Samples at (27, 19), and drawn ones at (28, 19) in a quarter of the rows: x and y are not the same."""
    table = torch.full((2, 50), -1e9)
    table[0, 27], table[0, 28], table[1, 19] = math.log(0.75), math.log(0.25), 0.0
    model = known_model(lambda noisy: table.expand(len(noisy), 2, 50), vocab_size=50, row_length=2)
    found = measures.toy2d(trained(model, variant="swiss_roll", samples=4000))
    exact = toy2d_distribution("swiss_roll")

    def divergence(cells):
        q = np.zeros((50, 50))
        for (x, y), share in cells.items():
            q[x, y] = share
        middle = (exact + q) / 2
        return 0.5 * sum((a[a > 0] * np.log(a[a > 0] / middle[a > 0])).sum() for a in (exact, q))

    argmax, drawn = divergence({(27, 19): 1.0}), divergence({(27, 19): 0.75, (28, 19): 0.25})
    assert abs(divergence({(19, 27): 1.0}) - argmax) > 1e-3  # the check can fail
    assert argmax - drawn > 1e-3
    for steps, law in ((1, "balanced"), (5, "bernoulli"), (5, "balanced")):
        of = {"metric": "js", "steps": steps, "law": law, "latent": "fixed"}
        assert one(found, **of, tokens="argmax").value == pytest.approx(argmax, abs=1e-9)
        assert one(found, **of, tokens="drawn").value == pytest.approx(drawn, abs=2e-4)
    draws = toy2d_draws("swiss_roll", "as many draws as samples", 4000)
    cells, times = np.unique(draws, axis=0, return_counts=True)
    floor = divergence({(x, y): n / 4000 for (x, y), n in zip(cells.tolist(), times, strict=True)})
    assert one(found, metric="js_of_exact_draws").value == pytest.approx(floor, abs=1e-9)
    assert floor < drawn / 2


# ---- puzzles


def puzzles(folder, name, count, seed):
    """Random digits, 41 of 81 cells given: solutions [count, 81], of each the first cell to find, and the data."""
    random = np.random.default_rng(seed)
    solutions = random.integers(1, 10, (count, CELLS))
    clues = solutions * (random.permuted(np.arange(CELLS).repeat(count).reshape(CELLS, count).T, axis=1) < 41)
    pairs = zip(clues.tolist(), solutions.tolist(), strict=True)
    lines = ["".join(map(str, clue)) + "," + "".join(map(str, solution)) + "\n" for clue, solution in pairs]
    (folder / f"{name}.csv").write_text("".join(lines))
    data = DataConfig(
        corpus="sudoku",
        source={"validation": str(folder / f"{name}.csv")},
        tokenizer="sudoku",
        row_length=CELLS,
        shards=str(folder / name),
    )
    prepare(data, ["validation"], progress=False)
    return torch.from_numpy(solutions - 1), torch.from_numpy(clues == 0).long().argmax(-1), data


def test_a_puzzle_is_solved_where_every_cell_is_right(tmp_path):
    """Of 30 puzzles 10 are solved, 8 not, and 12 hang on one cell: right by argmax, and in 7 draws of 10."""
    solutions, cells, own = puzzles(tmp_path, "own", 30, 0)
    other_solutions, other_cells, other = puzzles(tmp_path, "other", 25, 1)
    known, first = torch.cat((solutions, other_solutions)), torch.cat((cells, other_cells))
    sure = torch.full((len(known),), 1.0)
    sure[10:18], sure[18:30] = 1e-9, 0.7

    def log_p(noisy):
        seen = noisy != 9
        which = (seen[:, None] & (noisy[:, None] == known)).sum(-1).argmax(-1)
        right = nn.functional.one_hot(known[which], 9).double()
        wrong = nn.functional.one_hot((known[which] + 1) % 9, 9).double()
        p = torch.where(seen[..., None], wrong, right)  # what is given would be spoilt by whoever drew it again
        rows, cell, q = torch.arange(len(noisy)), first[which], sure[which].double()[:, None]
        p[rows, cell] = q * right[rows, cell] + (1 - q) * wrong[rows, cell]
        return p.clamp(min=1e-30).log()

    model = known_model(log_p, vocab_size=9, row_length=CELLS, latent_width=0)
    found = measures.solved(trained(model, own, other_data={"fewer clues": other}, rows=25))
    assert len(found) == 2 * 3 * 3 * 2
    assert {m.latent for m in found} == {"none"}
    easy = [m for m in found if m.split == "fewer clues"]
    assert {(m.value, m.standard_error) for m in easy} == {(1.0, 0.0)}

    found = measures.solved(trained(model, own, rows=100))
    for law in ("top_prob", "margin", "balanced"):
        for steps in (5, 10, 20):
            argmax = one(found, law=law, steps=steps, tokens="argmax", split="validation")
            assert argmax.value == pytest.approx(22 / 30)
            assert argmax.standard_error == pytest.approx(math.sqrt(22 / 30 * 8 / 30 / 29), rel=1e-6)
            drawn = one(found, law=law, steps=steps, tokens="drawn", split="validation")
            assert drawn.value < 22 / 30
            assert drawn.value == pytest.approx((10 + 12 * 0.7) / 30, abs=4 * math.sqrt(12 * 0.7 * 0.3) / 30)


# ---- bounds


@pytest.fixture(scope="module")
def four_tokens(tmp_path_factory):
    """D1: the ten rows of its validation split."""
    data = DataConfig(
        corpus="four_tokens",
        source="d1",
        tokenizer="symbols:10",
        row_length=4,
        shards=str(tmp_path_factory.mktemp("d1") / "shards"),
    )
    prepare(data, ["validation"], progress=False)
    return data


def rows_of(data):
    reader = ShardReader(data.shards, "validation")
    (batch,) = evaluation_batches(reader, np.arange(reader.rows), reader.rows)
    return Rows(batch.tokens, torch.ones_like(batch.tokens, dtype=torch.bool), None, torch.arange(reader.rows))


def per_token(nats):
    """Mean and standard error over rows of four tokens."""
    return nats.mean().item() / 4, nats.std().item() / math.sqrt(len(nats)) / 4


@pytest.mark.parametrize("metric", ["perplexity", "bits_per_dim"])
def test_bounds_by_hand_where_nothing_is_random(four_tokens, metric):
    """Without a latent and in one step: the nats of the model's own unigrams, and what becomes of their error."""
    table = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    model = known_model(lambda noisy: table.expand(len(noisy), 4, 10), vocab_size=10, row_length=4, latent_width=0)
    found = measures.bounds(metric, "validation", (1,))(trained(model, four_tokens, rows=100))
    clean = rows_of(four_tokens).clean
    nats, error = per_token(-table.double()[torch.arange(4), clean].sum(-1))
    expected = (math.exp(nats), math.exp(nats) * error)
    if metric == "bits_per_dim":
        expected = (nats / math.log(2), error / math.log(2))
    m = one(found, metric=metric)
    assert (m.value, m.standard_error) == pytest.approx(expected, rel=1e-5)
    assert (m.steps, m.latent, m.law, m.split, m.k) == (1, "none", "balanced", "validation", 1)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("metric", ["perplexity", "bits_per_dim"])
@pytest.mark.parametrize("law", ["balanced", "bernoulli"])
def test_bounds_are_those_of_the_likelihoods_with_steps_of_the_whole_row(four_tokens, groups, metric, law):
    model, rows = tiny_model(5, vocab_size=10, row_length=4, groups=groups), rows_of(four_tokens)
    measure = measures.bounds(metric, "validation", (1, 4, math.inf), surrogate=True, tight=(1, 2, 4))
    given = {"data": four_tokens, "paths": law, "rows": 100, "importance_samples": 3}
    found = measure(trained(model, objective="vmd", **given))
    noise, total = Noise(measures.SEED), len(rows.clean)

    def check(nats, **of):
        mean, error = per_token(nats)
        value = math.exp(mean) if metric == "perplexity" else mean / math.log(2)
        m = one(found, latent="fixed", law=law, split="validation", **of)
        assert m.value == pytest.approx(value, rel=1e-5)
        slope = value if metric == "perplexity" else 1 / math.log(2)
        assert m.standard_error == pytest.approx(error * slope, rel=1e-4)

    for steps in [t for t in (1, 4, math.inf) if t <= 4 // groups or t == math.inf]:
        name = "inf" if steps == math.inf else steps * groups
        check(elbo(model, rows, Sampler(steps, law=law), noise, total), metric=metric, steps=name, k=1)
    for steps in [t for t in (1, 2, 4) if t <= 4 // groups]:
        nats = importance_weighted(model, rows, Sampler(steps, law=law), noise, 3)
        check(nats, metric=metric, steps=steps * groups, k=3)
    surrogate = f"{metric}_vmd_surrogate"
    check(vmd_surrogate(model, rows, noise, total, law), metric=surrogate, steps="inf")
    steps = {(m.steps, m.k) for m in found if m.metric == metric}
    per_block = [t for t in (1, 2, 4) if t <= 4 // groups]
    expected = {(t * groups, 1) for t in per_block if t != 2} | {(t * groups, 3) for t in per_block} | {("inf", 1)}
    assert steps == expected
    plain = measure(trained(model, objective="nelbo", **given))
    assert not [m for m in plain if m.metric == surrogate]  # where nobody was trained by it


# ---- pictures


def row(**changes):
    values = {
        "task": "a",
        "variant": "",
        "method": "vmd",
        "objective": "iw",
        "blocks": 1,
        "steps": 1,
        "latent": "fixed",
        "law": "balanced",
        "tokens": "drawn",
        "split": "",
        "metric": "kl",
        "k": None,
        "mean": 1.0,
        "std": 0.1,
        "standard_error": None,
        "seeds": 3,
        "published": None,
    }
    return Row(**{**values, **changes})


@pytest.fixture
def drawn(monkeypatch):
    """Curves of the picture that was drawn last: {label: [(x, y)]}. Its axes bear numbers."""
    curves = {}

    def draw_png(draw, height):
        figure = Figure()
        with rc_context(STYLE):
            draw(figure)
            figure.draw_without_rendering()
        axes = figure.axes[0]
        labels = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        assert [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels if label]
        curves.clear()
        for container in figure.axes[0].containers:
            curves[container.get_label()] = list(zip(*container.lines[0].get_data(), strict=True))
        return b"a picture"

    monkeypatch.setattr(figures, "draw_png", draw_png)
    return curves


def test_kl_against_the_correlation_is_of_drawn_tokens_in_one_step(drawn, tmp_path):
    rows = [row(variant=p, mean=kl) for p, kl in (("0.5", 0.2), ("uniform", 0.4), ("0.0", 0.1))]
    rows += [row(method="mdm", variant="0.5", mean=0.7, std=None, latent="none")]
    rows += [row(variant="weighted"), row(variant="0.5", steps=2), row(variant="0.5", tokens="argmax")]
    rows += [row(variant="0.5", metric="accuracy")]
    assert figures.kl_against_p(rows, tmp_path / "kl.png")
    assert drawn == {"vmd": [(0.0, 0.1), (0.5, 0.2), (1.0, 0.4)], "mdm": [(0.5, 0.7)]}
    assert (tmp_path / "kl.png").read_bytes() == b"a picture"
    assert not figures.kl_against_p(rows[-1:], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_a_bound_against_steps_has_a_curve_for_each_method_and_its_tightest_bound(drawn, tmp_path):
    def bound(**changes):
        return row(metric="perplexity", tokens="", **changes)

    rows = [bound(steps=4, mean=9.0, k=1), bound(steps=1, mean=11.0, k=1), bound(steps=1, mean=10.0, k=16)]
    rows += [bound(steps=8, blocks=8, mean=8.0, k=1, std=None, standard_error=0.3)]
    rows += [bound(method="mdm", steps=1, mean=12.0, k=1), bound(method="mdm", steps="inf", mean=5.0, k=1)]
    rows += [row(metric="perplexity_vmd_surrogate", steps=1, mean=2.0)]
    assert figures.against_steps("perplexity", "perplexity")(rows, tmp_path / "steps.png")
    (vmd,) = [name for name in drawn if name.startswith("vmd") and "8 blocks" not in name]
    (blocks,) = [name for name in drawn if name.startswith("vmd, 8 blocks")]
    (mdm,) = [name for name in drawn if name.startswith("mdm")]
    assert len(drawn) == 3
    assert (drawn[vmd], drawn[blocks], drawn[mdm]) == ([(1, 10.0), (4, 9.0)], [(8, 8.0)], [(1, 12.0)])
    assert not figures.against_steps("bits_per_dim", "bits")(rows, tmp_path / "nothing.png")
