"""Does a small character transformer learn when its error signals go back through other weights?

Trains a causal transformer on a text that Python itself ships, the English texts of `pydoc_data.topics`,
under backprop, sign feedback at three concordances and random feedback, the latter also with exact attention,
and its last layer alone. The loop is a plain one: `feedbackhook.patch` is one line in it. Measured are the
test loss in bits per character, the angle between the delivered and backprop's gradients, and the angle
between V and W of each layer.

The text is in a fixed order, each paragraph once; its last tenth is for testing, the tenth before it for
choosing each rule's learning rate. Finished runs are not repeated; remove the output folder to begin anew.

    python recipes/retrofit/characters.py
    python recipes/retrofit/characters.py --smoke true --output runs/characters-smoke
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import feedbackhook
from feedbackhook.report import theme
from feedbackhook.store.atomic import atomic_write

HEAD_ALONE = "head alone"  # not a rule of feedback: all but the last layer stays as it was drawn
RULES: dict[str, dict[str, Any] | None] = {
    "backprop": None,
    "sign 1": {"mode": "sign", "concordance": 1.0},
    "sign 0.75": {"mode": "sign", "concordance": 0.75},
    "sign 0.5": {"mode": "sign", "concordance": 0.5},
    "random": {"mode": "random"},
    "random, attention exact": {"mode": "random", "exclude": r".*\.attention\..*"},
    HEAD_ALONE: None,
}
"""What `feedbackhook.patch` is given beside the model, by the name in the table; None: no patch."""

LEAST = 100_000  # characters, below which this is not the text that Python ships


# --- the text ---------------------------------------------------------------------------------------------


def shipped_text() -> str:
    """The texts of `pydoc_data.topics` in the order of their names, each paragraph once: some topics repeat
    sections of others, and what is trained on must not stand in the test text.

    Raises:
        ModuleNotFoundError: this Python comes without them, or with very little.
    """
    way_out = "take a Python that has it (python.org, pyenv), or give a text of your own: --text FILE"
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this Python has no pydoc_data.topics; {way_out}") from error
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics[name].strip() for name in sorted(topics)))
    once: dict[str, str] = {}
    for paragraph in paragraphs:
        once.setdefault(" ".join(paragraph.split()), paragraph)
    text = "\n\n".join(once.values())
    if len(text) < LEAST:
        raise ModuleNotFoundError(
            f"pydoc_data.topics has {len(text)} characters in this Python, fewer than {LEAST}; {way_out}"
        )
    return text


def split(text: str) -> tuple[str, str, str]:
    """The text for training, the held-out tenth for choosing learning rates, the last tenth for testing."""
    tenth = len(text) // 10
    return text[: -2 * tenth], text[-2 * tenth : -tenth], text[-tenth:]


def encode(text: str, characters: str) -> Tensor:
    """Each character's place in `characters`: [len(text)], integers."""
    places = {character: place for place, character in enumerate(characters)}
    return torch.tensor([places[character] for character in text])


def count_model_bits(training: Tensor, test: Tensor, vocabulary: int) -> tuple[float, float]:
    """Bits per character of the test text by counts in the training text (each count plus one): of single
    characters, and of characters given the one before."""
    single = torch.bincount(training, minlength=vocabulary).double() + 1
    pairs = torch.bincount(training[:-1] * vocabulary + training[1:], minlength=vocabulary**2).double() + 1
    pairs = pairs.reshape(vocabulary, vocabulary)
    single, pairs = single / single.sum(), pairs / pairs.sum(1, keepdim=True)
    return -single[test[1:]].log2().mean().item(), -pairs[test[:-1], test[1:]].log2().mean().item()


# --- the model: N batch, T context, C width ---------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention, [N, T, C] to [N, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron on the residual stream, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharacterTransformer(nn.Module):
    """Scores of the next character at each place: [N, T] characters to [N, T, vocabulary]."""

    def __init__(self, vocabulary: int, blocks: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, codes: Tensor) -> Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.character(codes) + self.position(places))))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of each character but the first of windows [N, T + 1]."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_character(model: nn.Module, codes: Tensor, context: int) -> float:
    """Over a whole text in windows side by side; what stands before a window is not seen in it."""
    windows = codes.unfold(0, context + 1, context)
    losses = [loss_of(model, part).item() * len(part) for part in windows.split(128)]
    return sum(losses) / len(windows) / math.log(2)


# --- one run ----------------------------------------------------------------------------------------------


def train(texts: tuple[str, str, str], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run on one thread: its result, which is kept in `folder` beside its table. If it is there already,
    it is read.

    Raises:
        ValueError: what is there was made with other settings.
    """
    kept = folder / "result.json"
    if kept.exists():
        result = json.loads(kept.read_text())
        if result["settings"] != settings:
            other = [name for name in settings if result["settings"].get(name) != settings[name]]
            raise ValueError(
                f"{folder} was run with other settings ({', '.join(other)}): remove it, "
                "or give another --output"
            )
        return result
    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    began = time.perf_counter()
    characters = "".join(sorted(set("".join(texts))))
    training, held_out, test = (encode(text, characters) for text in texts)
    context, steps, every = settings["context"], settings["steps"], settings["every"]
    model = CharacterTransformer(
        len(characters), settings["blocks"], settings["width"], settings["heads"], context
    )
    if settings["rule"] == HEAD_ALONE:
        model.requires_grad_(False).head.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], settings["rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings["rate"], total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    draws = torch.Generator().manual_seed(settings["seed"])
    window = torch.arange(context + 1)

    patch = None
    if settings["patch"] is not None:
        patch = feedbackhook.patch(model, **settings["patch"], seed=settings["seed"])
    with feedbackhook.Recorder(folder) as recorder:
        recorder.drop_after(-1)  # what a run that was killed has left
        if patch is not None:
            patch.watch(every, recorder)
        for step in range(steps):
            if step % every == 0:
                recorder.add(step, 0, "test_bits", bits_per_character(model, test, context))
            starts = torch.randint(len(training) - context, (settings["batch_size"], 1), generator=draws)
            loss = loss_of(model, training[starts + window])
            if not loss.isfinite():
                break
            if patch is not None and (step % every == 0 or step == steps - 1):
                for row in feedbackhook.measure(patch, loss):
                    if row.metric == "gradient_angle":  # the watch takes the others
                        recorder.add(step, 0, row.metric, row.value, row.layer, row.depth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bits = {
            "val_bits": bits_per_character(model, held_out, context),
            "test_bits": bits_per_character(model, test, context),
        }
        recorder.add(step + 1, 0, "test_bits", bits["test_bits"])
        if patch is not None:
            for row in feedbackhook.measure(patch):
                recorder.add(step + 1, 0, row.metric, row.value, row.layer, row.depth)
            patch.remove()  # this process goes on with other models
    finite = all(map(math.isfinite, bits.values()))
    result = {
        "settings": settings,
        "status": "finished" if finite and step == steps - 1 else "diverged",
        **bits,
        "seconds": round(time.perf_counter() - began, 1),
        "torch": torch.__version__,
    }
    with atomic_write(kept) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result


# --- all runs ---------------------------------------------------------------------------------------------


def name_of(rule: str, rate: float, seed: int) -> str:
    """The run's folder."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', rule)}-rate{rate:g}-seed{seed}"


def summarise(results: list[dict[str, Any]]) -> pd.DataFrame:
    """A row a run: rule, rate, seed, held-out and test loss, and whether its rate is the rule's best by the
    held-out loss of the first seed."""
    runs = pd.DataFrame(
        {
            "run": name_of(*(result["settings"][key] for key in ("rule", "rate", "seed"))),
            **{key: result["settings"][key] for key in ("rule", "rate", "seed")},
            **{key: result[key] for key in ("val_bits", "test_bits", "status", "seconds")},
        }
        for result in results
    )
    return runs.assign(chosen=runs["rate"] == runs["rule"].map(best_rates(runs)))


def best_rates(runs: pd.DataFrame) -> dict[str, float]:
    """The learning rate with the smallest held-out loss of the first seed, by rule; what diverged is last."""
    first = runs[runs["seed"] == runs["seed"].min()]
    losses = first["val_bits"].where(first["status"] == "finished", math.inf)
    return {
        rule: first.loc[part.idxmin(), "rate"] for rule, part in losses.groupby(first["rule"], sort=False)
    }


def at_the_end(runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Of the chosen runs the last weight and gradient angle of each layer (missing: of all together), in
    degrees, a row a layer."""
    rows = table[table["metric"].isin(["weight_angle", "gradient_angle"])].sort_values("step")
    last = rows.groupby(["run", "depth", "layer", "metric"], dropna=False)["value"].last().unstack("metric")
    chosen = runs.loc[runs["chosen"], ["run", "rule", "seed"]]
    return chosen.merge(last.reset_index(), on="run").sort_values(["run", "depth"], kind="stable")


def main(
    text: Path | None = None,
    rules: list[str] = list(RULES),  # noqa: B006 - never changed
    rates: list[float] = [3e-3, 1e-2],  # noqa: B006
    seeds: int = 1,
    steps: int = 1000,
    batch_size: int = 16,
    blocks: int = 3,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
    every: int = 100,
    jobs: int = 2,
    smoke: bool = False,
    output: Path = Path("runs/characters"),
) -> None:
    """Train, print and draw.

    Args:
        text: a text file in UTF-8; null: what Python ships in pydoc_data.topics.
        rules: which of the rules in this file, by name.
        rates: AdamW's learning rates; of each rule that counts which has the smallest held-out loss, seed 0.
        seeds: runs of each rule at its rate.
        steps: updates of a run.
        batch_size: windows of the text in an update.
        blocks: attention blocks, each with its perceptron.
        width: features at each place.
        heads: attention heads in a block.
        context: characters that a window holds.
        every: steps from one measurement to the next.
        jobs: processes, each on one thread.
        smoke: a few steps, to see that it works: seconds.
        output: the folder of the run folders, the tables and the figure.
    """
    console = Console(soft_wrap=True)
    if unknown := [rule for rule in rules if rule not in RULES]:
        raise ValueError(f"unknown rules {unknown}; known: {', '.join(RULES)}")
    if smoke:
        rates, seeds, steps, batch_size, width, context, every, jobs = rates[:1], 1, 4, 4, 32, 32, 2, 1
    whole = shipped_text() if text is None else text.read_text(encoding="utf-8")
    texts = split(whole)
    if smoke:
        texts = tuple(part[:4000] for part in texts)
    if min(map(len, texts)) <= context:
        raise ValueError(f"a text of {len(whole)} characters is too short: a tenth must hold {context + 1}")
    shared = {
        "text": hashlib.sha256(whole.encode()).hexdigest()[:16],
        "steps": steps,
        "batch_size": batch_size,
        "every": every,
        "blocks": blocks,
        "width": width,
        "heads": heads,
        "context": context,
    }
    output.mkdir(parents=True, exist_ok=True)

    def run(planned: list[tuple[str, float, int]], words: str) -> list[dict[str, Any]]:
        finished = joblib.Parallel(n_jobs=min(jobs, max(1, len(planned))), return_as="generator")(
            joblib.delayed(train)(
                texts,
                {"rule": rule, "patch": RULES[rule], "rate": rate, "seed": seed, **shared},
                output / name_of(rule, rate, seed),
            )
            for rule, rate, seed in planned
        )
        return list(track(finished, description=words, total=len(planned), console=console))

    began = time.perf_counter()
    results = run([(rule, rate, 0) for rule in rules for rate in rates], "learning rates")
    rate_of = best_rates(summarise(results))
    results += run([(rule, rate_of[rule], seed) for rule in rules for seed in range(1, seeds)], "seeds")

    runs = summarise(results)
    table = feedbackhook.read(output)
    table = table[table["run"].isin(runs["run"])]
    layers = at_the_end(runs, table)
    by_counts = count_model_bits(
        *(encode(part, "".join(sorted(set(whole)))) for part in (texts[0], texts[2])), len(set(whole))
    )
    console.print(shown(runs, layers))
    console.print(
        f"{len(texts[0])} characters for training, {len(texts[1])} held out, {len(texts[2])} for testing, "
        f"{len(set(whole))} different ones. Bits per character of the test text by counts of single "
        f"characters: {by_counts[0]:.3f}, of pairs: {by_counts[1]:.3f}"
    )
    runs.to_csv(output / "runs.csv", index=False, float_format="%.4f")
    layers.to_csv(output / "layers.csv", index=False, float_format="%.2f")
    draw(runs, table, layers, by_counts).savefig(output / "characters.png", dpi=150)
    console.print(f"{time.perf_counter() - began:.0f} s; the runs alone {runs['seconds'].sum():.0f} s")
    for name in ("runs.csv", "layers.csv", "characters.png"):
        console.print(output / name)


def shown(runs: pd.DataFrame, layers: pd.DataFrame) -> Table:
    """A row a rule, at its rate: the loss of each seed, and the last angles, means over layers below the head
    and seeds."""
    title = "test loss in bits per character; last angles in degrees, mean of the layers below the head"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    seeds = sorted(runs["seed"].unique())
    for heading in ("rate", *(f"seed {seed}" for seed in seeds), "mean", "angle of gradient", "of weight"):
        table.add_column(heading, justify="right")
    below = layers[layers["layer"].notna() & (layers["layer"] != "head")]
    means = below.groupby("rule")[["gradient_angle", "weight_angle"]].mean()
    for rule, part in runs[runs["chosen"]].groupby("rule", sort=False):
        diverged = int((part["status"] != "finished").sum())
        angles = [f"{angle:.1f}" for angle in means.loc[rule]] if rule in means.index else ["-", "-"]
        table.add_row(
            rule + (f" ({diverged} diverged)" if diverged else ""),
            f"{part['rate'].iloc[0]:g}",
            *(f"{bits:.3f}" for bits in part.sort_values("seed")["test_bits"]),
            f"{part['test_bits'].mean():.3f}",
            *angles,
        )
    return table


def draw(
    runs: pd.DataFrame, table: pd.DataFrame, layers: pd.DataFrame, by_counts: tuple[float, float]
) -> Figure:
    """Loss and gradient angle against the step, last angles layer by layer: mean and range of seeds."""
    order = list(runs["rule"].unique())
    signs = [rule for rule in RULES if rule.startswith("sign")]
    colours = {
        "backprop": theme.look("backprop").color,
        **dict(zip(signs, theme.sequence(len(signs)), strict=True)),
        "random": theme.look("random").color,
        "random, attention exact": theme.look("brSF").color,
        HEAD_ALONE: "#222222",
    }
    rows = table.merge(runs.loc[runs["chosen"], ["run", "rule"]], on="run")
    of_network = rows[rows["layer"].isna()]
    by_layer = layers[layers["layer"].notna()]
    places = by_layer.groupby("layer")["depth"].max().sort_values().index  # fewer where some are exact
    by_layer = by_layer.assign(layer=pd.Categorical(by_layer["layer"], places, ordered=True))
    by_rule = {"hue": "rule", "hue_order": order, "palette": colours, "errorbar": ("pi", 100)}
    with theme.style():
        figure = Figure(figsize=theme.figsize(12.5, 9.5), layout="constrained")
        (loss, over_steps), (gradient, weight) = figure.subplots(2, 2)
        sns.lineplot(of_network[of_network["metric"] == "test_bits"], x="step", y="value", ax=loss, **by_rule)
        for bits, words in zip(by_counts, ("counts of characters", "counts of pairs"), strict=True):
            loss.axhline(bits, linestyle=":", color=theme.ink())
            loss.annotate(
                words,
                (1, bits),
                xycoords=("axes fraction", "data"),
                xytext=(-3, 3),
                ha="right",
                textcoords="offset points",
                fontsize="x-small",
                color=theme.ink(),
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
                zorder=10,
            )
        loss.set(title="Test loss", ylabel="bits per character", ylim=(None, 6.9))
        below = rows["layer"].notna() & (rows["layer"] != "head")  # the head's is 0: nothing lies above it
        angles = rows[below & (rows["metric"] == "gradient_angle")]
        angles = angles.groupby(["run", "rule", "step"], as_index=False)["value"].mean()
        sns.lineplot(angles, x="step", y="value", ax=over_steps, legend=False, **by_rule)
        over_steps.set(
            title="Gradient angle, mean of the layers below the head",
            ylabel="angle to backprop's gradient [°]",
        )
        for axes, metric, title, label in (
            (gradient, "gradient_angle", "Gradient angle at the end", "angle to backprop's gradient [°]"),
            (weight, "weight_angle", "Weight angle at the end", "angle between V and W [°]"),
        ):
            sns.lineplot(by_layer, x="layer", y=metric, marker="o", ax=axes, legend=False, **by_rule)
            axes.set(title=title, ylabel=label, xlabel="layer, input to output")
            for text in axes.get_xticklabels():
                text.set(rotation=60, ha="right", rotation_mode="anchor")
        for axes in (over_steps, gradient, weight):
            axes.axhline(90, linestyle=":", color=theme.ink())
            axes.set(ylim=(-3, 100), yticks=range(0, 91, 15))
        handles, labels = loss.get_legend_handles_labels()
        loss.get_legend().remove()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


if __name__ == "__main__":
    auto_cli(main, as_positional=False, default_config_files=[str(Path(__file__).with_suffix(".yaml"))])
